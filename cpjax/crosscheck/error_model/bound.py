"""What rounding can do at worst (§5): an interval for each output, which holds in whatever order chunks are merged.

The exponent of each key may be off by D_j, each probability, chunk and merge by a unit roundoff. Beyond the interval no
rounding explains a result. Section numbers are those of docs/verdict.md.
"""

from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.error_model.arithmetic import Arithmetic
from cpjax.crosscheck.error_model.scores import added_size

OF_SCORE, OF_DISTANCE, OF_LOG = 2.0, 4.0, 8.0
"""Unit roundoffs of |s|, of M − s and of 1 + |lse| by which an exponent may be off."""

MOST_OF_TANH, MOST_OF_ADDED = 8.0, 6.0
"""Twice what σ has of softcap and of the numbers that are added (§3.11)."""

OF_SUMS = 2.0
"""Numerator and row sum: each adds up every key, and multiplies it before."""

OF_WEIGHT, WEIGHT_SIZE = 4.0, 4.0
"""A merge's weight is off by at most so many unit roundoffs of |lse| and this."""

LSE_SUMS = 2.0
"""Unit roundoffs an addition, in lse: of the row sum, and of the weights that it adds up."""

LSE_LOGS, LSE_SIZE = 2.0, 8.0
"""Of each logarithm and merge, so many unit roundoffs of |lse|, and this many of 1."""

MOST_DISTORTION = 0.5
"""Where the weights of a row may be off by more together, the row is not judged (§6)."""

OVERFLOW_ROOM = 2.0**-10
"""By how much q·k, which is itself rounded, may exceed its exact value, relative to it (§6)."""

LARGEST_EXPONENT = 50.0
"""An exponent that may be off by more makes no number of any use; rows are not judged long before (§6)."""


