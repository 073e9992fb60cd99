"""By how much a mask is off: every number of a family of masks is tried at once.

With keys sorted by their thresholds, Σ p (v − out') and Σ p up to each key are cumulative sums, and their quotient is
by how much the output under that mask differs from what was handed over.
"""

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.diagnosis.guards import LARGEST_SQUARE
from cpjax.crosscheck.diagnosis.masks import NEVER, thresholds
from cpjax.crosscheck.diagnosis.measure import Measured

ELEMENTS = 2**22
"""Most terms of a row's sums; with very long keys not every column of the values is looked at."""

TIE = 1e-9
"""Numbers that fit as well as the best, but for float64: the one nearest to the correct mask is taken."""

LARGEST_MISFIT = 1e30
"""Of one row and number: beyond this it does not matter."""

MOST = 8
"""Wrong query chunks that are looked at."""


def best_number(wrong: list[Measured], family: str, right: float) -> float | None:
    """The number with which the family explains the wrong rows best.

    None if there is none but that of the correct mask. What shows all keys that can be shown is not asked about either.
    """
    found = [thresholds(one.sample, one.problem, family) for one in wrong[:MOST]]
    numbers = np.unique(np.concatenate([x[np.isfinite(x)] for x in found]))
    numbers = numbers[:-1][numbers[:-1] != right]
    if not len(numbers):
        return None
    misfit = np.zeros(len(numbers))
    for one, threshold in zip(wrong, found, strict=False):
        for row in range(len(threshold)):
            misfit += np.log1p(row_misfit(one, threshold[row], row, numbers))
    best = np.flatnonzero(misfit <= misfit.min() + TIE)
    return float(numbers[best[np.abs(numbers[best] - np.clip(right, -LARGEST_SQUARE, LARGEST_SQUARE)).argmin()]])


def row_misfit(
    one: Measured, threshold: Float[np.ndarray, " S"], row: int, numbers: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Mean of ((out under the mask − out handed over) / σ)² for each number."""
    sample = one.sample
    keys = np.flatnonzero(threshold < NEVER)
    keys = keys[np.argsort(threshold[keys], kind="stable")]
    step = max(1, -(-len(keys) * sample.value.shape[1] // ELEMENTS))
    out, sigma = sample.out[row, ::step], one.sigma[row, ::step]
    if not len(keys):
        # No mask of the family shows a key, so that the output is 0 under all of them.
        return np.full(len(numbers), min(float(((out / sigma) ** 2).mean()), LARGEST_MISFIT))
    score = sample.score[row, keys]
    sink = -np.inf if sample.logits.sink is None else sample.logits.sink[row]
    top = max(score.max(initial=0.0), sink)
    p, of_sink = np.exp(score - top), np.exp(sink - top)
    off = np.cumsum(p[:, None] * (sample.value[keys, ::step] - out), axis=0) - of_sink * out
    total = np.cumsum(p) + of_sink
    last = np.searchsorted(threshold[keys], numbers, side="right") - 1
    off, total = off[np.maximum(last, 0)], total[np.maximum(last, 0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        off = np.where((last >= 0)[:, None] & (total > 0)[:, None], off / total[:, None], -out)
    return np.minimum(((off / sigma) ** 2).mean(axis=1), LARGEST_MISFIT)
