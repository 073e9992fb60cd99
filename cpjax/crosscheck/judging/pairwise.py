"""Are two results of one case consistent with each other? Each may have a precision and an order of merging of its own.

With a, b the results, o_a, o_b exact attention (with the scale as each profile rounds it) and e the errors of rounding:

    (a − b) − (o_a − o_b)  =  e_a − e_b            Var  =  σ_a² + σ_b² − 2 Cov(e_a, e_b)  ≤  σ_a² + σ_b²
                                                   |…|  ≤  bound_a + bound_b

Cov ≥ 0: two roundings of the same number to the same format are the same error, those of different numbers are
independent. So the deviation is at most √2 σ for equal profiles, and much less where both round the same numbers: two
implementations of the same stages in the same order differ only where their float32 sums fall on either side of a
rounding boundary. σ, the bound, the allowance `SLACK` and the threshold `LIMIT` are the judge's (docs/verdict.md);
nothing is fitted here.

Where both profiles round the scale alike, and both have the same keys and values, o_a − o_b is 0 to the last bit: no
answer of the oracle enters, only its error model. That is what this adds to two verdicts against dense. It is less
sensitive than they are, by up to √2, and says nothing of a fault that both results have.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.row_covariance import distinct
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.judging.evidence import Progress, each_tile, model_of
from cpjax.crosscheck.judging.problem import Problem
from cpjax.crosscheck.judging.sampling import Tile, chosen_rows
from cpjax.crosscheck.judging.statistic import LIMIT, RowErrors, effective_dof, spread_z_score, worst_row_z_score
from cpjax.wording import counted


@dataclass(frozen=True)
class Agreement:
    """Whether rounding explains the difference of two results, and how large it is."""

    agrees: bool
    reasons: tuple[str, ...]
    z: float
    """RMS of the difference of `out` over √(σ_a² + σ_b²): 1 if all roundings are independent, less if some are one."""
    ratio: float
    """Largest |difference| over the sum of both bounds."""
    lse_z: float
    """NaN, and the next too, where one result has no lse."""
    lse_ratio: float
    rows: int
    """Rows that were compared; those that the judge would not judge are not."""


Output = tuple[np.ndarray, np.ndarray | None]
"""out `[B, T, N, V]` and lse `[B, T, N]`, in global token order."""


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """The same numbers; quickly, where it is the same array."""
    return a is b or (a.shape == b.shape and np.array_equal(a, b))


def agreement(
    problem: Problem,
    other: Problem,
    one: Output,
    two: Output,
    seed: int = 0,
    *,
    own_keys: bool = False,
    progress: Progress = lambda done, total: None,
) -> Agreement:
    """Compare two results of the same inputs; the questions differ in precision and order only.

    Args:
      own_keys: each problem has keys and values that its backend has made itself, of the same latent.
      progress: called with the number of rows done and their total.

    Raises:
      ValueError: the questions are about different inputs.
    """
    same = _equal(problem.query, other.query)
    if not own_keys:
        same = same and _equal(problem.key, other.key) and _equal(problem.value, other.value)
    if not same or (problem.key.shape, problem.value.shape) != (other.key.shape, other.value.shape):
        raise ValueError("the two questions must be about the same query, key and value, but these differ")
    has_lse = one[1] is not None and two[1] is not None
    chosen = chosen_rows(problem, seed)
    found, done, total = [], 0, int(chosen.sum())
    for part in each_tile(partial(_differences, problem, other, one, two), problem, chosen):
        found.append(part)
        done += len(part[0].ratio)
        progress(done, total)
    out, lse = _joined([part[0] for part in found]), _joined([part[1] for part in found])
    reasons = [*_reasons("out", out), *(_reasons("lse", lse) if has_lse else [])]
    rows = int(sum(part[2] for part in found))
    if not rows:
        reasons.append("no row can be judged, so none can be compared")
    nan = float("nan")
    lse_numbers = (lse.z, lse.worst) if has_lse else (nan, nan)
    return Agreement(not reasons, tuple(reasons), out.z, out.worst, *lse_numbers, rows)


@dataclass(frozen=True)
class _Differences:
    """One entry a row: the mean of (difference/σ)², and the largest |difference| over the sum of the bounds."""

    errors: RowErrors
    ratio: Float[np.ndarray, " R"]

    @property
    def z(self) -> float:
        counts = self.errors.dof > 0
        return float(np.sqrt(self.errors.mean_square[counts].mean())) if counts.any() else float("nan")

    @property
    def worst(self) -> float:
        return float(self.ratio.max(initial=0.0))


def _differences(
    problem: Problem, other: Problem, one: Output, two: Output, key: np.ndarray, value: np.ndarray, tile: Tile
) -> tuple[_Differences, _Differences, int]:
    """Those of `out` and `lse` in a tile, and the number of rows that are compared."""
    b, at = tile.batch, tile.position
    its_key, its_value = (x[b, :, tile.kv_head].astype(np.float64) for x in (other.key, other.value))
    (rows, model), (rows2, model2) = model_of(problem, key, value, tile), model_of(other, its_key, its_value, tile)
    mine, theirs = model.expected(), model2.expected()
    judged = mine.is_judgeable & theirs.is_judgeable
    sigma, half_width = np.hypot(mine.sigma, theirs.sigma), mine.half_width + theirs.half_width
    coherent = np.maximum(mine.common, theirs.common)
    with np.errstate(invalid="ignore"):
        given = one[0][b, at, tile.head].astype(np.float64) - two[0][b, at, tile.head].astype(np.float64)
        difference = given - (rows.out - rows2.out)
    # As for the judge: what must be exact is for the bound to check, and has no spread.
    of_out = _row_errors(difference, sigma * (sigma > mine.least_sigma), half_width, judged, tile.same)
    different = distinct(rows.out, FORMATS[problem.precision.out])
    dof = np.where(of_out.errors.dof > 0, effective_dof(different, coherent), 0.0)
    of_out = replace(of_out, errors=of_out.errors._replace(dof=dof))
    if one[1] is None or two[1] is None:
        nothing = np.zeros((len(at), 1))
        return of_out, _row_errors(nothing, nothing, nothing, np.zeros(len(at), bool), tile.same), int(judged.sum())
    lse, lse2 = (
        _lse_error(given[b, at, tile.head].astype(np.float64), exact)
        for given, exact in ((one[1], rows.lse), (two[1], rows2.lse))
    )
    with np.errstate(invalid="ignore"):
        error = (lse - lse2)[:, None]
    lse_sigma = np.hypot(mine.lse_sigma, theirs.lse_sigma)[:, None]
    lse_half_width = (mine.lse_bound + theirs.lse_bound)[:, None]
    return of_out, _row_errors(error, lse_sigma, lse_half_width, judged, tile.same), int(judged.sum())


def _lse_error(given: Float[np.ndarray, " R"], exact: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """0 where −inf is said and meant; NaN where only one of it."""
    blind = np.isneginf(exact)
    with np.errstate(invalid="ignore"):
        return np.where(blind, np.where(np.isneginf(given), 0.0, np.nan), given - exact)


def _row_errors(
    difference: Float[np.ndarray, "R V"],
    sigma: Float[np.ndarray, "R V"],
    half_width: Float[np.ndarray, "R V"],
    judged: np.ndarray,
    same: np.ndarray,
) -> _Differences:
    """Differences in units of their deviation and their bound; what is not finite is infinitely wrong."""
    finite = np.isfinite(difference)
    size = np.where(finite, np.abs(difference), np.inf)
    counts = sigma > 0
    square = np.divide(np.where(finite, difference, 0.0), sigma, out=np.zeros_like(sigma), where=counts) ** 2
    mean = square.sum(axis=1) / np.maximum(counts.sum(axis=1), 1)
    mean = np.where(finite.all(axis=1), mean, np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(size == 0, 0.0, size / half_width).max(axis=1)
    dof = np.where(judged & counts.any(axis=1), 1.0, 0.0)
    return _Differences(RowErrors(np.where(judged, mean, 0.0), dof, same), np.where(judged, ratio, 0.0))


def _joined(parts: list[_Differences]) -> _Differences:
    errors = RowErrors(*(np.concatenate(x) for x in zip(*(part.errors for part in parts), strict=True)))
    return _Differences(errors, np.concatenate([part.ratio for part in parts]))


def _reasons(name: str, found: _Differences) -> list[str]:
    reasons = []
    beyond = int((~(found.ratio <= 1.0)).sum())
    if beyond:
        reasons.append(
            f"{name}: {counted(beyond, 'row')} {'differs' if beyond == 1 else 'differ'} by more than both bounds "
            f"together, the worst by {found.worst:.3g} times"
        )
    together, worst = spread_z_score(found.errors), worst_row_z_score(found.errors)
    if not together <= LIMIT:
        reasons.append(f"{name}: differences are {found.z:.3g} times what rounding makes them (z-score {together:.3g})")
    elif not worst <= LIMIT:
        reasons.append(f"{name}: one row differs by too much for roundings (z-score {worst:.3g})")
    return reasons
