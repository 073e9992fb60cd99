"""Packed: several requests in one row, each padded at its right end and cut in zigzag for itself, then cached prefixes.

Chunks are numbered request after request; each request has one number more, that of its prefix, which every rank reads.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError
from cpjax.mask import PAD
from cpjax.partition.partition import Partition, Segments
from cpjax.partition.zigzag import Zigzag


@dataclass(frozen=True)
class Packed(Partition):
    """Requests 0, 1, …, each a multiple of `2·cp` tokens with its pads last; behind the queries' own keys the prefixes.

    >>> segment = np.array([0, 0, 0, 0, 1, 1, 1, -1])
    >>> Packed(2).held(segment)
    array([[0, 3, 4, 7],
           [1, 2, 5, 6]])
    """

    name: ClassVar[str] = "packed"

    @property
    def _zigzag(self) -> Zigzag:
        return Zigzag(self.cp)

    @property
    def _numbers(self) -> int:
        """Chunk numbers of a request: its own, and one for its prefix."""
        return self._zigzag.chunk_count + 1

    def bounds(self, segment: Segments) -> list[tuple[int, int]]:
        """Where each request of a row begins and ends, pads included.

        >>> Packed(1).bounds(np.array([0, 0, 0, -1, 1, -1]))
        [(0, 4), (4, 6)]

        Raises:
          InputError: requests are not 0, 1, … in order, each padded at its right end so that it can be cut.
        """
        unit = self._zigzag.chunk_count
        count = int(segment.max(initial=PAD)) + 1
        starts = [int(np.argmax(segment == i)) for i in range(count)]
        ends = [*starts[1:], len(segment)]
        for i, (start, stop) in enumerate(zip(starts, ends, strict=True)):
            own = segment[start:stop]
            real = int((own == i).sum())
            if not (real and (start == 0) == (i == 0) and start < stop and (stop - start) % unit == 0):
                raise InputError(f"request {i} of the pack is at {start} to {stop}, no multiple of {unit} tokens")
            if not ((own[:real] == i).all() and (own[real:] == PAD).all()):
                raise InputError(f"request {i} of the pack does not have its tokens first and its pads behind them")
        if count == 0:
            raise InputError("the pack has no request")
        return list(zip(starts, ends, strict=True))

    def check(self, q_segment: Int[np.ndarray, "B T"], kv_segment: Int[np.ndarray, "B S"]) -> None:
        """One row, keys as queries, then prefixes.

        >>> Packed(1).check(np.array([[0, 0]]), np.array([[0, 1]]))
        Traceback (most recent call last):
        cpjax.errors.InputError: the first keys of a pack must be the queries' own tokens; its prefixes follow
        """
        tokens = q_segment.shape[1]
        if q_segment.shape[0] != 1:
            raise InputError(f"partition 'packed' has {q_segment.shape[0]} batch rows; a pack is one row")
        count = len(self.bounds(q_segment[0]))
        prefix = kv_segment[0, tokens:]
        if not np.array_equal(kv_segment[0, :tokens], q_segment[0]):
            raise InputError("the first keys of a pack must be the queries' own tokens; its prefixes follow")
        if not (np.isin(prefix, np.arange(count)).all() and (np.diff(prefix) >= 0).all()):
            raise InputError("the prefixes of a pack are those of request 0, 1, …, one after the other, without pads")

    def q_chunks(self, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, " T"]:
        """Each request is cut for itself."""
        of_query = np.empty(len(q_segment), int)
        for i, (start, stop) in enumerate(self.bounds(q_segment)):
            of_query[start:stop] = i * self._numbers + self._zigzag.chunk_of(stop - start)
        return of_query

    def kv_chunks(self, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, " S"]:
        """As the queries; a prefix is one chunk.

        >>> segment = np.array([0, 0])
        >>> Packed(1).kv_chunks(segment, np.array([0, 0, 0]))
        array([0, 0, 1])
        """
        of_prefix = kv_segment[len(q_segment) :] * self._numbers + self._zigzag.chunk_count
        return np.concatenate([self.q_chunks(q_segment, kv_segment), of_prefix])

    def merging(self, order: str, q_segment: Segments, kv_segment: Segments) -> Int[np.ndarray, "Q C"]:
        """Of each request its chunks, its prefix, then what it cannot see.

        >>> Packed(2).merging("ring", np.array([0, 0, 0, 0]), np.array([0, 0, 0, 0]))[1]
        array([1, 2, 0, 3, 4])
        """
        requests, rows = len(self.bounds(q_segment)), []
        one = self._zigzag.merge_orders(order)
        for i in range(requests):
            for own in (*one, np.arange(len(one))):  # the last is nobody's: a prefix has no queries
                mine = i * self._numbers + np.append(own, len(one))
                rows.append(np.concatenate([mine, np.setdiff1d(np.arange(requests * self._numbers), mine)]))
        return np.array(rows)

    def held(self, q_segment: Segments) -> Int[np.ndarray, "cp t"]:
        """Request after request."""
        bounds = self.bounds(q_segment)
        return np.concatenate([a + self._zigzag.order(b - a).reshape(self.cp, -1) for a, b in bounds], axis=1)

    def rank(self, chunk: int) -> int | None:
        """None for a cached prefix, which every rank reads."""
        place = chunk % self._numbers
        return None if place == self._zigzag.chunk_count else self._zigzag.rank(place)

    def request(self, chunk: int) -> int | None:
        """The request of the chunk, or of the prefix."""
        return chunk // self._numbers
