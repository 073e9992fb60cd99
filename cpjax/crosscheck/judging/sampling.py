"""Which rows are judged, and in which tiles (§9). Rows that are not judged are still looked at by `range_check`."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from cpjax.crosscheck.judging.problem import Problem

WORK = 2**28
"""Scores (query, key, head) up to which every row is judged; above, rows are sampled."""

TILE = 128
"""Of every so many queries of a head at least one is judged."""

ELEMENTS = 2**20
"""Scores in one tile; the model holds about twenty arrays of them at a time. It costs memory only."""

ROWS = 256
"""Most rows in one tile. It costs memory only."""

LEAST_ROWS = 32
"""Fewest rows in one tile, where there are as many: what is done once a tile takes as long as a few rows. It
costs time only."""


@dataclass(frozen=True)
class Tile:
    """Some judged rows of the query heads that share one key/value head."""

    batch: int
    kv_head: int
    position: Int[np.ndarray, " R"]
    head: Int[np.ndarray, " R"]
    same: Int[np.ndarray, " R"]
    times: Int[np.ndarray, " R"]
    """How many of all judged rows have the same query and keys: their scores are rounded alike."""


def chosen_rows(problem: Problem, seed: int) -> Bool[np.ndarray, "B T N"]:
    """All rows but pads; where that would take too long, a few of every `TILE` queries of each head, at random."""
    batch, length, heads, _ = problem.query.shape
    judged = np.broadcast_to(problem.is_judged[..., None], (batch, length, heads))
    work = batch * length * heads * problem.key.shape[1]
    if work <= WORK:
        return judged
    some = max(1, TILE * WORK // work)
    rng = np.random.default_rng(seed)
    rank = np.full((batch, -(-length // TILE) * TILE, heads), np.inf)
    rank[:, :length] = np.where(judged, rng.random((batch, length, heads)), np.inf)
    tiles = rank.reshape(batch, -1, TILE, heads)
    least = np.sort(tiles, axis=2)[:, :, some - 1 : some]
    return (tiles <= least).reshape(rank.shape)[:, :length] & judged


def suspicious_rows(
    problem: Problem, out: np.ndarray, chosen: Bool[np.ndarray, "B T N"], seed: int
) -> Bool[np.ndarray, "B T N"]:
    """Rows that were not chosen, but look as if nobody had computed them: zeros, or another row's outputs to the bit.

    They are judged as well, as many as were chosen at most: a row of zeros, or a copy, may be right.
    """
    rest = problem.is_judged[..., None] & ~chosen
    if not rest.any():
        return rest
    bits = np.ascontiguousarray(out).view(np.dtype(f"u{out.dtype.itemsize}"))
    # Equal rows have equal sums of products with random numbers (mod 2^64); others hardly ever.
    largest = np.iinfo(np.int64).max
    factors = np.random.default_rng(seed).integers(1, largest, out.shape[3], dtype=np.uint64) | np.uint64(1)
    sums = np.stack([bits[:, :, n].astype(np.uint64) @ factors for n in range(out.shape[2])], axis=2)
    _, number, count = np.unique(sums, return_inverse=True, return_counts=True)
    is_suspicious = rest & ((count[number.reshape(sums.shape)] > 1) | (out == 0).all(axis=3))
    at = np.flatnonzero(is_suspicious)
    most = int(chosen.sum())
    if len(at) > most:
        is_suspicious.ravel()[np.random.default_rng(seed).permutation(at)[most:]] = False
    return is_suspicious


def tiles(problem: Problem, chosen: Bool[np.ndarray, "B T N"]) -> Iterator[Tile]:
    """The chosen rows in tiles, by batch row and key/value head."""
    batch, position, head = np.nonzero(chosen)
    query, same = _same_rows(problem, batch, position, head)
    times = np.bincount(query)[query]
    kv_head = head // problem.group
    size = max(LEAST_ROWS, min(ROWS, ELEMENTS // problem.key.shape[1]))
    # Rows of one tile lie close together, so that under a causal mask they need few keys.
    order = np.lexsort((head, position, kv_head, batch))
    groups = np.flatnonzero(np.diff(batch[order] * problem.key.shape[2] + kv_head[order], prepend=-1))
    for start, stop in zip(groups, [*groups[1:], len(order)], strict=True):
        for first in range(start, stop, size):
            at = order[first : min(first + size, stop)]
            yield Tile(int(batch[at[0]]), int(kv_head[at[0]]), position[at], head[at], same[at], times[at])


def _same_rows(
    problem: Problem, batch: np.ndarray, position: np.ndarray, head: np.ndarray
) -> tuple[Int[np.ndarray, " R"], Int[np.ndarray, " R"]]:
    """Equal numbers for rows that have the same query and keys, to the last bit; and for those in the same place."""
    kv = {
        (b, k): hash((problem.key[b, :, k].tobytes(), problem.value[b, :, k].tobytes()))
        for b, k in np.ndindex(problem.key.shape[0], problem.key.shape[2])
    }
    place = np.stack([np.asarray(x)[batch, position] for x in problem.q_tokens], axis=1).astype(np.int64)
    by_place = problem.mask.is_causal or problem.mask.window is not None
    if not by_place and problem.alibi is None and problem.bias is None:
        place[:, 0] = 0
    shared = np.array([kv[b, n // problem.group] for b, n in zip(batch, head, strict=True)], np.int64)
    query = np.ascontiguousarray(problem.query[batch, position, head]).view(np.uint8).reshape(len(batch), -1)
    query = np.concatenate([query, shared[:, None].view(np.uint8)], axis=1)
    alike = _numbered(query)
    return alike, _numbered(np.column_stack([alike, place]).view(np.uint8))


def _numbered(rows: np.ndarray) -> Int[np.ndarray, " R"]:
    """A number for each row of bytes, the same for equal rows; in the order in which they first come."""
    # Equal hashes of 64 bits are equal rows; to sort the rows themselves takes ten times as long.
    hashes = np.fromiter((hash(row.tobytes()) for row in rows), np.int64, len(rows))
    _, first, number = np.unique(hashes, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]
