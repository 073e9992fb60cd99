"""Sums of squares in which equal rounding errors add up before they are squared.

Two keys with the same score are rounded alike, so their errors are one error, counted twice: (a + b)², not a² + b².
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.exact.attention import Rows

CELLS = 2.0**14
"""Scores that agree after multiplication with this and rounding count as equal. In FP16 the spacing of p in (1/2, 1) is
2^-11, so p's rounding error changes by less than an eighth of a spacing inside one cell."""

FURTHEST = 2.0**16
"""Keys farther than this below the maximum have probability 0 in every format."""

WORK = 2**22
"""Above so many (key, column) pairs the columns are not all grouped: see `Ties.sum_of_squares`. It costs time only, so
no test pins it."""

COLUMNS = 4
"""How many columns are grouped then: they cost time, and no test pins how many."""

MANY = 0.1
"""Of the keys of a row: from this share on it matters that their roundings are alike."""

CELL_DIGITS = 3
"""Scores within 2^-3 of a spacing of their format count as equal."""


def sum_of_squares(
    weight: Float[np.ndarray, "r S"], value: Float[np.ndarray, "S V"], center: Float[np.ndarray, "r V"] | None = None
) -> Float[np.ndarray, "r V"]:
    """Σ_j w_j² (v_j − center)²: independent errors."""
    w2 = weight**2
    total = w2 @ value**2
    if center is not None:
        total = np.maximum(total - 2 * center * (w2 @ value) + center**2 * w2.sum(axis=1, keepdims=True), 0.0)
    return total


@dataclass(frozen=True)
class Ties:
    """Rows in which enough keys have equal scores, and which of their keys belong together.

    The keys of rows `at` are listed group after group; no group spans two rows.
    """

    at: Int[np.ndarray, " r"]
    row: Int[np.ndarray, " n"]
    key: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " g"]
    """Where each group begins in the list."""

    @property
    def row_starts(self) -> Int[np.ndarray, " r"]:
        """Where each row's groups begin among the groups; every row has at least one."""
        return np.flatnonzero(np.diff(self.row[self.starts], prepend=-1))

    def sums(self, weight: Float[np.ndarray, "r S"], value: Float[np.ndarray, "S V"]) -> Float[np.ndarray, "g V"]:
        """Σ_{j∈G} w_j v_j for each group; `weight` of the rows `at`."""
        from scipy import sparse  # takes as long to import as the rest of the judge; most cases have no ties

        edges = np.append(self.starts, len(self.key))
        matrix = sparse.csr_array((weight[self.row, self.key], self.key, edges), shape=(len(self.starts), len(value)))
        return matrix @ value

    def square_of_weights(self, weight: Float[np.ndarray, "r S"]) -> Float[np.ndarray, " r"]:
        """Σ_G (Σ_{j∈G} w_j)²."""
        sums = np.add.reduceat(weight[self.row, self.key], self.starts)
        return np.add.reduceat(sums**2, self.row_starts)

    def sum_of_squares(
        self, weight: Float[np.ndarray, "r S"], value: Float[np.ndarray, "S V"], mean: Float[np.ndarray, "r V"]
    ) -> Float[np.ndarray, "r V"]:
        """Σ_G (Σ_{j∈G} w_j (v_j − mean))²: errors equal within a group, independent between groups.

        Where that would take long (`WORK`), only `COLUMNS` columns are grouped, and all others are as much larger than
        the ungrouped sum as these are on average.
        """
        columns = value.shape[1]
        some = np.arange(columns)
        if len(self.key) * columns > WORK and columns > COLUMNS:
            some = np.linspace(0, columns - 1, COLUMNS).astype(int)
        sums = self.sums(weight, value[:, some])
        of_weights = np.add.reduceat(weight[self.row, self.key], self.starts)
        sums -= of_weights[:, None] * mean[:, some][self.row[self.starts]]
        grouped = np.add.reduceat(sums**2, self.row_starts, axis=0)
        if len(some) == columns:
            return grouped
        plain = sum_of_squares(weight, value, mean)
        total = plain[:, some].sum(axis=1)
        ratio = np.divide(grouped.sum(axis=1), total, out=np.ones_like(total), where=total > 0)
        return plain * ratio[:, None]


def ties_of(rows: Rows) -> Ties:
    """Keys with equal p = exp(s − M_c): p is rounded alike in every chunk. Only rows with many of them are grouped."""
    return _ties(np.minimum(-rows.below, FURTHEST), rows.seen, lambda below: np.rint(below * CELLS))


def score_ties_of(rows: Rows, digits: int) -> Ties:
    """Keys with equal scores: q·k and s are rounded before a chunk's maximum is known, so alike in every chunk.

    `digits` are those of the format of the scores; scores within an eighth of its spacing count as equal.
    """

    def cell(score: np.ndarray) -> np.ndarray:
        fraction, exponent = np.frexp(score)
        return np.ldexp(np.round(np.ldexp(fraction, digits + CELL_DIGITS)), exponent)

    return _ties(np.where(rows.seen, rows.score, 0.0), rows.seen, cell)


def _ties(place: Float[np.ndarray, "R S"], seen: Bool[np.ndarray, "R S"], cell: Callable) -> Ties:
    """Groups of equal `cell(place)`, in the rows in which more than one key in ten shares its cell with another.

    `place` is finite; that of hidden keys does not matter.
    """
    count = seen.sum(axis=1)
    # Few rows have many: cells alone are sorted faster than the order of the keys is found, in float32 faster still, in
    # which only cells of keys whose p is 0 in every format may be taken for one. Hidden keys come last.
    cells = cell(place).astype(np.float32)
    np.copyto(cells, np.inf, where=~seen)
    cells.sort(axis=1)
    repeated = (cells[:, 1:] == cells[:, :-1]) & np.isfinite(cells[:, 1:])
    at = np.flatnonzero(repeated.sum(axis=1) > MANY * count)
    place, count = np.where(seen[at], place[at], np.inf), count[at]
    order = np.argsort(place, axis=1)
    listed = np.arange(place.shape[1]) < count[:, None]
    place = np.where(listed, np.take_along_axis(place, order, axis=1), 0.0)
    begins = ~(np.diff(cell(place), axis=1, prepend=np.nan) == 0)
    row, rank = np.nonzero(listed)
    return Ties(at, row, order[row, rank], np.flatnonzero(begins[row, rank]))


def variance_of(
    error: Float[np.ndarray, "R S"],
    ties: Ties,
    value: Float[np.ndarray, "S V"],
    out: Float[np.ndarray, "R V"],
    *,
    center: bool,
) -> Float[np.ndarray, "R V"]:
    """Variance of Σ_j error_j (v_j − out), or of Σ_j error_j v_j; tied keys have equal errors."""
    total = sum_of_squares(error, value, out if center else None)
    if len(ties.at):
        some, mean = error[ties.at], out[ties.at]
        tied = ties.sum_of_squares(some, value, mean)
        if not center:  # v = (v − out) + out; the two parts are uncorrelated up to chance
            tied = tied + ties.square_of_weights(some)[:, None] * mean**2
        total[ties.at] = np.maximum(total[ties.at], tied)
    return total


def variance_of_sum(error: Float[np.ndarray, "R S"], ties: Ties) -> Float[np.ndarray, " R"]:
    """Variance of Σ_j error_j; tied keys have equal errors."""
    total = (error**2).sum(axis=1)
    if len(ties.at):
        total[ties.at] = np.maximum(total[ties.at], ties.square_of_weights(error[ties.at]))
    return total
