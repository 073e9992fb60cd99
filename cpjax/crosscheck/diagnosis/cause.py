"""The best explanation of one query chunk, and what the outputs cannot tell from it."""

from dataclasses import dataclass

import numpy as np

from cpjax.crosscheck.diagnosis.dictionary import FITTED, NARROW, Fault, chunk_faults, pairs_of, rank_faults
from cpjax.crosscheck.diagnosis.measure import Fit, Measured
from cpjax.crosscheck.diagnosis.weights import with_weight
from cpjax.crosscheck.judging.problem import Problem

BEST = 8
"""Of the faults of a chunk, so many are computed exactly."""

SAME = 1e-6
"""Masks whose likelihoods differ by less, relative to themselves, hide the same keys."""

EQUAL = 6.0
"""Faults whose 2 ln(likelihood) differs by less are equals: the better one is not twenty times likelier."""

LEAST_GAIN = 20.0
"""2 ln(likelihood) by which a fault, its price paid, must explain more than a right result would: e^10 times likelier.
Of what is wrong it is mostly thousands."""


@dataclass(frozen=True)
class Cause:
    """What explains one wrong query chunk: `faults` are equals, the best first; empty where nothing does."""

    query_chunk: int
    faults: tuple[Fault, ...]
    z: float
    """RMS(residual / σ) that is left."""
    z_right: float
    """The same if nothing were wrong."""
    ahead: float
    """ln(likelihood) by which it is ahead of the best explanation that is no equal; inf if there is none."""


def cause_of(one: Measured, problem: Problem, everywhere: list[Fit]) -> Cause:
    """The best explanation of one query chunk, the faults `whole` that touch all chunks among them."""
    faults = [*chunk_faults(one.sample, problem), *rank_faults(one.sample, problem)]
    sets = pairs_of(one.sample, problem)
    price = 2 * np.log(max(len(sets), 1)) + FITTED
    if int(one.sample.chunk.max()) > 0:  # the weight of an only chunk is a constant in lse, or another sink
        faults += [with_weight(one, chunks, price) for chunks in sets]
    merges = len(one.model.rows.chunks)
    if problem.order != "unknown" and merges > 1:
        steps = [(k,) for k in range(1, merges)] + ([tuple(range(1, merges))] if merges > 2 else [])
        everywhere = everywhere + [
            one.fit(Fault("not rescaled", unrescaled=k, cost=2 * np.log(len(steps)) + NARROW)) for k in steps
        ]
    fits = [one.fit(fault) for fault in one.screen(faults)[:BEST]] + everywhere
    explains = sorted((fit for fit in fits if fit.explains), key=lambda fit: fit.deviance)
    # What was there without a fault must be worse by more than its price, or the verdict failed for another reason.
    explains = [fit for fit in explains if fit.deviance < one.right.deviance - LEAST_GAIN]
    if not explains:
        return Cause(one.sample.q_chunk, (), float("nan"), one.right.z, 0.0)
    best = explains[0]
    equals = [fit for fit in explains if _is_equal(fit, best) and not _same_mask(fit, best)]
    # The fault with its weight fitted, where it was found without fitting, is no other explanation.
    own = {fit.fault.chunks for fit in equals}
    rest = [fit for fit in fits if not (_is_equal(fit, best) or _same_mask(fit, best))]
    others = [fit.deviance for fit in rest if not (fit.fault.kind == "weight" and fit.fault.chunks in own)]
    ahead = (min(others) - best.deviance) / 2 if others else float("inf")
    faults = without_twins(tuple(fit.fault for fit in equals))
    return Cause(one.sample.q_chunk, faults, best.z, one.right.z, ahead)


def without_twins(faults: tuple[Fault, ...]) -> tuple[Fault, ...]:
    """Without a fitted scale or sink where one that has a name fits as well: it is the same one."""
    named = any(fault.scale != 1.0 and fault.kind != "scale" for fault in faults)
    sinks = any(fault.logits.startswith("sink ") and fault.kind != "another sink" for fault in faults)
    twins = [kind for kind, has_name in (("scale", named), ("another sink", sinks)) if has_name]
    return tuple(fault for fault in faults if fault.kind not in twins)


def _is_equal(fit: Fit, best: Fit) -> bool:
    """The outputs do not tell it from the best.

    A fitted weight has its price so that in one place the plain name is preferred. Another place is no less likely for
    having a weight that is no whole number.
    """
    elsewhere = fit.fault.kind == "weight" and not set(fit.fault.chunks) & set(best.fault.chunks)
    return bool(fit.deviance - FITTED * elsewhere <= best.deviance + EQUAL)


def _same_mask(fit: Fit, best: Fit) -> bool:
    """The same computation by another name: a mask that here hides just the same keys."""
    same = abs((fit.deviance - fit.fault.cost) - (best.deviance - best.fault.cost)) < SAME * abs(best.deviance)
    return bool(fit is not best and fit.fault.mask and same)
