"""Folders of ranks that are numbered otherwise than the ranks hold the text, or cut otherwise than was said.

A result that passes in another order was not wrong: the tokens were laid wrongly together. Scores of a few queries are
computed once; of each order only the mask differs. What fits roughly is judged by the caller.
"""

from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np
from jaxtyping import Int

from cpjax.crosscheck.dumps.layouts import Arrays
from cpjax.errors import InputError
from cpjax.partition import Partition
from cpjax.partition.sequence import SequencePartition

ALL = 4
"""Up to so many ranks every order is tried; of more, the reverse, what begins at another rank, and two exchanged."""

MOST_RANKS = 16

ROWS = 8
"""Queries that are looked at, of the first head."""

NEAR = 0.05
"""Rows are near if they differ by less than this share of their size: roundings are far smaller, other masks larger."""

MOST = 4
"""Orders that are handed on, the nearest first."""


def orders(cp: int) -> Iterator[tuple[int, ...]]:
    """For each rank the file that may hold its tokens; the order of the files' numbers first.

    >>> list(orders(2))
    [(0, 1), (1, 0)]
    """
    plain = tuple(range(cp))
    if cp <= ALL:
        yield from permutations(plain)
        return
    yield plain
    yield plain[::-1]
    yield from (plain[i:] + plain[:i] for i in range(1, cp))
    for a, b in combinations(plain, 2):
        yield tuple(b if r == a else a if r == b else r for r in plain)


def that_fit(
    arrays: Arrays, partitions: list[Partition], *, scale: float, is_causal: bool, window: int | None
) -> list[tuple[Partition, tuple[int, ...]]]:
    """Partitions and orders of the files in which a few rows of out are what they should be, the nearest first.

    Args:
      arrays: of each rank as its file holds it.
      partitions: those that may be.
      scale, is_causal, window: as of `judge`; other terms of the logits are not looked at here.
    """
    cp = len(arrays.query)
    sizes = {x.shape[1] for x in (*arrays.query, *arrays.key)}
    if not (is_causal or window is not None) or len(sizes) > 1 or cp > MOST_RANKS:
        return []  # the order changes nothing, or shards are no equal parts of one text
    length = cp * sizes.pop()
    at = np.unique(np.linspace(0, length - 1, ROWS).astype(int))
    query, key, value, out = (np.concatenate([x[0, :, 0] for x in some]).astype(np.float64) for some in arrays[:4])
    score = scale * query[at] @ key.T
    found = []
    for partition in partitions:
        for order in orders(cp):
            place = _places(partition, order, length)
            if place is None:
                break
            ahead = place[at][:, None] - place[None]
            seen = np.logical_or(ahead >= 0, not is_causal)
            seen = seen if window is None else seen & (np.abs(ahead) < window)
            with np.errstate(invalid="ignore", over="ignore"):
                masked = np.where(seen, score, -np.inf)
                p = np.where(seen, np.exp(masked - masked.max(axis=1, keepdims=True)), 0.0)
                exact = p @ np.where(np.any(seen, axis=0)[:, None], value, 0.0) / p.sum(axis=1, keepdims=True)
                far = float(((out[at] - exact) ** 2).sum() / max((exact**2).sum(), np.finfo(float).tiny))
            if far <= NEAR**2:
                found.append((far, partition, order))
    found.sort(key=lambda one: one[0])
    return [(partition, order) for _, partition, order in found[:MOST]]


def _places(partition: Partition, order: tuple[int, ...], length: int) -> Int[np.ndarray, " T"] | None:
    """The place in the text of each token of the files, laid one after the other; None if it cannot be cut so."""
    if not isinstance(partition, SequencePartition):
        return None
    try:
        held = partition.order(length).reshape(len(order), -1)
    except InputError:
        return None
    place = np.empty_like(held)
    for rank, file in enumerate(order):
        place[file] = held[rank]
    return place.ravel()
