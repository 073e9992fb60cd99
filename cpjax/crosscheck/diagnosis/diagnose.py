"""The search: each wrong query chunk is explained on its own, then it is asked whether one cause explains them all."""

from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.diagnosis import words
from cpjax.crosscheck.diagnosis.cause import EQUAL, LEAST_GAIN, SAME, Cause, cause_of, without_twins
from cpjax.crosscheck.diagnosis.columns import wrong_columns
from cpjax.crosscheck.diagnosis.denominator import extra_terms
from cpjax.crosscheck.diagnosis.dictionary import Fault
from cpjax.crosscheck.diagnosis.everywhere import data_faults, global_faults, global_masks, logit_faults, precisions
from cpjax.crosscheck.diagnosis.fitted import requests_of, with_numbers
from cpjax.crosscheck.diagnosis.masks import is_cached
from cpjax.crosscheck.diagnosis.measure import MOST_Z, Fit, Measured
from cpjax.crosscheck.diagnosis.parts import base_faults
from cpjax.crosscheck.diagnosis.permutation import (
    axes_exchanged,
    batch_from,
    chunks_from,
    heads_from,
    kv_heads_from,
    requests_from,
)
from cpjax.crosscheck.diagnosis.row_masks import row_mask
from cpjax.crosscheck.diagnosis.runs import looked_at, run_faults
from cpjax.crosscheck.diagnosis.sample import out_suspects, samples, samples_of_requests, suspects, with_more_rows
from cpjax.crosscheck.diagnosis.scales import scale_faults
from cpjax.crosscheck.diagnosis.unwritten import said as unwritten
from cpjax.crosscheck.diagnosis.unwritten import sees_nothing, unwritten_rows
from cpjax.crosscheck.diagnosis.weights import chunk_weights
from cpjax.crosscheck.judging.evidence import Evidence
from cpjax.crosscheck.judging.problem import Problem
from cpjax.crosscheck.judging.score_tests import z_score


@dataclass(frozen=True)
class Diagnosis:
    """`common` explains every chunk at once and then comes first; `causes` has one entry a wrong query chunk."""

    sentences: list[str]
    chunk_weights: Float[np.ndarray, "Q C"]
    causes: tuple[Cause, ...] = ()
    common: tuple[Fault, ...] = field(default=())


def diagnose(problem: Problem, evidence: Evidence, out: np.ndarray, lse: np.ndarray | None) -> Diagnosis:
    """What went wrong in a result that failed its verdict. Looks at a few rows of each query chunk."""
    unknown = np.full((int(problem.q_chunk.max()) + 1, int(problem.kv_chunk.max()) + 1), np.nan)
    special = _special(problem, out) if out_suspects(evidence.rows).any() else None
    if special is not None:
        return Diagnosis([special, *words.scope(problem, evidence.rows, suspects(evidence.rows), out, lse)], unknown)
    nobody = unwritten_rows(evidence.rows, out)
    if nobody.any():
        table = replace(evidence.rows, unjudged=evidence.rows.unjudged | nobody)
        if not suspects(table).any():
            return Diagnosis(unwritten(problem, evidence.rows, out, nobody, saw_nothing=False), unknown)
        rest = diagnose(problem, replace(evidence, rows=table), out, lse)
        # A row that loses all its keys is zero: what explains the other rows may explain these.
        if rest.common and all(sees_nothing(fault, problem, evidence.rows, nobody, out) for fault in rest.common):
            return rest
        named = rest.common or any(cause.faults for cause in rest.causes)
        sentences = unwritten(problem, evidence.rows, out, nobody, saw_nothing=not named)
        first, then = (rest.sentences, sentences) if named else (sentences, rest.sentences)
        return replace(rest, sentences=[*first, *(f"Besides: {sentence}" for sentence in then)])
    measured = [Measured(sample, problem) for sample in samples(problem, evidence.rows, out, lse)]
    weights = unknown.copy()
    for one in measured:
        weights[one.sample.q_chunk] = chunk_weights(one)
    scope = words.scope(problem, evidence.rows, suspects(evidence.rows), out, lse)
    wrong = [one for one in measured if one.sample.is_wrong] or measured
    if scope and words.tells_broken(scope[0]) and not any(one.sample.is_wrong for one in measured):
        return Diagnosis(scope, weights)
    if not measured:
        return Diagnosis([f"{words.UNKNOWN}.", *scope], weights)
    samples_beside = samples_of_requests(problem, evidence.rows, out, lse, [one.sample for one in wrong])
    beside = [Measured(sample, problem) for sample in samples_beside]
    everywhere = [*global_masks(problem, requests_of(wrong)), *with_numbers(wrong), *scale_faults(problem, wrong)]
    everywhere += global_faults(problem, has_lse=lse is not None, suspects=_keys(evidence, measured))
    everywhere += _precisions(problem, wrong)
    if problem.sink is None:  # with one, every rank's parts may or may not have it
        segment = np.asarray(problem.kv_tokens.segment)[0]
        cached = is_cached(problem, wrong[0].sample.batch)
        everywhere += base_faults(problem.kv_chunk, segment, cached, has_lse=lse is not None)
    everywhere += [
        *run_faults(_with_more_rows(problem, evidence, out, looked_at(wrong, beside))),
        *data_faults(problem),
        *logit_faults(problem),
    ]
    everywhere += extra_terms(wrong)
    limits = row_mask([*wrong, *beside])
    everywhere += [] if limits is None else [limits]
    everywhere = list({_label(fault): fault for fault in reversed(everywhere)}.values())
    fits: dict[str, dict[int, Fit]] = {}
    for fault in everywhere:
        fits[_label(fault)] = {one.sample.q_chunk: one.fit(fault) for one in wrong}
    kv_head = wrong[0].sample.kv_head
    everywhere = [fault for fault in everywhere if _holds_beside(fault, fits[_label(fault)], beside, kv_head)]
    fits = {_label(fault): fits[_label(fault)] for fault in everywhere}
    causes = tuple(cause_of(one, problem, [of[one.sample.q_chunk] for of in fits.values()]) for one in wrong)
    common = _common(everywhere, fits, causes, measured, wrong)
    chosen = common or causes
    sentences = words.causes(problem, chosen)
    if not any(cause.faults for cause in chosen):
        scope = [*scope, *wrong_columns(wrong)]
    return Diagnosis([*sentences, *scope], weights, causes, tuple(f for c in common[:1] for f in c.faults))


