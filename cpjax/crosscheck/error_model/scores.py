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

OF_TANH = 4.0
"""Of softcap: a quotient, a tanh, which may be 2 sigmoid(2x) − 1, and a product (§3.11)."""

OF_ADDED = 3.0
"""Of Σ |summand|: slope · distance, its addition, and that of a bias; of the sink, and its distance (§3.11)."""


def score_terms(a: Arithmetic) -> Iterator[Term | Systematic]:
    """Sections 3.5 and 3.6."""
    if not a.has_rounded_scores:
        yield _scores(a, _computed_variance(a))
        yield _factor(a, *a.rows.of_scale)
        if a.has_half_factors:
            yield _cut_off(a, *a.rows.of_scale)
        return
    spacing, scaling = a.score.spacing(_score(a)), _scaling_sigma(a) * a.rows.slope
    raw = (a.rows.slope * a.scale_size * a.score.spacing(a.rows.product / a.scale_size)) ** 2 / 12
    variance = _computed_variance(a) + raw + scaling**2 + _stages_variance(a)
    maxima = []
    if a.has_rounded_distances:
        starts = [False, True] if a.rows.has_sink else [False]
        maxima = [RunningMax(a.rows, a.score, spacing, size, start) for start in starts for size in tile_sizes(a.rows)]
        # In the largest tiles the maximum is furthest from each score, and the difference has its widest spacing.
        own = np.max([one.own_sigma for one in maxima if one.tile == maxima[-1].tile], axis=0)
        variance = variance + own**2
    scores = _scores(a, variance)
    yield scores
    yield _scaling(a, scaling, scores)
    if maxima:
        yield _maxima(a, maxima)
        if a.rows.has_sink:
            yield _last_rescale(a)


def _score(a: Arithmetic) -> Float[np.ndarray, "R S"]:
    return np.where(a.rows.seen, a.rows.score, 0.0)


def _computed_variance(a: Arithmetic) -> Float[np.ndarray, "R S"]:
    """What the compute format does to each score."""
    rows = a.rows
    x, below = np.abs(rows.product), np.abs(np.where(rows.seen, rows.furthest_below, 0.0))
    computed = rows.slope * (OF_SCORE * x + OF_PRODUCT * rows.norms) + OF_DISTANCE * below
    if rows.logits.softcap is not None:
        computed = computed + OF_TANH * rows.logits.softcap
    computed = computed + OF_ADDED * added_size(a)
    # A dot product that is added up term after term rounds a partial sum as large as itself each time.
    return (computed**2 + a.head_dim * (rows.slope * x) ** 2) * (a.eps**2 / 3)


def _stages_variance(a: Arithmetic) -> Float[np.ndarray, "R S"] | float:
    """What the format of the scores does to each after scale · q·k: softcap, ALiBi, bias, sink (§3.11)."""
    rows, logits, keys = a.rows, a.rows.logits, slice(a.rows.key_count)
    product, capped = rows.product[:, keys], rows.capped[:, keys]
    steps = []
    if logits.softcap is not None:
        slope = np.asarray(rows.slope)[:, keys]
        steps.append(slope * logits.softcap * a.score.spacing(product / logits.softcap))
        steps += [logits.softcap * a.score.spacing(capped / logits.softcap), a.score.spacing(capped)]
    sums = [*logits.shifted(capped), *([] if logits.alibi_size is None else [logits.alibi_size])]
    most = a.score.largest  # what lies beyond is −inf, and has no weight
    steps += [a.score.spacing(np.clip(x, -most, most)) for x in sums]
    variance = sum((step**2 for step in steps), np.zeros_like(product)) / 12
    if not rows.has_sink:
        return variance
    sink = rows.score[:, -1:]
    of_sink = [a.score.spacing(np.clip(x, -most, most)) ** 2 / 12 for x in (sink, _from_top(a))]
    return np.hstack([variance, sum(of_sink, np.zeros_like(sink))])


def added_size(a: Arithmetic) -> Float[np.ndarray, "R S"] | float:
    """Σ of the magnitudes that are added to each score after the softcap; of the sink, itself and its distance."""
    rows, keys = a.rows, slice(a.rows.key_count)
    size = rows.logits.added_size(rows.capped[:, keys])
    if not rows.has_sink:
        return 0.0 if size is None else size
    size = np.zeros_like(rows.score[:, keys]) if size is None else size
    return np.hstack([size, np.abs(rows.score[:, -1:]) + np.abs(_from_top(a))])


