"""How well a fault explains a sample: the likelihood of what was handed over, had the fault happened."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cpjax.crosscheck.diagnosis.cuts import part_of
from cpjax.crosscheck.diagnosis.dictionary import RIGHT, Fault
from cpjax.crosscheck.diagnosis.guards import LARGEST_GROWTH, LARGEST_OUT, LARGEST_SQUARE, LEAST_SPACING, LEAST_SUM
from cpjax.crosscheck.diagnosis.masks import is_cached
from cpjax.crosscheck.diagnosis.parts import UNWEIGHTED, merged_wrongly
from cpjax.crosscheck.diagnosis.predict import changed_lse, exact_model, glance, noisier, unrescaled, with_term
from cpjax.crosscheck.diagnosis.sample import Sample
from cpjax.crosscheck.error_model.row_covariance import distinct
from cpjax.crosscheck.exact.attention import Rows, attention_rows
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.judging.problem import Problem
from cpjax.crosscheck.judging.statistic import effective_dof

MOST_Z = 2.0
"""A fault whose residual is larger than this many standard deviations explains nothing."""

MOST_NOISE_Z = 1.45
"""The same of noise of a fitted size: sizes a factor of two apart are tried, and the nearest leaves √2 at most."""

FAR = 20.0
"""With more standard deviations than this in the median row, roughly computed, a fault is not computed exactly."""

EVEN = 0.1
"""More noise is in every row: if half of the rows have less than this share of the variance, it was not that."""


LARGEST_LEFT, LARGEST_ROW = 12.0, 4.0
"""Standard deviations that are left in one output, and in the mean of a row, where a fault explains."""

UNEVEN_OUTPUT, UNEVEN_PART = 60.0, 6.0
"""Of the mean square that noise leaves, one output and one row or column may have so many times."""

STORED = 1 / 6
"""Variance, in squared spacings, that two stored results have at least: what a rough prediction adds to σ²."""

LEAST_SPACINGS = 1 / 4
"""σ in spacings, at least, of an output that may not be the right one: about 1/√12, its last rounding's."""

OF_THE_MAXIMUM = ("maximum only", "without its maximum", "sum itself", "with log2 of the sum")
"""What is handed over instead of lse that has the row maximum as it was rounded: q·k, then the scaled score."""

EXACT_SIGMA = 1e-3
"""σ in spacings of an output that must be exact, so that a likelihood can be computed."""

LEAST_LSE_SIGMA = 2.0**-24
"""σ of lse is at least a unit roundoff of float32, in which it is handed over."""


@dataclass(frozen=True)
class Fit:
    """How well a fault explains a sample."""

    fault: Fault
    deviance: float
    """−2 ln(likelihood), up to a constant of the sample, plus the cost of the fault."""
    z: float
    """RMS(residual / σ) of out and lse, the larger."""
    dof: float
    """Effective number of independent residuals."""
    lse_is_right: bool = False
    """lse is that of the correct result, only out is not."""
    is_even: bool = True
    """What is left does not depend on where."""

    @property
    def explains(self) -> bool:
        """No residual is left."""
        return self.z <= (MOST_NOISE_Z if self.fault.noise else MOST_Z) and self.is_even


