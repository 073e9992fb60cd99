"""The search: each wrong query chunk is explained on its own, then it is asked whether one cause explains them all."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.diagnosis import words
from cpjax.crosscheck.diagnosis.dictionary import FITTED, Fault, chunk_faults, pairs_of, rank_faults, whole_faults
from cpjax.crosscheck.diagnosis.fitted import with_numbers
from cpjax.crosscheck.diagnosis.measure import Fit, Measured
from cpjax.crosscheck.diagnosis.permutation import chunks_from, heads_from
from cpjax.crosscheck.diagnosis.sample import samples, suspects
from cpjax.crosscheck.diagnosis.weights import chunk_weights, with_weight
from cpjax.crosscheck.directed import deviate
from cpjax.crosscheck.evidence import Evidence
from cpjax.crosscheck.question import Question

BEST = 8
"""Of the faults of a chunk, so many are computed exactly."""

EQUAL = 6.0
"""Faults whose 2 ln(likelihood) differs by less are equals: the better one is not twenty times likelier."""


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


@dataclass(frozen=True)
class Diagnosis:
    """`common` explains every chunk at once and then comes first; `causes` has one entry a wrong query chunk."""

    sentences: list[str]
    chunk_weights: Float[np.ndarray, "Q C"]
    causes: tuple[Cause, ...] = ()
    common: tuple[Fault, ...] = field(default=())


def diagnose(question: Question, evidence: Evidence, out: np.ndarray, lse: np.ndarray | None) -> Diagnosis:
    """What went wrong in a result that failed its verdict. Looks at a few rows of each query chunk."""
    measured = [Measured(sample, question) for sample in samples(question, evidence.rows, out, lse)]
    weights = np.full((len(np.unique(question.q_chunk)), int(question.kv_chunk.max()) + 1), np.nan)
    for one in measured:
        weights[one.sample.q_chunk] = chunk_weights(one)
    scope = words.scope(question, evidence.rows, suspects(evidence.rows), out)
    wrong = [one for one in measured if one.sample.is_wrong] or measured
    special = _special(question, out)
    if special is not None:
        return Diagnosis([special, *scope], np.full_like(weights, np.nan))
    if scope and scope[0].endswith(words.BROKEN_END) and not any(one.sample.is_wrong for one in measured):
        return Diagnosis(scope, weights)
    if not measured:
        return Diagnosis([words.UNKNOWN, *scope], weights)
    whole = list(whole_faults(question, has_lse=lse is not None, suspects=_keys(evidence, measured)))
    whole += with_numbers(wrong)
    fits: dict[str, dict[int, Fit]] = defaultdict(dict)
    for fault in whole:
        for one in wrong:
            fits[_label(fault)][one.sample.q_chunk] = one.fit(fault)
    causes = tuple(_cause(one, question, [fits[label][one.sample.q_chunk] for label in fits]) for one in wrong)
    common = _common(whole, fits, causes, measured, wrong)
    chosen = common or causes
    sentences = words.causes(question, chosen)
    return Diagnosis([*sentences, *scope], weights, causes, tuple(f for c in common[:1] for f in c.faults))


def _cause(one: Measured, question: Question, whole: list[Fit]) -> Cause:
    """The best explanation of one query chunk."""
    faults = [*chunk_faults(one.sample, question), *rank_faults(one.sample, question)]
    sets = pairs_of(one.sample, question)
    price = 2 * np.log(max(len(sets), 1)) + FITTED
    faults += [with_weight(one, chunks, price) for chunks in sets]
    merges = len(one.model.rows.chunks)
    if question.order != "unknown" and merges > 1:
        steps = [(k,) for k in range(1, merges)] + ([tuple(range(1, merges))] if merges > 2 else [])
        whole = whole + [one.fit(Fault("not rescaled", unrescaled=k, cost=2 * np.log(len(steps)) + 1)) for k in steps]
    fits = [one.fit(fault) for fault in one.screen(faults)[:BEST]] + whole
    explains = sorted((fit for fit in fits if fit.explains), key=lambda fit: fit.deviance)
    # What was there without a fault must be worse by more than its price, or the verdict failed for another reason.
    explains = [fit for fit in explains if fit.deviance < one.right.deviance - EQUAL]
    if not explains:
        return Cause(one.sample.q_chunk, (), float("nan"), one.right.z, 0.0)
    best = explains[0]
    equals = [fit for fit in explains if fit.deviance <= best.deviance + EQUAL and not _same_mask(fit, best)]
    # The fault with its weight fitted, where it was found without fitting, is no other explanation.
    own = {fit.fault.chunks for fit in equals}
    rest = [fit for fit in fits if fit.deviance > best.deviance + EQUAL and not _same_mask(fit, best)]
    others = [fit.deviance for fit in rest if not (fit.fault.kind == "weight" and fit.fault.chunks in own)]
    ahead = (min(others) - best.deviance) / 2 if others else float("inf")
    return Cause(one.sample.q_chunk, tuple(fit.fault for fit in equals), best.z, one.right.z, ahead)


def _same_mask(fit: Fit, best: Fit) -> bool:
    """The same computation by another name: a mask that here hides just the same keys."""
    same = abs((fit.deviance - fit.fault.cost) - (best.deviance - best.fault.cost)) < 1e-6 * abs(best.deviance)
    return bool(fit is not best and fit.fault.mask and same)


def _common(
    whole: list[Fault],
    fits: dict[str, dict[int, Fit]],
    causes: tuple[Cause, ...],
    measured: list[Measured],
    wrong: list[Measured],
) -> tuple[Cause, ...]:
    """One fault that explains all query chunks, those that are right included, or nothing."""
    if len(wrong) == 1 and len(measured) > 1 and causes[0].faults:
        return ()
    found = []
    for fault in whole:
        of_fault = fits[_label(fault)]
        if not all(fit.explains for fit in of_fault.values()):
            continue
        others = [one.fit(fault) for one in measured if one.sample.q_chunk not in of_fault]
        if not all(fit.explains for fit in others):
            continue
        gain = sum(one.right.deviance for one in measured)
        total = sum(fit.deviance - fault.cost for fit in [*of_fault.values(), *others]) + fault.cost
        if total < gain - EQUAL:
            found.append((total, fault, max(fit.z for fit in of_fault.values())))
    if not found:
        return ()
    found.sort(key=lambda entry: entry[0])
    best = found[0]
    local = [cause.faults for cause in causes]
    if all(local) and not any(_label(best[1]) in map(_label, faults) for faults in local):
        return ()  # every chunk has a better explanation of its own
    equals = tuple(fault for total, fault, _ in found if total <= best[0] + EQUAL)
    others = [total for total, _, _ in found if total > best[0] + EQUAL] + [gain_of(measured)]
    return (Cause(-1, equals, best[2], max(one.right.z for one in wrong), (min(others) - best[0]) / 2),)


def gain_of(measured: list[Measured]) -> float:
    """The deviance if nothing were wrong."""
    return sum(one.right.deviance for one in measured)


def _label(fault: Fault) -> str:
    return f"{fault.kind} {fault.mask} {fault.key} {fault.scale:.9g}"


def _keys(evidence: Evidence, measured: list[Measured]) -> list[tuple[int, float]]:
    """The three keys with the largest scores, of the key/value head that is looked at, and their weights."""
    b, k = measured[0].sample.batch, measured[0].sample.kv_head
    score = type(evidence.keys)(*(x[b, k] for x in evidence.keys))
    value = np.abs(deviate(score))
    change = np.divide(score.value, score.information, out=np.zeros_like(score.value), where=score.information > 0)
    return [(int(s), float(1 + change[s])) for s in np.argsort(-value)[:3] if value[s] > 0]


def _special(question: Question, out: np.ndarray) -> str | None:
    """What needs no model: nothing written, heads or ranks exchanged."""
    if not out[question.is_judged].any():
        return "out is zero everywhere: it was never written."
    heads = heads_from(question, out)
    if heads is not None:
        return words.heads(heads)
    chunks = chunks_from(question, out)
    return None if chunks is None else words.chunks(question, chunks)