@dataclass(frozen=True)
class Bound:
    """The bound of `out` and `lse`, and which rows have none."""

    arithmetic: Arithmetic

    @cached_property
    def in_range(self) -> Bool[np.ndarray, " R"]:
        """Rows none of whose q·k overflows the format that scores are kept in (§6)."""
        a = self.arithmetic
        largest = np.where(a.rows.seen, np.abs(a.rows.product), 0.0).max(axis=1) / a.scale_size
        return largest * (1 + OVERFLOW_ROOM) < a.score.largest

    @cached_property
    def of_exponent(self) -> Float[np.ndarray, "R S"]:
        """The most that rounding changes any exponent, D_j."""
        a, rows = self.arithmetic, self.arithmetic.rows
        x = np.abs(rows.product)
        top = rows.chunk_max.max(axis=1)
        below_top = np.where(rows.seen, np.where(np.isneginf(top), 0.0, top)[:, None] - rows.score, 0.0)
        fixed = OF_LOG * (1 + a.lse_size) + a.depth
        bound = a.eps * (a.head_dim * rows.norms + OF_SCORE * x)
        if a.has_rounded_scores:
            fmt = a.score
            spill = np.maximum(fmt.u * x / a.scale_size, fmt.tiny / 2) * a.scale_size
            own = spill + np.maximum(fmt.u * (x + spill), fmt.tiny / 2)
            bound = bound + own
        unit = a.score.u + a.eps if a.has_rounded_scores else a.eps
        if rows.logits.softcap is not None:  # the slope changes on the way, by less than the error over softcap
            bound = np.minimum(rows.slope + bound / rows.logits.softcap, 1.0) * bound
            bound = bound + MOST_OF_TANH * unit * rows.logits.softcap
        bound = bound + MOST_OF_ADDED * unit * added_size(a) + a.eps * (OF_DISTANCE * below_top + fixed[:, None])
        if a.has_rounded_scores and a.has_rounded_distances:
            bound = bound + a.score.u * (below_top + 2 * bound) + a.score.tiny
        bound = bound + rows.per_key(a.chunk_lse_spacing / 2)
        return np.where(rows.seen, bound, 0.0)

    @cached_property
    def growth(self) -> Float[np.ndarray, "R S"]:
        """exp(D_j) − 1: the share by which a weight may be too large."""
        return np.expm1(np.minimum(self.of_exponent, LARGEST_EXPONENT))

    @cached_property
    def distortion(self) -> Float[np.ndarray, " R"]:
        """Σ_j A_j (exp(D_j) − 1): how much the weights may be off together, and what their sum may be off besides."""
        return np.einsum("rs,rs->r", self.arithmetic.rows.weight, self.growth) + self.of_sum

    @cached_property
    def of_probability(self) -> Float[np.ndarray, "R S"]:
        """The most that rounding changes the factor of each value, in units of the output."""
        a, rows = self.arithmetic, self.arithmetic.rows
        worth = reduce(np.maximum, (worth for _, worth in a.p_choices))
        error = np.maximum(a.probability.u * rows.weight, a.probability.tiny / 2 * worth)
        error *= 1 + self.growth
        error[a.seen_keys <= 1] = 0.0  # a key alone has p = 1; hidden ones have no weight and no worth
        return error

    @cached_property
    def of_sum(self) -> Float[np.ndarray, " R"]:
        """The same of their sum, where the row sum takes the rounded probabilities."""
        if not self.arithmetic.has_rounded_sum:
            return np.zeros(len(self.arithmetic.rows.lse))
        return self.of_probability.sum(axis=1)

    @cached_property
    def parts(self) -> dict[str, Float[np.ndarray, "R V"]]:
        """What the half-width before the last rounding is made of, by name."""
        a, rows = self.arithmetic, self.arithmetic.rows
        moved = rows.weight * self.growth
        # Weights that are off do not sum to one; all errors are relative to their sum.
        least = (rows.weight / (1 + self.growth)).sum(axis=1, keepdims=True) - self.of_sum[:, None]
        least = np.where(least > 0, least, 1.0)  # where it is not, the row is not judged
        of_p = self.of_probability @ rows.size + self.of_sum[:, None] * np.abs(rows.out)
        share = rows.chunk_weight[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            chunk_out = np.where(share > 0, np.abs(rows.chunk_part) / share, 0.0)
        chunks = a.chunk_count[:, None]
        merges = np.maximum(chunks - (2 if a.carry == a.out else 1), 0)
        of_sums = (OF_SUMS * (a.depth + a.head_dim) * a.eps)[:, None]
        of_weights = OF_WEIGHT * a.eps * (a.lse_size[:, None] + WEIGHT_SIZE) * chunks * a.weighted_size
        # One key: nothing but the last rounding. One chunk: its own rounding is the last one.
        several_keys, several_chunks = (a.seen_keys > 1)[:, None], chunks > 1
        return {
            "probabilities": of_p / least,
            "scores": several_keys * (moved @ rows.size + moved.sum(axis=1, keepdims=True) * np.abs(rows.out)) / least,
            "sums": several_keys * (of_sums * a.weighted_size + a.product_drift) / least,
            "outputs of chunks": several_chunks * (share * (a.out.u * chunk_out + a.out.tiny / 2)).sum(axis=1),
            "outputs of merges": several_chunks * merges * (a.carry.u * a.largest_running + a.carry.tiny / 2),
            "weights of the merge": several_chunks * several_keys * of_weights,
            "underflow": a.underflow,
        }

    @cached_property
    def before_last(self) -> Float[np.ndarray, "R V"]:
        """The most that everything before the last rounding moves `out`."""
        a = self.arithmetic
        return (1 + a.out.u) ** (a.chunk_count[:, None] + 2) * sum(self.parts.values(), np.zeros_like(a.rows.out))

    # The last rounding is done, not bounded: so what must be exact is exact.

    @cached_property
    def low(self) -> Float[np.ndarray, "R V"]:
        """The least output that rounding explains."""
        return self.arithmetic.out.round(self.arithmetic.rows.out - self.before_last)

    @cached_property
    def high(self) -> Float[np.ndarray, "R V"]:
        """The largest."""
        return self.arithmetic.out.round(self.arithmetic.rows.out + self.before_last)

    @cached_property
    def is_judgeable(self) -> Bool[np.ndarray, " R"]:
        """Rows of which rounding leaves something to judge (§6)."""
        finite = np.isfinite(self.low).all(axis=1) & np.isfinite(self.high).all(axis=1)
        return (self.distortion <= MOST_DISTORTION) & finite & self.in_range

    @property
    def half_width(self) -> Float[np.ndarray, "R V"]:
        """How far the last rounding and everything before it may move `out` together."""
        half = self.arithmetic.out.spacing(self.arithmetic.rows.out) / 2
        # Half of float64's least number is 0, by which no error can be divided.
        return self.before_last + np.maximum(half, np.finfo(np.float64).smallest_subnormal)

    @cached_property
    def of_lse(self) -> Float[np.ndarray, " R"]:
        """The most that rounding changes lse; 0 where nothing is seen."""
        a = self.arithmetic
        of_log = a.eps * (a.chunk_count + 2) * (LSE_LOGS * a.lse_size + LSE_SIZE)
        of_weights = np.log1p(self.distortion)
        if a.has_rounded_sum:  # the sum may be as much less as it may be more, and its logarithm then loses more
            of_weights = -np.log1p(-np.minimum(self.distortion, MOST_DISTORTION))
        bound = of_weights + LSE_SUMS * a.depth * a.eps + of_log
        return np.where(a.rows.seen.any(axis=1), bound, 0.0)
