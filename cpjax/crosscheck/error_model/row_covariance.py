"""Rounding errors that rows share (§3.10): the same number is rounded alike wherever it turns up.

Few different logits give few different probabilities; a sink gives all rows nearly the same output. A sum over rows of
such errors has the variance Σ_cells (Σ_{errors in the cell} c)², not Σ c². A cell is an eighth of a spacing of the
format: numbers in one cell have nearly the same rounding error.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.exact.formats import Format, doublings

EIGHTH = 8
"""Cells of a spacing."""

DIGITS = 12
"""Formats of more digits are not followed: their cells are too many, and their errors too small to be shared.

Twice as many would need a hundred gigabytes; a test pins the half, at which FP16 is not followed any more.
"""


class Roundings(NamedTuple):
    """Numbers that are rounded, and what the standard deviation of each rounding does to its output."""

    value: Float[np.ndarray, "R *more"]
    sigma: Float[np.ndarray, "R *more"]


def cells(value: Float[np.ndarray, "*shape"], fmt: Format) -> Int[np.ndarray, "*shape"]:
    """The cell of each number, counted along the number line of the format from 0; odd for negative numbers.

    >>> from cpjax.crosscheck.exact.formats import FORMATS
    >>> cells(np.array([0.0, 2.0**-24, 1.0, 1 + 2.0**-13, -1.0]), FORMATS["float16"]) // 2
    array([     0,      8, 122880, 122881, 122880])
    """
    spacing = fmt.spacing(value)
    eighths = np.abs(value)
    eighths *= EIGHTH
    eighths /= spacing
    cell = np.rint(eighths, out=eighths).astype(np.int64)
    cell += doublings(spacing, fmt.tiny) << (fmt.digits + 2)
    cell <<= 1
    cell += value < 0
    return cell


def distinct(out: Float[np.ndarray, "R V"], fmt: Format) -> Int[np.ndarray, " R"]:
    """How many outputs of each row are rounded differently: those that lie in different eighths of a spacing.

    >>> from cpjax.crosscheck.exact.formats import FORMATS
    >>> distinct(np.array([[1.0, 1.0, 2.0], [15000.0, 15000.1, 15000.2]]), FORMATS["float16"])
    array([2, 1])
    >>> distinct(np.array([[0.0, 0.0, 1.0]]), FORMATS["float64"])
    array([2])
    """
    # An eighth of float64's least number is 0, and nothing can be divided by that.
    eighth = np.maximum(fmt.spacing(out) / EIGHTH, np.finfo(np.float64).smallest_subnormal)
    return 1 + (np.diff(np.sort(np.round(out / eighth) * eighth, axis=1), axis=1) != 0).sum(axis=1)


def by_cell(roundings: Roundings, fmt: Format) -> Float[np.ndarray, " c"]:
    """What the roundings of each cell do together; of formats with more than `DIGITS` digits, nothing."""
    if fmt.digits > DIGITS:
        return np.zeros(1)
    return np.bincount(cells(roundings.value, fmt).ravel(), roundings.sigma.ravel(), minlength=1)


class Shared(NamedTuple):
    """One sort of roundings in some rows: what those of each cell do together, and their variance row by row."""

    together: Float[np.ndarray, " c"]
    variance: Float[np.ndarray, " R"]
    """As if rows were independent."""


def merged(some: list[Shared], more: list[Shared]) -> list[Shared]:
    """The same sorts of roundings in more rows; cells that one of them has not are 0."""
    if not some:
        return more
    both = []
    for a, b in zip(some, more, strict=True):
        short, long = sorted((a.together, b.together), key=len)
        together = long.copy()
        together[: len(short)] += short
        both.append(Shared(together, np.array([a.variance.sum() + b.variance.sum()])))
    return both


def excess(shared: list[Shared]) -> float:
    """By how much the variance of a sum over rows is larger than if rows were independent."""
    return float(sum(max((part.together**2).sum() - part.variance.sum(), 0.0) for part in shared))
