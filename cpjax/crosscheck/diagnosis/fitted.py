"""Faults with a number that is fitted: how far a mask is off, the scale, a constant in lse, the size of errors."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cpjax.crosscheck.diagnosis.dictionary import FITTED, OFFSET, USUAL, Fault
from cpjax.crosscheck.diagnosis.everywhere import families
from cpjax.crosscheck.diagnosis.measure import LEAST_LSE_SIGMA, Measured
from cpjax.crosscheck.diagnosis.predict import glance
from cpjax.crosscheck.diagnosis.sample import Sample
from cpjax.crosscheck.diagnosis.scan import best_number
from cpjax.crosscheck.error_model.model import ErrorModel

NOISE = tuple(2.0**n for n in range(-16, -5))
"""Sizes of relative errors of the exponentials that are tried."""

LOG_SCALES = np.sort(np.concatenate([np.linspace(-4, 4, 33), [-0.02, -2e-3, 2e-3, 0.02]]))
"""ln of the factors on the scale between which the best one is looked for."""

SCALE_ACCURACY = 1e-10
"""Of ln of the factor."""

CHUNKS = 4
"""Wrong query chunks that a fitted number looks at."""

LEAST_SIGMA = 1e-7
"""σ of `out` is taken to be at least this where only the scale is fitted."""


def with_numbers(wrong: list[Measured]) -> list[Fault]:
    """Faults with a number that is common to all chunks: the scale, an offset of lse, the size of other errors."""
    found = list(_masks(wrong))
    factor = _fit_scale(wrong)
    if factor is not None:
        found.append(Fault("scale", scale=factor, number=factor, cost=FITTED))
    offsets = [fault for one in wrong if (fault := lse_off(one.sample, one.model)) is not None]
    if offsets:
        found.append(offsets[0]._replace(number=float(np.median([fault.number for fault in offsets]))))
    trials = [Fault("inexact exponentials", noise="inexact exponentials", number=s, cost=FITTED) for s in NOISE]
    best = min(trials, key=lambda fault: sum(one.fit(fault).deviance for one in wrong[:CHUNKS]))
    return [*found, best]


def requests_of(wrong: list[Measured]) -> set[int]:
    """The requests of the rows that are looked at."""
    numbers: set[int] = set()
    for one in wrong:
        segment = np.asarray(one.problem.q_tokens.segment)[one.sample.batch, one.sample.position]
        numbers |= {int(x) for x in segment if x >= 0}
    return numbers


def _masks(wrong: list[Measured]) -> Iterator[Fault]:
    """Of each family of masks the one that fits best."""
    for kind, family, right in families(wrong[0].problem, requests_of(wrong)):
        best = best_number(wrong, family, right)
        if best is not None:
            # "diagonal" and "in place" are special cases; where they hide the same keys, the plain name is taken.
            special = family in ("diagonal", "pads in place")
            cost = 2 * float(np.log(wrong[0].problem.key.shape[1])) + USUAL + special
            yield Fault(kind, mask=family, number=best, cost=cost)


def _fit_scale(wrong: list[Measured]) -> float | None:
    """The factor on the scale that makes the outputs of (at most four) wrong chunks likeliest."""
    some = [one for one in wrong if (one.sample.seen.sum(axis=1) > 1).any()][:CHUNKS]
    if not some:
        return None

    def misfit(log_factor: float) -> float:
        total = 0.0
        for one in some:
            out, _, lse = glance(one.sample, one.problem, Fault("scale", scale=float(np.exp(log_factor))))
            total += float(((one.sample.out - out) ** 2 / np.maximum(one.expected.sigma, LEAST_SIGMA) ** 2).mean())
            if one.sample.lse is not None:
                with np.errstate(invalid="ignore"):
                    off = np.where(np.isfinite(lse), one.sample.lse - lse, 0.0)
                total += float((off**2 / np.maximum(one.expected.lse_sigma, LEAST_LSE_SIGMA) ** 2).mean())
        return total

    values = [misfit(x) for x in LOG_SCALES]
    i = int(np.argmin(values))
    low, high = LOG_SCALES[max(i - 1, 0)], LOG_SCALES[min(i + 1, len(LOG_SCALES) - 1)]
    from scipy.optimize import minimize_scalar  # slow to import; only a failed verdict needs it

    best: Any = minimize_scalar(misfit, bounds=(low, high), method="bounded", options={"xatol": SCALE_ACCURACY})
    return float(np.exp(best.x))


def lse_off(sample: Sample, model: ErrorModel) -> Fault | None:
    """lse off by a constant, the median of its errors."""
    if sample.lse is None:
        return None
    with np.errstate(invalid="ignore"):
        off = sample.lse - model.rows.lse
    if not np.isfinite(off).any():
        return None
    return Fault("lse off by a constant", lse="off", number=float(np.median(off[np.isfinite(off)])), cost=OFFSET)
