"""What is measured of a result, row by row: errors, what explains them, and the statistics of the directed tests.

Rows are judged in tiles that bound memory. Nothing is decided here; `verdict` does that.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from threadpoolctl import threadpool_limits

from cpjax.crosscheck.error_model.model import ErrorModel, Expected
from cpjax.crosscheck.error_model.row_covariance import Shared, distinct, excess, merged
from cpjax.crosscheck.exact.attention import Rows, attention_rows
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.judging.problem import Problem
from cpjax.crosscheck.judging.sampling import ELEMENTS, Tile, tiles
from cpjax.crosscheck.judging.score_tests import LEAST_NORMAL, Score, key_scores, on_bfloat16_lattice, scale_score
from cpjax.crosscheck.judging.statistic import effective_dof
from cpjax.mask import Tokens, visible

Progress = Callable[[int, int], None]
"""Called with the number of rows done and their total."""

Measured = TypeVar("Measured")


FP16_NUMBERS = 2**16
"""There are so many: it is no choice that a test could pin."""

BEYOND = 1 + 2.0**-10
"""The least ratio of an output that lies outside its interval, so that it does not read as one inside."""

SEVERAL = 16
"""Tiles from which on all processors measure. It costs time only, so no test pins it."""


@dataclass(frozen=True)
class RowTable:
    """One entry per judged row. A row that cannot be judged counts in `unjudged` only; all else is neutral."""

    batch: Int[np.ndarray, " R"]
    position: Int[np.ndarray, " R"]
    """Index in the sequence."""
    head: Int[np.ndarray, " R"]
    same: Int[np.ndarray, " R"]
    """Equal numbers: the same query sees the same keys."""
    unjudged: Bool[np.ndarray, " R"]
    ratio: Float[np.ndarray, " R"]
    """Largest |error| / bound of `out` in the row."""
    outside: Int[np.ndarray, " R"]
    """Outputs beyond the bound."""
    mean_square: Float[np.ndarray, " R"]
    """Mean of (error/σ)² over the outputs that are rounded at all; what must be exact is for the bound to check."""
    rounded: Int[np.ndarray, " R"]
    """How many these are."""
    dof: Float[np.ndarray, " R"]
    bias: Float[np.ndarray, " R"]
    """Mean of error/σ: told, never decisive."""
    error: Float[np.ndarray, " R"]
    """Largest |error| of `out`."""
    lse_ratio: Float[np.ndarray, " R"]
    lse_square: Float[np.ndarray, " R"]
    lse_dof: Float[np.ndarray, " R"]
    lse_error: Float[np.ndarray, " R"]
    scale_value: Float[np.ndarray, " R"]
    scale_variance: Float[np.ndarray, " R"]
    scale_mean: Float[np.ndarray, " R"]
    scale_bias: Float[np.ndarray, " R"]
    scale_information: Float[np.ndarray, " R"]


@dataclass
class Lattice:
    """For each FP16 number, whether an output that should be it was seen, and was then a BF16 number."""

    expected: Bool[np.ndarray, "65536"]
    found: Bool[np.ndarray, "65536"]


@dataclass(frozen=True)
class Evidence:
    """All that is measured of a result."""

    rows: RowTable
    keys: Score
    """Arrays `[B, K, S]`: whether a key entered with another weight than its own."""
    lattice: Lattice
    scale_excess: float
    """Variance of the scale test beyond the sum of its rows', because rows share rounding errors."""


@dataclass(frozen=True)
class _TileEvidence:
    tile: Tile
    table: RowTable
    keys: Int[np.ndarray, " n"]
    key_scores: Score
    scale_shared: list[Shared]
    lattice: tuple[np.ndarray, np.ndarray]


def collect(
    problem: Problem,
    out: np.ndarray,
    lse: np.ndarray | None,
    chosen: Bool[np.ndarray, "B T N"],
    progress: Progress = lambda done, total: None,
) -> Evidence:
    """The evidence on the `chosen` rows of a result in global token order."""
    batch, length, kv_heads, _ = problem.key.shape
    keys = Score(*(np.zeros((batch, kv_heads, length)) for _ in Score._fields))
    lattice = Lattice(np.zeros(FP16_NUMBERS, bool), np.zeros(FP16_NUMBERS, bool))
    tables, done, total = [], 0, int(chosen.sum())
    shared: list[Shared] = []
    for found in each_tile(partial(_measure, problem, out, lse), problem, chosen):
        where = (found.tile.batch, found.tile.kv_head, found.keys)
        for sums, part in zip(keys, found.key_scores, strict=True):
            sums[where] += part
        shared = merged(shared, found.scale_shared)
        expected, is_bfloat16 = found.lattice
        new = ~lattice.expected[expected]
        lattice.expected[expected[new]] = True
        lattice.found[expected[new]] = is_bfloat16[new]
        tables.append(found.table)
        done += len(found.tile.position)
        progress(done, total)
    columns = {field.name: [getattr(table, field.name) for table in tables] for field in fields(RowTable)}
    return Evidence(
        RowTable(**{name: np.concatenate(parts) for name, parts in columns.items()}), keys, lattice, excess(shared)
    )


