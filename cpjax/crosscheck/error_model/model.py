"""What rounding may do to a result: per element a standard deviation and a hard bound. Derivation: docs/verdict.md.

Every quantity that a kernel rounds is known in float64, so the variance of its rounding is known: spacing² / 12, if
the rounded value falls anywhere between two neighbours. Each is carried to the output by its derivative. The bound adds
up worst cases instead, and holds for every order of merging; where it is exceeded, no rounding explains the result.

Section numbers are those of docs/verdict.md.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.bound import HardBound
from cpjax.crosscheck.error_model.weights import Weighed


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


class ErrorModel(Weighed, HardBound):
    """The error model of one precision profile for some rows."""

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
