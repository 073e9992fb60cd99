"""The whole layer in float64 from the hidden state, every stage exact: what a case's scales are found with."""

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.layer.case import LayerCase
from cpjax.crosscheck.layer.computed import compute
from cpjax.crosscheck.layer.expected import LARGEST_INT8, LEAST_INT8
from cpjax.crosscheck.layer.formulas import sigmoid
from cpjax.crosscheck.layer.gating import best_groups
from cpjax.crosscheck.layer.stages import Stage, stages_of
from cpjax.crosscheck.layer.weights import linear_of


def compute_layer(case: LayerCase) -> dict[str, np.ndarray]:
    """Every tensor of a result by name, in float64, nothing rounded but integers and the scales of tokens.

    Integers are made in float32, as the specification makes them.
    """
    there: dict[str, np.ndarray] = {"hidden": case.tensors["hidden"].astype(np.float64)}
    for stage in stages_of(case):
        if stage.kind == "attention":
            there |= dict(zip(stage.outputs, _attention(case, there), strict=True))
            continue
        if stage.name == "router":
            there["expert_index"] = _chosen(case, there["router_logits"])
        if stage.kind == "quantisation":
            there |= _integers(case, stage, there[stage.inputs[0]])
            continue
        there |= {name: x.exact for name, x in compute(case, stage, there).items()}
    return there


def _attention(
    case: LayerCase, x: dict[str, np.ndarray]
) -> tuple[Float[np.ndarray, "T N V"], Float[np.ndarray, "T N"]]:
    score = np.einsum("tnd,snd->tns", x["query"][..., : x["key"].shape[2]], x["key"])
    score = score + np.einsum("tnr,sr->tns", x["query"][..., x["key"].shape[2] :], x["k_rope"])
    position = case.tensors["position"]
    is_seen = (position[:, None] >= position[None])[:, None]
    score = np.where(is_seen, score * case.config.softmax_scale, -np.inf)
    largest = score.max(axis=2, keepdims=True)
    weight = np.exp(score - largest)
    size = weight.sum(axis=2)
    out = np.einsum("tns,snv->tnv", weight / size[..., None], x["value"])
    return out, np.log(size) + largest[..., 0]


def _chosen(case: LayerCase, logits: Float[np.ndarray, "T E"]) -> Int[np.ndarray, "T k"]:
    """The experts with the largest choices, the largest first; of equal ones the lower."""
    choice = sigmoid(logits) + case.tensors["mlp.gate.e_score_correction_bias"].astype(np.float64)
    choice = np.where(best_groups(choice, case.config), choice, -np.inf)
    return np.argsort(-choice, axis=1, kind="stable")[:, : case.config.num_experts_per_tok]


def _integers(case: LayerCase, stage: Stage, x: np.ndarray) -> dict[str, np.ndarray]:
    """Quantised in float32."""
    assert stage.product is not None
    weights = linear_of(case, stage.product.weights[0].format(e=0))
    x = x.reshape(len(x), -1) if stage.name == "o.integers" else x
    x = x.astype(np.float32)
    if weights.input_scale is not None:
        found = {stage.name: x / np.float32(weights.input_scale) + np.float32(weights.input_offset)}
    else:
        scale = np.abs(x).max(axis=-1) / np.float32(LARGEST_INT8)
        found = {stage.name: x / np.where(scale > 0, scale, np.float32(1))[..., None], stage.outputs[1]: scale}
    found[stage.name] = np.clip(np.rint(found[stage.name]), LEAST_INT8, LARGEST_INT8)
    return {name: y.astype(np.float64) for name, y in found.items()}
