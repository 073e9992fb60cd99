"""From natural order to the ranks' shards, and back, by the fewest bytes. Integers only.

Before, rank r has run r of the text; after, the tokens of its shard. How many tokens go from rank s to rank d is a
matrix whose rows and columns all have the sum t, the tokens of a shard. Such a matrix is a sum of permutations, each
times a number n (Birkhoff 1946): in one *round* every rank sends n tokens to one rank and gets n from one.

    zigzag over 4         2 rounds, t/2 tokens each: the even chunks of a rank, and the odd ones
    striped over cp       cp rounds, t/cp tokens each; in the first every rank keeps its own

Only tokens that change their rank are sent, each once, so no other way sends less. On the wire a round is one
`jax.lax.ppermute` (`cpjax.exchange.moving`).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError


@dataclass(frozen=True, eq=False)
class Round:
    """Every rank sends n tokens to one rank and receives n from one; both may be itself.

    >>> step = Round((1, 0), np.array([[1], [1]]), np.array([[0], [0]]))
    >>> step.pairs
    ((0, 1), (1, 0))
    """

    destination: tuple[int, ...]
    """Of each rank."""
    send: Int[np.ndarray, "cp n"]
    """Which of its tokens each rank sends."""
    receive: Int[np.ndarray, "cp n"]
    """Where each rank puts what it receives."""

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(source, destination) of what is sent; a rank that keeps its tokens is in none."""
        return tuple((s, d) for s, d in enumerate(self.destination) if s != d)

    @property
    def keeps(self) -> tuple[bool, ...]:
        """Which ranks send to themselves."""
        return tuple(s == d for s, d in enumerate(self.destination))

    def back(self) -> "Round":
        """The round that undoes it.

        >>> Round((1, 2, 0), np.array([[0], [1], [2]]), np.array([[3], [4], [5]])).back().destination
        (2, 0, 1)
        """
        return Round(tuple(int(s) for s in np.argsort(self.destination)), self.receive, self.send)


def moves(order: Int[np.ndarray, " T"], cp: int) -> tuple[Round, ...]:
    """The rounds that take runs of the text to shards; none where `order` is the natural one.

    Args:
      order: which token of the text lies at each place of the shards, laid one after the other (`order` of a
        partition, `packed_order`).
      cp: the ranks.

    >>> from cpjax.partition import Zigzag
    >>> [(step.pairs, step.send.tolist()) for step in moves(Zigzag(2).order(8), 2)]
    [((), [[0, 1], [0, 1]]), (((0, 1), (1, 0)), [[2, 3], [2, 3]])]

    Raises:
      InputError: no permutation, or one that cannot be cut into equal shards.
    """
    order = np.asarray(order)
    if len(order) % cp or not np.array_equal(np.sort(order), np.arange(len(order))):
        raise InputError(f"order is no permutation that {cp} ranks can share equally; take the order of a partition")
    return _moves(order.astype(np.int64).tobytes(), cp)


@lru_cache(maxsize=64)
def _moves(order_bytes: bytes, cp: int) -> tuple[Round, ...]:
    order = np.frombuffer(order_bytes, np.int64)
    shard = len(order) // cp
    if np.array_equal(order, np.arange(len(order))):
        return ()
    source, where = order.reshape(cp, shard) // shard, order.reshape(cp, shard) % shard
    # Tokens from s to d in the order of the shard of d: their places there, and at s.
    places = [[np.flatnonzero(source[d] == s) for d in range(cp)] for s in range(cp)]
    left = np.array([[len(x) for x in row] for row in places])
    done, rounds = np.zeros_like(left), []
    while left.any():
        to = _matching(left)
        n = int(left[np.arange(cp), to].min())
        send, receive = np.empty((cp, n), np.int32), np.empty((cp, n), np.int32)
        for s, d in enumerate(to):
            taken = places[s][d][done[s, d] : done[s, d] + n]
            send[s], receive[d] = where[d, taken], taken
        left[np.arange(cp), to] -= n
        done[np.arange(cp), to] += n
        rounds.append(Round(tuple(to), send, receive))
    return tuple(rounds)


def _matching(left: Int[np.ndarray, "cp cp"]) -> list[int]:
    """For each source a destination of its own, so that the least entry is as large as can be: few rounds.

    Every rank to itself comes first, where that is possible, for it costs no transfer.
    """
    if np.diagonal(left).all():
        return list(range(len(left)))
    enough = np.unique(left[left > 0])
    low, high, found = 0, len(enough) - 1, _perfect(left >= enough[0])
    assert found is not None  # rows and columns have one sum: Birkhoff
    while low < high:
        middle = (low + high + 1) // 2
        better = _perfect(left >= enough[middle])
        if better is None:
            high = middle - 1
        else:
            low, found = middle, better
    return found


def _perfect(allowed: np.ndarray) -> list[int] | None:
    """A perfect matching of rows to columns by augmenting paths (Kuhn 1955), or None."""
    row_of: list[int | None] = [None] * len(allowed)
    columns = [np.flatnonzero(row).tolist() for row in allowed]

    def augment(row: int, seen: set[int]) -> bool:
        for column in columns[row]:
            if column in seen:
                continue
            seen.add(column)
            holder = row_of[column]
            if holder is None or augment(holder, seen):
                row_of[column] = row
                return True
        return False

    if not all(augment(row, set()) for row in range(len(allowed))):
        return None
    to = [0] * len(allowed)
    for column, row in enumerate(row_of):
        assert row is not None
        to[row] = column
    return to
