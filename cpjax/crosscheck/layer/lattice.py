"""The test of a stage's numbers (docs/verdict.md, §12): which of them are not the rounding of the exact value.

A stage computes in float32 and rounds once. Float32 is so much finer than FP16 that a correct result is nearly always
the FP16 number nearest to the exact value. It is another one only if the exact value lies so near to the middle
between two that the float32 error leads across. How likely that is follows from both distances: a count of such
numbers above what is likely is a systematic error, though each number stays within its bound. Integers likewise.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.judging.statistic import LEAST_PROBABILITY, expected_maximum, z_score
from cpjax.crosscheck.layer.expected import LARGEST_INT8, LEAST_INT8, Expected

AFTER_FP16 = 2.0**16
"""The number after the largest of FP16, if there were one."""

SPARE = 1.0
"""Numbers that may be another's rounding beyond those that the model expects."""

BEYOND = 1 + 2.0**-10
"""The least share of the bound of a number outside its interval."""

LEAST_Z = -9.0
"""No z-score below this is told."""


class Measured(NamedTuple):
    """One tensor against what it should be; arrays have its shape."""

    outside: Bool[np.ndarray, "..."]
    """Not between what the bound's two ends are rounded to; NaN is."""
    ratio: Float[np.ndarray, "..."]
    """|error| / bound."""
    moved: Int[np.ndarray, "..."]
    """1: rounded to a number further from zero than the nearest; −1: nearer to zero. Of float32 all 0."""
    chance: Float[np.ndarray, "2 ..."]
    """Of 1 and of −1, in a correct result."""
    error: Float[np.ndarray, "..."]
    """Of float32 tensors: in standard deviations; else 0."""
    drift: float
    """Of float32 tensors: z-score of a common factor; else 0."""
    same: Int[np.ndarray, "..."]
    """Equal numbers have one rounding error: one name for each."""


def measure(given: np.ndarray, expected: Expected) -> Measured:
    """Hold a tensor against what it should be."""
    exact, most = expected.exact, np.broadcast_to(expected.most, expected.exact.shape)
    x = given.astype(np.float64)
    low, high = nearest(exact - most, expected.stored), nearest(exact + most, expected.stored)
    outside = ~((x >= low) & (x <= high))
    error = np.where(np.isfinite(x), np.abs(x - exact), np.where(outside, np.inf, 0.0))
    bound = most + _half_step(exact, expected)
    ratio = np.divide(error, bound, out=np.zeros_like(error), where=error > 0)
    ratio = np.where(outside, np.maximum(ratio, BEYOND), np.minimum(ratio, 1.0))
    same = np.unique(np.abs(exact).astype(np.float32), return_inverse=True)[1].reshape(exact.shape)
    none = np.zeros(exact.shape, int)
    if expected.stored == "float32":
        sigma = np.hypot(expected.sigma, FORMATS["float32"].spacing(exact) / np.sqrt(12))
        share = np.where(np.isfinite(x), (x - exact) / sigma, np.inf)
        drift = _drift(share, exact / sigma, np.broadcast_to(expected.inward, exact.shape) / sigma)
        return Measured(outside, ratio, none, np.zeros((2, *exact.shape)), share, drift, same)
    sign = np.where(exact < 0, -1, 1)
    right = nearest(exact, expected.stored)
    off = np.where(x > right, 1, np.where(x < right, -1, 0)) * sign
    return Measured(outside, ratio, off, _chances(expected, sign), np.zeros(exact.shape), 0.0, same)


def nearest(x: Float[np.ndarray, "..."], stored: str) -> Float[np.ndarray, "..."]:
    """x rounded to what is stored, as float64."""
    return np.clip(np.rint(x), LEAST_INT8, LARGEST_INT8) if stored == "int8" else FORMATS[stored].round(x)


def _half_step(exact: np.ndarray, expected: Expected) -> np.ndarray:
    if expected.stored == "int8":
        return 0.5 + np.maximum(np.abs(exact) - (LARGEST_INT8 + 0.5), 0.0)  # what is clipped is off by more
    return FORMATS[expected.stored].spacing(np.abs(exact) + expected.most) / 2


