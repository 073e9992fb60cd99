"""What each stage should give: from its inputs, which are the result's own earlier tensors, by `formulas`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.layer import formulas
from cpjax.crosscheck.layer.case import LayerCase
from cpjax.crosscheck.layer.expected import LARGEST_INT8, Expected, known, side_by_side
from cpjax.crosscheck.layer.formulas import Scaling
from cpjax.crosscheck.layer.gating import weights_of
from cpjax.crosscheck.layer.stages import Stage
from cpjax.crosscheck.layer.weights import Linear, linear_of

LATENT_EPS = 1e-6
"""Of `q_a_layernorm` and `kv_a_layernorm`, whatever the config says."""

Inputs = dict[str, np.ndarray]
"""Tensors by name, float64; indices of experts as they are."""


def compute(case: LayerCase, stage: Stage, x: Inputs, how: Any = None) -> dict[str, Expected]:
    """Tensor → what it should be.

    Args:
      x: the stage's inputs, finite. Of the router also `expert_index`.
      how: another way of computing it than the right one (`cpjax.crosscheck.layer.causes`).
    """
    return _FORMULAS[stage.kind](case, stage, x, how)


def _norm(case: LayerCase, stage: Stage, x: Inputs, how: Any) -> dict[str, Expected]:
    source = x[stage.inputs[0]][:, : len(case.tensors[stage.weight])]
    weight = case.tensors[stage.weight].astype(np.float64)
    words = {"eps": eps_of(case, stage), "rounded_first": False, "has_weight": True} | (how or {})
    weight = weight if words.pop("has_weight") else np.ones_like(weight)
    return {stage.name: formulas.norm(source, weight, **words)}


def eps_of(case: LayerCase, stage: Stage) -> float:
    """The norms inside attention have their own."""
    return LATENT_EPS if stage.name in ("q_a_norm", "c_kv") else case.config.rms_norm_eps


def _rope(case: LayerCase, stage: Stage, x: Inputs, how: Any) -> dict[str, Expected]:
    size, source = case.config.qk_rope_head_dim, x[stage.inputs[0]]
    plain, turned = source[..., :-size], source[..., -size:]
    found = formulas.rope(turned, case.tensors["position"].astype(np.int64), case.config, how)
    return {stage.name: found if stage.name == "k_rope" else side_by_side([known(plain), found])}


def _projection(case: LayerCase, stage: Stage, x: Inputs, how: Any) -> dict[str, Expected]:
    source = x[stage.inputs[0]]
    if stage.name == "key_value":
        return _key_value(case, source, is_apart=how == "apart")
    assert stage.product is not None
    source = source.reshape(len(source), -1)
    return {stage.name: _shaped(case, stage, _of_each(case, stage, source, formulas.linear, how))}


def _key_value(case: LayerCase, c_kv: Float[np.ndarray, "T C"], *, is_apart: bool) -> dict[str, Expected]:
    """Of each head first the rows of its key, then of its value; `is_apart`: those of all keys come first."""
    config = case.config
    n, d, v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    both = formulas.linear(c_kv, case.tensors["self_attn.kv_b_proj.weight"].astype(np.float64))

    def part(where: slice, size: int) -> Expected:
        def cut(y: Any) -> np.ndarray:
            y = np.broadcast_to(y, both.exact.shape)
            if is_apart:
                y = y[:, : n * d] if where.start is None else y[:, n * d :]
                return y.reshape(-1, n, size)
            return y.reshape(-1, n, d + v)[:, :, where]

        return Expected(cut(both.exact), cut(both.most), cut(both.sigma), cut(both.inward))

    return {"key": part(slice(None, d), d), "value": part(slice(d, None), v)}


def _of_each(
    case: LayerCase, stage: Stage, source: np.ndarray, product: Callable[..., Expected], how: Any
) -> list[Expected]:
    """Each weight of a product, float ones; "exchanged": in the other order."""
    assert stage.product is not None
    names = stage.product.weights[::-1] if how == "exchanged" else stage.product.weights
    return [product(source, linear_of(case, name).weight) for name in names]


def _shaped(case: LayerCase, stage: Stage, parts: list[Expected]) -> Expected:
    """As the result has it: queries by heads."""
    found = side_by_side(parts)
    if stage.name != "q":
        return found
    shape = (len(found.exact), case.config.num_attention_heads, case.config.head_dim)
    most, sigma, inward = (
        np.broadcast_to(y, found.exact.shape).reshape(shape) for y in (found.most, found.sigma, found.inward)
    )
    return Expected(found.exact.reshape(shape), most, sigma, inward)


def _expert(case: LayerCase, stage: Stage, x: Inputs, how: Any) -> dict[str, Expected]:
    source, index = x[stage.inputs[0]], x["expert_index"]
    if how == "neighbour":
        index = (index + 1) % case.config.n_routed_experts

    def one(e: int, rows: np.ndarray, slots: np.ndarray) -> list[Expected]:
        assert stage.product is not None
        given = source[rows] if source.ndim == 2 else source[rows, slots]
        names = stage.product.weights[::-1] if how == "exchanged" else stage.product.weights
        return [formulas.linear(given, linear_of(case, name.format(e=e)).weight) for name in names]

    return {stage.name: _by_expert(index, one)}


def _by_expert(index: Int[np.ndarray, "T k"], one: Callable[[int, np.ndarray, np.ndarray], list[Expected]]) -> Expected:
    """`one` of each expert and the tokens and slots that want it, put where they belong."""
    found: list[np.ndarray] = []
    for e in np.unique(index).tolist():
        rows, slots = np.nonzero(index == e)
        part = side_by_side(one(e, rows, slots))
        columns = [np.broadcast_to(y, part.exact.shape) for y in (part.exact, part.most, part.sigma, part.inward)]
        if not found:
            found = [np.zeros((*index.shape, part.exact.shape[-1])) for _ in columns]
        for whole, column in zip(found, columns, strict=True):
            whole[rows, slots] = column
    exact, most, sigma, inward = found
    return Expected(exact, most, sigma, inward)


def _quantisation(case: LayerCase, stage: Stage, x: Inputs, how: Any) -> dict[str, Expected]:
    assert stage.product is not None
    source = x[stage.inputs[0]]
    if source.ndim == 3 and stage.product.weights[0].endswith("o_proj"):
        source = source.reshape(len(source), -1)
    weights, words = linear_of(case, stage.product.weights[0].format(e=0)), dict(how or {})
    if weights.input_scale is not None:
        assert weights.input_offset is not None
        offset = 0.0 if words.pop("no_offset", False) else weights.input_offset
        return {stage.name: formulas.quantised_static(source, weights.input_scale, offset, **words)}
    scale = f"{stage.name.removesuffix('.integers')}.token_scale"
    largest = words.pop("largest", LARGEST_INT8)
    whole = formulas.token_scale(source, largest)
    if words.pop("one_scale", False):
        exact, most, sigma = (np.full_like(y, y.max()) for y in (whole.exact, whole.most, whole.sigma))
        whole = Expected(exact, most, sigma, 0.0, "float32")
    return {scale: whole, stage.name: formulas.quantised_token(source, x[scale], **words)}


def _product(case: LayerCase, stage: Stage, x: Inputs, how: Any) -> dict[str, Expected]:
    """A quantised one: from its integers and, in a dynamic kind, the scales of tokens."""
    assert stage.product is not None
    product, words = stage.product, dict(how or {})
    integers, scale = x[f"{stage.name}.integers"], x.get(f"{stage.name}.token_scale")
    names = product.weights[::-1] if words.pop("exchanged", False) else product.weights
    arithmetic = words.pop("arithmetic", case.arithmetic)

    def one(a: np.ndarray, s: np.ndarray | None, weights: Linear) -> Expected:
        return formulas.quantised(a, s, weights, arithmetic, Scaling(**words))

    if not product.is_expert:
        return {stage.name: _shaped(case, stage, [one(integers, scale, linear_of(case, name)) for name in names])}

    def of_expert(e: int, rows: np.ndarray, slots: np.ndarray) -> list[Expected]:
        at = (rows,) if integers.ndim == 2 else (rows, slots)
        s = None if scale is None else scale[at]
        return [one(integers[at], s, linear_of(case, name.format(e=e))) for name in names]

    return {stage.name: _by_expert(x["expert_index"], of_expert)}


def _activation(case: LayerCase, stage: Stage, x: Inputs, how: Any) -> dict[str, Expected]:
    gate, up = np.split(x[stage.inputs[0]], 2, axis=-1)
    words = dict(how or {})
    if words.pop("exchanged", False):
        gate, up = up, gate
    return {stage.name: formulas.swiglu(gate, up, **words)}


def _sum(case: LayerCase, stage: Stage, x: Inputs, how: Any) -> dict[str, Expected]:
    words = dict(how or {})
    if stage.name == "routed":
        weight = x["expert_weight"]
        weight = np.ones_like(weight) if words.get("unweighted") else weight
        if words.get("fp16"):
            weight = weight.astype(np.float16).astype(np.float64)
        return {stage.name: formulas.weighted(x["expert_down"], weight)}
    without = words.pop("without", None)
    parts = [x[name] for name in stage.inputs if name != without]
    return {stage.name: formulas.total(parts, **words)}


def _router(case: LayerCase, stage: Stage, x: Inputs, how: Any) -> dict[str, Expected]:
    bias = case.tensors["mlp.gate.e_score_correction_bias"].astype(np.float64)
    if stage.name == "router":
        return {"expert_weight": weights_of(x["router_logits"], bias, case.config, x["expert_index"], how)}
    weight = case.tensors["mlp.gate.weight"].astype(np.float64)
    if how is not None:
        weight = how(weight)
    return {stage.name: formulas.linear(x["post_norm"], weight, "float32")}


_FORMULAS: dict[str, Callable[[LayerCase, Stage, Inputs, Any], dict[str, Expected]]] = {
    "norm": _norm,
    "rope": _rope,
    "projection": _projection,
    "expert": _expert,
    "quantisation": _quantisation,
    "quantised product": _product,
    "activation": _activation,
    "sum": _sum,
    "router": _router,
}
"""Of every kind but attention, which the judge of attention has."""
