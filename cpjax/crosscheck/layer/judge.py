"""The verdict on a result: each stage from the result's own earlier tensors, so that a wrong one is named alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from cpjax.crosscheck.judge import judge as judge_attention
from cpjax.crosscheck.judging.statistic import LIMIT
from cpjax.crosscheck.layer.case import DTYPES, LayerCase
from cpjax.crosscheck.layer.causes import Cause, causes_of, readings_of
from cpjax.crosscheck.layer.computed import compute
from cpjax.crosscheck.layer.gating import is_choice
from cpjax.crosscheck.layer.lattice import LEAST_Z, Measured, group_z, measure, total_of
from cpjax.crosscheck.layer.places import places_of, words_of
from cpjax.crosscheck.layer.result import LayerResult, check_forms
from cpjax.crosscheck.layer.stages import Stage, stages_of
from cpjax.crosscheck.layer.verdict import LayerVerdict, StageVerdict
from cpjax.wording import counted, is_are

AXES = {1: ("token",), 2: ("token", "column"), 3: ("token", "head", "column")}
EXPERTS = ("token", "slot", "column")
"""What the axes of a tensor are; slots are the experts of a token, which the indices name."""

PROFILE = "ring_mla_fp16"
"""Of the attention stage."""

Progress = Callable[[int, int], None]
"""Called with stages done and their total."""


def judge_layer(case: LayerCase, result: LayerResult, progress: Progress = lambda done, total: None) -> LayerVerdict:
    """Does correct arithmetic explain every stage of this result?

    Raises:
      InputError: a tensor that is missing, of another dtype or shape.
    """
    dtypes = {name: DTYPES.get(x.dtype.name, x.dtype.name) for name, x in result.tensors.items()}
    check_forms(case, result.tensors, dtypes)
    stages, found = stages_of(case), []
    for number, stage in enumerate(stages):
        found.append(judge_stage(case, stage, result.tensors))
        progress(number + 1, len(stages))
    return LayerVerdict(tuple(found))


def judge_stage(case: LayerCase, stage: Stage, tensors: dict[str, np.ndarray]) -> StageVerdict:
    """The verdict on one stage, from the tensors of a result."""
    there = {"hidden": case.tensors["hidden"], **tensors}
    used = _usable(case, stage, there)
    if not used.any() or (stage.kind == "attention" and not used.all()):
        which = ", ".join(stage.inputs)
        return StageVerdict(stage.name, stage.kind, "not judgeable", 0.0, 0.0, reasons=(f"no finite {which}",))
    if stage.kind == "attention":
        return _attention(case, stage, there)
    right = _held(case, stage, there, used)
    if right.outcome == "agrees":
        return _with_unjudged(right, used)
    for reading in readings_of(stage):
        other = _held(case, stage, there, used, reading)
        if other.outcome == "agrees":
            return _with_unjudged(replace(other, remarks=(reading.words,)), used)
    found = []
    for cause in causes_of(case, stage):
        if _held(case, stage, there, used, cause).outcome == "agrees":
            found.append(f"the result equals, within its bound: {cause.words}")
    return replace(right, causes=tuple(found))


def _usable(case: LayerCase, stage: Stage, there: dict[str, np.ndarray]) -> Bool[np.ndarray, " T"]:
    """Tokens whose inputs are numbers."""
    used = np.ones(case.tokens, bool)
    for name in stage.inputs:
        x = there[name].reshape(case.tokens, -1)
        if name == "expert_index":
            used &= ((x >= 0) & (x < case.config.n_routed_experts)).all(axis=1)
        elif x.dtype.kind == "f":
            used &= np.isfinite(x).all(axis=1)
    return used


def _with_unjudged(verdict: StageVerdict, used: Bool[np.ndarray, " T"]) -> StageVerdict:
    """A stage whose inputs are partly no numbers does not agree as a whole."""
    if used.all():
        return verdict
    count = int((~used).sum())
    words = f"inputs of {counted(count, 'token')} {is_are(count)} not finite or not in range"
    return replace(verdict, outcome="not judgeable", reasons=(words,))


def _held(
    case: LayerCase, stage: Stage, there: dict[str, np.ndarray], used: Bool[np.ndarray, " T"], way: Cause | None = None
) -> StageVerdict:
    """The verdict against what is right, or against another way of computing the stage."""
    inputs = {name: _clean(there[name], used) for name in (*stage.inputs, *_more(stage, there))}
    if way is not None and way.source:
        inputs[stage.inputs[0]] = _clean(there[way.source], used & np.isfinite(there[way.source]).all(axis=1))
    how = None if way is None else way.how
    reasons: list[str] = []
    where: list[str] = []
    ratio, z, moved, allowed = 0.0, LEAST_Z, 0, 0.0
    if stage.name == "router":
        bias = case.tensors["mlp.gate.e_score_correction_bias"].astype(np.float64)
        index = there["expert_index"].astype(np.int64)
        is_right = is_choice(inputs["router_logits"], bias, case.config, index, how) | ~used
        if not is_right.all():
            count = int((~is_right).sum())
            reasons.append(f"the experts of {counted(count, 'token')} are not those with the largest choices")
            where.append(words_of("token", np.flatnonzero(~is_right)))
            ratio = np.inf
        in_range = np.all((index >= 0) & (index < case.config.n_routed_experts), axis=1)
        used = used & in_range  # weights are those of the experts that were chosen, right or wrong
        inputs["expert_index"] = np.where(in_range[:, None], index, 0)
    for name, expected in compute(case, stage, inputs, how).items():
        one = measure(there[name].reshape(expected.exact.shape), expected)
        one = _without(one, used)
        total = total_of(one, used)
        ratio, z = max(ratio, float(one.ratio.max())), max(z, total.z)
        moved, allowed = moved + total.moved, allowed + total.allowed
        z = max(z, _groups_z(one))
        bad = _reasons(name, there[name], one, total.z)
        if bad:
            axes = _axes(name, one.moved.ndim)
            expert = there["expert_index"] if axes == EXPERTS else None
            prefix = f"{name}: " if len(stage.outputs) > 1 else ""
            reasons += [f"{prefix}{reason}" for reason in bad]
            where += [f"{prefix}{place}" for place in places_of(one, expert, axes, total.z)]
    outcome = "WRONG" if reasons else "agrees"
    return StageVerdict(
        stage.name, stage.kind, outcome, ratio, z, moved, allowed, tuple(reasons), tuple(dict.fromkeys(where))
    )


def _more(stage: Stage, there: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Outputs that a stage's other output is judged from: integers from the scale of their token."""
    scale = f"{stage.name.removesuffix('.integers')}.token_scale"
    return (scale,) if stage.kind == "quantisation" and scale in there else ()


