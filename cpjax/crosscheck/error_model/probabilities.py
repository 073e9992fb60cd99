"""Probabilities rounded to their format as the factor of v (§3.1), and those that become the least numbers (§3.2)."""

from collections.abc import Iterator
from functools import reduce

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.arithmetic import Arithmetic, times_few
from cpjax.crosscheck.error_model.row_covariance import Roundings, Shared, by_cell
from cpjax.crosscheck.error_model.terms import Direction, Systematic, Term
from cpjax.crosscheck.error_model.ties import variance_of, variance_of_sum

LEAST_CELLS = 16
"""Keys whose p becomes n times the least number err alike, for n up to this (§3.2)."""

LEAST_ERROR = 1 / 4
"""Of the least number: the typical error that the keys of such a cell have in common (§3.2)."""


def probability_terms(a: Arithmetic) -> Iterator[Term | Systematic]:
    """Sections 3.1 and 3.2."""
    sigma, is_summed = _sigma(a), a.has_rounded_sum

    def along(direction: Direction) -> Iterator[Shared]:
        roundings = Roundings(a.p_value, sigma * _pull(a, direction))
        yield Shared(by_cell(roundings, a.probability), variance_of_sum(roundings.sigma, a.ties))

    out = variance_of(sigma, a.ties, a.rows.value, a.rows.out, center=is_summed)
    of_lse = variance_of_sum(sigma, a.ties) if is_summed else 0.0
    yield Term("probabilities", "3.1", out, of_lse, is_common=True, along=along)
    if a.precision.probability == "float16":
        yield _least(a)
        lowest = reduce(np.minimum, (p for p, _ in a.p_choices))
        lost = np.where(lowest < a.probability.tiny / 2, a.rows.weight, 0.0)
        # A partly lost sum is uniform between 0 and all of it.
        yield Systematic(
            "probabilities that become 0",
            "3.2",
            np.abs(_moved(a, lost)),
            typical=1 / np.sqrt(3),
            lse=lost.sum(axis=1) if is_summed else 0.0,
        )


def _pull(a: Arithmetic, direction: Direction) -> Float[np.ndarray, "R S"]:
    """What an error of p does to the sum: in the numerator only, or in the row sum as well."""
    return direction.of_weight if a.has_rounded_sum else direction.of_value


def _moved(a: Arithmetic, lost: Float[np.ndarray, "R S"]) -> Float[np.ndarray, "R V"]:
    """What these errors of the weights do to `out` together."""
    of_sum = lost.sum(axis=1, keepdims=True) * a.rows.out if a.has_rounded_sum else 0.0
    return times_few(lost, a.rows.value) - of_sum


def _sigma(a: Arithmetic) -> Float[np.ndarray, "R S"]:
    """Standard deviation of each p's rounding, in units of the output; p = 1 is exact."""
    each = [worth * np.where(p == 1.0, 0.0, a.probability.spacing(p)) for p, worth in a.p_choices]
    return reduce(np.maximum, each) / np.sqrt(12)


def _least(a: Arithmetic) -> Term:
    """Keys whose p becomes n times the least number: those with the same n err together."""
    p, worth = a.p_choices[-1]  # beside a larger sink more of them are so small
    n = np.round(p / a.probability.tiny)  # hidden keys have p = 0
    cells = {int(k): np.where(n == k, worth, 0.0) for k in np.unique(n[(n >= 1) & (n <= LEAST_CELLS)])}
    error = LEAST_ERROR * a.probability.tiny

    def along(direction: Direction) -> Iterator[Shared]:
        of_rows = {k: error * (cell * _pull(a, direction)).sum(axis=1) for k, cell in cells.items()}
        together = np.zeros(LEAST_CELLS + 1)
        for k, of_row in of_rows.items():
            together[k] = of_row.sum()
        yield Shared(together, sum((of_row**2 for of_row in of_rows.values()), np.zeros(len(n))))

    out = sum(((error * _moved(a, cell)) ** 2 for cell in cells.values()), np.zeros_like(a.rows.out))
    of_lse = sum(((error * cell.sum(axis=1)) ** 2 for cell in cells.values()), np.zeros(len(n)))
    return Term("least probabilities", "3.2", out, of_lse if a.has_rounded_sum else 0.0, is_common=True, along=along)
