"""Tests for one particular fault each, where the spread of all errors together would not notice it (§7).

The score test (Rao, 1948): if a fault of size ε moves the output by ε·g, the statistic Σ error·g/σ² is the most
powerful one for small ε. Its variance under correct arithmetic follows from the same error model, correlations of the
errors within a row included.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.error_model.model import ErrorModel, Expected
from cpjax.crosscheck.error_model.row_covariance import Shared

OWN_ERROR = 1e-12
"""Of a value's square: what differs from the output by less than a millionth tells the oracle's rounding only."""

LEAST_NORMAL = 2.0**-14
"""The least normal number of FP16: below it the significand is shorter, and says nothing of BF16."""


class Score(NamedTuple):
    """A score statistic, per row or per key, and what correct arithmetic makes of it."""

    value: np.ndarray
    variance: np.ndarray
    """Of its random part."""
    mean: np.ndarray
    """What systematic errors of known sign add to it: the middle between nothing and the most."""
    bias: np.ndarray
    """The most by which what systematic errors add to it differs from `mean`."""
    information: np.ndarray
    """Σ g²/σ²; value / information estimates the size of the fault."""


def scale_score(
    model: ErrorModel,
    expected: Expected,
    error: Float[np.ndarray, "R V"],
    lse_error: Float[np.ndarray, " R"] | None,
    unjudged: Bool[np.ndarray, " R"],
) -> tuple[Score, list[Shared]]:
    """Is the scale off? With scale·(1 + ε): d out/dε = Σ A_j s_j (v_j − out), d lse/dε = Σ A_j s_j. Per row.

    s_j is scale · q·k, times 1 − tanh² where there is a softcap, and 0 for the sink.

    Rows that are `unjudged` count nothing. Returned besides is the part of the variance that rows may share (§3.10).
    """
    g, mean_score = model.rows.of_scale
    g, mean_score = np.where(unjudged[:, None], 0.0, g), np.where(unjudged, 0.0, mean_score)
    per_out = g * _inverse_square(expected.sigma)
    per_lse = np.zeros(len(g)) if lse_error is None else mean_score * _inverse_square(expected.lse_sigma)
    value = (error * per_out).sum(axis=1) + (0.0 if lse_error is None else lse_error * per_lse)
    mean = (per_out * model.mean).sum(axis=1) + per_lse * model.lse_mean
    bias = (np.abs(per_out) * model.drift).sum(axis=1) + np.abs(per_lse) * model.lse_drift
    information = (g * per_out).sum(axis=1) + mean_score * per_lse
    variance, shared = model.variance_along(per_out, per_lse)
    return Score(value, variance, mean, bias, information), shared


def key_scores(
    model: ErrorModel,
    expected: Expected,
    error: Float[np.ndarray, "R V"],
    lse_error: Float[np.ndarray, " R"] | None,
    inflation: Float[np.ndarray, " R"],
) -> Score:
    """Did one key enter with another weight? With weight (1 + ε) for key j: d out_i/dε = A_ij (v_j − out_i).

    Per key, summed over the rows. `inflation` of each row is how much larger the variance of a sum of its errors may be
    than if they were independent; 0 for rows that do not count.
    """
    rows, counts = model.rows, inflation > 0
    weight = rows.weight * counts[:, None]
    inverse = _inverse_square(expected.sigma)
    pull = error * inverse
    # From nothing: one more product a row would cost more than a key's test gains by the mean.
    drag = (model.drift + np.abs(model.mean)) * inverse
    of_value, of_bias = -(pull * rows.out).sum(axis=1), (drag * np.abs(rows.out)).sum(axis=1)
    size = inverse @ rows.square.T + (inverse * rows.out**2).sum(axis=1, keepdims=True)
    square = size - 2 * (inverse * rows.out) @ rows.value.T
    information = np.maximum(square, OWN_ERROR * size)
    if lse_error is not None:
        of_lse = _inverse_square(expected.lse_sigma)
        of_value = of_value + lse_error * of_lse
        of_bias = of_bias + (model.lse_drift + np.abs(model.lse_mean)) * of_lse
        information += of_lse[:, None]
    information *= weight**2
    # Summed over the rows first: there are fewer columns than rows in a tile.
    value = ((weight.T @ pull) * rows.value).sum(axis=1) + of_value @ weight
    bias = ((weight.T @ drag) * rows.size).sum(axis=1) + of_bias @ weight
    return Score(value, inflation @ information, np.zeros_like(value), bias, information.sum(axis=0))


def z_score(score: Score) -> np.ndarray:
    """A score as a z-score, after what systematic errors explain is taken off; 0 where nothing was measured."""
    beside = score.value - score.mean
    excess = np.sign(beside) * np.maximum(np.abs(beside) - score.bias, 0.0)
    return np.divide(excess, np.sqrt(score.variance), out=np.zeros_like(excess), where=score.variance > 0)


def on_bfloat16_lattice(x: Float[np.ndarray, "..."]) -> np.ndarray:
    """Which FP16 numbers are BF16 numbers as well: normal, and the three last significand bits are zero."""
    half = x.astype(np.float16)
    return ((half.view(np.uint16) & 0b111) == 0) & (np.abs(x) >= LEAST_NORMAL)


def _inverse_square(sigma: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return np.divide(1.0, sigma**2, out=np.zeros_like(sigma), where=sigma > 0)
