"""The error model of one precision profile for some rows: all terms added up, and the bound.

Every quantity that a kernel rounds is known in float64, so the variance of its rounding is known: spacing² / 12, if
the rounded value falls anywhere between two neighbours. Each is carried to the output by its derivative. The bound adds
up worst cases instead, and holds for every order of merging. Derivation: docs/verdict.md.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.error_model.arithmetic import Arithmetic, Merging
from cpjax.crosscheck.error_model.bound import Bound
from cpjax.crosscheck.error_model.lse import lse_terms
from cpjax.crosscheck.error_model.outputs import output_terms
from cpjax.crosscheck.error_model.probabilities import probability_terms
from cpjax.crosscheck.error_model.row_covariance import Shared
from cpjax.crosscheck.error_model.scores import score_terms
from cpjax.crosscheck.error_model.sums import sum_terms
from cpjax.crosscheck.error_model.terms import Direction, Systematic, Term
from cpjax.crosscheck.exact.attention import Rows
from cpjax.precision import Precision

SECTIONS = (probability_terms, output_terms, score_terms, sum_terms, lse_terms)


@dataclass(frozen=True)
class Expected:
    """What correct arithmetic explains. All float64; R rows, V value head dim."""

    sigma: Float[np.ndarray, "R V"]
    """Standard deviation of `out`."""
    least_sigma: Float[np.ndarray, "R V"]
    """An output with less has no spread: it must be exact."""
    common: Float[np.ndarray, " R"]
    """Share of the variance that comes from errors which all outputs of a row share."""
    low: Float[np.ndarray, "R V"]
    high: Float[np.ndarray, "R V"]
    """The least and the largest `out` that rounding explains."""
    half_width: Float[np.ndarray, "R V"]
    """How far the last rounding and everything before it may move `out` together: what errors are measured by."""
    lse_sigma: Float[np.ndarray, " R"]
    lse_bound: Float[np.ndarray, " R"]
    is_judgeable: Bool[np.ndarray, " R"]
    """Rows of which rounding leaves something to judge (§6)."""


LEAST_SIGMA = 2.0**-10
"""Spacings of the out format. An output whose σ is less must be exact, which is for the bound to check (§4)."""


class ErrorModel:
    """R rows, V value head dim."""

    def __init__(
        self,
        rows: Rows,
        precision: Precision,
        merging: Merging | None,
        head_dim: int,
        scale: float,
        without: Collection[str] = (),
    ):
        """Arguments as of `Arithmetic`; `without` are names of terms that are left out, to see what they are for."""
        self.arithmetic = Arithmetic(rows, precision, merging, head_dim, scale)
        self.bound = Bound(self.arithmetic)
        self._without = frozenset(without)

    @property
    def rows(self) -> Rows:
        """Exact attention."""
        return self.arithmetic.rows

    @cached_property
    def _all(self) -> list[Term | Systematic]:
        everything = [term for section in SECTIONS for term in section(self.arithmetic)]
        return [term for term in everything if term.name not in self._without]

    @property
    def terms(self) -> list[Term]:
        """The random roundings, in the order of docs/verdict.md."""
        return [term for term in self._all if isinstance(term, Term)]

    @property
    def systematic(self) -> list[Systematic]:
        """The roundings that may have one sign."""
        return [term for term in self._all if isinstance(term, Systematic)]

    def expected(self) -> Expected:
        """Everything the judge needs of these rows."""
        typical = _sum((term.typical * term.most for term in self.systematic), np.zeros_like(self.rows.out))
        common = _sum((term.out for term in self.terms if term.is_common), typical**2)
        variance = _sum((term.out for term in self.terms if not term.is_common), common)
        total = variance.sum(axis=1)
        share = np.divide(common.sum(axis=1), total, out=np.zeros_like(total), where=total > 0)
        bound = self.bound
        return Expected(
            sigma=np.sqrt(variance),
            least_sigma=self.arithmetic.out.spacing(self.rows.out) * LEAST_SIGMA,
            common=share,
            low=bound.low,
            high=bound.high,
            half_width=bound.half_width,
            lse_sigma=np.sqrt(self.lse_variance),
            lse_bound=bound.of_lse,
            is_judgeable=bound.is_judgeable,
        )

    @cached_property
    def mean(self) -> Float[np.ndarray, "R V"]:
        """How far systematic roundings of known sign move `out`: the middle between nothing and the most."""
        return _sum((term.mean for term in self.systematic if term.mean is not None), np.zeros_like(self.rows.out))

    @cached_property
    def lse_mean(self) -> Float[np.ndarray, " R"]:
        """Likewise lse."""
        return _sum((term.lse_mean for term in self.systematic), np.zeros_like(self.rows.lse))

    @cached_property
    def drift(self) -> Float[np.ndarray, "R V"]:
        """The most by which what systematic roundings do to `out` differs from `mean`."""
        return _sum((term.most * _range(term) for term in self.systematic), np.zeros_like(self.rows.out))

    @cached_property
    def lse_drift(self) -> Float[np.ndarray, " R"]:
        """Likewise of lse, from `lse_mean`."""
        return _sum((term.lse * _range(term) for term in self.systematic), np.zeros_like(self.rows.lse))

    @cached_property
    def lse_variance(self) -> Float[np.ndarray, " R"]:
        """Variance of lse; 0 where nothing is seen."""
        typical = _sum((term.typical * term.lse for term in self.systematic), np.zeros_like(self.rows.lse))
        variance = _sum((term.lse for term in self.terms), typical**2)
        return np.where(self.arithmetic.seen_keys > 0, variance, 0.0)

    def variance_along(
        self, per_out: Float[np.ndarray, "R V"], per_lse: Float[np.ndarray, " R"]
    ) -> tuple[Float[np.ndarray, " R"], list[Shared]]:
        """Variance of per_out · (error of out) + per_lse · (error of lse) in each row, correlations included (§7).

        Errors that all outputs of a row share are added up first. What is systematic is no random error and left out.
        Also returned is the part of it that rows may share (§3.10).
        """
        rows = self.rows
        of_value = per_out @ rows.value.T
        of_weight = of_value - (per_out * rows.out).sum(axis=1, keepdims=True) + per_lse[:, None]
        of_chunk = np.einsum("rv,rcv->rc", per_out, self.arithmetic.chunk_pull)
        direction = Direction(per_out, per_lse, of_value, of_weight, of_chunk)
        parts = [part for term in self.terms for part in term.along(direction)]
        variances = [part.variance if isinstance(part, Shared) else part for part in parts]
        return _sum(variances, per_lse**2 * self.lse_variance), [part for part in parts if isinstance(part, Shared)]


def _range(term: Systematic) -> float:
    """Half the width of where its errors lie, as a share of the most: of known sign they are on one side of 0."""
    return 1.0 if term.mean is None else 0.5


def _sum(addends: Iterable[np.ndarray | float], start: np.ndarray) -> np.ndarray:
    for addend in addends:
        start = start + addend
    return start
