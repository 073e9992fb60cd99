"""Faults with a number that is fitted: how far a mask is off, a constant in lse, the size of errors."""

from collections.abc import Iterator

import numpy as np

from cpjax.crosscheck.diagnosis.dictionary import FITTED, OFFSET, USUAL, Fault
from cpjax.crosscheck.diagnosis.everywhere import families
from cpjax.crosscheck.diagnosis.measure import Measured
from cpjax.crosscheck.diagnosis.sample import Sample
from cpjax.crosscheck.diagnosis.scan import best_number
from cpjax.crosscheck.error_model.model import ErrorModel

NOISE = tuple(2.0**n for n in range(-16, -5))
"""Sizes of relative errors of the exponentials that are tried."""

CHUNKS = 4
"""Wrong query chunks that a fitted number looks at."""


def with_numbers(wrong: list[Measured]) -> list[Fault]:
    """Faults with a number that is common to all chunks: a mask, an offset of lse, the size of other errors."""
    found = list(_masks(wrong))
    offsets = [fault for one in wrong if (fault := lse_off(one.sample, one.model)) is not None]
    if offsets:
        found.append(offsets[0]._replace(number=float(np.median([fault.number for fault in offsets]))))
    factor = _factor(wrong)
    if factor is not None:
        found.append(Fault("out times a number", factor=factor, number=factor, cost=FITTED))
    trials = [Fault("inexact exponentials", noise="inexact exponentials", number=s, cost=FITTED) for s in NOISE]
    best = min(trials, key=lambda fault: sum(one.fit(fault).deviance for one in wrong[:CHUNKS]))
    return [*found, best]


def _factor(wrong: list[Measured]) -> float | None:
    """The number that makes the right outputs those that were handed over, by least squares."""
    given, right = 0.0, 0.0
    for one in wrong:
        given += float((one.sample.out * one.model.rows.out / one.sigma**2).sum())
        right += float((one.model.rows.out**2 / one.sigma**2).sum())
    return given / right if right > 0 and np.isfinite(given / right) and given != 0 else None


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


def lse_off(sample: Sample, model: ErrorModel) -> Fault | None:
    """lse off by a constant, the median of its errors."""
    if sample.lse is None:
        return None
    with np.errstate(invalid="ignore"):
        off = sample.lse - model.rows.lse
    if not np.isfinite(off).any():
        return None
    return Fault("lse off by a constant", lse="off", number=float(np.median(off[np.isfinite(off)])), cost=OFFSET)
