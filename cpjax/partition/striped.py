"""Striped: rank r holds tokens r, r + cp, r + 2·cp, … (arXiv 2311.09431)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from cpjax.partition.sequence import BlockMask, SequencePartition


@dataclass(frozen=True)
class Striped(SequencePartition):
    """`cp` chunks, one a rank; a chunk is every cp-th token.

    >>> Striped(2).order(6).reshape(2, -1).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """

    name: ClassVar[str] = "striped"

    def held_chunks(self, rank: int) -> tuple[int, ...]:
        """The chunk of the rank's own number."""
        return (rank,)

    def chunk_of(self, length: int) -> Int[np.ndarray, " T"]:
        """Not a run of the text: every cp-th token."""
        return np.arange(length) % self.cp

    def block_mask(self, query_chunk: int, kv_chunk: int) -> BlockMask | None:
        """Token i of chunk c is at position c + cp·i, so later chunks are ahead by less than one step.

        >>> [Striped(2).block_mask(0, kv_chunk) for kv_chunk in range(2)]
        ['triu', 'strict']
        """
        return "triu" if kv_chunk <= query_chunk else "strict"
