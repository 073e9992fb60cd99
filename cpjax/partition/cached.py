"""Partitions of a decode step: every rank has the new queries, and each key lives in one rank's KV cache."""

from abc import abstractmethod

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError
from cpjax.partition.partition import Partition, Segments, check_order


class Cached(Partition):
    """New tokens of requests 0, 1, … over a cache that is cut by tokens. One row, without pads.

    The piece of a request that one rank's cache holds is a chunk, numbered request · cp + rank. A query's chunk is its
    request. A subclass says which rank's cache holds which token.
    """

    @abstractmethod
    def owners(self, request: int, length: int) -> Int[np.ndarray, " S"]:
        """The rank whose cache holds each of the `length` tokens of a request."""

    def check(self, q_segment: Int[np.ndarray, "B T"], kv_segment: Int[np.ndarray, "B S"]) -> None:
        """One row; requests 0, 1, … one after the other, each with queries and keys; no pads.

        >>> from cpjax.partition import Blocks
        >>> Blocks(2).check(np.array([[0, 1]]), np.array([[0, 0]]))
        Traceback (most recent call last):
        cpjax.errors.InputError: every request of partition 'blocks' has queries and keys
        """
        for name, segment in (("queries", q_segment), ("keys", kv_segment)):
            if segment.shape[0] != 1 or segment[0, 0] != 0 or not np.isin(np.diff(segment[0]), (0, 1)).all():
                raise InputError(
                    f"the {name} of partition {self.name!r} are one row of requests 0, 1, … in order, without pads"
                )
        if q_segment[0, -1] != kv_segment[0, -1]:
            raise InputError(f"every request of partition {self.name!r} has queries and keys")

    def q_chunks(self, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, " T"]:
        """The request."""
        return np.asarray(q_segment)

    def kv_chunks(self, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, " S"]:
        """By request and owner.

        >>> from cpjax.partition import Blocks
        >>> np.unique(Blocks(2).kv_chunks(np.zeros(1, int), np.zeros(300, int)), return_counts=True)[1]
        array([128, 172])
        """
        counts = np.bincount(kv_segment)
        return np.concatenate([i * self.cp + self.owners(i, int(n)) for i, n in enumerate(counts)])

    def merging(self, order: str, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, "Q C"]:
        """For each request its own chunks in the order of the ranks, then those it cannot see.

        >>> from cpjax.partition import Blocks
        >>> Blocks(2).merging("ascending", np.array([0, 1]), np.array([0, 1]))
        array([[0, 1, 2, 3],
               [2, 3, 0, 1]])
        """
        check_order(order)
        requests = int(kv_segment.max()) + 1
        every = np.arange(requests * self.cp).reshape(requests, self.cp)
        return np.array([np.concatenate([every[i], np.delete(every, i, axis=0).ravel()]) for i in range(requests)])

    def held(self, q_segment: Segments) -> Int[np.ndarray, "cp t"]:
        """Every rank has all queries."""
        return np.tile(np.arange(len(q_segment)), (self.cp, 1))

    def rank(self, chunk: int) -> int | None:
        """The rank whose cache it is."""
        return chunk % self.cp

    def q_ranks(self, q_chunk: int) -> tuple[int, ...]:
        """All of them."""
        return tuple(range(self.cp))

    def own(self, q_chunk: int) -> int | None:
        """The keys of the new tokens are in some cache, with others."""
        return None

    def request(self, chunk: int) -> int | None:
        """The request of the chunk."""
        return chunk // self.cp

    def step(self, order: str, q_chunk: int, kv_chunk: int) -> int | None:
        """Partials are exchanged at once."""
        return None
