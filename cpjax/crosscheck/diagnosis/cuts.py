"""Into which parts keys may have been cut, where nobody said it: runs of the text, and tokens dealt out in turn."""

import numpy as np
from jaxtyping import Bool, Int

COUNTS = (2, 3, 4, 5, 6, 7, 8, 16)
"""Numbers of parts that are tried where the parts are not known."""


def pattern(part: Int[np.ndarray, " S"]) -> bytes:
    """Equal for parts that are the same but for their numbers."""
    _, first, number = np.unique(part, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number].tobytes()


def part_of(
    cut: str,
    chunk: Int[np.ndarray, " S"],
    segment: Int[np.ndarray, " S"],
    is_cached: Bool[np.ndarray, " S"] | None = None,
) -> Int[np.ndarray, " S"]:
    """The number of the part in which each key lies; `is_cached`: keys that stand before the first query.

    >>> part_of("interleaved 2", np.zeros(4, int), np.zeros(4, int))
    array([0, 1, 0, 1])
    """
    if cut == "chunks":
        return chunk
    if cut == "prefix":
        assert is_cached is not None
        return np.where(is_cached, 0, 1)
    kind, _, count = cut.partition(" ")
    part = np.zeros(len(segment), int)
    for number in np.unique(segment):
        own = segment == number
        index, length = np.arange(own.sum()), int(own.sum())
        part[own] = index % int(count) if kind == "interleaved" else index * int(count) // length
    return part
