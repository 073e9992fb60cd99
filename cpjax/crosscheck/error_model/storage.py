"""Numbers that are stored in a narrow format (§3.1 to 3.4): probabilities, outputs of chunks, outputs of merges.

Every one of them is known in float64, so the variance of its rounding is: spacing² / 12, if the rounded value falls
anywhere between two neighbours; carried to the output by its derivative. Where it does not, because a number hardly
moves, errors repeat with the same sign, and are added up instead. Section numbers are those of docs/verdict.md.
"""

from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.arithmetic import Arithmetic
from cpjax.crosscheck.error_model.row_covariance import Roundings
from cpjax.crosscheck.error_model.ties import Groups, groups_of, score_groups_of, sum_of_squares
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.precision import KEY_TILE

ABSORBED = 0.6
"""Of a small term, what a sum loses at most, in unit roundoffs of the sum (§3.7)."""


class Stored(Arithmetic):
    """Variances of what is stored, and the errors among them that have one sign."""

    @cached_property
    def _groups(self) -> Groups:
        """Keys whose errors must be added up before they are squared (§3.9)."""
        return groups_of(self.rows)

    @cached_property
    def _score_groups(self) -> Groups:
        """The same for errors of the scores; they differ only where scores are rounded themselves."""
        if not self._low_precision_scores:
            return self._groups
        return score_groups_of(self.rows, FORMATS[self.precision.score].digits)

    def _variance_of(
        self, error: Float[np.ndarray, "R S"], groups: Groups, *, center: bool
    ) -> Float[np.ndarray, "R V"]:
        """Variance of Σ_j error_j (v_j − out), or of Σ_j error_j v_j; the keys of a group have equal errors."""
        rows = self.rows
        total = sum_of_squares(error, rows.value, rows.out if center else None)
        if len(groups.at):
            some, out = error[groups.at], rows.out[groups.at]
            grouped = groups.sum_of_squares(some, rows.value, out)
            if not center:  # v = (v − out) + out; the two parts are uncorrelated up to chance
                grouped = grouped + groups.square_of_weights(some)[:, None] * out**2
            total[groups.at] = np.maximum(total[groups.at], grouped)
        return total

    def _variance_of_sum(self, error: Float[np.ndarray, "R S"], groups: Groups) -> Float[np.ndarray, " R"]:
        """Variance of Σ_j error_j; the keys of a group have equal errors."""
        total = (error**2).sum(axis=1)
        if len(groups.at):
            total[groups.at] = np.maximum(total[groups.at], groups.square_of_weights(error[groups.at]))
        return total

    @cached_property
    def probability_variance(self) -> Float[np.ndarray, "R V"]:
        """p rounded to its format (§3.1). p = 1 is exact; what becomes 0 is in `one_signed`."""
        variance = self._variance_of(self._p_sigma, self._groups, center=False)
        for cell in self._least_cells.values():
            variance = variance + (self._p.tiny / 4 * (cell @ self.rows.value)) ** 2
        return variance

    @cached_property
    def _p_sigma(self) -> Float[np.ndarray, "R S"]:
        """Standard deviation of each p's rounding, in units of the output."""
        p = self._p_value
        return self._p_weight * np.where(p == 1.0, 0.0, self._p.spacing(p)) / np.sqrt(12)

    @cached_property
    def _least_cells(self) -> dict[int, Float[np.ndarray, "R S"]]:
        """Worth of the keys whose p becomes n times the least number, by n up to 16: they err alike (§3.2)."""
        if self.precision.probability != "float16":
            return {}
        n = np.where(self.rows.seen, np.round(self._p_value / self._p.tiny), 0.0)
        return {int(k): np.where(n == k, self._p_weight, 0.0) for k in np.unique(n[(n >= 1) & (n <= 16)])}

    @property
    def chunk_variance(self) -> Float[np.ndarray, "R V"]:
        """Each chunk's out rounded to the out format, where these errors are random (§3.3)."""
        return (self._chunk[0].sigma ** 2).sum(axis=1)

    @cached_property
    def _chunk(self) -> tuple[Roundings, Float[np.ndarray, "R V"]]:
        """The chunks' random roundings, and the sum of those that are not.

        The value of the chunk's best key is, once rounded, a number of the format. Where the chunk's out is nearer than
        a few spacings, it is rounded back to it, always against what the other keys added.
        """
        rows = self.rows
        a = rows.chunk_weight[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            out = np.where(a > 0, rows.chunk_part / a, 0.0)
        moved = np.abs(out - self._best_value)
        step = self._out.spacing(out)
        free = moved >= 4 * step
        random = Roundings(out, np.where(free, a * step / np.sqrt(12), 0.0))
        return random, np.where(free, 0.0, a * np.minimum(moved, 0.5 * step)).sum(axis=1)

    @cached_property
    def _best_value(self) -> Float[np.ndarray, "R C V"]:
        """The value of each chunk's best key, as a number of the out format."""
        rows = self.rows
        top = np.stack(
            [start + rows.score[:, start:stop].argmax(axis=1) for start, stop in pairwise(rows.edges)], axis=1
        )
        return self._out.round(rows.value[top])

    @property
    def carry_variance(self) -> Float[np.ndarray, "R V"]:
        """The running out rounded after each merge, where these errors are independent (§3.4)."""
        return (self._carry[0].sigma ** 2).sum(axis=1)

    @cached_property
    def _carry(self) -> tuple[Roundings, Float[np.ndarray, "R V"]]:
        """The merges' independent roundings, and the sum of those that repeat.

        A merge that moves the running out by less than a few spacings rounds the same way again and again. One that
        leaves it within a few spacings of the best key's value rounds it to that, as with a chunk's out.
        """
        rows = self.rows
        if self.merging is None:
            return self._carry_of_any_order()
        a = np.take_along_axis(rows.chunk_weight, self.merging, axis=1)
        part = np.take_along_axis(rows.chunk_part, self.merging[..., None], axis=1)
        done = np.cumsum(a, axis=1)[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            running = np.where(done > 0, np.cumsum(part, axis=1) / done, 0.0)
        first = (np.cumsum(a > 0, axis=1) == 1) & (a > 0)
        moved = np.abs(np.diff(running, axis=1, prepend=0.0))
        merged = ((a > 0) & ~first)[..., None]  # the first chunk a row sees is merged with nothing
        step = self._carry_format.spacing(running)
        beyond = np.abs(running - self._best_value_so_far)
        stuck = np.maximum(np.where(moved < 4 * step, moved, 0.0), np.where(beyond < 4 * step, beyond, 0.0))
        is_free = (moved >= 4 * step) & (beyond >= 4 * step)
        random = Roundings(running, np.where(merged & is_free, done * step / np.sqrt(12), 0.0))
        return random, np.where(merged, done * np.minimum(stuck, 0.5 * step), 0.0).sum(axis=1)

    @property
    def _best_value_so_far(self) -> Float[np.ndarray, "R C V"]:
        """The value of the best key of all chunks merged so far, in the order of merging."""
        assert self.merging is not None  # asked only where the order is known
        highest = np.take_along_axis(self.rows.chunk_max, self.merging, axis=1)
        is_best = highest == np.maximum.accumulate(highest, axis=1)
        latest = np.maximum.accumulate(np.where(is_best, np.arange(highest.shape[1]), 0), axis=1)
        best = np.take_along_axis(self.merging, latest, axis=1)
        return np.take_along_axis(self._best_value, best[..., None], axis=1)

    def _carry_of_any_order(self) -> tuple[Roundings, Float[np.ndarray, "R V"]]:
        merges = np.maximum(self._chunk_count - 1, 0)[:, None]
        # A merge's share times the spacing of its running out is less than twice the unit roundoff of the largest.
        fmt = self._carry_format
        step = np.maximum(2 * fmt.u * self._largest_running, fmt.tiny)
        moved = 2 * np.abs(self._beside)
        repeated = np.minimum(moved, 0.5 * step[:, None]).sum(axis=1) * (merges > 0)
        # Where the running out was on its way is not known; rows that end alike are taken to have come alike.
        return Roundings(self.rows.out[:, None], (np.sqrt(merges / 12) * step)[:, None]), repeated

    @cached_property
    def last_variance(self) -> Float[np.ndarray, "R V"]:
        """The merged out rounded to the out format, where it was carried in a wider one (§3.4)."""
        several = self._chunk_count > 1
        is_wider = self.precision.carry != self.precision.out
        return several[:, None] * is_wider * self._out.spacing(self.rows.out) ** 2 / 12

    @property
    def one_signed(self) -> Float[np.ndarray, "R V"]:
        """Typical size of the errors that all may have the same sign: nothing averages them out."""
        return self._stuck + self._lost / np.sqrt(3)

    @property
    def drift(self) -> Float[np.ndarray, "R V"]:
        """The most that these errors can be."""
        return self._stuck + self._lost

    @cached_property
    def _lost(self) -> Float[np.ndarray, "R V"]:
        """Probabilities that become 0 (§3.2)."""
        if self.precision.probability != "float16":
            return np.zeros_like(self.rows.out)
        lost = np.where(self._p_value < self._p.tiny / 2, self.rows.weight, 0.0)
        return np.abs(lost @ self.rows.value)

    @cached_property
    def _stuck(self) -> Float[np.ndarray, "R V"]:
        """Merges that move the running out by less than a few spacings, and round the same way each time (§3.4); terms
        that are too small for the sum they are added to (§3.7).
        """
        rows = self.rows
        error = self._carry[1] + self._chunk[1]
        absorbed = self._absorbed
        if absorbed.any():
            # A sum of products is as large as they are: where the heavy keys have small values it absorbs less.
            count = (absorbed > 0).sum(axis=1, keepdims=True)
            of_products = np.minimum(absorbed @ rows.size, count * ABSORBED * self._eps * self._weighted_magnitude)
            error = error + of_products + absorbed.sum(axis=1, keepdims=True) * np.abs(rows.out)
        return error

    @cached_property
    def _absorbed(self) -> Float[np.ndarray, "R S"]:
        """What may be lost of a weight that is small beside its tile's sum, or whose tile is (§3.7)."""
        rows, eps = self.rows, self._eps
        starts = np.concatenate([np.arange(start, stop, KEY_TILE) for start, stop in pairwise(rows.edges)])
        tile = np.add.reduceat(rows.weight, starts, axis=1)
        sizes = np.diff(np.append(starts, rows.weight.shape[1]))
        of_tile = np.where(tile < 8 * eps, np.minimum(tile, ABSORBED * eps), 0.0)
        share = np.divide(of_tile, tile, out=np.zeros_like(tile), where=tile > 0)
        whole = np.repeat(tile, sizes, axis=1)
        lost = np.where(rows.weight < 8 * eps * whole, np.minimum(rows.weight, ABSORBED * eps * whole), 0.0)
        lost = np.maximum(lost, rows.weight * np.repeat(share, sizes, axis=1))
        return lost * (self._seen_keys > 1)[:, None]
