"""Known faults of each stage, as ways of computing it: one that gives the wrong result within its bound is named.

A name is given only if the whole tensor equals that computation by the same test by which it fails the right one.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.layer.case import LayerCase
from cpjax.crosscheck.layer.computed import LATENT_EPS, eps_of
from cpjax.crosscheck.layer.expected import LEAST_INT8
from cpjax.crosscheck.layer.formulas import Turn
from cpjax.crosscheck.layer.gating import Gating
from cpjax.crosscheck.layer.stages import Stage
from cpjax.crosscheck.layer.weights import TOP_19, linear_of
from cpjax.deepseek.description import KINDS


class Cause(NamedTuple):
    """One way of computing a stage."""

    words: str
    """What it would be, after "equals within its bound: "."""
    how: Any
    """As `cpjax.crosscheck.layer.computed.compute` takes it."""
    source: str = ""
    """A tensor from which it is computed in place of the stage's first input."""


def causes_of(case: LayerCase, stage: Stage) -> Iterator[Cause]:
    """Known faults of a stage; of attention the judge has its own."""
    if stage.kind == "norm":
        yield from _of_norms(case, stage)
    elif stage.kind == "rope":
        yield from _of_rope(case)
    elif stage.name == "key_value":
        if case.config.qk_nope_head_dim == case.config.v_head_dim:
            yield Cause("kv_b_proj read as the keys of all heads, then their values, not head by head", "apart")
    elif stage.kind in ("projection", "expert"):
        yield from _of_products(stage, "exchanged", "neighbour")
    elif stage.kind == "quantisation":
        yield from _of_quantisation(case, stage)
    elif stage.kind == "quantised product":
        yield from _of_quantised(case, stage)
    elif stage.kind == "activation":
        yield Cause("gate and up exchanged", {"exchanged": True})
        yield Cause("silu forgotten: gate · up", {"bare": True})
        yield Cause("silu rounded to FP16 before it is multiplied by up", {"rounded_first": True})
    elif stage.kind == "sum":
        yield from _of_sums(stage)
    elif stage.name == "router_logits":
        yield Cause("the router's weights rounded to FP16", lambda w: w.astype(np.float16).astype(np.float64))
        yield Cause("the router's weights cut to 19 bits (TF32, HF32)", lambda w: _cut(w, 0))
        yield Cause("the router's weights rounded to 19 bits (TF32, HF32)", lambda w: _cut(w, 1 << 12))
        yield Cause("the router's weights rounded to BF16", lambda w: _cut_bf16(w))
    elif stage.name == "router":
        yield from _of_router(case)


def readings_of(stage: Stage) -> list[Cause]:
    """Ways of computing a stage that are right, too, by what the operators accept."""
    if stage.kind == "norm":
        words = "x / √(mean x² + eps) is rounded to FP16 before it is multiplied by the weight, as in npu_add_rms_norm"
        return [Cause(words, {"rounded_first": True})]
    if stage.kind == "rope":
        return [Cause("cosines and sines are given as FP16, as the vendor's operators take them", Turn(is_fp16=True))]
    return []


def _of_norms(case: LayerCase, stage: Stage) -> Iterator[Cause]:
    eps = eps_of(case, stage)
    ways: list[Cause] = []
    for other, words in ((case.config.rms_norm_eps, ", the config's rms_norm_eps,"), (LATENT_EPS, ""), (0.0, "")):
        if other != eps:
            ways.append(Cause(f"eps {other:g}{words} in place of {eps:g}", {"eps": other}))
    ways.append(Cause("the norm's weight forgotten", {"has_weight": False}))
    if stage.name == "post_norm":
        ways.append(Cause("the norm of o: the residual forgotten", {}, "o"))
        ways.append(Cause("the norm of hidden: attention forgotten", {}, "hidden"))
    for way in ways:
        yield way
        yield Cause(f"{way.words}; rounded before the weight, too", way.how | {"rounded_first": True}, way.source)


def _of_rope(case: LayerCase) -> Iterator[Cause]:
    config = case.config
    pairs = ("halves", "(i, i + R/2)") if config.rope_interleave else ("interleaved", "(2i, 2i + 1)")
    ways = {f"pairs {pairs[1]} are rotated": Turn(pairs=pairs[0])}
    ways |= {
        "pairs left side by side, not as halves": Turn(out="interleaved"),
        "no rotation": Turn(is_turned=False),
        "rotated in the opposite direction": Turn(sign=-1),
        "positions one too large": Turn(shift=1),
        "positions one too small": Turn(shift=-1),
    }
    if (yarn := config.yarn) is not None:
        ways["plain frequencies, without YaRN"] = Turn(is_yarn=False)
        for m, name in ((1.0, "1"), (yarn.mscale or 1.0, "mscale")):
            if (factor := yarn.mscale_of(m)) != yarn.cos_factor:
                ways[f"cosine and sine times g({name}) = {factor:.4f}"] = Turn(factor=factor)
    for words, how in ways.items():
        yield Cause(words, how)
        yield Cause(f"{words}; cosines and sines in FP16", how._replace(is_fp16=True))


