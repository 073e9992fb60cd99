"""Scores that are off move weight between the keys: Σ A_j δs_j (v_j − out) (§3.5), and the rescales (§3.6)."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.arithmetic import Arithmetic
from cpjax.crosscheck.error_model.row_covariance import Shared
from cpjax.crosscheck.error_model.running_max import Moved, RunningMax, tile_sizes
from cpjax.crosscheck.error_model.terms import Direction, Systematic, Term
from cpjax.crosscheck.error_model.ties import sum_of_squares, variance_of, variance_of_sum

OF_SCORE, OF_DISTANCE, OF_PRODUCT = 2.0, 3.0, 1.0
"""Unit roundoffs of |s|, of the distance to the maximum and of |q||k|: a score is off by so much, uniformly (§3.5)."""

OF_SCALE = 2.0
"""Unit roundoffs by which the number that multiplies every q·k may be off: scale and scale · log2(e) are rounded, or
√scale twice (§3.5)."""


def score_terms(a: Arithmetic) -> Iterator[Term | Systematic]:
    """Sections 3.5 and 3.6."""
    if not a.has_rounded_scores:
        yield _scores(a, _computed_variance(a))
        yield _factor(a)
        return
    spacing, scaling = a.score.spacing(_score(a)), _scaling_sigma(a)
    raw = (a.scale_size * a.score.spacing(_score(a) / a.scale_size)) ** 2 / 12
    variance = _computed_variance(a) + raw + scaling**2
    maxima = []
    if a.has_rounded_distances:
        maxima = [RunningMax(a.rows, a.score, spacing, size) for size in tile_sizes(a.rows)]
        # In the largest tiles the maximum is furthest from each score, and the difference has its widest spacing.
        variance = variance + maxima[-1].own_sigma ** 2
    scores = _scores(a, variance)
    yield scores
    yield _scaling(a, scaling, scores)
    if maxima:
        yield _maxima(a, maxima)


def _score(a: Arithmetic) -> Float[np.ndarray, "R S"]:
    return np.where(a.rows.seen, a.rows.score, 0.0)


def _computed_variance(a: Arithmetic) -> Float[np.ndarray, "R S"]:
    """What the compute format does to each score."""
    s, below = np.abs(_score(a)), np.abs(np.where(a.rows.seen, a.rows.below, 0.0))
    computed = a.eps * (OF_SCORE * s + OF_DISTANCE * below + OF_PRODUCT * a.rows.norms)
    # A dot product that is added up term after term rounds a partial sum as large as itself each time.
    return (computed**2 + a.head_dim * (a.eps * s) ** 2) / 3


def _scores(a: Arithmetic, variance: Float[np.ndarray, "R S"]) -> Term:
    """Every key's own error; `variance` is that of its score."""
    moved = a.rows.weight * np.where(a.rows.seen, np.sqrt(variance), 0.0)

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield variance_of_sum(moved * direction.of_weight, a.score_ties)

    out = variance_of(moved, a.score_ties, a.rows.value, a.rows.out, center=True)
    return Term("scores", "3.5", out, variance_of_sum(moved, a.score_ties), is_common=True, along=along)


def _factor(a: Arithmetic) -> Systematic:
    """The number that multiplies q·k, rounded once for all keys and rows: it errs as a scale that is off does."""
    of_lse = (a.rows.weight * _score(a)).sum(axis=1)
    most = _pulled(a, a.rows.weight * _score(a), slice(None))
    size = OF_SCALE * a.eps
    # It is as likely to be anywhere in its range.
    return Systematic("factor of q·k", "3.5", size * np.abs(most), typical=1 / np.sqrt(3), lse=size * np.abs(of_lse))


def _scaling_sigma(a: Arithmetic) -> Float[np.ndarray, "R S"]:
    """Standard deviation of the rounding of scale · q·k; by a power of two nothing is lost."""
    spacing = a.score.spacing(_score(a))
    is_exact = (np.frexp(a.scale_size)[0] == 0.5) & (spacing > a.score.tiny)
    return np.where(is_exact, 0.0, spacing / np.sqrt(12))


def _scaling(a: Arithmetic, sigma: Float[np.ndarray, "R S"], scores: Term) -> Term:
    """The error of scale · q·k is known where the rounded q·k is. Where the known errors do more together than `scores`
    has for them, this term is the difference.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product = a.scale_size * a.score.round(_score(a) / a.scale_size)
        error = a.score.round(product) - product
    known = a.rows.weight * np.where(np.isfinite(error), error, 0.0)

    def more_than_independent(away: Float[np.ndarray, "R S"] | float) -> tuple[np.ndarray, np.ndarray]:
        together = (known * away).sum(axis=1)
        return together, np.maximum(together**2 - ((a.rows.weight * sigma * away) ** 2).sum(axis=1), 0.0)

    def along(direction: Direction) -> Iterator[Shared]:
        together, variance = more_than_independent(direction.of_weight)
        yield Shared(together.sum(keepdims=True), variance)

    together = _pulled(a, known, slice(None)) ** 2
    independent = sum_of_squares(a.rows.weight * sigma, a.rows.value, a.rows.out)
    is_more = together.sum(axis=1, keepdims=True) > independent.sum(axis=1, keepdims=True)
    # In a column where the known errors cancel, less is left than `scores` has.
    excess = np.maximum(np.where(is_more, together - independent, 0.0), -scores.out)
    return Term("scaling", "3.5", excess, more_than_independent(1.0)[1], is_common=True, along=along)


def _maxima(a: Arithmetic, maxima: list[RunningMax]) -> Term:
    """What keys lose alike as maxima are subtracted (§3.5) and replaced (§3.6): the most of any size of tile."""

    def most(moved: Moved) -> Float[np.ndarray, "R m"]:
        return np.max([one.variance(moved) for one in maxima], axis=0)

    def of_sum(pull: Float[np.ndarray, "R S"]) -> Float[np.ndarray, " R"]:
        return most(lambda error, keys: (pull[:, keys] * error).sum(axis=1, keepdims=True))[:, 0]

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield of_sum(a.rows.weight * direction.of_weight)

    out = most(lambda error, keys: _pulled(a, a.rows.weight[:, keys] * error, keys))
    return Term("maxima and rescales", "3.6", out, of_sum(a.rows.weight), is_common=True, along=along)


def _pulled(a: Arithmetic, moved: Float[np.ndarray, "R n"], keys: slice) -> Float[np.ndarray, "R V"]:
    """What weights of these keys that are off by `moved` do to the output: Σ_j moved_j (v_j − out)."""
    return moved @ a.rows.value[keys] - moved.sum(axis=1, keepdims=True) * a.rows.out
