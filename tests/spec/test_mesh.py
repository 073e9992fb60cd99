"""The ring's order on a torus: a permutation whose neighbours are one hop apart, and which closes."""

from typing import NamedTuple

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpjax.mesh import ring_order
from cpjax.parallel import cp_mesh

SIDE = st.integers(1, 6)


class Chip(NamedTuple):
    coords: tuple[int, ...]
    core_on_chip: int = 0


def box(sides, cores=1, corner=(0, 0, 0)):
    """The devices as a TPU numbers them: x fastest, the cores of a chip together."""
    a, b, c = sides
    at = [(x, y, z) for z in range(c) for y in range(b) for x in range(a)]
    return [
        Chip(tuple(p + o for p, o in zip(place, corner, strict=True)), core) for place in at for core in range(cores)
    ]


def hops(a, b, sides):
    """Links between two chips of a torus."""
    far = (abs(x - y) for x, y in zip(a.coords, b.coords, strict=True))
    return sum(min(d, side - d) for d, side in zip(far, sides, strict=True))


@given(st.tuples(SIDE, SIDE, SIDE), st.integers(1, 2), st.tuples(SIDE, SIDE, SIDE), st.randoms())
def test_neighbours_are_one_hop_apart_and_the_ring_closes(sides, cores, corner, random):
    devices = box(sides, cores, corner)
    random.shuffle(devices)
    ring = ring_order(devices)
    assert sorted(ring) == sorted(devices), "no permutation"
    chips = len(devices) // cores
    if chips % 2 and sorted(sides)[1] > 1:  # no cycle is made of an odd rectangle
        assert ring == devices
        return
    for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
        assert hops(a, b, sides) == (a.coords != b.coords)
    line = sorted(sides)[1] == 1
    without_wrapping = [sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True)) for a, b in
                        zip(ring, ring[1:] + ring[:1], strict=True)]  # fmt: skip
    assert line or max(without_wrapping) == 1, "a link that closes the torus is used: small slices have none"


@given(st.tuples(SIDE, SIDE, SIDE), st.randoms())
def test_the_cores_of_a_chip_stand_together(sides, random):
    devices = box(sides, cores=2)
    ring = ring_order(devices)
    assert all(a.coords == b.coords for a, b in zip(ring[::2], ring[1::2], strict=True))


@pytest.mark.parametrize(
    "devices",
    [
        [],
        ["cpu:1", "cpu:0"],
        [*box((2, 2, 1)), *box((2, 2, 1))],  # two slices
        box((4, 2, 1))[1:],  # a hole
        [chip for chip in box((5, 2, 1)) if chip.coords[0] != 2],  # a gap
        box((3, 3, 1)),
        [Chip((0, 0)), Chip((1, 0))],
    ],
    ids=["none", "no coords", "two slices", "a hole", "a gap", "odd", "two axes"],
)
def test_where_no_cycle_is_known_the_order_is_the_given_one(devices):
    assert ring_order(devices) == devices


def test_cp_mesh_is_in_ring_order(monkeypatch):
    backwards = lambda devices: list(devices)[::-1]  # noqa: E731
    monkeypatch.setattr("cpjax.parallel.ring_order", backwards)
    assert list(cp_mesh(4).devices) == jax.devices()[3::-1]
