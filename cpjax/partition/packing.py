"""Packed batches: several requests one after the other, each padded on its own so that every rank gets a part of it.

Request i of real length ℓ is padded at the right to L, a multiple of 2·cp, and cut into 2·cp chunks of h = L/2cp
tokens; rank r holds its chunks r and 2·cp − 1 − r. Chunks never cross the border of a request. What a rank holds is
kept as two runs, the first chunks of all requests and then the last ones, because these are computed together.

`mindie_indices` are the index arrays with which MindIE does the same (DeepSeek prefill under cp; read from the
public source of MindIE-LLM, `prepare_cp_prefill_inputs`), whose ranks hold request after request.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError
from cpjax.mask import PAD, Tokens
from cpjax.partition.names import sequence_of
from cpjax.partition.partition import Partition

Indices = Int[np.ndarray, " n"]


def padded_lengths(lengths: Sequence[int], cp: int) -> tuple[int, ...]:
    """Each length rounded up to a multiple of 2·cp.

    >>> padded_lengths((7, 12), cp=2)
    (8, 12)

    Raises:
      InputError: no request, a negative length, cp < 1.
    """
    if cp < 1:
        raise InputError(f"cp is {cp}; it is a number of ranks, at least 1")
    if not lengths or min(lengths) < 0:
        raise InputError(f"request lengths are {tuple(lengths)}; give at least one, and none below 0")
    return tuple(-(-length // (2 * cp)) * 2 * cp for length in lengths)


def packed_tokens(lengths: Sequence[int], cp: int) -> Tokens:
    """Places of the padded requests one after the other, `[1, ΣL]`; the requests are segments 0, 1, 2, …

    >>> packed_tokens((3, 4), cp=1).segment
    array([[ 0,  0,  0, -1,  1,  1,  1,  1]], dtype=int32)
    """
    padded = padded_lengths(lengths, cp)
    position = np.concatenate([np.arange(n) for n in padded])
    real = [np.where(np.arange(n) < length, i, PAD) for i, (n, length) in enumerate(zip(padded, lengths, strict=True))]
    return Tokens(position[None].astype(np.int32), np.concatenate(real)[None].astype(np.int32))


def packed_order(partition: str | Partition, lengths: Sequence[int], cp: int) -> Int[np.ndarray, " T"]:
    """As `order` of the partition, for each request on its own: index at each place of the ranks' shards.

    >>> packed_order("zigzag", (7, 12), cp=2).reshape(2, -1)
    array([[ 0,  1,  8,  9, 10,  6,  7, 17, 18, 19],
           [ 2,  3, 11, 12, 13,  4,  5, 14, 15, 16]])
    """
    one, padded = sequence_of(partition, cp), padded_lengths(lengths, cp)
    pieces = one.chunks_per_rank
    starts = np.cumsum([0, *padded[:-1]])
    of_requests = zip(starts, padded, strict=True)
    held = [start + one.order(n).reshape(cp, pieces, n // (cp * pieces)) for start, n in of_requests]
    return np.concatenate(held, axis=2).ravel()


def pack(requests: Sequence[np.ndarray], cp: int) -> np.ndarray:
    """Arrays `[ℓ, …]` of the requests as one `[1, ΣL, …]`, zeros in the pads.

    >>> pack([np.ones(1), np.ones(2)], cp=1)
    array([[1., 0., 1., 1.]])
    """
    padded = padded_lengths([len(x) for x in requests], cp)
    fill = [(0, 0)] * (requests[0].ndim - 1)
    return np.concatenate([np.pad(x, [(0, n - len(x)), *fill]) for x, n in zip(requests, padded, strict=True)])[None]


def unpack(x: np.ndarray, lengths: Sequence[int], cp: int) -> list[np.ndarray]:
    """The real tokens of each request, from `[1, ΣL, …]`: the inverse of `pack`.

    >>> unpack(np.array([[5, 0, 6, 7]]), (1, 2), cp=1)
    [array([5]), array([6, 7])]
    """
    starts = np.cumsum([0, *padded_lengths(lengths, cp)[:-1]])
    return [x[0, start : start + length] for start, length in zip(starts, lengths, strict=True)]


class MindieIndices(NamedTuple):
    """The arrays that MindIE's graph is fed, the same on every rank; names of its inputs in brackets."""

    first: Indices
    """Local places of the first chunks [in_cp_load_balance_idx_first]."""
    last: Indices
    """Local places of the last chunks [in_cp_load_balance_idx_last]."""
    out_recovery: Indices
    """Into (first results ++ last results), giving the rank's own order [in_cp_o_recover_idx]."""
    kv_recovery: Indices
    """Into the all-gathered tokens of all ranks, giving natural order [in_cp_kv_recover_idx]."""
    chunk_lengths: Indices
    """Tokens of one chunk of each request, h [in_seq_len_cp]."""
    last_token: Indices
    """Into the all-gathered tokens: the last real token of each request [lm_head_indices]."""


def mindie_indices(lengths: Sequence[int], cp: int) -> MindieIndices:
    """MindIE's index arrays in closed form. Each request must have a token.

    >>> mindie_indices((7, 12), cp=2).last_token
    array([2, 9])
    """
    if min(lengths, default=0) < 1:
        raise InputError(f"request lengths are {tuple(lengths)}; an empty request has no last token, give at least 1")
    h = np.array(padded_lengths(lengths, cp)) // (2 * cp)
    held = int((2 * h).sum())  # T: tokens a rank holds
    start, half = np.cumsum(2 * h) - 2 * h, np.cumsum(h) - h

    def runs(firsts: np.ndarray) -> list[np.ndarray]:
        return [np.arange(first, first + n) for first, n in zip(firsts, h, strict=True)]

    def gathered(request: int, chunk: int) -> int:
        """Where a chunk of a request begins among the tokens of all ranks."""
        rank = min(chunk, 2 * cp - 1 - chunk)
        place = int(chunk >= cp)
        return int(rank * held + start[request] + place * h[request])

    first, last = runs(start), runs(start + h)
    out = [run for pair in zip(runs(half), runs(h.sum() + half), strict=True) for run in pair]
    kv = [gathered(i, chunk) + np.arange(n) for i, n in enumerate(h) for chunk in range(2 * cp)]
    ends = [gathered(i, (n - 1) // int(h[i])) + (n - 1) % int(h[i]) for i, n in enumerate(lengths)]
    first, last, out, kv = (np.concatenate(x) for x in (first, last, out, kv))
    return MindieIndices(first, last, out, kv, h, np.array(ends))
