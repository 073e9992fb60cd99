"""The other half of the dictionary: faults that touch all query chunks alike."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from cpjax.crosscheck.diagnosis.cuts import COUNTS
from cpjax.crosscheck.diagnosis.dictionary import NARROW, ODD, RARE, USUAL, Fault
from cpjax.crosscheck.diagnosis.masks import before_of, first_query
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.judging.problem import Problem
from cpjax.partition import SequencePartition
from cpjax.precision import Precision

LSE_FORMS = (
    *("log2", "log10", "negated", "maximum only", "without its maximum", "sum itself", "zero"),
    *("with log2 of the sum", "whole sum", "natural for base two", "without the scale"),
)
"""What may be handed over instead of lse (`predict.changed_lse`)."""

SOFTCAPS = (50.0, 30.0, 20.0, 15.0, 10.0)
"""Softcaps of published models (Gemma 2: 50; Grok: 30), and smaller ones."""

SINKS = ("twice", "times log2(e)", "scaled", "negated")
OTHER_SINKS = ("of the head after", "of the head before", "of head 0")
"""What may be done to sinks that were stated (`predict.changed_logits`), and where there are several heads."""

MOST_KV_HEADS = 16
"""Key/value heads whose keys or values are tried in the place of a head's own."""


def families(problem: Problem, requests: set[int]) -> Iterator[tuple[str, str, float]]:
    """Masks with a number that is looked for: kind, family, and the number of the correct mask.

    Args:
      requests: those of wrong rows.
    """
    segment = np.asarray(problem.kv_tokens.segment)
    if problem.mask.is_causal:
        yield "causal mask shifted", "shift", 0.0
        yield "causal mask shifted", "diagonal", 0.0
    yield "window", "window", np.inf if problem.mask.window is None else float(problem.mask.window)
    if (segment < 0).any():
        yield "pads leaked", "pads", -np.inf
        if problem.mask.is_causal:
            yield "pads leaked", "pads in place", -np.inf
    if len(np.unique(segment[segment >= 0])) > 1:
        yield "requests mixed", "requests", -np.inf
        for number in sorted(requests):
            if any(before_of(row, number) >= 0 for row in segment):
                yield "requests mixed", f"request {number}", -np.inf
    if _has_prefix(problem):
        yield "prefix dropped", "prefix", np.inf


def global_masks(problem: Problem, requests: set[int]) -> Iterator[Fault]:
    """Masks without a number that would have to be looked for."""
    for kind, family, _ in families(problem, requests):
        if family not in ("diagonal", "prefix") and (family != "window" or problem.mask.window is not None):
            kind = "causal mask absent" if family == "shift" else kind
            # Of two requests only one is before another: where two names mean the same, the narrower one is taken.
            cost = NARROW if family.startswith("request ") else ODD if " " in family else USUAL
            yield Fault(kind, mask=family, number=np.inf, cost=cost)
        if family == "requests" and problem.mask.is_causal:
            yield Fault(kind, mask="requests by position", number=np.inf, cost=ODD)
        if family == "prefix":
            yield Fault(kind, mask=family, number=0.0, cost=USUAL)
    if not problem.mask.is_causal:
        yield Fault("causal mask applied", mask="shift", number=0.0, cost=USUAL)
    elif problem.mask.window is not None:
        for family in ("both sides", "left side"):
            yield Fault("causal mask absent", mask=family, number=float(problem.mask.window), cost=ODD)
    if problem.cp > 1 and isinstance(problem.partition, SequencePartition):
        yield Fault("own rank only", mask="own rank", number=0.0, cost=ODD)
        if problem.mask.is_causal and problem.query.shape[1] == problem.key.shape[1]:
            yield Fault("causal mask by local index", mask="rank index", number=0.0, cost=ODD)
    if int(problem.kv_chunk.max()) > 0:
        yield Fault("causal mask in every chunk", mask="chunks", number=0.0, cost=ODD)
    elif problem.query.shape[1] != problem.key.shape[1]:
        yield Fault("causal mask top-left", mask="chunks", number=0.0, rule=_as_shift(problem), cost=ODD)
    if problem.query.shape[1] == problem.key.shape[1]:
        for count in COUNTS:
            yield Fault(
                "causal mask in every block", mask=f"blocks {count}", number=0.0, cost=ODD + 2 * np.log(len(COUNTS))
            )