def each_tile(
    measure: Callable[[np.ndarray, np.ndarray, Tile], Measured],
    problem: Problem,
    chosen: Bool[np.ndarray, "B T N"],
) -> Iterator[Measured]:
    """`measure(key, value, tile)` of all tiles, in order; key and value `[S, H]`, `[S, V]` of its head in float64.

    Large problems are measured on all processors, since NumPy works outside Python's lock.
    """
    is_large = chosen.sum() * problem.key.shape[1] >= SEVERAL * ELEMENTS
    with ExitStack() as stack:
        each = map
        if is_large:
            # Products that take all processors for themselves would wait for each other, spinning: twice the time.
            stack.enter_context(threadpool_limits(1, user_api="blas"))
            each = stack.enter_context(ThreadPoolExecutor(os.cpu_count())).map
        for (b, k), some in groupby(tiles(problem, chosen), key=lambda tile: (tile.batch, tile.kv_head)):
            key, value = (x[b, :, k].astype(np.float64) for x in (problem.key, problem.value))
            yield from each(partial(measure, key, value), some)


def _measure(
    problem: Problem, out: np.ndarray, lse: np.ndarray | None, key: np.ndarray, value: np.ndarray, tile: Tile
) -> _TileEvidence:
    """The evidence of one tile; `key` and `value` of its head in float64."""
    b, at = tile.batch, tile.position
    rows, model = model_of(problem, key, value, tile)
    expected = model.expected()
    given = out[b, at, tile.head].astype(np.float64)
    unjudged = ~expected.is_judgeable
    with np.errstate(invalid="ignore"):
        error = given - rows.out
    error = np.where(unjudged[:, None] | ~np.isfinite(error), 0.0, error)
    spacing = FORMATS[problem.precision.out].spacing(rows.out)
    inside = unjudged[:, None] | ((given >= expected.low) & (given <= expected.high))
    lse_columns, lse_error = _lse(rows, expected, None if lse is None else lse[b, at, tile.head], unjudged)
    mean_square, rounded, bias = _spread(error, np.where(expected.sigma > expected.least_sigma, expected.sigma, 0.0))
    mean_square = np.where(unjudged | np.isfinite(given).all(axis=1), mean_square, np.inf)
    rounded = np.where(unjudged, 0, rounded)
    different = distinct(rows.out, FORMATS[problem.precision.out])
    dof = np.where(rounded > 0, effective_dof(different, expected.common), 0.0)
    scale, shared = scale_score(model, expected, error, lse_error, unjudged)
    shared = [part._replace(variance=part.variance * tile.times) for part in shared]
    inflation = np.divide(rounded, dof, out=np.ones_like(dof), where=dof > 0) * tile.times
    table = RowTable(
        batch=np.full(len(at), b),
        position=at,
        head=tile.head,
        same=tile.same,
        unjudged=unjudged,
        ratio=np.where(unjudged, 0.0, _ratio(given, rows.out, expected, spacing).max(axis=1)),
        outside=(~inside).sum(axis=1),
        mean_square=mean_square,
        rounded=rounded,
        dof=dof,
        bias=bias,
        error=np.where(unjudged | np.isfinite(given).all(axis=1), np.abs(error).max(axis=1), np.inf),
        scale_value=scale.value,
        scale_variance=scale.variance * tile.times,
        scale_mean=scale.mean,
        scale_bias=scale.bias,
        scale_information=scale.information,
        **lse_columns,
    )
    scores = key_scores(model, expected, error, lse_error, inflation * ~unjudged)
    keys = slice(rows.key_count)  # a sink is no key of the problem
    scores = Score(*(x[keys] for x in scores))
    return _TileEvidence(tile, table, rows.index[keys], scores, shared, _lattice(problem, rows, expected, given))