def _from_top(a: Arithmetic) -> Float[np.ndarray, "R 1"]:
    """How far the sink lies from the largest score."""
    return a.rows.score[:, -1:] - a.rows.chunk_max.max(axis=1, keepdims=True)


def _scores(a: Arithmetic, variance: Float[np.ndarray, "R S"]) -> Term:
    """Every key's own error; `variance` is that of its score."""
    moved = a.rows.weight * np.sqrt(variance)

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield variance_of_sum(moved * direction.of_weight, a.score_ties)

    out = variance_of(moved, a.score_ties, a.rows.value, a.rows.out, center=True)
    return Term("scores", "3.5", out, variance_of_sum(moved, a.score_ties), is_common=True, along=along)


def _factor(a: Arithmetic, of_out: Float[np.ndarray, "R V"], of_lse: Float[np.ndarray, " R"]) -> Systematic:
    """The number that multiplies q·k, rounded once for all keys and rows."""
    size = OF_SCALE * a.eps
    # It is as likely to be anywhere in its range.
    return Systematic("factor of q·k", "3.5", size * np.abs(of_out), typical=1 / np.sqrt(3), lse=size * np.abs(of_lse))


def _cut_off(a: Arithmetic, of_out: Float[np.ndarray, "R V"], of_lse: Float[np.ndarray, " R"]) -> Systematic:
    """Products of half inputs are added by matrix units, which cut off: as with a scale that is too small."""
    of_out, of_lse = (float(a.cut_off(a.head_dim)) * x for x in (of_out, of_lse))
    return Systematic(
        "products cut off",
        "3.5",
        np.abs(of_out),
        typical=1 / np.sqrt(3),
        lse=np.abs(of_lse),
        mean=-of_out / 2,
        lse_mean=-of_lse / 2,
    )


def _scaling_sigma(a: Arithmetic) -> Float[np.ndarray, "R S"]:
    """Standard deviation of the rounding of scale · q·k; by a power of two nothing is lost."""
    spacing = a.score.spacing(a.rows.product)
    is_exact = (np.frexp(a.scale_size)[0] == 0.5) & (spacing > a.score.tiny)
    return np.where(is_exact, 0.0, spacing / np.sqrt(12))


def _scaling(a: Arithmetic, sigma: Float[np.ndarray, "R S"], scores: Term) -> Term:
    """The error of scale · q·k is known where the rounded q·k is. Where the known errors do more together than `scores`
    has for them, this term is the difference.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product = a.scale_size * a.score.round(a.rows.product / a.scale_size)
        error = a.rows.slope * (a.score.round(product) - product)
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


def _last_rescale(a: Arithmetic) -> Term:
    """A sink that a kernel takes in at its end, and that is the new maximum: all keys are rescaled once more, by one
    rounded difference (§3.11).
    """
    weight = a.rows.weight.copy()
    weight[:, a.rows.key_count :] = 0
    top = np.where(a.rows.seen, a.rows.score, -np.inf)[:, : a.rows.key_count].max(axis=1, initial=-np.inf)
    rise = np.where(np.isneginf(top), 0.0, np.maximum(a.rows.score[:, -1] - top, 0.0))
    step = np.where(rise > 0, a.score.spacing(np.minimum(rise, a.score.largest)), 0.0) / np.sqrt(12)
    moved = weight * step[:, None]

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield (moved * direction.of_weight).sum(axis=1) ** 2

    out = _pulled(a, moved, slice(None)) ** 2
    return Term("last rescale", "3.11", out, moved.sum(axis=1) ** 2, is_common=True, along=along)


def _pulled(a: Arithmetic, moved: Float[np.ndarray, "R n"], keys: slice) -> Float[np.ndarray, "R V"]:
    """What weights of these keys that are off by `moved` do to the output: Σ_j moved_j (v_j − out)."""
    return moved @ a.rows.value[keys] - moved.sum(axis=1, keepdims=True) * a.rows.out