def _clean(x: np.ndarray, used: Bool[np.ndarray, " T"]) -> np.ndarray:
    """In float64, with zeros where nothing is judged."""
    x = x if x.dtype.kind == "i" and x.dtype.itemsize > 1 else x.astype(np.float64)
    keep = used.reshape((-1,) + (1,) * (x.ndim - 1))
    return np.where(keep & np.isfinite(x), x, 0)


def _axes(name: str, dimensions: int) -> tuple[str, ...]:
    """What the axes of a tensor are."""
    if name == "router_logits":
        return ("token", "expert")
    if name.startswith("expert_") and name != "expert_gate_up.integers":
        return EXPERTS[:dimensions]
    return AXES[dimensions]


def _without(one: Measured, used: Bool[np.ndarray, " T"]) -> Measured:
    """Tokens that are not judged are right."""
    keep = used.reshape((-1,) + (1,) * (one.moved.ndim - 1))
    return one._replace(
        outside=one.outside & keep,
        ratio=np.where(keep, one.ratio, 0.0),
        moved=np.where(keep, one.moved, 0),
        chance=np.where(keep[None], one.chance, 0.0),
        error=np.where(keep, one.error, 0.0),
    )


def _groups_z(one: Measured) -> float:
    """The worst token, the worst column, …: a fault in one of them is not lost among the others."""
    shape, worst = one.moved.shape, LEAST_Z
    for axis, size in enumerate(shape):
        index = np.arange(size).reshape((-1,) + (1,) * (len(shape) - axis - 1))
        worst = max(worst, float(group_z(one, np.broadcast_to(index, shape), size).max()))
    return worst


def _reasons(name: str, given: np.ndarray, one: Measured, total_z: float) -> list[str]:
    """Why a tensor is wrong."""
    found = []
    not_finite = (
        int((~np.isfinite(given.reshape(one.outside.shape)) & one.outside).sum()) if given.dtype.kind == "f" else 0
    )
    if not_finite:
        found.append(f"{counted(not_finite, 'number')} {is_are(not_finite)} NaN or infinite")
    outside = int(one.outside.sum()) - not_finite
    if outside:
        size = float(np.where(np.isfinite(one.ratio), one.ratio, 0.0).max())
        found.append(
            f"{counted(outside, 'number')} of {one.outside.size:,} {is_are(outside)} out of bounds, by up to "
            f"{size:.4g} times the bound"
        )
    if found:
        return found
    if total_z > LIMIT:
        found.append(f"all within their bounds, but together not what rounding gives (z {total_z:.1f})")
    elif (worst := _groups_z(one)) > LIMIT:
        found.append(f"all within their bounds, but not what rounding gives in some places (z {worst:.1f})")
    return found


# Attention -----------------------------------------------------------------------------------------------------------


def _attention(case: LayerCase, stage: Stage, there: dict[str, np.ndarray]) -> StageVerdict:
    """By the judge of attention, on the stage's own query, key and value."""
    key = there["key"]
    k_rope = np.broadcast_to(there["k_rope"][:, None], (*key.shape[:2], there["k_rope"].shape[1]))
    whole = np.concatenate([key, k_rope], axis=-1)
    batched: list[Any] = [x[None] for x in (there["query"], whole, there["value"], there["attention"], there["lse"])]
    verdict = judge_attention(*batched, scale=case.config.softmax_scale, is_causal=True, precision=PROFILE)
    ratio = _largest(verdict.hard_ratio, verdict.lse_hard_ratio)
    z = _largest(verdict.z, verdict.lse_z)
    if verdict.passed:
        return StageVerdict(stage.name, stage.kind, "agrees", ratio, z)
    outcome = "WRONG" if verdict.judgeable else "not judgeable"
    causes = tuple(verdict.diagnosis) if verdict.judgeable else ()
    return StageVerdict(
        stage.name,
        stage.kind,
        outcome,
        ratio,
        z,
        reasons=tuple(verdict.reasons),
        where=("see the diagnosis",) * bool(causes),
        causes=causes,
    )


def _largest(*numbers: float) -> float:
    """Of those that are no NaN; inf if none is."""
    known = [x for x in numbers if not np.isnan(x)]
    return float(max(known)) if known else float(np.inf)
