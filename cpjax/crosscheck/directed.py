"""Tests for one particular fault each, where the spread of all errors together would not notice it (§7).

The score test (Rao, 1948): if a fault of size ε moves the output by ε·g, the statistic Σ error·g/σ² is the most
powerful one for small ε. Its variance under correct arithmetic follows from the same error model, correlations of the
errors within a row included.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model import ErrorModel, Expected


class Score(NamedTuple):
    """Per row: the score statistic, its variance under correct arithmetic, and its information (Σ g²/σ²)."""

    value: Float[np.ndarray, " R"]
    variance: Float[np.ndarray, " R"]
    information: Float[np.ndarray, " R"]


def scale_score(
    model: ErrorModel, expected: Expected, error: Float[np.ndarray, "R V"], lse_error: Float[np.ndarray, " R"] | None
) -> Score:
    """Is the scale off? With scale·(1 + ε): d out/dε = Σ A_j s_j (v_j − out), d lse/dε = Σ A_j s_j."""
    rows = model.rows
    s = np.where(rows.seen, rows.score, 0.0)
    weighted = rows.weight * s
    mean_score = weighted.sum(axis=1)
    g = weighted @ rows.value - mean_score[:, None] * rows.out
    per_out = g * _inverse_square(expected.sigma)
    per_lse = np.zeros(len(g)) if lse_error is None else mean_score * _inverse_square(expected.lse_sigma)
    value = (error * per_out).sum(axis=1) + (0.0 if lse_error is None else lse_error * per_lse)
    information = (g * per_out).sum(axis=1) + mean_score * per_lse
    return Score(value, model.variance_along(per_out, per_lse), information)


def key_scores(
    model: ErrorModel,
    expected: Expected,
    error: Float[np.ndarray, "R V"],
    lse_error: Float[np.ndarray, " R"] | None,
    inflation: Float[np.ndarray, " R"],
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " S"], Float[np.ndarray, " S"]]:
    """Did one key enter with another weight? With weight (1 + ε) for key j: d out_i/dε = A_ij (v_j − out_i).

    Returns the score of each key, summed over the rows, its variance, and its information; ε is estimated by
    score / information. `inflation` of each row is how much larger the variance of a sum of its errors may be than if
    they were independent; 0 for rows that do not count.
    """
    rows = model.rows
    inverse = _inverse_square(expected.sigma)
    pull = error * inverse
    value = rows.weight * (pull @ rows.value.T - (pull * rows.out).sum(axis=1, keepdims=True))
    square = (
        inverse @ (rows.value**2).T
        - 2 * (inverse * rows.out) @ rows.value.T
        + (inverse * rows.out**2).sum(axis=1, keepdims=True)
    )
    information = rows.weight**2 * np.maximum(square, 0.0)
    if lse_error is not None:
        of_lse = _inverse_square(expected.lse_sigma)[:, None]
        value = value + rows.weight * lse_error[:, None] * of_lse
        information = information + rows.weight**2 * of_lse
    counts = inflation > 0
    variance = inflation @ information
    return counts @ value, variance, counts @ information


def on_bfloat16_lattice(x: Float[np.ndarray, "..."]) -> np.ndarray:
    """Which FP16 numbers are BF16 numbers as well: normal, and the three last significand bits are zero."""
    half = x.astype(np.float16)
    return ((half.view(np.uint16) & 0b111) == 0) & (np.abs(x) >= 2.0**-14)


def _inverse_square(sigma: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return np.divide(1.0, sigma**2, out=np.zeros_like(sigma), where=sigma > 0)
