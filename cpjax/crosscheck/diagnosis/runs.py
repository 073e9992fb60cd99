"""A run of keys, wherever it lies: lost, counted twice, or other keys in its place. Every run is tried, roughly.

With p = exp(s − base) and Q the running sum of p (v − out'), what a row's output wants is Σ p (v − out') = 0 over what
really entered. Without the run [a, b), or with it twice, that is Q_S ∓ (Q_b − Q_a); with the block at c in the place of
the block at a it is Q_S − block_a + block_c. So one table of running sums answers for all runs.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.diagnosis.dictionary import Fault
from cpjax.crosscheck.diagnosis.guards import LARGEST_LOG
from cpjax.crosscheck.diagnosis.measure import Measured

SAMPLES = 4
"""Wrong query chunks that are looked at."""

COLUMNS = 8
"""Columns of the values that are looked at."""

GRID = 128
"""Places at which a run may begin or end, at first; then the best one's ends are looked for between them."""

FINEST = 4
"""Ends tried to either side of the best, at each finer step."""

BLOCKS = (16, 32, 64, 128, 256)
"""Lengths of blocks, at multiples of themselves, in whose place another block is tried."""

MOST_PAIRS = 2**15
"""Pairs of blocks that are tried, at most: of long texts only large blocks."""

LARGEST = 1e8
"""Of a squared misfit: one row that nothing explains does not decide."""

TIE = 1e-9
"""Misfits that differ by less, relative to themselves, are alike."""

LEAST_LEFT = 1e-9
"""Share of its mass that a row must keep: one that loses all its keys is no output."""


def looked_at(wrong: list[Measured], beside: list[Measured]) -> list[Measured]:
    """Of the wrong query chunks a few from the first to the last, and those of other requests.

    Under a causal mask the first ones see where a run begins, and only the last ones all of it.
    """
    count = min(len(wrong), max(SAMPLES - len(beside), 2))
    return [*(wrong[i] for i in np.linspace(0, len(wrong) - 1, count).astype(int)), *beside]


def run_faults(wrong: list[Measured]) -> Iterator[Fault]:
    """The run whose loss, and the run whose doubling, explains the wrong rows best; and the best stale block."""
    tables = [_Table(one) for one in wrong]
    length = tables[0].length
    cost = 2 * float(np.log(max(length, 2) * (length - 1) / 2 + 1))
    for kind, weight in (("run lost", 0.0), ("run doubled", 2.0)):
        start, stop = _best_run(tables, weight)
        if 0 < stop - start < length:
            yield Fault(kind, run=(start, stop), number=weight, cost=cost)
    best = _best_block(tables)
    if best is not None:
        (start, stop, source), tried = best
        yield Fault("run stale", run=(start, stop), number=float(source), cost=2 * float(np.log(tried)))


