"""float32 sums and matrix products in a given order, bit for bit.

A matrix product has an order by the words of its card line (`cpjax.fingerprint.tree.words`): one after the other; in
pairs; blocks of n that are added at once and cut off; n sums side by side. A row sum has one of `ROW_SUMS`.
"""

import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cpjax.trial.summation import product, total

_HALF_WAY = np.int64(0x10000000)
_BELOW_FLOAT32 = np.int64(0x1FFFFFFF)
"""The digits of a float64 that float32 lacks, and what they are half way between two numbers."""


Single = np.ndarray | np.float32
"""float32 numbers: an array, or one number."""


def fused(a: Single, b: Single, c: Single) -> Float[np.ndarray, "..."]:
    """a · b + c of float32 arrays with one rounding, as fused multiply-add units give it.

    The product is exact in float64; where the sum, rounded there, lies half way between two float32 numbers, it
    is moved to the side on which the exact sum lies, so that it is not rounded twice.

    >>> float(fused(np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(-1 - 2**-11))) == 2**-24
    True
    """
    exact, added = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    near = np.asarray(exact + added)
    half_way = (near.view(np.int64) & _BELOW_FLOAT32) == _HALF_WAY
    if half_way.any():
        back = near - exact
        lost = (exact - (near - back)) + (added - back)
        moved = np.nextafter(near, np.where(lost > 0, np.inf, -np.inf))
        near = np.where(half_way & (lost != 0), moved, near)
    return near.astype(np.float32)


@dataclass(frozen=True)
class Order:
    """How a product's terms are added.

    Attributes:
      words: of the card line.
      is_fused: a product is added unrounded. Of half numbers it is exact in float32 anyway.
      part: so many terms have a sum of their own, which is added to the sum of the parts before; 0 is no parts.
      has_halves: between `part` and twice as many terms are two equal parts, and one of the odd term.
      goes_on: what is carried from the tile before is the first term, and not added in the end.
      is_cut: blocks are cut off toward zero, and not rounded to nearest.
    """

    words: str = "one after the other"
    is_fused: bool = True
    part: int = 0
    has_halves: bool = False
    goes_on: bool = False
    is_cut: bool = True


SEQUENTIAL, PAIRS = "one after the other", "in pairs, halves added to halves"
_BLOCKS = re.compile(r"blocks of (\d+), each added at once to the sum so far")
_AT_ONCE = re.compile(r"all (\d+) at once")
_SIDE_BY_SIDE = re.compile(
    r"(\d+) sums of \d+ terms \((\d+) apart\), each one after the other; then these: (one after the other|one addition)"
)


_NEIGHBOURS = re.compile(r"\d+ sums of (\d+) terms \(neighbours\), each (.*); then these: .*")
_RUNS = re.compile(r"sums of \d+ to (\d+) neighbours, added one after the other to one sum")


def within(words: str) -> tuple[str, int]:
    """The order within a sum of neighbours, and of how many, where such sums are added to one running sum.

    >>> within("4 sums of 16 terms (neighbours), each one after the other; then these: one after the other")
    ('one after the other', 16)
    >>> within("one after the other")
    ('one after the other', 0)
    """
    if found := _NEIGHBOURS.fullmatch(words):
        return found[2], int(found[1])
    return (SEQUENTIAL, int(found[1])) if (found := _RUNS.fullmatch(words)) else (words, 0)


def is_computable(words: str) -> bool:
    """Whether a line's words say enough to add in that order, for any number of terms.

    >>> is_computable("blocks of 16, each added at once to the sum so far"), is_computable("a tree of depth 9")
    (True, False)
    """
    return words in (SEQUENTIAL, PAIRS) or any(p.fullmatch(words) for p in (_BLOCKS, _AT_ONCE, _SIDE_BY_SIDE))


def parts_of(terms: int, order: Order) -> list[slice]:
    """The parts of a sum of so many terms.

    >>> [(s.start, s.stop) for s in parts_of(500, Order(part=192, has_halves=True))]
    [(0, 192), (192, 384), (384, 500)]
    >>> [(s.start, s.stop) for s in parts_of(301, Order(part=192, has_halves=True))]
    [(0, 150), (150, 300), (300, 301)]
    """
    size = order.part or max(terms, 1)
    if order.has_halves and size < terms < 2 * size:
        size = terms // 2
    return [slice(first, min(first + size, terms)) for first in range(0, terms, size)]


