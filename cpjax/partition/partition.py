"""Who holds which tokens, what is computed as one piece, in which order pieces are merged: one value. Integers only.

A *chunk* is a set of tokens that is computed and merged as one piece; its result is rounded when it is stored. A
partition numbers the chunks of the queries and of the keys of one batch row, and says where each one lives:

    Sequence    one text, cut into equal shards, queries as keys         contiguous, zigzag, striped
    Packed      several requests in a row, each cut for itself           packed
    Cached      queries everywhere, the keys in the ranks' caches        blocks, interleaved, pages

A partition never decides who sees whom: positions and segments travel with the tokens, and they decide the mask.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError

Order = Literal["ascending", "ring", "gather", "unknown", "together"]
"""In which order one query's partial results are merged. With FP16 carried between merges it decides the bits.
"together": all keys at once, as one device computes them; there is nothing to merge."""

ORDERS: tuple[str, ...] = get_args(Order)
"""The words of `Order`."""

MOST_CP = 2**10
"""A larger number of ranks is taken for a mistake. No test pins it: none is meant to come near it."""

Segments = Int[np.ndarray, " _"]
"""The request of each token of one batch row; −1 is a pad (`cpjax.mask`)."""


@dataclass(frozen=True)
class Partition(ABC):
    """A partition over `cp` ranks.

    Raises:
      InputError: cp is no whole number from 1 to 1,024.
    """

    cp: int
    name: ClassVar[str]

    def __post_init__(self):
        """Refuse what is no number of ranks."""
        if isinstance(self.cp, bool) or not isinstance(self.cp, int | np.integer) or not 1 <= self.cp <= MOST_CP:
            raise InputError(f"cp is {self.cp!r}; it is a number of ranks, a whole number from 1 to {MOST_CP}")

    @abstractmethod
    def check(self, q_segment: Int[np.ndarray, "B T"], kv_segment: Int[np.ndarray, "B S"]) -> None:
        """Raise InputError where tokens of these segments cannot lie in this way."""

    @abstractmethod
    def q_chunks(self, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, " T"]:
        """The chunk of every query of a batch row."""

    @abstractmethod
    def kv_chunks(self, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, " S"]:
        """The chunk of every key of a batch row."""

    @abstractmethod
    def merging(self, order: str, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, "Q C"]:
        """For each query chunk the key/value chunks in the order in which its results are merged (visible or not)."""

    @abstractmethod
    def held(self, q_segment: Segments) -> Int[np.ndarray, "cp t"]:
        """Which queries of a row each rank has, in its order."""

    @abstractmethod
    def rank(self, chunk: int) -> int | None:
        """The rank that holds a key/value chunk; None where every rank reads it."""

    def q_ranks(self, q_chunk: int) -> tuple[int, ...]:
        """The ranks that have the queries of this query chunk."""
        rank = self.rank(q_chunk)
        return () if rank is None else (rank,)

    def own(self, q_chunk: int) -> int | None:
        """The key/value chunk of the same tokens as a query chunk; None where there is none."""
        return q_chunk

    def request(self, chunk: int) -> int | None:
        """The request of a key/value chunk; None where chunks are not those of requests."""
        return None

    def step(self, order: str, q_chunk: int, kv_chunk: int) -> int | None:
        """The ring step at which the rank of the queries meets a key/value chunk; None where there are no steps."""
        rank, source = self.rank(q_chunk), self.rank(kv_chunk)
        if self.cp == 1 or rank is None or source is None:
            return None
        if order == "ring":
            return (rank - source) % self.cp
        return source if order == "gather" else None

    def travel_together(self) -> tuple[tuple[int, ...], ...]:
        """Chunks that one rank sends in one piece, where it holds several."""
        return ()

    def as_json(self) -> dict[str, Any]:
        """What it is, for reports."""
        return {"partition": self.name, "cp": self.cp}

    def __str__(self) -> str:
        """In a sentence: "zigzag over 4 ranks"."""
        return f"{self.name} over {self.cp} ranks" if self.cp > 1 else "one device"


def check_order(order: str) -> None:
    """Refuse an unknown order of merging.

    >>> check_order("ring")

    Raises:
      InputError: it lists the known ones.
    """
    if order not in ORDERS:
        raise InputError(f"unknown merge order {order!r}; known are {', '.join(ORDERS)}")


def inverse(permutation: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
    """The permutation that undoes it.

    >>> inverse(np.array([2, 0, 1]))
    array([1, 2, 0])
    """
    return np.argsort(permutation, kind="stable")