def model_of(problem: Problem, key: np.ndarray, value: np.ndarray, tile: Tile) -> tuple[Rows, ErrorModel]:
    """Exact attention of a tile's rows, and the error model of the arithmetic of the problem."""
    b, at = tile.batch, tile.position
    q_tokens = Tokens(*(np.asarray(x)[b : b + 1, at] for x in problem.q_tokens))
    kv_tokens = Tokens(*(np.asarray(x)[b : b + 1] for x in problem.kv_tokens))
    seen = np.asarray(visible(problem.mask, q_tokens, kv_tokens))[0]
    query, logits = problem.queries(b, at, tile.head), problem.logits_of(b, at, tile.head)
    rows = attention_rows(query, key, value, seen, problem.kv_chunk, problem.scale, logits)
    merging = problem.merging_of(problem.q_chunk[at], rows.key_chunks)
    return rows, ErrorModel(rows, problem.precision, merging, problem.query.shape[3], problem.scale)


def _spread(
    error: Float[np.ndarray, "R V"], sigma: Float[np.ndarray, "R V"]
) -> tuple[Float[np.ndarray, " R"], Int[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Mean square and mean of error/σ where σ > 0, and how many outputs that are."""
    deviation = np.divide(error, sigma, out=np.zeros_like(error), where=sigma > 0)
    count = (sigma > 0).sum(axis=1)
    return (deviation**2).sum(axis=1) / np.maximum(count, 1), count, deviation.sum(axis=1) / np.maximum(count, 1)


def _ratio(given: np.ndarray, exact: np.ndarray, expected: Expected, spacing: np.ndarray) -> Float[np.ndarray, "R V"]:
    """|error| / bound on its own side; more than 1 beyond the interval, infinite for NaN and infinity.

    Where an output must be exact, half of its format's `spacing` is taken for the bound: the worst is the worst.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = given - exact
        inside = (given >= expected.low) & (given <= expected.high)
        side = np.where(error < 0, exact - expected.low, expected.high - exact)
        own = np.abs(error) / np.where(inside, expected.half_width, np.maximum(side, spacing / 2))
    # An output beyond the interval is wrong, however little it is off; so is a NaN.
    beyond = np.where(np.isfinite(given), np.maximum(np.nan_to_num(own, nan=np.inf), BEYOND), np.inf)
    return np.where(inside, np.minimum(np.nan_to_num(own, nan=0.0), 1.0), beyond)


def _lse(
    rows: Rows, expected: Expected, given: np.ndarray | None, unjudged: Bool[np.ndarray, " R"]
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The columns of the table that speak of lse, and its error for the directed tests."""
    zeros = np.zeros(len(unjudged))
    if given is None:
        return {"lse_ratio": zeros, "lse_square": zeros, "lse_dof": zeros, "lse_error": zeros}, None
    given = given.astype(np.float64)
    blind = np.isneginf(rows.lse)
    with np.errstate(invalid="ignore"):
        error = np.where(blind, np.where(np.isneginf(given), 0.0, np.inf), given - rows.lse)
    broken = ~unjudged & ~np.isfinite(error)
    ratio = np.divide(np.abs(error), expected.lse_bound, out=np.full_like(error, np.inf), where=expected.lse_bound > 0)
    ratio = np.where(error == 0, 0.0, np.where(np.isfinite(ratio), ratio, np.inf))
    finite = np.where(unjudged | ~np.isfinite(error), 0.0, error)
    sigma = expected.lse_sigma
    square = np.divide(finite, sigma, out=np.zeros_like(finite), where=sigma > 0) ** 2
    columns = {
        "lse_ratio": np.where(unjudged, 0.0, ratio),
        "lse_square": np.where(broken, np.inf, square),
        "lse_dof": np.where(unjudged | (sigma == 0), 0.0, 1.0),
        "lse_error": np.where(broken, np.inf, np.abs(finite)),
    }
    return columns, finite


def _lattice(problem: Problem, rows: Rows, expected: Expected, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FP16 numbers (as bits) that are no BF16 numbers and should come out, and whether a BF16 number came instead.

    Where σ is more than a spacing, as between chunks that cancel, the last digits are those of what was rounded before.
    """
    if problem.precision.out != "float16":
        return np.empty(0, np.int64), np.empty(0, bool)
    exact = FORMATS["float16"].round(rows.out)
    is_fine = expected.is_judgeable[:, None] & (expected.sigma <= FORMATS["float16"].spacing(exact))
    telling = is_fine & ~on_bfloat16_lattice(exact) & (np.abs(exact) >= LEAST_NORMAL) & np.isfinite(exact)
    bits, first = np.unique(exact[telling].astype(np.float16).view(np.uint16), return_index=True)
    with np.errstate(over="ignore", invalid="ignore"):
        return bits.astype(np.int64), on_bfloat16_lattice(given[telling][first])
