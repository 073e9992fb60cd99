"""What a report draws, measured on a sample of rows: it illustrates, and decides nothing."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.row_covariance import distinct
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.judging.evidence import model_of
from cpjax.crosscheck.judging.problem import Problem
from cpjax.crosscheck.judging.sampling import Tile
from cpjax.crosscheck.judging.statistic import effective_dof
from cpjax.partition import SequencePartition

ROWS = 16
"""Rows of each query chunk, head and batch row that are looked at, at most; more where the bands need them."""

BANDS = 32
"""Into so many runs the queries are cut for the map of query and head."""

SCORES = 2**25
"""Scores that are looked at, at most; with very long keys fewer rows."""

EDGES = np.linspace(-5, 5, 41)
"""Of the histogram, in σ; what lies outside is counted in the outermost bins."""


@dataclass(frozen=True)
class Figures:
    """NaN where nothing was measured or nothing is visible."""

    spread: Float[np.ndarray, "Q N"]
    """RMS(error/σ) for each query chunk and head."""
    bands: Float[np.ndarray, "A N"]
    """The same for each run of queries and head: A is `BANDS`, or T if that is less."""
    band_starts: tuple[int, ...]
    """Where in the row each run begins."""
    pull: Float[np.ndarray, "Q C"]
    """By how many standard deviations the errors point along the contribution of a key/value chunk: beyond ±6 it
    entered with another weight than 1, or with other keys."""
    steps: Float[np.ndarray, "R S"] | None
    """Largest |pull| for each rank and ring step; None where the order has no steps."""
    histogram: Float[np.ndarray, " bins"]
    """Share of the error/σ in each bin of `EDGES`."""
    rows: int
    """Rows that were looked at."""


def figures(problem: Problem, out: np.ndarray, seed: int = 0) -> Figures:
    """The figures of a result `[B, T, N, V]` that has the right shape."""
    heads = problem.query.shape[2]
    chunks = int(problem.q_chunk.max()) + 1, int(problem.kv_chunk.max()) + 1
    squares, counts = np.zeros((chunks[0], heads)), np.zeros((chunks[0], heads))
    length = problem.query.shape[1]
    bands = min(BANDS, length)
    in_band, band_counts = np.zeros((bands, heads)), np.zeros((bands, heads))
    value, variance, deviations, looked = np.zeros(chunks), np.zeros(chunks), [], 0
    for tile in _sample(problem, seed):
        key, val = (x[tile.batch, :, tile.kv_head].astype(np.float64) for x in (problem.key, problem.value))
        rows, model = model_of(problem, key, val, tile)
        expected = model.expected()
        given = out[tile.batch, tile.position, tile.head].astype(np.float64)
        usable = (expected.sigma > 0) & np.isfinite(given) & model.bound.in_range[:, None]
        with np.errstate(invalid="ignore"):
            deviation = np.divide(given - rows.out, expected.sigma, out=np.zeros_like(given), where=usable)
        chunk = int(problem.q_chunk[tile.position[0]])
        np.add.at(squares[chunk], tile.head, (deviation**2).sum(axis=1))
        np.add.at(counts[chunk], tile.head, usable.sum(axis=1))
        band = tile.position * bands // length, tile.head
        np.add.at(in_band, band, (deviation**2).sum(axis=1))
        np.add.at(band_counts, band, usable.sum(axis=1))
        deviations.append(deviation[usable])
        different = distinct(rows.out, FORMATS[problem.precision.out])
        inflation = usable.sum(axis=1) / np.maximum(effective_dof(different, expected.common), 1)
        weight = np.divide(1.0, expected.sigma, out=np.zeros_like(given), where=usable)
        for c, number in enumerate(rows.key_chunks):
            along = (rows.chunk_part[:, c] - rows.chunk_weight[:, c, None] * rows.out) * weight
            value[chunk, number] += (along * deviation).sum()
            variance[chunk, number] += ((along**2).sum(axis=1) * np.maximum(inflation, 1)).sum()
        looked += len(tile.position)
    spread, by_band = (
        np.sqrt(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))
        for total, count in ((squares, counts), (in_band, band_counts))
    )
    starts = tuple(-(-i * length // bands) for i in range(bands))
    pull = np.divide(value, np.sqrt(variance), out=np.full_like(value, np.nan), where=variance > 0)
    everything = np.clip(np.concatenate([*deviations, np.zeros(0)]), EDGES[0], EDGES[-1])
    histogram = np.histogram(everything, EDGES)[0] / max(len(everything), 1)
    return Figures(spread, by_band, starts, pull, _steps(problem, pull), histogram, looked)


def _sample(problem: Problem, seed: int):
    """Some rows of each query chunk, batch row and key/value head, of all heads that share it; one of each run."""
    rng = np.random.default_rng(seed)
    batch, _, heads, _ = problem.query.shape
    count = int(problem.q_chunk.max()) + 1
    wanted = max(ROWS, -(-2 * BANDS // count))
    most = max(1, min(wanted, SCORES // (problem.key.shape[1] * count * batch * heads)))
    for b, c, k in np.ndindex(batch, count, problem.key.shape[2]):
        at = np.flatnonzero((problem.q_chunk == c) & problem.is_judged[b])
        at = np.array([rng.choice(run) for run in np.array_split(at, most) if len(run)], int)
        if len(at):
            own = np.arange(k * problem.group, (k + 1) * problem.group)
            position, head = np.repeat(at, len(own)), np.tile(own, len(at))
            one = np.ones_like(position)
            yield Tile(b, k, position, head, np.arange(len(position)), one)


def _steps(problem: Problem, pull: np.ndarray) -> np.ndarray | None:
    partition = problem.partition
    if not isinstance(partition, SequencePartition) or problem.order not in ("ring", "gather") or problem.cp == 1:
        return None
    steps = np.full((problem.cp, problem.cp), np.nan)
    for q, c in np.ndindex(pull.shape):
        rank, step = partition.rank(q), partition.step(problem.order, q, c)
        steps[rank, step] = np.fmax(steps[rank, step], abs(pull[q, c]))
    return steps
