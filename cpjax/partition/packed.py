"""Cases of layout "packed": several requests in one row, each cut into 2·cp chunks of its own, then cached prefixes.

Chunks are numbered request after request; each request has one number more, that of its prefix.
"""

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError
from cpjax.mask import PAD
from cpjax.partition.layout import order as layout_order

Integers = Int[np.ndarray, "..."]


def bounds(segment: Integers, cp: int) -> list[tuple[int, int]]:
    """Where each request of a row `[T]` begins and ends, pads included.

    >>> bounds(np.array([0, 0, 0, -1, 1, -1]), cp=1)
    [(0, 4), (4, 6)]

    Raises:
      InputError: requests are not 0, 1, … in order, each padded at its right end to a multiple of 2·cp.
    """
    count = int(segment.max(initial=PAD)) + 1
    starts = [int(np.argmax(segment == i)) for i in range(count)]
    ends = [*starts[1:], len(segment)]
    for i, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        own = segment[start:stop]
        real = int((own == i).sum())
        if not (real and (start == 0) == (i == 0) and start < stop and (stop - start) % (2 * cp) == 0):
            raise InputError(f"request {i} of the pack is at {start} to {stop}, no multiple of 2·cp = {2 * cp} tokens")
        if not ((own[:real] == i).all() and (own[real:] == PAD).all()):
            raise InputError(f"request {i} of the pack does not have its tokens first and its pads behind them")
    if count == 0:
        raise InputError("the pack has no request")
    return list(zip(starts, ends, strict=True))


def check_pack(q_segment: Integers, kv_segment: Integers, cp: int) -> None:
    """The segments `[B, T]`, `[B, S]` are those of a pack: one row, keys as queries, then prefixes.

    >>> check_pack(np.array([[0, 0]]), np.array([[0, 1]]), cp=1)
    Traceback (most recent call last):
    cpjax.errors.InputError: the first keys of a pack must be the queries' own tokens; its prefixes follow

    Raises:
      InputError: they are not.
    """
    tokens = q_segment.shape[1]
    if q_segment.shape[0] != 1:
        raise InputError(f"layout 'packed' has {q_segment.shape[0]} batch rows; a pack is one row")
    count = len(bounds(q_segment[0], cp))
    prefix = kv_segment[0, tokens:]
    if not np.array_equal(kv_segment[0, :tokens], q_segment[0]):
        raise InputError("the first keys of a pack must be the queries' own tokens; its prefixes follow")
    if not (np.isin(prefix, np.arange(count)).all() and (np.diff(prefix) >= 0).all()):
        raise InputError("the prefixes of a pack are those of request 0, 1, …, one after the other, without pads")


def held(segment: Integers, cp: int) -> Int[np.ndarray, "cp t"]:
    """Which tokens of the row each rank holds, request after request.

    >>> held(np.array([0, 0, 1, 1, 1, 1]), cp=1)
    array([[0, 1, 2, 3, 4, 5]])
    """
    parts = [start + layout_order("zigzag", stop - start, cp).reshape(cp, -1) for start, stop in bounds(segment, cp)]
    return np.concatenate(parts, axis=1)


def chunks(q_segment: Integers, kv_segment: Integers, cp: int) -> tuple[Integers, Integers]:
    """The chunk of every query of the row, and of every key; a prefix is one chunk.

    >>> chunks(np.array([0, 0]), np.array([0, 0, 0]), cp=1)
    (array([0, 1]), array([0, 1, 2]))
    """
    of_query = np.empty(len(q_segment), int)
    for i, (start, stop) in enumerate(bounds(q_segment, cp)):
        index = np.arange(stop - start) // ((stop - start) // (2 * cp))
        of_query[start:stop] = i * (2 * cp + 1) + index
    of_prefix = kv_segment[len(q_segment) :] * (2 * cp + 1) + 2 * cp
    return of_query, np.concatenate([of_query, of_prefix])


def merging(one: Int[np.ndarray, "Q C"], requests: int) -> Int[np.ndarray, "P P"]:
    """The order of merging of a pack, given that of one request: its chunks, its prefix, then what it cannot see.

    >>> merging(np.array([[0, 1], [1, 0]]), requests=2)[:2]
    array([[0, 1, 2, 3, 4, 5],
           [1, 0, 2, 3, 4, 5]])
    """
    count = len(one) + 1
    rows = []
    for i in range(requests):
        for own in (*one, np.arange(len(one))):
            mine = i * count + np.append(own, len(one))
            rows.append(np.concatenate([mine, np.setdiff1d(np.arange(requests * count), mine)]))
    return np.array(rows)
