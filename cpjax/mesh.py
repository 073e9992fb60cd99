"""In which order devices make a ring, so that each hands its shard to a neighbour on the torus.

    chips of a 4×4 torus, as numbered        the ring: each step is one hop, the last one too

     0   1   2   3                            0 ─ 1 ─ 2 ─ 3
                                              │           │
     4   5   6   7                            4   5 ─ 6   7
                      from 3 to 4 it is       │   │   │   │
     8   9  10  11    more than one hop       8   9  10  11
                                              │   │   │   │
    12  13  14  15                           12 ─13  14 ─15

A shard that has to cross several links shares them with other shards, and a compiler may give up sending it while it
computes (docs/scale.md).
"""

from collections.abc import Sequence
from itertools import chain, product
from typing import Any


def ring_order(devices: Sequence[Any]) -> list[Any]:
    """The devices along a Hamiltonian cycle of their torus; in the given order if none is known.

    Args:
      devices: those of a TPU have `coords` (x, y, z) of their chip, and `core_on_chip`. The cores of one chip stand
        together.

    Returns:
      A permutation. Where the chips fill a box a×b×c with an even number of chips, neighbours in the list (and the last
      and the first device) are at most one hop apart, without the links that close the torus, unless the box is a
      line. In every other case (no coords, holes, several slices, an odd number of chips) the order is the given one.

    >>> from collections import namedtuple
    >>> Chip = namedtuple("Chip", "coords core_on_chip")
    >>> [device.coords[:2] for device in ring_order([Chip((x, y, 0), 0) for y in range(2) for x in range(2)])]
    [(0, 0), (1, 0), (1, 1), (0, 1)]
    """
    given = list(devices)
    places = {place: device for device in given if (place := _place(device)) is not None}
    if not given or len(places) < len(given):
        return given
    sides = [sorted({place[axis] for place in places}) for axis in range(4)]
    if set(places) != set(product(*sides)) or any(side[-1] - side[0] >= len(side) for side in sides):
        return given
    cycle = _cycle(sides[:3])
    return given if cycle is None else [places[*place, core] for place in cycle for core in sides[3]]


def _cycle(sides: list[list[int]]) -> list[tuple[int, ...]] | None:
    """Once round a box: out along an even side, and home through the rest, back and forth."""
    out = max(range(3), key=lambda axis: (len(sides[axis]) % 2 == 0, len(sides[axis])))
    b, c = (side for axis, side in enumerate(sides) if axis != out)
    # The two other axes are walked as one line, so that what is gone round is a rectangle.
    line = list(chain.from_iterable([(i, j) for i in (b[::-1] if turn % 2 else b)] for turn, j in enumerate(c)))
    if len(line) > 1 and len(sides[out]) % 2:
        return None
    home = chain.from_iterable(
        [(a, *rest) for rest in (line[:0:-1] if turn % 2 else line[1:])] for turn, a in enumerate(sides[out][::-1])
    )
    walk = [*((a, *line[0]) for a in sides[out]), *home]
    return [(*place[1 : out + 1], place[0], *place[out + 1 :]) for place in walk]


def _place(device: Any) -> tuple[int, ...] | None:
    coords = getattr(device, "coords", None)
    return None if coords is None or len(coords) != 3 else (*coords, getattr(device, "core_on_chip", 0))
