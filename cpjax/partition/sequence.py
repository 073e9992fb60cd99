"""Partitions of one text into equal shards: a permutation of the tokens, cut into `cp` runs. Integers only."""

from abc import abstractmethod
from typing import Literal

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError
from cpjax.partition.partition import Partition, Segments, check_order
from cpjax.wording import counted

BlockMask = Literal["none", "triu", "strict"]
"""Of a block's pairs (i, j), query and key counted within their chunks, visible are: all, those with j <= i (the
upper triangle is hidden), those with j < i."""


class SequencePartition(Partition):
    """One text, or batch rows of one text each. Queries and keys lie alike: chunk c of both is the same part.

    A subclass says which chunks a rank holds; a chunk is a run of the text, unless it says otherwise.
    """

    @abstractmethod
    def held_chunks(self, rank: int) -> tuple[int, ...]:
        """The chunks that a rank holds, in the order in which it holds them; as many on every rank."""

    @property
    def chunks_per_rank(self) -> int:
        """Pieces of a shard that are computed and merged one after the other."""
        return len(self.held_chunks(0))

    @property
    def chunk_count(self) -> int:
        """Chunks of the whole text. Its length must be a multiple of it to be cut into equal shards."""
        return self.cp * self.chunks_per_rank

    def order(self, length: int) -> Int[np.ndarray, " T"]:
        """The index in the text of the token at each place of the ranks' shards, laid one after the other.

        >>> from cpjax.partition import Striped, Zigzag
        >>> Zigzag(2).order(8), Striped(2).order(4)
        (array([0, 1, 6, 7, 2, 3, 4, 5]), array([0, 2, 1, 3]))

        Raises:
          InputError: a length that cannot be cut into equal parts.
        """
        parts = self.chunk_count
        if length % parts:
            raise InputError(
                f"{counted(length, 'token')} cannot be cut into {parts} equal parts (partition {self.name!r}, "
                f"cp {self.cp}); "
                f"pad to {-(-length // parts) * parts} with pad tokens (segment -1)"
            )
        chunk = self.chunk_of(length)
        return np.concatenate([np.flatnonzero(chunk == c) for r in range(self.cp) for c in self.held_chunks(r)])

    def chunk_of(self, length: int) -> Int[np.ndarray, " T"]:
        """The chunk of every token; where the length does not divide, the last chunks are shorter or missing.

        >>> from cpjax.partition import Zigzag
        >>> Zigzag(2).chunk_of(5)
        array([0, 0, 1, 1, 2])
        """
        return np.arange(length) // max(1, -(-length // self.chunk_count))

    def block_mask(self, query_chunk: int, kv_chunk: int) -> BlockMask | None:
        """What a causal mask leaves of the block; None: nothing.

        >>> from cpjax.partition import Zigzag
        >>> [Zigzag(2).block_mask(1, kv_chunk) for kv_chunk in range(4)]
        ['none', 'triu', None, None]
        """
        if kv_chunk > query_chunk:
            return None
        return "triu" if kv_chunk == query_chunk else "none"

    def merge_orders(self, order: str) -> Int[np.ndarray, "C C"]:
        """`merging`, which does not depend on the segments; "unknown" is ascending here.

        >>> from cpjax.partition import Zigzag
        >>> Zigzag(2).merge_orders("ring")
        array([[0, 3, 1, 2],
               [1, 2, 0, 3],
               [1, 2, 0, 3],
               [0, 3, 1, 2]])

        Raises:
          InputError: for an unknown order; it lists the known ones.
        """
        check_order(order)
        orders = np.empty((self.chunk_count, self.chunk_count), int)
        for rank in range(self.cp):
            sources = [(rank - step) % self.cp for step in range(self.cp)] if order == "ring" else range(self.cp)
            met = [chunk for source in sources for chunk in self.held_chunks(source)]
            for query_chunk in self.held_chunks(rank):
                orders[query_chunk] = met if order in ("ring", "gather") else np.arange(self.chunk_count)
        return orders

    def check(self, q_segment: Int[np.ndarray, "B T"], kv_segment: Int[np.ndarray, "B S"]) -> None:
        """Any tokens can lie in this way; where the length does not divide, the last chunks are shorter or empty."""

    def q_chunks(self, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, " T"]:
        """By the place in the row alone."""
        return self.chunk_of(len(q_segment))

    def kv_chunks(self, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, " S"]:
        """By the place in the row alone."""
        return self.chunk_of(len(kv_segment))

    def merging(self, order: str, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, "Q C"]:
        """The same for every row."""
        return self.merge_orders(order)

    def held(self, q_segment: Segments) -> Int[np.ndarray, "cp t"]:
        """The shards."""
        return self.order(len(q_segment)).reshape(self.cp, -1)

    def rank(self, chunk: int) -> int | None:
        """The rank that holds the chunk."""
        return next(rank for rank in range(self.cp) if chunk in self.held_chunks(rank))

    def travel_together(self) -> tuple[tuple[int, ...], ...]:
        """The chunks of a rank."""
        return tuple(self.held_chunks(rank) for rank in range(self.cp)) if self.chunks_per_rank > 1 else ()