def added(
    a: Float[np.ndarray, "... M n"], b: Float[np.ndarray, "... n P"], order: Order, start: np.ndarray | None = None
) -> Float[np.ndarray, "... M P"]:
    """`start + a @ b` of float32 arrays, in that order."""
    sum_so_far = start
    for part in parts_of(b.shape[-2], order):
        x, y = a[..., part], b[..., part, :]
        if order.goes_on:
            sum_so_far = _one_part(x, y, order, sum_so_far)
        else:
            one = _one_part(x, y, order, None)
            sum_so_far = one if sum_so_far is None else sum_so_far + one
    assert sum_so_far is not None  # there is at least one term
    return sum_so_far


def _one_part(a: np.ndarray, b: np.ndarray, order: Order, start: np.ndarray | None) -> np.ndarray:
    block, at_once = _BLOCKS.fullmatch(order.words), _AT_ONCE.fullmatch(order.words)
    if block or at_once:
        size = int(block[1]) if block else b.shape[-2]
        return product(a, b, "cut" if order.is_cut else "blocks", start, block=size)
    if order.words == PAIRS:
        return product(a, b, "pairwise", start)
    lanes = _SIDE_BY_SIDE.fullmatch(order.words)
    if lanes is None:
        return _chain(a, b, order, start)
    sums = [
        _chain(a[..., lane :: int(lanes[1])], b[..., lane :: int(lanes[1]), :], order, None)
        for lane in range(min(int(lanes[1]), b.shape[-2]))
    ]
    found = sums[0]
    for one in sums[1:]:
        found = found + one
    return found if start is None else start + found


def _chain(a: np.ndarray, b: np.ndarray, order: Order, start: np.ndarray | None) -> np.ndarray:
    found = start
    for i in range(b.shape[-2]):
        x, y = a[..., :, i : i + 1], b[..., i : i + 1, :]
        if found is None or not order.is_fused:
            found = x * y if found is None else found + x * y
        else:
            found = fused(x, y, found)
    assert found is not None  # a part has a term
    return found


ROW_SUMS = {
    "numpy": "as NumPy adds: eight sums side by side, halves beyond 128 terms",
    "sequential": "one after the other",
    "pairwise": "in pairs, halves added to halves",
    **{f"{n} lanes": f"{n} sums side by side, halves added to halves, the rest one by one" for n in (4, 8, 16, 32)},
    **{
        f"{n} lanes, all": f"{n} sums side by side, the rest among them, halves added to halves" for n in (4, 8, 16, 32)
    },
    **{
        f"2 x {n} lanes": f"two vectors of {n} sums in turn, halves added to halves, the rest one by one"
        for n in (8, 16)
    },
}
_LANES = re.compile(r"(2 x )?(\d+) lanes(, all)?")


def lanes_of(how: str) -> int:
    """Terms in a vector, where those that are left over are added one by one; else 1.

    >>> lanes_of("16 lanes"), lanes_of("2 x 16 lanes"), lanes_of("numpy")
    (16, 16, 1)
    """
    found = _LANES.fullmatch(how)
    return int(found[2]) if found and not found[3] else 1


def row_sum(x: Float[np.ndarray, "... n"], how: str) -> Float[np.ndarray, "..."]:
    """The sum over the last axis, in an order of `ROW_SUMS`.

    >>> [row_sum(np.float32([[1, 2, 3, 4, 5]]), how).tolist() for how in ROW_SUMS][:3]
    [[15.0], [15.0], [15.0]]
    """
    found = _LANES.fullmatch(how)
    if found is None:
        return total(x, "blas" if how == "numpy" else how)
    vector, side_by_side = int(found[2]), int(found[2]) * (2 if found[1] else 1)
    whole = x.shape[-1] if found[3] else x.shape[-1] // vector * vector
    sums = np.zeros((*x.shape[:-1], side_by_side), x.dtype)
    for first in range(0, whole, side_by_side):
        some = x[..., first : min(first + side_by_side, whole)]
        sums[..., : some.shape[-1]] += some
    while side_by_side > 1:
        side_by_side //= 2
        sums = sums[..., :side_by_side] + sums[..., side_by_side : 2 * side_by_side]
    result = sums[..., 0]
    for last in range(whole, x.shape[-1]):
        result = result + x[..., last]
    return result