def _of_products(stage: Stage, exchanged: Any, neighbour: Any) -> Iterator[Cause]:
    assert stage.product is not None
    if len(stage.product.weights) > 1:
        yield Cause("gate and up exchanged", exchanged)
    if stage.product.is_expert:
        yield Cause("the weights of the next expert", neighbour)


def _of_quantisation(case: LayerCase, stage: Stage) -> Iterator[Cause]:
    assert stage.product is not None
    yield Cause("truncated toward zero, not rounded", {"truncated": True})
    if linear_of(case, stage.product.weights[0].format(e=0)).kind == KINDS[0]:
        yield Cause("multiplied by 1 / input_scale rounded to FP16", {"fp16_reciprocal": True})
        yield Cause("input_offset forgotten", {"no_offset": True})
        return
    yield Cause("scale max |x| / 128 in place of max |x| / 127", {"largest": -LEAST_INT8})
    yield Cause("one scale for all tokens", {"one_scale": True})


def _of_quantised(case: LayerCase, stage: Stage) -> Iterator[Cause]:
    assert stage.product is not None
    if len(stage.product.weights) > 1:
        yield Cause("gate and up exchanged", {"exchanged": True})
    other = {"exact": "vendor", "vendor": "exact"}[case.arithmetic]
    yield Cause(f"{other} arithmetic; the case says {case.arithmetic}", {"arithmetic": other})
    name = next(iter(stage.product.weights)).format(e=0)
    kind, one = case.kinds[name], linear_of(case, name)
    if kind == KINDS[0]:
        yield Cause("quant_bias forgotten", {"bias": 0.0})
        yield Cause("quant_bias added twice", {"bias": 2.0})
        return
    yield Cause("the scale of each token forgotten", {"has_token_scale": False})
    if kind == KINDS[2]:
        yield Cause("nibbles exchanged: rows 2i and 2i + 1", {"swapped": True})
        if case.arithmetic == "vendor":
            yield Cause("scale_bias forgotten", {"has_scale_bias": False})
        if one.second is not None:
            yield Cause("weight_scale_second forgotten", {"has_second": False})


def _of_sums(stage: Stage) -> Iterator[Cause]:
    if stage.name == "routed":
        yield Cause("the experts' weights forgotten", {"unweighted": True})
        yield Cause("the experts' weights rounded to FP16", {"fp16": True})
        return
    words = {"hidden": "the residual (hidden) forgotten", "attended": "the residual (attended) forgotten"}
    for name in stage.inputs:
        yield Cause(words.get(name, f"{name} forgotten"), {"without": name})
    if stage.name == "out":
        yield Cause("the residual of attention (hidden) added in place of attended", None, "hidden")
    if len(stage.inputs) > 2:
        yield Cause("routed + shared_down rounded to FP16 before attended is added", {"rounded_at": 2})


def _of_router(case: LayerCase) -> Iterator[Cause]:
    config = case.config
    ways = {
        "the correction bias is in the experts' weights, too": Gating(bias_weighs=True),
        "the correction bias forgotten": Gating(bias_chooses=False),
        "softmax in place of sigmoid": Gating(is_softmax=True),
    }
    if config.norm_topk_prob:
        ways["weights not renormalised"] = Gating(is_renormalised=False)
    else:
        ways["weights renormalised, against norm_topk_prob"] = Gating(is_renormalised=True)
    if config.routed_scaling_factor != 1:
        ways[f"routed_scaling_factor ({config.routed_scaling_factor:g}) forgotten"] = Gating(is_scaled=False)
    if config.groups > 1:
        ways["groups of experts ignored"] = Gating(has_groups=False)
    for words, how in ways.items():
        yield Cause(words, how)


def _cut(weight: Float[np.ndarray, "..."], half: int) -> Float[np.ndarray, "..."]:
    bits = weight.astype(np.float32).view(np.uint32) + np.uint32(half)
    return (bits & np.uint32(TOP_19)).view(np.float32).astype(np.float64)


def _cut_bf16(weight: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    import ml_dtypes

    return weight.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)
