"""What rounding may do to a result: per element a standard deviation and a hard bound. Derivation: docs/verdict.md.

Every quantity that a kernel rounds is known in float64, so the variance of its rounding is known: spacing² / 12, if
the rounded value falls anywhere between two neighbours. Each is carried to the output by its derivative. The bound adds
up worst cases instead, and holds for every order of merging; where it is exceeded, no rounding explains the result.

Section numbers are those of docs/verdict.md.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.attention64 import Rows
from cpjax.crosscheck.formats import FORMATS, Format
from cpjax.crosscheck.groups import Groups, groups_of, score_groups_of, sum_of_squares
from cpjax.precision import Precision
from cpjax.tiles import KEY_TILE

Merging = Int[np.ndarray, "R C"]
"""Per row the chunks in the order of merging."""


@dataclass(frozen=True)
class Expected:
    """What correct arithmetic explains. All float64; R rows, V value head dim."""

    sigma: Float[np.ndarray, "R V"]
    """Standard deviation of `out`."""
    coherent: Float[np.ndarray, " R"]
    """Share of the variance that comes from errors which all outputs of a row share."""
    low: Float[np.ndarray, "R V"]
    high: Float[np.ndarray, "R V"]
    """The least and the largest `out` that rounding explains."""
    room: Float[np.ndarray, "R V"]
    """How far the last rounding and everything before it may move `out` together: what errors are measured by."""
    lse_sigma: Float[np.ndarray, " R"]
    lse_bound: Float[np.ndarray, " R"]
    distortion: Float[np.ndarray, " R"]
    """How much the weights of a row may be off together; beyond 1/2 the row is not judged (§6)."""


@dataclass(frozen=True)
class ErrorModel:
    """The error model of one precision profile for some rows."""

    rows: Rows
    precision: Precision
    merging: Merging | None
    """None: the order is not known."""
    head_dim: int
    scale: float
    """As the profile rounds it."""

    def expected(self) -> Expected:
        """Everything the judge needs of these rows."""
        shared = self.probability_variance + self.score_variance + self.lse_rounding_variance + self.one_signed**2
        variance = shared + self.chunk_variance + self.carry_variance + self.compute_variance
        variance = variance + self.last_variance
        total = variance.sum(axis=1)
        share = np.divide(shared.sum(axis=1), total, out=np.zeros_like(total), where=total > 0)
        low, high, room = self.interval
        sees_nothing = ~self.rows.seen.any(axis=1)
        lse_bound = np.where(sees_nothing, 0.0, self.lse_bound)
        return Expected(
            np.sqrt(variance), share, low, high, room, np.sqrt(self.lse_variance), lse_bound, self.weight_distortion
        )

    # Formats -----------------------------------------------------------------------------------------------------

    @property
    def _p(self) -> Format:
        return FORMATS[self.precision.probability]

    @property
    def _out(self) -> Format:
        return FORMATS[self.precision.out]

    @property
    def _carry_format(self) -> Format:
        return FORMATS[self.precision.carry]

    @property
    def _eps(self) -> float:
        """Unit roundoff of everything that is not stored in a format of its own. The oracle is float64 itself: for
        the float64 profile its own errors count too, so they count twice."""
        return FORMATS[self.precision.compute].u * (2.0 if self.precision.compute == "float64" else 1.0)

    @property
    def _scale(self) -> float:
        """|scale|, or 1 where it is 0 and every score is exact."""
        return abs(self.scale) or 1.0

    @property
    def _low_precision_scores(self) -> bool:
        return self.precision.score != self.precision.compute

    @property
    def _depth(self) -> float:
        """Additions one after the other in a sum over the keys, as assumed (§5): a tile, then the tiles."""
        return KEY_TILE + self.rows.seen.shape[1] / KEY_TILE

    # Pieces ------------------------------------------------------------------------------------------------------

    @cached_property
    def _p_value(self) -> Float[np.ndarray, "R S"]:
        """p = exp(s − M_c)."""
        return np.exp(self.rows.below)

    @cached_property
    def _p_weight(self) -> Float[np.ndarray, "R S"]:
        """What one unit of p is worth in the output, g_c = exp(M_c − lse); 0 where hidden."""
        rows = self.rows
        with np.errstate(invalid="ignore"):  # −inf − (−inf) where a row sees nothing; replaced below
            worth = np.exp(rows.chunk_max - rows.lse[:, None])
        return np.where(rows.seen, rows.per_key(np.nan_to_num(worth, nan=0.0)), 0.0)

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

    # Standard deviation (§3) -------------------------------------------------------------------------------------

    @cached_property
    def probability_variance(self) -> Float[np.ndarray, "R V"]:
        """p rounded to its format (§3.1). p = 1 is exact; what becomes 0 is in `one_signed`."""
        p, worth = self._p_value, self._p_weight
        step = np.where(p == 1.0, 0.0, self._p.spacing(p))
        variance = self._variance_of(worth * step / np.sqrt(12), self._groups, center=False)
        if self.precision.probability != "float16":
            return variance
        for cell in self._least_cells:
            variance = variance + (self._p.tiny / 4 * (cell @ self.rows.value)) ** 2
        return variance

    @cached_property
    def _least_cells(self) -> list[Float[np.ndarray, "R S"]]:
        """Worth of the keys whose p becomes n times the least number, for each n up to 16: they err alike (§3.2)."""
        if self.precision.probability != "float16":
            return []
        n = np.where(self.rows.seen, np.round(self._p_value / self._p.tiny), 0.0)
        return [np.where(n == k, self._p_weight, 0.0) for k in np.unique(n[(n >= 1) & (n <= 16)])]

    @property
    def chunk_variance(self) -> Float[np.ndarray, "R V"]:
        """Each chunk's out rounded to the out format, where these errors are random (§3.3)."""
        return self._chunk[0]

    @cached_property
    def _chunk(self) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, "R V"]]:
        """Variance of the chunks' random roundings, and the sum of those that are not.

        The value of the chunk's best key is, once rounded, a number of the format. Where the chunk's out is nearer than
        a few spacings, it is rounded back to it, always against what the other keys added.
        """
        rows = self.rows
        a = rows.chunk_weight[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            out = np.where(a > 0, rows.chunk_part / a, 0.0)
        top = np.stack(
            [start + rows.score[:, start:stop].argmax(axis=1) for start, stop in pairwise(rows.edges)], axis=1
        )
        moved = np.abs(out - self._out.round(rows.value[top]))
        step = self._out.spacing(out)
        free = moved >= 4 * step
        independent = np.where(free, a**2 * step**2 / 12, 0.0).sum(axis=1)
        return independent, np.where(free, 0.0, a * np.minimum(moved, 0.5 * step)).sum(axis=1)

    @property
    def carry_variance(self) -> Float[np.ndarray, "R V"]:
        """The running out rounded after each merge, where these errors are independent (§3.4)."""
        return self._carry[0]

    @cached_property
    def one_signed(self) -> Float[np.ndarray, "R V"]:
        """Errors that all may have the same sign, at most: nothing averages them out.

        Merges that move the running out by less than a few spacings, and round the same way each time (§3.4);
        probabilities that become 0 (§3.2); terms that are too small for the sum they are added to (§3.7).
        """
        rows = self.rows
        error = self._carry[1] + self._chunk[1]
        if self.precision.probability == "float16":
            lost = np.where(self._p_value < self._p.tiny / 2, rows.weight, 0.0)
            error = error + np.abs(lost @ rows.value) / np.sqrt(3)
        absorbed = self._absorbed
        if absorbed.any():
            of_values = absorbed @ rows.size + absorbed.sum(axis=1, keepdims=True) * np.abs(rows.out)
            error = error + of_values
        return error

    @cached_property
    def _absorbed(self) -> Float[np.ndarray, "R S"]:
        """What may be lost of a weight that is small beside its tile's sum, or whose tile is (§3.7)."""
        rows, eps = self.rows, self._eps
        starts = np.concatenate([np.arange(start, stop, KEY_TILE) for start, stop in pairwise(rows.edges)])
        tile = np.add.reduceat(rows.weight, starts, axis=1)
        sizes = np.diff(np.append(starts, rows.weight.shape[1]))
        of_tile = np.where(tile < 8 * eps, np.minimum(tile, 0.6 * eps), 0.0)
        share = np.divide(of_tile, tile, out=np.zeros_like(tile), where=tile > 0)
        whole = np.repeat(tile, sizes, axis=1)
        lost = np.where(rows.weight < 8 * eps * whole, np.minimum(rows.weight, 0.6 * eps * whole), 0.0)
        lost = np.maximum(lost, rows.weight * np.repeat(share, sizes, axis=1))
        return lost * (self._seen_keys > 1)[:, None]

    @cached_property
    def _carry(self) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, "R V"]]:
        """Variance of the merges' independent roundings, and the sum of those that repeat.

        A merge that moves the running out by less than a few spacings rounds the same way again and again.
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
        free = merged & (moved >= 4 * step)
        stuck = merged & (moved < 4 * step)
        independent = np.where(free, done**2 * step**2 / 12, 0.0).sum(axis=1)
        repeated = np.where(stuck, done * np.minimum(moved, 0.5 * step), 0.0).sum(axis=1)
        return independent, repeated

    def _carry_of_any_order(self) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, "R V"]]:
        merges = np.maximum((self.rows.chunk_weight > 0).sum(axis=1) - 1, 0)[:, None]
        step = self._carry_format.spacing(self._largest_running)
        a = self.rows.chunk_weight[..., None]
        moved = 2 * np.abs(self.rows.chunk_part - a * self.rows.out[:, None])
        repeated = np.minimum(moved, 0.5 * step[:, None]).sum(axis=1) * (merges > 0)
        return merges * step**2 / 12, repeated

    @cached_property
    def _largest_running(self) -> Float[np.ndarray, "R V"]:
        """No partial sum of the chunks' parts exceeds this in magnitude, whatever the order (§5)."""
        part = self.rows.chunk_part
        return np.maximum(np.maximum(part, 0).sum(axis=1), np.maximum(-part, 0).sum(axis=1))

    @cached_property
    def _score_sigma(self) -> Float[np.ndarray, "R S"]:
        """Standard deviation of each score (§3.5): its roundings to the score format, and the compute dtype's."""
        rows, s = self.rows, np.where(self.rows.seen, self.rows.score, 0.0)
        below = np.where(rows.seen, rows.below, 0.0)
        computed = self._eps * (2 * np.abs(s) + 3 * np.abs(below) + rows.norms)
        variance = computed**2 / 3
        if self._low_precision_scores:
            fmt = FORMATS[self.precision.score]
            variance = variance + (self._scale * fmt.spacing(s / self._scale)) ** 2 / 12
            variance = variance + fmt.spacing(s) ** 2 / 12
            variance = variance + np.where(np.abs(below) <= np.abs(s), 0.0, fmt.spacing(below) ** 2 / 12)
        return np.where(rows.seen, np.sqrt(variance), 0.0)

    @cached_property
    def score_variance(self) -> Float[np.ndarray, "R V"]:
        """Errors of the scores move weight between keys: Σ A_j δs_j (v_j − out) (§3.5), and the rescales (§3.6)."""
        rows = self.rows
        variance = self._variance_of(rows.weight * self._score_sigma, self._score_groups, center=True)
        for jump, weight, part in self._rescales:
            variance = variance + (jump[:, None] * (part - weight[:, None] * rows.out)) ** 2
        return variance

    @cached_property
    def _rescales(self) -> list[tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"], Float[np.ndarray, "R V"]]]:
        """Standard deviation of each rescale's exponent, with Σ A and Σ A v of the keys that it multiplies (§3.6)."""
        if not self._low_precision_scores:
            return []
        fmt, rows = FORMATS[self.precision.score], self.rows
        found = []
        for start, stop in pairwise(rows.edges):
            highest = np.full(len(rows.lse), -np.inf)
            weight, part = np.zeros_like(rows.lse), np.zeros_like(rows.out)
            for tile in range(start, stop, KEY_TILE):
                keys = slice(tile, min(tile + KEY_TILE, stop))
                new = np.maximum(highest, rows.score[:, keys].max(axis=1))
                seen_before = ~np.isneginf(highest)
                jump = np.where(seen_before, new - np.where(seen_before, highest, 0.0), 0.0)
                if (jump > 0).any():
                    found.append((np.where(jump > 0, fmt.spacing(jump), 0.0) / np.sqrt(12), weight, part))
                weight = weight + rows.weight[:, keys].sum(axis=1)
                part = part + rows.weight[:, keys] @ rows.value[keys]
                highest = new
        return found

    @cached_property
    def _chunk_lse_step(self) -> Float[np.ndarray, "R C"]:
        """Spacing of the format in which a chunk's lse is stored, where that is coarser than the compute format."""
        if self.precision.lse == self.precision.compute:
            return np.zeros_like(self.rows.chunk_weight)
        with np.errstate(divide="ignore", invalid="ignore"):
            lse = np.log(self.rows.chunk_weight) + self.rows.lse[:, None]
        fmt = FORMATS[self.precision.lse]
        return np.where(self.rows.chunk_weight > 0, fmt.spacing(np.where(np.isfinite(lse), lse, 0.0)), 0.0)

    @cached_property
    def lse_rounding_variance(self) -> Float[np.ndarray, "R V"]:
        """Each chunk's lse rounded, which makes it weigh too much or too little in the merge (§3.8)."""
        rows = self.rows
        beside = rows.chunk_part - rows.chunk_weight[..., None] * rows.out[:, None]
        return (beside**2 * self._chunk_lse_step[..., None] ** 2 / 12).sum(axis=1)

    @cached_property
    def last_variance(self) -> Float[np.ndarray, "R V"]:
        """The merged out rounded to the out format, where it was carried in a wider one (§3.4)."""
        several = (self.rows.chunk_weight > 0).sum(axis=1) > 1
        is_wider = self.precision.carry != self.precision.out
        return several[:, None] * is_wider * self._out.spacing(self.rows.out) ** 2 / 12

    @cached_property
    def compute_variance(self) -> Float[np.ndarray, "R V"]:
        """What float32 does besides (§3.7): exponentials and products, sums over the keys, weights of the merge."""
        rows, eps = self.rows, self._eps
        a = rows.chunk_weight[..., None]
        spread = ((rows.chunk_part - a * rows.out[:, None]) ** 2).sum(axis=1)
        of_terms = 4 * eps * self._weighted_magnitude * (self._seen_keys > 1)[:, None]
        size = np.where(self._groups.is_repeated[:, None], self._weighted_magnitude, np.abs(rows.out))
        of_sums = self._sum_sigma[:, None] * size
        of_merges = (2 * eps * (self._lse_size + 2))[:, None] ** 2 * spread
        return of_terms**2 + 2 * of_sums**2 + of_merges

    @cached_property
    def _sum_sigma(self) -> Float[np.ndarray, " R"]:
        """Relative error of a sum of positive terms, one after the other in a tile of up to 2,048 (§3.7).

        0.25 √n units if the roundings are independent; n/4 units if equal terms make them equal.
        """
        n = np.minimum(self._seen_keys, 2048)
        tiles = self._seen_keys / 2048
        units = np.where(self._groups.is_repeated, n / 4, 0.25 * np.sqrt(n)) + 0.25 * np.sqrt(tiles)
        return self._eps * np.where(self._seen_keys > 1, units, 0.0)

    @cached_property
    def lse_one_signed(self) -> Float[np.ndarray, " R"]:
        """Errors of lse that may all have the same sign (§3.8)."""
        return self._absorbed.sum(axis=1)

    @cached_property
    def lse_variance(self) -> Float[np.ndarray, " R"]:
        """Variance of lse (§3.8): errors of scores, of the sum, and of the logarithm and the merges."""
        rows, eps, n = self.rows, self._eps, self._seen_keys
        variance = self._variance_of_sum(rows.weight * self._score_sigma, self._score_groups)
        for jump, weight, _ in self._rescales:
            variance = variance + (jump * weight) ** 2
        merges = (rows.chunk_weight > 0).sum(axis=1)
        of_sum = np.where(n > 1, 4 * eps, 0.0) + self._sum_sigma
        of_log = eps * (self._lse_size + 2) * np.sqrt(merges + 1)
        of_storing = (rows.chunk_weight**2 * self._chunk_lse_step**2).sum(axis=1) / 12
        return np.where(n > 0, variance + of_sum**2 + of_log**2 + of_storing + self.lse_one_signed**2, 0.0)

    def variance_along(
        self, per_out: Float[np.ndarray, "R V"], per_lse: Float[np.ndarray, " R"]
    ) -> Float[np.ndarray, " R"]:
        """Variance of per_out · (error of out) + per_lse · (error of lse) in each row, correlations included (§7).

        The errors of probabilities and of scores are shared by all outputs of a row, so they are added up first. What
        is `one_signed` is left out: it is no random error.
        """
        rows = self.rows
        along = per_out @ rows.value.T
        away = along - (per_out * rows.out).sum(axis=1, keepdims=True) + per_lse[:, None]
        step = np.where(self._p_value == 1.0, 0.0, self._p.spacing(self._p_value))
        variance = self._variance_of_sum(self._p_weight * step / np.sqrt(12) * along, self._groups)
        variance += self._variance_of_sum(rows.weight * self._score_sigma * away, self._score_groups)
        for cell in self._least_cells:
            variance += (self._p.tiny / 4 * (cell * along).sum(axis=1)) ** 2
        # Errors of a merge's weights and of the row sum move all outputs of a row together.
        beside = rows.chunk_part - rows.chunk_weight[..., None] * rows.out[:, None]
        away_of_chunks = np.einsum("rv,rcv->rc", per_out, beside)
        variance += ((2 * self._eps * (self._lse_size + 2))[:, None] ** 2 * away_of_chunks**2).sum(axis=1)
        variance += (self._sum_sigma * (per_out * rows.out).sum(axis=1)) ** 2
        variance += (self._chunk_lse_step**2 * away_of_chunks**2).sum(axis=1) / 12
        stored = self.chunk_variance + self.carry_variance + self.compute_variance + self.last_variance
        variance += (per_out**2 * stored).sum(axis=1)
        return variance + per_lse**2 * self.lse_variance

    @cached_property
    def in_range(self) -> Bool[np.ndarray, " R"]:
        """Rows none of whose q·k overflows the format that scores are kept in (§6)."""
        largest = np.where(self.rows.seen, np.abs(self.rows.score), 0.0).max(axis=1) / self._scale
        return largest * (1 + 2.0**-10) < FORMATS[self.precision.score].largest

    # Hard bound (§5) ---------------------------------------------------------------------------------------------

    @cached_property
    def _seen_keys(self) -> Int[np.ndarray, " R"]:
        return self.rows.seen.sum(axis=1)

    @cached_property
    def _lse_size(self) -> Float[np.ndarray, " R"]:
        return np.where(self._seen_keys > 0, np.abs(self.rows.lse), 0.0)

    @cached_property
    def _weighted_magnitude(self) -> Float[np.ndarray, "R V"]:
        return self.rows.weight @ self.rows.size

    @cached_property
    def score_bound(self) -> Float[np.ndarray, "R S"]:
        """The most that rounding changes any exponent, D_j."""
        rows, eps = self.rows, self._eps
        s = np.where(rows.seen, np.abs(rows.score), 0.0)
        top = rows.chunk_max.max(axis=1)
        below_top = np.where(rows.seen, np.where(np.isneginf(top), 0.0, top)[:, None] - rows.score, 0.0)
        fixed = 8 * (1 + self._lse_size) + self._depth
        bound = eps * (self.head_dim * rows.norms + 2 * s + 4 * below_top + fixed[:, None])
        if self._low_precision_scores:
            fmt = FORMATS[self.precision.score]
            spill = np.maximum(fmt.u * s / self._scale, fmt.tiny / 2) * self._scale
            multiply = np.maximum(fmt.u * (s + spill), fmt.tiny / 2)
            own = spill + multiply
            bound = bound + own + fmt.u * (below_top + 2 * (bound + own)) + fmt.tiny
        bound = bound + rows.per_key(self._chunk_lse_step / 2)
        return np.where(rows.seen, bound, 0.0)

    @cached_property
    def weight_distortion(self) -> Float[np.ndarray, " R"]:
        """Σ_j A_j (exp(D_j) − 1)."""
        return (self.rows.weight * np.expm1(np.minimum(self.score_bound, 50.0))).sum(axis=1)

    @cached_property
    def interval(self) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, "R V"], Float[np.ndarray, "R V"]]:
        """The least and the largest output, and the room on either side.

        The last rounding is done, not bounded: so what must be exact is exact.
        """
        rows, fmt = self.rows, self._out
        magnitude = rows.size
        growth = np.exp(np.minimum(self.score_bound, 50.0))
        several = (self._seen_keys > 1)[:, None]
        chunks = (rows.chunk_weight > 0).sum(axis=1)[:, None]
        p_error = np.maximum(self._p.u * rows.weight * growth, self._p.tiny / 2 * self._p_weight)
        moved = rows.weight * (growth - 1)
        least = (rows.weight / growth).sum(axis=1, keepdims=True)
        of_scores = (moved @ magnitude + moved.sum(axis=1, keepdims=True) * np.abs(rows.out)) / np.where(
            least > 0, least, 1.0
        )
        of_sums = 2 * (self._depth + self.head_dim) * self._eps * self._weighted_magnitude
        b = several * ((np.where(rows.seen, p_error, 0.0) @ magnitude) + of_scores + of_sums)
        a = rows.chunk_weight[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            chunk_out = np.where(a > 0, np.abs(rows.chunk_part) / a, 0.0)
        of_chunks = (a * (fmt.u * chunk_out + fmt.tiny / 2)).sum(axis=1)
        carry = self._carry_format
        merges = np.maximum(chunks - (2 if carry == fmt else 1), 0)
        of_merges = merges * (carry.u * self._largest_running + carry.tiny / 2)
        of_weights = several * 4 * self._eps * (self._lse_size[:, None] + 4) * chunks * self._weighted_magnitude
        # One chunk: its own rounding is the last one. Several: the last merge's is.
        stored = np.where(chunks > 1, of_chunks + of_merges + of_weights, 0.0)
        b = (1 + fmt.u) ** (chunks + 2) * (b + stored)
        return fmt.round(rows.out - b), fmt.round(rows.out + b), b + fmt.spacing(rows.out) / 2

    @cached_property
    def lse_bound(self) -> Float[np.ndarray, " R"]:
        """The most that rounding changes lse."""
        chunks = (self.rows.chunk_weight > 0).sum(axis=1)
        of_log = self._eps * (chunks + 2) * (2 * self._lse_size + 8)
        return np.log1p(self.weight_distortion) + 2 * self._depth * self._eps + of_log