def _with_more_rows(problem: Problem, evidence: Evidence, out: np.ndarray, some: list[Measured]) -> list[Measured]:
    return [Measured(with_more_rows(problem, evidence.rows, out, one.sample), problem) for one in some]


def _holds_beside(fault: Fault, fits: dict[int, Fit], beside: list[Measured], kv_head: int) -> bool:
    """Whether a fault explains the wrong rows of other requests too, as far as it says something of them."""
    if fault.extra or fault.limits or not any(fit.explains for fit in fits.values()):
        return True
    of_a_head = fault.keys_of >= 0 or fault.values_of >= 0
    return all(one.fit(fault).explains for one in beside if not of_a_head or one.sample.kv_head == kv_head)


def _precisions(problem: Problem, wrong: list[Measured]) -> list[Fault]:
    """Coarser precisions; none if the coarsest does not explain any wrong chunk, since then no finer one does."""
    found = precisions(problem.precision)
    return found if found and any(one.fit(found[-1]).z <= MOST_Z for one in wrong) else []


def _common(
    everywhere: list[Fault],
    fits: dict[str, dict[int, Fit]],
    causes: tuple[Cause, ...],
    measured: list[Measured],
    wrong: list[Measured],
) -> tuple[Cause, ...]:
    """One fault that explains all query chunks, those that are right included, or nothing."""
    if len(wrong) == 1 and len(measured) > 1 and causes[0].faults:
        return ()
    found: list[tuple[float, Fault, float]] = []
    for fault in everywhere:
        of_fault = fits[_label(fault)]
        if not all(fit.explains for fit in of_fault.values()):
            continue
        others = [one.fit(fault) for one in measured if one.sample.q_chunk not in of_fault]
        if not all(fit.explains for fit in others):
            continue
        gain = sum(one.right.deviance for one in measured)
        total = sum(fit.deviance - fault.cost for fit in [*of_fault.values(), *others]) + fault.cost
        if total < gain - LEAST_GAIN:
            found.append((total, fault, max(fit.z for fit in of_fault.values())))
    if not found:
        return ()
    found.sort(key=lambda entry: entry[0])
    best = found[0]
    local = [cause.faults for cause in causes]
    if all(local) and not any(_label(best[1]) in map(_label, faults) for faults in local):
        return ()  # every chunk has a better explanation of its own
    found = [best] + [entry for entry in found[1:] if not (entry[1].mask and _same_total(entry, best))]
    equals = without_twins(tuple(fault for total, fault, _ in found if total <= best[0] + EQUAL))
    others = [total for total, _, _ in found if total > best[0] + EQUAL] + [gain_of(measured)]
    return (Cause(-1, equals, best[2], max(one.right.z for one in wrong), (min(others) - best[0]) / 2),)


def _same_total(entry: tuple[float, Fault, float], best: tuple[float, Fault, float]) -> bool:
    return bool(abs((entry[0] - entry[1].cost) - (best[0] - best[1].cost)) < SAME * abs(best[0]))


def gain_of(measured: list[Measured]) -> float:
    """The deviance if nothing were wrong."""
    return sum(one.right.deviance for one in measured)


def _label(fault: Fault) -> str:
    """Equal for the same fault, whatever was fitted to it in another chunk."""
    is_which = bool(fault.mask or fault.run or fault.logits or fault.merge)
    return str(fault._replace(cost=0.0, number=fault.number if is_which else float("nan"), factor=1.0))


def _keys(evidence: Evidence, measured: list[Measured]) -> list[tuple[int, float]]:
    """The three keys with the largest scores, of the key/value head that is looked at, and their weights."""
    b, k = measured[0].sample.batch, measured[0].sample.kv_head
    score = type(evidence.keys)(*(x[b, k] for x in evidence.keys))
    value = np.abs(z_score(score))
    change = np.divide(score.value, score.information, out=np.zeros_like(score.value), where=score.information > 0)
    return [(int(s), float(1 + change[s])) for s in np.argsort(-value)[:3] if value[s] > 0]


def _special(problem: Problem, out: np.ndarray) -> str | None:
    """What needs no model: heads, requests or ranks exchanged."""
    if not out[problem.is_judged].any():
        return None
    if axes_exchanged(problem, out):
        return words.AXES
    batch = batch_from(problem, out)
    if batch is not None:
        return words.batch_rows(batch)
    requests = requests_from(problem, out)
    if requests is not None:
        return words.requests(requests)
    heads = heads_from(problem, out)
    if heads is not None:
        return words.heads(heads)
    kv_heads = kv_heads_from(problem, out)
    if kv_heads is not None:
        return words.kv_heads(problem, kv_heads)
    chunks = chunks_from(problem, out)
    return None if chunks is None else words.chunks(problem, chunks)
