"""Weights that are off (§3.5 to 3.8): rounded scores, rescales, sums and logarithms move weight between the keys.

Section numbers are those of docs/verdict.md.
"""

from functools import cached_property

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.row_covariance import Roundings, Shared, by_cell
from cpjax.crosscheck.error_model.running_max import Maxima
from cpjax.crosscheck.error_model.storage import Stored
from cpjax.crosscheck.error_model.ties import sum_of_squares
from cpjax.crosscheck.exact.formats import FORMATS


class Weighed(Stored):
    """Variances of the weights with which values enter, and of lse."""

    @cached_property
    def _score_sigma(self) -> Float[np.ndarray, "R S"]:
        """Standard deviation of each score (§3.5): its roundings to the score format, and the compute dtype's."""
        rows, s = self.rows, np.where(self.rows.seen, self.rows.score, 0.0)
        below = np.where(rows.seen, rows.below, 0.0)
        computed = self._eps * (2 * np.abs(s) + 3 * np.abs(below) + rows.norms)
        # A dot product that is added up term after term rounds a partial sum as large as itself each time.
        variance = (computed**2 + self.head_dim * (self._eps * s) ** 2) / 3
        if self._low_precision_scores:
            fmt = FORMATS[self.precision.score]
            variance = variance + (self._scale * fmt.spacing(s / self._scale)) ** 2 / 12
            variance = variance + self._scaling_sigma**2 + self._maxima.own_sigma**2
        return np.where(rows.seen, np.sqrt(variance), 0.0)

    @cached_property
    def score_variance(self) -> Float[np.ndarray, "R V"]:
        """Errors of the scores move weight between keys: Σ A_j δs_j (v_j − out) (§3.5), and the rescales (§3.6)."""
        rows = self.rows
        variance = self._variance_of(rows.weight * self._score_sigma, self._score_groups, center=True)
        if (known := self._moved_by_scaling) is not None:
            moved = self._pulled(known, slice(None))
            independent = sum_of_squares(rows.weight * self._scaling_sigma, rows.value, rows.out)
            is_more = (moved**2).sum(axis=1, keepdims=True) > independent.sum(axis=1, keepdims=True)
            variance = np.maximum(variance + np.where(is_more, moved**2 - independent, 0.0), 0.0)
        for jump, weight, part in self._rescales:
            variance = variance + (jump[:, None] * (part - weight[:, None] * rows.out)) ** 2
        if (moved := self._of_maxima) is not None:
            variance = variance + self._maxima.common_variance(lambda keys: self._pulled(moved, keys))
        return variance

    def _pulled(self, moved: Float[np.ndarray, "R S"], keys: slice) -> Float[np.ndarray, "R V"]:
        """What weights that are off by `moved` do to the output: Σ_j moved_j (v_j − out) over these keys."""
        some = moved[:, keys]
        return some @ self.rows.value[keys] - some.sum(axis=1, keepdims=True) * self.rows.out

    @cached_property
    def _scaling_sigma(self) -> Float[np.ndarray, "R S"]:
        """Standard deviation of the rounding of scale · q·k (§3.5); by a power of two nothing is lost."""
        fmt = FORMATS[self.precision.score]
        spacing = fmt.spacing(np.where(self.rows.seen, self.rows.score, 0.0))
        is_exact = (np.frexp(self._scale)[0] == 0.5) & (spacing > fmt.tiny)
        return np.where(is_exact, 0.0, spacing / np.sqrt(12))

    @cached_property
    def _moved_by_scaling(self) -> Float[np.ndarray, "R S"] | None:
        """A_j times the error of scale · q·k, which is known where the rounded q·k is (§3.5)."""
        if not self._low_precision_scores:
            return None
        fmt, rows = FORMATS[self.precision.score], self.rows
        with np.errstate(invalid="ignore", over="ignore"):
            product = self._scale * fmt.round(np.where(rows.seen, rows.score, 0.0) / self._scale)
            error = fmt.round(product) - product
        return rows.weight * np.where(np.isfinite(error), error, 0.0)

    def _known_along(self, away: Float[np.ndarray, "R S"] | float) -> list[Shared]:
        """What the errors of scaling do along `away`, where that is more than independent errors would (§3.5)."""
        if self._moved_by_scaling is None:
            return []
        together = (self._moved_by_scaling * away).sum(axis=1)
        independent = ((self.rows.weight * self._scaling_sigma * away) ** 2).sum(axis=1)
        return [Shared(together.sum(keepdims=True), np.maximum(together**2 - independent, 0.0))]

    @cached_property
    def _maxima(self) -> Maxima:
        return Maxima(self.rows, FORMATS[self.precision.score])

    @cached_property
    def _of_maxima(self) -> Float[np.ndarray, "R S"] | None:
        """What each score's error that others have alike moves (§3.5): A_j times its standard deviation."""
        if not self._low_precision_scores or not self._maxima.common_sigma.any():
            return None
        return self.rows.weight * self._maxima.common_sigma

    def _along_maxima(self, moved: Float[np.ndarray, "R S"] | None) -> Float[np.ndarray, " R"] | float:
        """Variance of the sum of these."""
        if moved is None:
            return 0.0
        return self._maxima.common_variance(lambda keys: moved[:, keys].sum(axis=1, keepdims=True))[:, 0]

    @cached_property
    def _rescales(self) -> list[tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"], Float[np.ndarray, "R V"]]]:
        """Standard deviation of each rescale's exponent, with Σ A and Σ A v of the keys that it multiplies (§3.6)."""
        if not self._low_precision_scores:
            return []
        rows, maxima, found = self.rows, self._maxima, []
        weight, part = np.zeros_like(rows.lse), np.zeros_like(rows.out)
        for (keys, is_first), jump in zip(maxima.tiles, maxima.jump.T, strict=True):
            if is_first:
                weight, part = np.zeros_like(rows.lse), np.zeros_like(rows.out)
            if (jump > 0).any():
                found.append((np.where(jump > 0, maxima.fmt.spacing(jump), 0.0) / np.sqrt(12), weight, part))
            weight = weight + rows.weight[:, keys].sum(axis=1)
            part = part + rows.weight[:, keys] @ rows.value[keys]
        return found

    @cached_property
    def lse_rounding_variance(self) -> Float[np.ndarray, "R V"]:
        """Each chunk's lse rounded, which makes it weigh too much or too little in the merge (§3.8)."""
        return (self._beside**2 * self._chunk_lse_step[..., None] ** 2 / 12).sum(axis=1)

    @cached_property
    def compute_variance(self) -> Float[np.ndarray, "R V"]:
        """What float32 does besides (§3.7): exponentials and products, sums over the keys, weights of the merge."""
        rows, eps = self.rows, self._eps
        spread = (self._beside**2).sum(axis=1)
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
        variance = variance + self._along_maxima(self._of_maxima)
        variance = variance + sum(part.variance for part in self._known_along(1.0))
        of_sum = np.where(n > 1, 4 * eps, 0.0) + self._sum_sigma
        of_log = eps * (self._lse_size + 2) * np.sqrt(self._chunk_count + 1)
        of_storing = (rows.chunk_weight**2 * self._chunk_lse_step**2).sum(axis=1) / 12
        return np.where(n > 0, variance + of_sum**2 + of_log**2 + of_storing + self.lse_one_signed**2, 0.0)

    def variance_along(
        self, per_out: Float[np.ndarray, "R V"], per_lse: Float[np.ndarray, " R"]
    ) -> tuple[Float[np.ndarray, " R"], list[Shared]]:
        """Variance of per_out · (error of out) + per_lse · (error of lse) in each row, correlations included (§7).

        The errors of probabilities and of scores are shared by all outputs of a row, so they are added up first. What
        is `one_signed` is left out: it is no random error. Also returned is the part of it that rows may share (§3.10).
        """
        rows = self.rows
        along = per_out @ rows.value.T
        away = along - (per_out * rows.out).sum(axis=1, keepdims=True) + per_lse[:, None]
        shared = self._shared_along(per_out, along) + self._known_along(away)
        variance = sum((part.variance for part in shared), np.zeros_like(per_lse))
        variance += self._variance_of_sum(rows.weight * self._score_sigma * away, self._score_groups)
        variance += self._along_maxima(None if self._of_maxima is None else self._of_maxima * away)
        # Errors of a merge's weights and of the row sum move all outputs of a row together.
        away_of_chunks = np.einsum("rv,rcv->rc", per_out, self._beside)
        variance += ((2 * self._eps * (self._lse_size + 2))[:, None] ** 2 * away_of_chunks**2).sum(axis=1)
        variance += (self._sum_sigma * (per_out * rows.out).sum(axis=1)) ** 2
        variance += (self._chunk_lse_step**2 * away_of_chunks**2).sum(axis=1) / 12
        variance += (per_out**2 * (self.compute_variance + self.last_variance)).sum(axis=1)
        return variance + per_lse**2 * self.lse_variance, shared

    def _shared_along(self, per_out: Float[np.ndarray, "R V"], along: Float[np.ndarray, "R S"]) -> list[Shared]:
        """Errors of probabilities, of the least of them, of chunks and of merges: those that rows may share (§3.10)."""
        probabilities = Roundings(self._p_value, self._p_sigma * along)
        variance = self._variance_of_sum(probabilities.sigma, self._groups)
        least = {n: self._p.tiny / 4 * (cell * along).sum(axis=1) for n, cell in self._least_cells.items()}
        sums = np.zeros(17)
        for n, of_row in least.items():
            sums[n] = of_row.sum()
        of_least = sum((of_row**2 for of_row in least.values()), np.zeros_like(variance))
        found = [Shared(by_cell(probabilities, self._p), variance), Shared(sums, of_least)]
        for (value, sigma), fmt in ((self._chunk[0], self._out), (self._carry[0], self._carry_format)):
            stored = Roundings(value, sigma * per_out[:, None])
            found.append(Shared(by_cell(stored, fmt), (stored.sigma**2).sum(axis=(1, 2))))
        return found