class Measured:
    """A sample with the model of the correct result; scores faults."""

    def __init__(self, sample: Sample, problem: Problem):
        """Computes the correct result once."""
        self.sample, self.problem = sample, problem
        self._cuts: dict[str, Rows] = {}
        self.model = exact_model(sample, problem)
        self.expected = self.model.expected()
        different = distinct(self.model.rows.out, FORMATS[problem.precision.out])
        self.dof = np.maximum(effective_dof(different, self.expected.common), 1.0)
        self.right = self.fit(RIGHT)

    def fit(self, fault: Fault) -> Fit:
        """Exactly, by the error model of the changed computation."""
        plain = not (fault.changes or fault.mask or fault.scale != 1.0 or fault.key >= 0 or fault.precision)
        plain = plain and not (
            fault.logits or fault.limits or fault.run or fault.keys_of >= 0 or fault.values_of >= 0 or fault.value_shift
        )
        known = fault.mask or fault.scale != 1.0 or fault.key >= 0  # what a glance can compute
        if known and not fault.changes and not fault.precision and (far := self._far(fault)) is not None:
            return far
        if fault.extra and not fault.logits:
            return self._with_term(fault)
        model = self.model if plain else exact_model(self.sample, self.problem, fault)
        if not plain and not fault.precision and self._is_far(model.rows):
            return replace(
                self._score(fault, model.rows.out, self.expected.sigma**2, model.rows.lse, self.expected.lse_sigma),
                z=float("inf"),
            )
        expected = self.expected if plain else model.expected()
        out, lse, variance = model.rows.out, model.rows.lse, expected.sigma**2
        if fault.unrescaled:
            out = unrescaled(model, self.problem, fault.unrescaled)
            variance = variance * np.maximum(1.0, (out / np.where(model.rows.out == 0, 1, model.rows.out)) ** 2)
        if fault.merge:
            out, lse, growth = merged_wrongly(self._rows_cut(fault.cut), fault)
            variance = variance * growth[:, None] ** 2
        if fault.factor != 1.0:
            out, variance = out * fault.factor, variance * fault.factor**2
        if fault.factor != 1.0 or fault.merge in UNWEIGHTED:
            # A row that sees one key is exact where weights add up to one, and is rounded here.
            variance = variance + STORED * self._spacing(out) ** 2
        if fault.noise:
            variance = noisier(model, expected.sigma**2, fault.number)
        lse_sigma = expected.lse_sigma
        if fault.lse and not fault.merge:
            other = {"without the scale": Fault("", scale=1 / (self.problem.scale or 1.0))}
            other["without the sink"] = Fault("", logits="sink dropped")
            if fault.lse in other:
                changed = exact_model(self.sample, self.problem, other[fault.lse])
                lse, lse_sigma = changed.rows.lse, changed.expected().lse_sigma
            else:
                lse = changed_lse(model.rows, fault)
            if fault.lse in OF_THE_MAXIMUM:  # lse does not have its rounding, for the sum is relative to it
                step = FORMATS[self.problem.precision.score].spacing(model.rows.chunk_max.max(axis=1))
                lse_sigma = np.sqrt(lse_sigma**2 + STORED * step**2)
            if fault.lse in ("sum itself", "whole sum"):  # which errs by so much times itself
                lse_sigma = lse_sigma * np.maximum(1.0, lse)
        return self._score(fault, out, variance, lse, lse_sigma)

    def _with_term(self, fault: Fault) -> Fit:
        """The fit of one more term in the sums. It is stored once more: without the term that must explain less."""
        out, lse, share = with_term(self.model.rows, self.sample.head, fault.extra)
        more = STORED * self._spacing(out) ** 2
        variance, lse_sigma = self.expected.sigma**2, self.expected.lse_sigma
        fit = self._score(fault, out, variance * share[:, None] ** 2 + more, lse, lse_sigma)
        stated = self._score(RIGHT, self.model.rows.out, variance + more, self.model.rows.lse, lse_sigma)
        return fit if fit.deviance < stated.deviance else replace(fit, is_even=False)

    def _rows_cut(self, cut: str) -> Rows:
        """The rows with other parts in the place of chunks; several faults ask for each cut."""
        if cut not in self._cuts:
            self._cuts[cut] = self._cut_anew(cut)
        return self._cuts[cut]

    def _cut_anew(self, cut: str) -> Rows:
        sample = self.sample
        segment = np.asarray(self.problem.kv_tokens.segment)[sample.batch]
        part = part_of(cut, sample.chunk, segment, is_cached(self.problem, sample.batch))
        return attention_rows(sample.query, sample.key, sample.value, sample.seen, part, sample.scale, sample.logits)

    def screen(self, faults: list[Fault]) -> list[Fault]:
        """The faults in the order of how well they fit, roughly: by sums over chunks, without touching a key."""
        sums = self.sample.sums
        mass, part = (x.sum(axis=1) for x in sums["visible"])
        mass = mass + self.sample.sink_mass
        rough = []
        for fault in faults:
            m, p = mass.copy(), part.copy()
            for slot, block in fault.changes:
                m += block.weight * sums[block.extent][0][:, block.source] - sums["visible"][0][:, slot]
                p += block.weight * sums[block.extent][1][:, block.source] - sums["visible"][1][:, slot]
            m = np.maximum(m, LEAST_SUM)
            # A row that loses all its keys is no output at all.
            out = np.clip(p / m[:, None], -LARGEST_OUT, LARGEST_OUT)
            with np.errstate(over="ignore"):
                growth = np.minimum(np.maximum(1.0, mass / m), LARGEST_GROWTH)
            step = self._spacing(out)
            variance = (self.expected.sigma * growth[:, None]) ** 2 + STORED * step**2
            lse = self.sample.base + np.log(m)
            rough.append(self._score(fault, out, variance, lse, self.expected.lse_sigma * growth).deviance)
        return [faults[i] for i in np.argsort(rough, kind="stable")]

    def _far(self, fault: Fault) -> Fit | None:
        """The fit of a fault that changes the mask, the scale or a key, if a glance shows that it explains nothing."""
        out, mass, lse = glance(self.sample, self.problem, fault)
        whole = self.sample.sums["visible"][0].sum(axis=1) + self.sample.sink_mass
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            growth = np.minimum(np.maximum(1.0, whole / mass), LARGEST_GROWTH)
        step = self._spacing(out)
        variance = (self.expected.sigma * np.nan_to_num(growth, nan=1.0)[:, None]) ** 2 + STORED * step**2
        each = ((self.sample.out - out) ** 2 / variance).mean(axis=1)
        if not np.median(each) > FAR**2:
            return None
        return replace(self._score(fault, out, variance, lse, self.expected.lse_sigma), z=float("inf"))

    def _is_far(self, rows: Rows) -> bool:
        """Whether exact outputs are so far from what was handed over that no error model is needed to tell."""
        with np.errstate(over="ignore", invalid="ignore"):
            growth = np.clip(np.nan_to_num(np.exp(self.model.rows.lse - rows.lse), nan=1.0), 1.0, LARGEST_GROWTH)
        variance = (self.expected.sigma * growth[:, None]) ** 2 + STORED * self._spacing(rows.out) ** 2
        return bool(np.median(((self.sample.out - rows.out) ** 2 / variance).mean(axis=1)) > FAR**2)

    @cached_property
    def sigma(self) -> np.ndarray:
        """Deviation of the rows, whatever they should have been: at least that of the last rounding."""
        return np.maximum(self.expected.sigma, self._spacing(self.sample.out) * LEAST_SPACINGS)

    @property
    def floor(self) -> np.ndarray:
        """Outputs that must be exact still get a deviation, a thousandth of a spacing."""
        return self._spacing(self.model.rows.out) * EXACT_SIGMA

    def _spacing(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(FORMATS[self.problem.precision.out].spacing(x), LEAST_SPACING)

    def _is_even(self, square: np.ndarray, *, is_noise: bool) -> bool:
        """What is left does not depend on where: no output, row or column has much more than the others.

        A precision, or noise of a fitted size, is in every row; it would swallow any fault if large errors in one place
        could pass for it.
        """
        rows, columns = square.mean(axis=1), square.mean(axis=0)
        if not (square.max() <= LARGEST_LEFT**2 and rows.max() <= LARGEST_ROW**2):
            return False
        if not is_noise:
            return True
        mean = square.mean()
        even = np.median(rows) >= EVEN and square.max() <= UNEVEN_OUTPUT * mean
        return bool(even and max(rows.max(), columns.max()) <= UNEVEN_PART * mean)

    def _score(self, fault: Fault, out: np.ndarray, variance: np.ndarray, lse: np.ndarray, sigma: np.ndarray) -> Fit:
        sample = self.sample
        variance = np.maximum(variance, self.floor**2)
        with np.errstate(over="ignore"):
            square = (sample.out - out) ** 2 / variance
        square = np.where(square < LARGEST_SQUARE, square, LARGEST_SQUARE)  # a NaN explains nothing either
        each = (square + np.log(variance)).mean(axis=1)
        deviance = float((self.dof * each).sum()) + fault.cost
        z = float(np.sqrt((self.dof * square.mean(axis=1)).sum() / self.dof.sum()))
        is_even = self._is_even(square, is_noise=bool(fault.noise or fault.precision))
        if sample.lse is None:
            return Fit(fault, deviance, z, float(self.dof.sum()), is_even=is_even)
        choices = []
        for is_right, expected, s in ((False, lse, sigma), (True, self.model.rows.lse, self.expected.lse_sigma)):
            s = np.maximum(s, LEAST_LSE_SIGMA)
            with np.errstate(invalid="ignore"):
                off = np.where(sample.lse == expected, 0.0, sample.lse - expected)
            of_lse = np.minimum(np.nan_to_num((off / s) ** 2, nan=LARGEST_SQUARE), LARGEST_SQUARE)
            choices.append((float((of_lse + 2 * np.log(s)).sum()) + 2.0 * is_right, of_lse.mean() ** 0.5, is_right))
        best = min(choices if not (fault.lse or fault.merge) else choices[: 1 + (fault.merge != "" and not fault.lse)])
        z = max(z, float(best[1]))
        return Fit(fault, deviance + best[0], z, float(self.dof.sum()), bool(best[2]), is_even)
