"""What a backward pass rounds, pair by pair of a query and a key; sections are those of docs/gradients.md.

Every number that is rounded is known in float64, so each rounding has a variance: spacing² / 12 in a half format, and a
count of unit roundoffs in the compute format. p enters dv, ds enters dq and dk: a term says what it does to either.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.error_model.arithmetic import ORACLE
from cpjax.crosscheck.error_model.bound import LARGEST_EXPONENT, MOST_DISTORTION
from cpjax.crosscheck.error_model.bound import OF_DISTANCE as MOST_OF_DISTANCE
from cpjax.crosscheck.error_model.bound import OF_LOG as MOST_OF_LSE
from cpjax.crosscheck.error_model.bound import OF_SCORE as MOST_OF_SCORE
from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.crosscheck.gradients.asked import RELATIVE, Asked
from cpjax.crosscheck.gradients.exact import Tile

COHERENT, RANDOM = RELATIVE, RELATIVE / 2
"""Variance of a sum of n terms, in units of (unit roundoff)² n: times its square, and times Σ term² (§3.6)."""

OF_SCORE, OF_DISTANCE, OF_EXP = 2.0, 2.0, 2.0
"""Unit roundoffs of |s|, of |s − lse| and of 1 by which an exponential is off, uniformly (§3.3)."""

LSE_SIZE = 2.0
"""The 2 in |lse| + 2: unit roundoffs by which lse is off once it is multiplied by log2 e (§3.3)."""

STEPS = 4.0
"""Roundings of dp − δ, of the product with p, and of the scale, in the bound (§4)."""

Pairs = Float[np.ndarray, "R S"]


def eps_of(asked: Asked) -> float:
    """Unit roundoff of the compute format; doubled for float64, in which the oracle computes, too."""
    compute = asked.problem.precision.compute
    return FORMATS[compute].u * (ORACLE if compute == "float64" else 1.0)


@dataclass(frozen=True)
class Term:
    """Roundings that are independent from pair to pair; variances, 0.0 is "none"."""

    name: str
    section: str
    of_p: Pairs | float = 0.0
    of_ds: Pairs | float = 0.0


@dataclass(frozen=True)
class RowTerm:
    """A rounding that all pairs of a query share: its variance, and what one unit of it does to p and ds."""

    name: str
    section: str
    variance: Float[np.ndarray, " R"]
    in_ds: Pairs
    in_p: Pairs | float = 0.0


@dataclass(frozen=True)
class Roundings:
    """The profile at work on one tile. R queries, S keys."""

    asked: Asked
    tile: Tile

    @property
    def eps(self) -> float:
        """Unit roundoff of whatever has no format of its own."""
        return eps_of(self.asked)

    @property
    def least(self) -> float:
        """The least normal number of the compute format: processors may take what is below for 0."""
        return FORMATS[self.asked.problem.precision.compute].least_normal

    @property
    def lost(self) -> Bool[np.ndarray, "R S"]:
        """Pairs that may be lost to zero."""
        return (self.tile.p < 2 * self.least) & self.tile.seen

    @property
    def stored(self) -> Format | None:
        """The format of p and ds as factors of matrix products, if they have one of their own."""
        precision = self.asked.problem.precision
        return None if precision.probability == precision.compute else FORMATS[precision.probability]

    @property
    def score_size(self) -> Pairs:
        """|scale| |q| |k|."""
        t = self.tile
        sizes = np.linalg.norm(t.query, axis=1)[:, None] * np.linalg.norm(t.key, axis=1)
        return abs(self.asked.problem.scale) * sizes

    @property
    def dp_size(self) -> Pairs:
        """|dout| |v|."""
        return np.linalg.norm(self.tile.dout, axis=1)[:, None] * np.linalg.norm(self.tile.value, axis=1)

    @property
    def lse(self) -> Float[np.ndarray, " R"]:
        """Of the tile's queries."""
        return self._of_rows(self.asked.lse)

    def _of_rows(self, x: np.ndarray) -> np.ndarray:
        t = self.tile
        return x[t.batch, t.rows, t.head]

    @property
    def stored_scale(self) -> float:
        """What ds is multiplied by when it is rounded."""
        return (self.asked.problem.scale or 1.0) if self.asked.ds == "scaled" else 1.0

    @property
    def is_of_rounded_p(self) -> bool:
        """Whether ds is made of the p that was rounded."""
        return self.asked.ds == "of_rounded_p"

    def stored_errors(self) -> tuple[Pairs, Pairs]:
        """What rounding to the stored format does to p and ds, as far as float32 leaves it known (§3.1, 3.2)."""
        fmt, t, scale = self.stored, self.tile, self.stored_scale
        assert fmt is not None
        with np.errstate(invalid="ignore"):
            p = fmt.round(t.p)
            ds = p * t.per_p if self.is_of_rounded_p else t.ds
            return p - t.p, fmt.round(ds * scale) / scale - t.ds

    def stored_terms(self) -> Iterator[Term]:
        """Sections 3.1 and 3.2; none where p and ds have no format of their own."""
        fmt, t, scale = self.stored, self.tile, self.stored_scale
        if fmt is None:
            return
        of_p = t.seen * fmt.spacing(t.p) ** 2 / 12
        yield Term("probabilities", "3.1", of_p, of_p * t.per_p**2 if self.is_of_rounded_p else 0.0)
        yield Term("ds", "3.2", of_ds=t.seen * (fmt.spacing(t.ds * scale) / scale) ** 2 / 12)

    def computed_terms(self) -> Iterator[Term]:
        """Sections 3.3 and 3.4: what is done in the compute format."""
        t, eps = self.tile, self.eps
        exponent = OF_SCORE * np.abs(t.score) + OF_DISTANCE * np.abs(t.below) + OF_EXP
        score = (eps * exponent) ** 2 / 3 + self.asked.problem.scale**2 * self._dot(t.query, t.key)
        yield Term("scores", "3.3", of_p=t.p**2 * score, of_ds=t.ds**2 * score)
        yield Term("underflow", "3.7", of_p=(t.p * self.lost) ** 2, of_ds=(t.ds * self.lost) ** 2)
        yield Term("dout·v", "3.4", of_ds=t.p**2 * self._dot(t.dout, t.value) + eps**2 * t.ds**2)

    def _dot(self, x: Float[np.ndarray, "R D"], y: Float[np.ndarray, "S D"]) -> Pairs:
        """Variance of x·y, added up term after term (§3.6)."""
        return self.eps**2 * x.shape[1] * (COHERENT * (x @ y.T) ** 2 + RANDOM * (x**2 @ (y**2).T))

    def row_terms(self) -> Iterator[RowTerm]:
        """Sections 3.3 and 3.5: what all keys of a query share."""
        t, eps = self.tile, self.eps
        yield RowTerm("lse", "3.3", (eps * (np.abs(self.lse) + LSE_SIZE)) ** 2 / 3, t.ds, t.p)
        out = self._of_rows(self.asked.out)
        square = ((t.dout * out) ** 2).sum(axis=1)
        variance = COHERENT * self._of_rows(self.asked.delta) ** 2 + RANDOM * square
        variance = eps**2 * out.shape[1] * variance
        if not self.asked.has_out:
            variance = variance + (t.dout**2 * self._of_rows(np.asarray(self.asked.out_variance))).sum(axis=1)
        yield RowTerm("delta", "3.5", variance, t.p)

    def most(self) -> tuple[Pairs, Pairs]:
        """The most that p and ds are off when they are added up; infinite where weights may be off by half (§4)."""
        t, eps = self.tile, self.eps
        lse = MOST_OF_LSE * (1 + np.abs(self.lse))[:, None]
        exponent = t.query.shape[1] * self.score_size + MOST_OF_SCORE * np.abs(t.score)
        exponent = eps * (exponent + MOST_OF_DISTANCE * np.abs(t.below) + lse)
        growth = np.expm1(np.minimum(exponent, LARGEST_EXPONENT))
        growth = np.where(growth <= MOST_DISTORTION, growth, np.inf)
        out = self._of_rows(self.asked.out)
        delta = eps * (out.shape[1] + STEPS) * np.linalg.norm(t.dout, axis=1) * np.linalg.norm(out, axis=1)
        if not self.asked.has_out:
            delta = delta + (np.abs(t.dout) * self._of_rows(np.asarray(self.asked.out_bound))).sum(axis=1)
        product = eps * (t.dout.shape[1] + STEPS) * self.dp_size + delta[:, None]
        with np.errstate(invalid="ignore"):
            of_p = np.where(t.seen, t.p * growth, 0.0)
            of_ds = np.where(t.seen, np.abs(t.ds) * growth + t.p * (1 + growth) * product, 0.0)
        of_p = of_p + t.p * self.lost + self.least * t.seen
        of_ds = of_ds + STEPS * eps * np.abs(t.ds) + np.abs(t.ds) * self.lost + self.least * t.seen
        if self.stored is not None:
            half, scale = self.stored.tiny / 2 * t.seen, abs(self.stored_scale)
            rounding = self.stored.u * (t.p + of_p) + half
            of_p = of_p + rounding
            if self.is_of_rounded_p:
                of_ds = of_ds + rounding * (np.abs(t.per_p) + product)
            of_ds = of_ds + self.stored.u * (np.abs(t.ds) + of_ds) + half / scale
            of_ds = np.where(scale * (np.abs(t.ds) + of_ds) < self.stored.largest, of_ds, np.inf)
        return of_p, of_ds