def _as_shift(problem: Problem) -> str:
    """What a mask by indices is beside the mask by positions, in words: a shift, if it is the same for all queries."""
    q_position, kv_position = (np.asarray(x.position) for x in (problem.q_tokens, problem.kv_tokens))
    ahead = q_position - np.arange(q_position.shape[1])
    if (ahead != ahead[0, 0]).any() or (kv_position != np.arange(kv_position.shape[1])).any():
        return ""
    return f"a shift by {-int(ahead[0, 0]):+d} of the mask by positions"


def global_faults(problem: Problem, *, has_lse: bool, suspects: list[tuple[int, float]]) -> Iterator[Fault]:
    """Other faults that touch all query chunks alike.

    Args:
      suspects: keys with the largest scores, and the weights with which they seem to enter.
    """
    if has_lse:
        for name in (*LSE_FORMS, *(["without the sink"] if problem.sink is not None else [])):
            yield Fault(f"lse {name}", lse=name, cost=RARE)
    for key, weight in suspects:
        kind = "key lost" if abs(weight) < 0.5 else "key doubled"
        yield Fault(kind, key=key, number=0.0 if kind == "key lost" else 2.0, cost=2 * np.log(problem.key.shape[1]))


def logit_faults(problem: Problem) -> Iterator[Fault]:
    """Softcap, sink, ALiBi and bias that were stated and not applied, or applied and not stated."""
    stated = {
        "softcap": problem.softcap, "sink": problem.sink, "alibi": problem.alibi, "bias": problem.bias,
    }  # fmt: skip
    for name, given in stated.items():
        if given is not None:
            yield Fault("logits", logits="sink dropped" if name == "sink" else f"{name} ignored", cost=USUAL)
    if problem.sink is not None:
        names = (*SINKS, *(OTHER_SINKS if len(problem.sink) > 1 else ()))
        for name in names:
            yield Fault("logits", logits=f"sink {name}", cost=RARE + 2 * float(np.log(len(names))))
    for name in ("alibi", "bias"):
        if stated[name] is not None:
            yield from (Fault("logits", logits=f"{name} {how}", cost=RARE) for how in ("twice", "scaled"))
    if problem.bias is not None and np.isneginf(problem.bias).any():
        yield Fault("logits", logits="bias a mask only", cost=RARE)
    if problem.alibi is not None:
        yield Fault("logits", logits="alibi negated", cost=RARE)
    else:
        yield Fault("logits", logits="alibi applied", cost=RARE)
    if problem.softcap is None:
        for softcap in SOFTCAPS:
            yield Fault(
                "logits", logits="softcap applied", number=softcap, cost=RARE + 2 * float(np.log(len(SOFTCAPS)))
            )


def data_faults(problem: Problem) -> Iterator[Fault]:
    """Keys or values alone are wrong: those of another head, or a neighbouring token's."""
    heads = problem.key.shape[2]
    for head in range(min(heads, MOST_KV_HEADS)) if heads > 1 else ():
        cost = RARE + 2 * float(np.log(2 * heads))
        yield Fault("keys of another head", keys_of=head, cost=cost)
        yield Fault("values of another head", values_of=head, cost=cost)
    for shift in (-1, 1):
        yield Fault("values of the neighbour", value_shift=shift, cost=RARE)


SHORT = {"float16": "FP16", "bfloat16": "BF16"}


def precisions(claimed: Precision) -> list[Fault]:
    """Coarser arithmetic than the claimed one, the coarsest last: scores, probabilities, stored results."""

    def coarser(fmt: str) -> list[str]:
        return [fmt] + [x for x in SHORT if FORMATS[x].digits < FORMATS[fmt].digits]

    found = []
    for score, probability, carry in product(*map(coarser, (claimed.score, claimed.probability, claimed.carry))):
        out = carry if FORMATS[carry].digits < FORMATS[claimed.out].digits else claimed.out
        said = []
        if score != claimed.score:
            said.append(f"scores rounded to {SHORT[score]}")
        if probability != claimed.probability:
            said.append(f"probabilities rounded to {SHORT[probability]}")
        if carry != claimed.carry:
            said.append(f"chunk results stored in {SHORT[carry]}")
        if said:
            precision = replace(claimed, score=score, probability=probability, carry=carry, out=out)
            found.append(Fault(f"precision: {' and '.join(said)}", precision=precision, cost=RARE))
    return found


def _has_prefix(problem: Problem) -> bool:
    """Keys that stand before every query of their request."""
    segment = np.asarray(problem.kv_tokens.segment)
    return bool((np.asarray(problem.kv_tokens.position)[segment >= 0] < first_query(problem)[segment >= 0]).any())