class _Table:
    """Running sums over the keys of the rows of one sample."""

    def __init__(self, one: Measured):
        sample = one.sample
        step = -(-sample.value.shape[1] // COLUMNS)
        self.length = len(sample.key)
        weight = np.exp(np.minimum(sample.score - sample.base[:, None], LARGEST_LOG))
        pull = weight[..., None] * (sample.value[None, :, ::step] - sample.out[:, None, ::step])  # [R, S, V]
        self.mass = _running(np.where(sample.seen, weight, 0.0)[..., None])[..., 0]
        self.sums = _running(np.where(sample.seen[..., None], pull, 0.0))
        self.all_mass, self.all_sums = _running(weight[..., None])[..., 0], _running(pull)
        self.seen = sample.seen
        self.seen_count = _running(sample.seen[..., None].astype(float))[..., 0].astype(int)
        self.sigma = one.sigma[:, ::step]
        # A sink is in the sum, whatever keys are.
        sink = np.broadcast_to(sample.sink_mass, (len(sample.out),))
        self.total = self.mass[:, -1:] + sink[:, None]
        self.left = self.sums[:, -1:] - (sink[:, None] * sample.out[:, ::step])[:, None]

    def part_seen(self, slots: Int[np.ndarray, " n"], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which keys of each slot a row sees, from the first to before the last, and whether they are such a run.

        A causal mask shows the beginning of a slot, a request that begins in it the end.
        """
        count = self.seen_count[:, slots + size] - self.seen_count[:, slots]
        begins, ends = self.seen[:, slots], self.seen[:, slots + size - 1]
        first = np.where(begins, 0, size - count)
        return first, first + count, begins | ends | (count == 0)

    def misfit(
        self,
        change: Float[np.ndarray, "R n V"],
        mass: Float[np.ndarray, "R n"],
        counts: Bool[np.ndarray, "R n"] | None = None,
    ) -> Float[np.ndarray, " n"]:
        """Σ over rows and columns, if the sums change by this, and the masses too; of the rows that count."""
        total = self.total + mass
        is_left = total > LEAST_LEFT * self.total
        off = (self.left + change) / (np.where(is_left, total, 1.0)[..., None] * self.sigma[:, None])
        square = np.where(is_left[..., None], np.minimum(off**2, LARGEST), LARGEST)
        if counts is not None:
            square = np.where(counts[..., None], square, 0.0)
        return np.log1p(square).sum(axis=(0, 2))


def _running(x: Float[np.ndarray, "R S V"]) -> Float[np.ndarray, "R S1 V"]:
    return np.concatenate([np.zeros_like(x[:, :1]), np.cumsum(x, axis=1)], axis=1)


def _best_run(tables: list[_Table], weight: float) -> tuple[int, int]:
    length = tables[0].length
    step = max(1, -(-length // GRID))
    grid = np.unique(np.append(np.arange(0, length, step), length))
    starts, stops = (x.ravel() for x in np.meshgrid(grid, grid, indexing="ij"))
    best = _least(tables, weight, starts, stops)
    while step > 1:
        step = max(1, step // FINEST)
        near = step * np.arange(-FINEST, FINEST + 1)
        starts, stops = (
            x.ravel() for x in np.meshgrid(*(np.clip(end + near, 0, length) for end in best), indexing="ij")
        )
        best = _least(tables, weight, starts, stops)
    return best


def _least(tables: list[_Table], weight: float, starts: np.ndarray, stops: np.ndarray) -> tuple[int, int]:
    real = starts < stops
    starts, stops = starts[real], stops[real]
    misfit = np.zeros(len(starts))
    for table in tables:
        for first in range(0, len(starts), 2**12):
            a, b = starts[first : first + 2**12], stops[first : first + 2**12]
            change = (weight - 1) * (table.sums[:, b] - table.sums[:, a])
            mass = (weight - 1) * (table.mass[:, b] - table.mass[:, a])
            misfit[first : first + 2**12] += table.misfit(change, mass)
    # Of runs that fit alike (what lies beside is seen by nobody) the shortest.
    fits = np.flatnonzero(misfit <= misfit.min() * (1 + TIE))
    best = fits[np.argmin((stops - starts)[fits])]
    return int(starts[best]), int(stops[best])


def _best_block(tables: list[_Table]) -> tuple[tuple[int, int, int], int] | None:
    """Start, stop and source of the block, and how many were tried."""
    length, found, tried = tables[0].length, [], 0
    for size in BLOCKS:
        count = length // size
        if count < 2 or count * (count - 1) > MOST_PAIRS:
            continue
        at = size * np.arange(count)
        slots, sources = (x.ravel() for x in np.meshgrid(at, at, indexing="ij"))
        slots, sources = slots[slots != sources], sources[slots != sources]
        tried += len(slots)
        misfit = np.zeros(len(slots))
        for table in tables:
            first, last, is_run = table.part_seen(slots, size)
            rows = np.arange(len(first))[:, None]
            change = table.all_sums[rows, sources + last] - table.all_sums[rows, sources + first]
            change = change - (table.sums[:, slots + size] - table.sums[:, slots])
            mass = table.all_mass[rows, sources + last] - table.all_mass[rows, sources + first]
            mass = mass - (table.mass[:, slots + size] - table.mass[:, slots])
            misfit += table.misfit(change, mass, is_run)
        best = int(misfit.argmin())
        found.append((float(misfit[best]), (int(slots[best]), int(slots[best]) + size, int(sources[best]))))
    return (min(found)[1], tried) if found else None
