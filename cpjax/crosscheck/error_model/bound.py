"""What rounding can do at worst (§5): an interval for each output, which holds in whatever order chunks are merged.

The exponent of each key may be off by D_j, each probability, chunk and merge by a unit roundoff. Beyond the interval no
rounding explains a result. Section numbers are those of docs/verdict.md.
"""

from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.error_model.arithmetic import Arithmetic
from cpjax.crosscheck.exact.formats import FORMATS


class HardBound(Arithmetic):
    """The hard bound of `out` and `lse`, and which rows have none."""

    @cached_property
    def in_range(self) -> Bool[np.ndarray, " R"]:
        """Rows none of whose q·k overflows the format that scores are kept in (§6)."""
        largest = np.where(self.rows.seen, np.abs(self.rows.score), 0.0).max(axis=1) / self._scale
        return largest * (1 + 2.0**-10) < FORMATS[self.precision.score].largest

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
        chunks = self._chunk_count[:, None]
        p_error = growth * np.maximum(self._p.u * rows.weight, self._p.tiny / 2 * self._p_weight)
        moved = rows.weight * (growth - 1)
        # Weights that are off do not sum to one; all errors are relative to their sum.
        least = (rows.weight / growth).sum(axis=1, keepdims=True)
        least = np.where(least > 0, least, 1.0)
        of_scores = moved @ magnitude + moved.sum(axis=1, keepdims=True) * np.abs(rows.out)
        of_sums = 2 * (self._depth + self.head_dim) * self._eps * self._weighted_magnitude
        b = several * (np.where(rows.seen, p_error, 0.0) @ magnitude + of_scores + of_sums) / least
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
        of_log = self._eps * (self._chunk_count + 2) * (2 * self._lse_size + 8)
        return np.log1p(self.weight_distortion) + 2 * self._depth * self._eps + of_log
