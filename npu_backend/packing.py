"""Packed batches: several requests in one row, each padded on its own to a multiple of 2·cp, and their index arrays.

Request i of padded length L_i is cut into 2·cp chunks of h_i tokens. Rank r holds chunks r and 2·cp−1−r of every
request, request after request (alone, it holds all of every request). What it computes it computes for all first chunks
and then for all last ones, so it gathers them; the arrays that say how are MindIE's (`prepare_cp_prefill_inputs`; names
of its graph inputs in brackets).
"""

from typing import NamedTuple

import numpy as np

from npu_backend.schedule import chunk_count, held_chunks


class Indices(NamedTuple):
    """The arrays, the same on every rank; h are the chunk lengths."""

    first: np.ndarray  # local places of the first chunks [in_cp_load_balance_idx_first]
    last: np.ndarray  # local places of the last chunks [in_cp_load_balance_idx_last]
    out_recovery: np.ndarray  # into (first results ++ last results), gives local order [in_cp_o_recover_idx]
    kv_recovery: np.ndarray  # into the gathered tokens of all ranks, gives natural order [in_cp_kv_recover_idx]


def indices(chunk_lengths: tuple[int, ...], cp: int) -> Indices:
    """The index arrays of a pack whose request i has `chunk_count(cp)` chunks of `chunk_lengths[i]` tokens.

    One rank alone has no last chunks.

    >>> indices((2, 3), cp=2).out_recovery
    array([0, 1, 5, 6, 2, 3, 4, 7, 8, 9])
    """
    h = np.array(chunk_lengths)
    if cp == 1:
        everything = np.arange(h.sum())
        return Indices(everything, everything[:0], everything, everything)
    start, half = 2 * (np.cumsum(h) - h), np.cumsum(h) - h
    first = [np.arange(b, b + n) for b, n in zip(start, h, strict=True)]
    last = [x + n for x, n in zip(first, h, strict=True)]
    out = [np.r_[c : c + n, h.sum() + c : h.sum() + c + n] for c, n in zip(half, h, strict=True)]
    gathered = []
    for i in range(len(h)):
        for chunk in range(2 * cp):
            rank = min(chunk, 2 * cp - 1 - chunk)
            side = first if chunk < cp else last
            gathered.append(rank * 2 * h.sum() + side[i])
    return Indices(*(np.concatenate(x) for x in (first, last, out, gathered)))


def held_rows(rank: int, cp: int, chunk_lengths: tuple[int, ...]) -> np.ndarray:
    """The indices in the row of a rank's tokens, `[t]`, in per-device order: request after request.

    >>> held_rows(0, 2, (2, 3))
    array([ 0,  1,  6,  7,  8,  9, 10, 17, 18, 19])
    """
    rows, begin = [], 0
    for n in chunk_lengths:
        rows += [begin + np.arange(chunk * n, (chunk + 1) * n) for chunk in held_chunks(rank, cp)]
        begin += chunk_count(cp) * n
    return np.concatenate(rows)
