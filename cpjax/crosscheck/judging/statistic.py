"""From errors in units of their standard deviation to a number whose false-alarm probability is known (§4).

r_i is the mean of (error/σ)² over row i. If all errors were independent, Σ r_i would be χ². They are not: outputs of a
row share the errors of its probabilities and scores, and equal rows are one row. So each row counts with its effective
number of independent errors ν_i, and equal rows count once.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

SLACK = 2.0
"""Variance that a correct result may have, over the model's. Tuned on the tuning set (docs/trial.md)."""

LIMIT = 6.0
"""z-score beyond which a test fails: one in 10⁹ for a normal variable."""


LEAST_PROBABILITY = 1e-300
"""Less is no more unlikely than this: its z-score is 37. Twice or half as much is as far beyond `LIMIT`, so no
test can pin it."""


class RowErrors(NamedTuple):
    """One number per judged row (or per row's lse)."""

    mean_square: Float[np.ndarray, " R"]
    """Mean of (error/σ)² over the row."""
    dof: Float[np.ndarray, " R"]
    """Effective number of independent errors, ν."""
    same: Int[np.ndarray, " R"]
    """Rows with the same number are equal rows."""


def effective_dof(distinct: Int[np.ndarray, " R"], share: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """ν of `distinct` errors of which a `share` of the variance is common to all: D / (1 + (D − 1) share²)."""
    return distinct / (1 + np.maximum(distinct - 1, 0) * share**2)


def z_score(mean_square: Float[np.ndarray, "..."], dof: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """χ²_ν/ν as a z-score, by Wilson and Hilferty's cube root (PNAS 17, 1931); −inf for ν = 0."""
    dof = np.asarray(dof, float)
    spread = 2 / (9 * np.where(dof > 0, dof, 1.0))
    value = (np.cbrt(mean_square) - 1 + spread) / np.sqrt(spread)
    return np.where(dof > 0, value, -np.inf)


def distinct_rows(errors: RowErrors) -> RowErrors:
    """Equal rows as one row with their mean, rows without any dof left out."""
    used = errors.dof > 0
    same, group = np.unique(errors.same[used], return_inverse=True)
    count = np.bincount(group, minlength=len(same))
    mean = np.bincount(group, errors.mean_square[used], len(same)) / np.maximum(count, 1)
    dof = np.bincount(group, errors.dof[used], len(same)) / np.maximum(count, 1)
    return RowErrors(mean, dof, same)


def spread_z_score(errors: RowErrors) -> float:
    """All rows together: is the spread of the errors larger than rounding explains?"""
    rows = distinct_rows(errors)
    total = rows.dof.sum()
    if total == 0:
        return -np.inf
    mean = (rows.dof * rows.mean_square).sum() / total
    return float(z_score(np.asarray(mean / SLACK), np.asarray(total)))


def worst_row_z_score(errors: RowErrors) -> float:
    """The worst row, less what the largest of so many is expected to be.

    Of equal rows each counts by itself: a single wrong one must not hide behind the mean of the others.
    """
    used = errors.dof > 0
    if not used.any():
        return -np.inf
    z_scores = z_score(errors.mean_square[used] / SLACK, errors.dof[used])
    return float(z_scores.max() - expected_maximum(len(z_scores)))


def expected_maximum(n: int) -> float:
    """About the largest of n standard normal variables: √(2 ln n)."""
    return float(np.sqrt(2 * np.log(max(n, 1))))


def binomial_z_score(successes: int, trials: int, probability: float) -> float:
    """How unlikely at least so many successes are, as a z-score."""
    if trials == 0 or successes == 0:
        return -np.inf
    from scipy import special  # slow to import; scipy.stats gives the same bits, and is slower still

    at_least = special.betainc(successes, trials - successes + 1, probability)
    return float(-special.ndtri(max(at_least, LEAST_PROBABILITY)))