def _edges(exact: np.ndarray, stored: str) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the interval that is rounded to the number nearest to `exact`."""
    middle = nearest(exact, stored)
    if stored == "int8":
        low, high = middle - 0.5, middle + 0.5
        return np.where(middle == LEAST_INT8, -np.inf, low), np.where(middle == LARGEST_INT8, np.inf, high)
    half = middle.astype(np.float16)
    with np.errstate(over="ignore"):
        ends = [np.nextafter(half, np.float16(sign * np.inf)).astype(np.float64) for sign in (-1, 1)]
    low, high = ((np.clip(middle, -AFTER_FP16, AFTER_FP16) + np.clip(end, -AFTER_FP16, AFTER_FP16)) / 2 for end in ends)
    return np.where(middle == -np.inf, -np.inf, low), np.where(middle == np.inf, np.inf, high)


def _chances(expected: Expected, sign: np.ndarray) -> np.ndarray:
    """Of a rounding outwards, and of one inwards."""
    from scipy import special  # slow to import

    low, high = _edges(expected.exact, expected.stored)
    above, below = high - expected.exact, expected.exact - low
    outward, inward = np.where(sign > 0, above, below), np.where(sign > 0, below, above)
    found = []
    for distance in (outward, inward - np.broadcast_to(expected.inward, inward.shape)):
        sigma = np.broadcast_to(expected.sigma, distance.shape)
        is_random = (sigma > 0) & np.isfinite(distance)
        steps = np.divide(distance, sigma, out=np.zeros_like(distance), where=is_random)
        found.append(np.where(is_random, special.ndtr(-steps), np.where(distance < 0, 1.0, 0.0)))
    return np.stack(found)


def _drift(error: np.ndarray, weight: np.ndarray, inward: np.ndarray) -> float:
    """z-score of a common factor on all numbers; what is cut off is no such error."""
    size = np.sqrt((weight**2).sum())
    if size == 0:
        return 0.0
    value, allowed = (error * weight).sum(), (np.abs(weight) * inward).sum()
    return float(max(value, -value - allowed, 0.0) / size) if np.isfinite(value) else np.inf


# Counts --------------------------------------------------------------------------------------------------------------


def count_z(count: int, mean: float, variance: float) -> float:
    """How unlikely at least so many are, as a z-score, if `mean` are expected: Poisson, in clumps of variance/mean."""
    from scipy import special  # slow to import

    if count <= 0:
        return LEAST_Z
    clump = max(variance / mean, 1.0) if mean > 0 else 1.0
    probability = special.gammainc(count / clump, (mean + SPARE) / clump)
    return float(max(-special.ndtri(max(probability, LEAST_PROBABILITY)), LEAST_Z))


class Total(NamedTuple):
    """All numbers of a tensor together."""

    z: float
    moved: int
    """Numbers that are not the rounding of the exact value."""
    allowed: float
    """How many are expected at most."""


def total_of(measured: Measured, used: Bool[np.ndarray, " T"]) -> Total:
    """The test over the whole tensor, of the tokens `used`."""
    part = measured._replace(
        ratio=measured.ratio[used],
        moved=measured.moved[used],
        chance=measured.chance[:, used],
        error=measured.error[used],
        same=measured.same[used],
    )
    count, allowed = int((part.moved != 0).sum()), float(part.chance.sum())
    if not part.ratio.size:
        return Total(LEAST_Z, 0, 0.0)
    if measured.error.any():
        distinct = np.unique(part.same).size
        spread = float(z_score(np.asarray((part.error**2).mean()), np.asarray(float(distinct))))
        return Total(max(spread, part.drift, LEAST_Z), count, allowed)
    z = LEAST_Z
    for direction, chance in zip((1, -1), part.chance, strict=True):
        of_row = chance.reshape(len(chance), -1).sum(axis=1)
        of_value = np.bincount(part.same.ravel(), chance.ravel())
        number = np.bincount(part.same.ravel())[: len(of_value)]
        # All numbers of a row may err together, and equal numbers do.
        variance = (number * of_value).sum() + (of_row**2).sum()
        z = max(z, count_z(int((part.moved == direction).sum()), float(of_row.sum()), float(variance)))
    return Total(z, count, allowed)


def group_z(measured: Measured, group: Int[np.ndarray, "..."], count: int) -> Float[np.ndarray, " G"]:
    """z-score of every group of numbers, less what the largest of so many is expected to be.

    Args:
      group: which group each number is in, with the tensor's shape; −1: in none.
      count: of groups.
    """
    at = group >= 0
    where = group[at]
    size = np.bincount(where, minlength=count)
    if measured.error.any():
        square = np.bincount(where, measured.error[at] ** 2, count) / np.maximum(size, 1)
        found = z_score(square, size.astype(float))
    else:
        moved = np.bincount(where, measured.moved[at] != 0, count)
        mean = np.bincount(where, measured.chance.sum(axis=0)[at], count)
        found = np.array([count_z(int(n), m, m + m * m) for n, m in zip(moved, mean.tolist(), strict=True)])
    return np.where(size > 0, found - expected_maximum(count), LEAST_Z)
