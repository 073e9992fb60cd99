"""Visible pairs of query and key, for each rank and the rank whose keys it meets: integers, from the partition."""

import functools

import numpy as np
from jaxtyping import Int

from cpjax.partition import SequencePartition


@functools.lru_cache(maxsize=256)
def _block_masks(partition: SequencePartition) -> Int[np.ndarray, "3 cp cp"]:
    """How many pairs of chunks of rank and source are whole, triangles, triangles without the diagonal."""
    counts = np.zeros((3, partition.cp, partition.cp), np.int64)
    held = [partition.held_chunks(rank) for rank in range(partition.cp)]
    for rank, queries in enumerate(held):
        for source, keys in enumerate(held):
            for mask in (partition.block_mask(q, k) for q in queries for k in keys):
                if mask is not None:
                    counts[("none", "triu", "strict").index(mask), rank, source] += 1
    counts.setflags(write=False)
    return counts


def prefix_tokens(prefix: int, cp: int) -> Int[np.ndarray, " cp"]:
    """How many of the cached tokens before a chunk each rank holds: as equal as can be.

    >>> prefix_tokens(10, 4)
    array([3, 3, 2, 2])
    """
    return prefix // cp + (np.arange(cp) < prefix % cp)


def visible_pairs(partition: SequencePartition, tokens: int, prefix: int = 0) -> Int[np.ndarray, "cp cp"]:
    """Pairs [rank, source] that a causal mask shows, of `tokens` queries that see `prefix` more tokens, all of them.

    `tokens` is a multiple of the partition's chunk_count. The sum is tokens · (tokens + 1) / 2 + tokens · prefix.

    >>> from cpjax.partition import Contiguous, Zigzag
    >>> visible_pairs(Zigzag(2), 8).sum(axis=1), visible_pairs(Contiguous(2), 8).sum(axis=1)
    (array([18, 18]), array([10, 26]))
    """
    size = tokens // partition.chunk_count
    whole, triangle, strict = _block_masks(partition)
    new = whole * size**2 + triangle * (size * (size + 1) // 2) + strict * (size * (size - 1) // 2)
    return new + tokens // partition.cp * prefix_tokens(prefix, partition.cp)
