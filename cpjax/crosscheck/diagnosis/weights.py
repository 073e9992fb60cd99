"""With which weight each key/value chunk entered a query chunk, from its outputs alone.

If chunk c enters with weight w_c instead of 1, out' = Σ w_c B_c / Σ w_c a_c, so Σ w_c (B_c − a_c out') = 0: w is the
smallest singular vector, up to a factor. lse' fixes the factor, Σ w_c a_c = exp(lse' − lse); without it the median
weight is taken to be 1. A sum that was never rescaled is not an average, and obeys out' = Σ w_c B_c instead.
"""

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.diagnosis.dictionary import Block, Fault
from cpjax.crosscheck.diagnosis.guards import LARGEST_LOG, LEAST_SUM
from cpjax.crosscheck.diagnosis.measure import MOST_Z, Measured
from cpjax.crosscheck.exact.attention import SINK

ROUGH_LSE_SIGMA, LEAST_LSE_SIGMA = 2.0**-20, 1e-9
"""σ of lse is taken to be at least this: where all weights are fitted at once, and where one is."""

LEAST_TOTAL = 1e-12
"""A weighted sum of shares of 1 is taken to be at least this, to be divided by."""

UNSURE = 0.05
"""A weight with a larger standard deviation is not determined."""


def chunk_weights(measured: Measured) -> Float[np.ndarray, " C"]:
    """One weight for each key/value chunk; NaN where the chunk is hidden, too light to tell, or nothing fits."""
    rows, sample = measured.model.rows, measured.sample
    weights = np.full(int(sample.chunk.max()) + 1, np.nan)
    heavy = np.flatnonzero(rows.chunk_weight.max(axis=0) > 0)
    is_key = rows.chunks[heavy] != SINK
    if not is_key.any():
        return weights
    sigma = measured.sigma  # roundings of the parts of a reweighted sum are at most as much larger as the sum itself
    a, part = rows.chunk_weight[:, heavy], rows.chunk_part[:, heavy]
    columns = (part - a[..., None] * sample.out[:, None]) / sigma[:, None]
    matrix = columns.swapaxes(1, 2).reshape(-1, len(heavy))
    fits = [_homogeneous(matrix, a, sample.out.shape[1])]
    if sample.lse is not None:
        total = np.exp(np.clip(sample.lse - rows.lse, -LARGEST_LOG, LARGEST_LOG))
        of_lse = np.maximum(measured.expected.lse_sigma, ROUGH_LSE_SIGMA) * total
        fits.insert(0, _least_squares(np.vstack([matrix, a / of_lse[:, None]]), len(matrix), total / of_lse))
    # The sink adds nothing to a sum that was never rescaled.
    plain = (part[:, is_key] / sigma[:, None]).swapaxes(1, 2).reshape(-1, int(is_key.sum()))
    fits = [(w[is_key], deviation[is_key], z) for w, deviation, z in fits]
    fits.append(_least_squares(plain, 0, (sample.out / sigma).ravel()))
    for w, deviation, z in fits:
        if z <= MOST_Z:
            weights[rows.chunks[heavy[is_key]]] = np.where(deviation <= UNSURE, w, np.nan)
            break
    return weights


def _least_squares(
    matrix: np.ndarray, zeros: int, right: np.ndarray
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"], float]:
    """Weights, their standard deviations, and the residual in standard deviations; the first `zeros` rows equal 0."""
    target = np.concatenate([np.zeros(zeros), right])
    w, _, _, singular = np.linalg.lstsq(matrix, target, rcond=None)
    residual = matrix @ w - target
    z = float(np.sqrt((residual**2).sum() / max(len(target) - len(w), 1)))
    return w, _deviation(matrix, singular), z


def _homogeneous(matrix: np.ndarray, a: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, float]:
    count = matrix.shape[1]
    # Of two only a ratio can be seen, and their median is neither; fewer equations than weights leave some open.
    if count < 3 or len(matrix) < count:
        return np.ones(count), np.full(count, np.inf), float("inf")
    _, singular, vectors = np.linalg.svd(matrix, full_matrices=False)
    w = vectors[-1] / (np.median(vectors[-1]) or np.nan)
    if not np.isfinite(w).all() or singular[-2] == 0:
        return np.ones(count), np.full(count, np.inf), float("inf")
    total = np.repeat(np.maximum(np.abs(a @ w), LEAST_TOTAL), width)
    z = float(np.sqrt(((matrix @ w / total) ** 2).sum() / max(len(matrix) - count, 1)))
    # Errors of w: all directions but w itself, each as uncertain as its singular value is small.
    return w, _spread(vectors[:-1], singular[:-1]) * np.linalg.norm(w), z


def _deviation(matrix: np.ndarray, singular: np.ndarray) -> np.ndarray:
    if len(matrix) < matrix.shape[1]:  # some directions have no equation
        return np.full(matrix.shape[1], np.inf)
    _, _, vectors = np.linalg.svd(matrix, full_matrices=False)
    return _spread(vectors, singular)


def _spread(vectors: np.ndarray, singular: np.ndarray) -> np.ndarray:
    """Standard deviation of each weight; infinite where nothing depends on it."""
    with np.errstate(over="ignore"):
        return np.sqrt(((vectors / np.maximum(singular[:, None], LEAST_SUM)) ** 2).sum(axis=0))


def with_weight(measured: Measured, chunks: tuple[int, ...], cost: float) -> Fault:
    """The fault that these chunks enter with the weight, common to them, that fits best."""
    weight = _common(measured, list(chunks))
    changes = tuple((c, Block(c, "visible", max(weight, 0.0))) for c in chunks)
    return Fault("weight", chunks, changes=changes, number=weight, cost=cost)


def _common(measured: Measured, chunks: list[int]) -> float:
    """Linear least squares, weighted by 1/σ."""
    sample, expected = measured.sample, measured.expected
    sums = sample.sums["visible"]
    mass, part = sums[0].sum(axis=1) + sample.sink_mass, sums[1].sum(axis=1)
    a, b = sums[0][:, chunks].sum(axis=1), sums[1][:, chunks].sum(axis=1)
    # The sums are in units of exp(base), so the deviation of Σ w (B − a out′) is that of out times the whole mass.
    # A row that sees nothing says nothing.
    sigma = np.maximum(expected.sigma, measured.floor) * np.where(mass > LEAST_SUM, mass, np.inf)[:, None]
    x = ((b - a[:, None] * sample.out) / sigma).ravel()
    y = ((mass[:, None] * sample.out - part) / sigma).ravel()
    if sample.lse is not None:
        total = np.exp(np.minimum(sample.lse - sample.base, LARGEST_LOG))
        of_lse = np.maximum(expected.lse_sigma, LEAST_LSE_SIGMA) * total
        x, y = np.append(x, a / of_lse), np.append(y, (total - mass) / of_lse)
    square = float(x @ x)
    return 1.0 + float(x @ y) / square if square > 0 else 1.0
