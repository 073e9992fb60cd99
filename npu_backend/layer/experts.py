"""Stages of routed experts: which and with which weight, their products, and the sums.

    post_norm → router_logits (float32) → expert_index, expert_weight
    post_norm → expert_gate_up → expert_activated → expert_down → routed

Rows are sorted by expert for the grouped products; a result has them as [T, k, …]. Activations are quantised before
they are spread, so that a token has the same integers for each of its experts.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from npu_backend.layer.attention import Stages, keep
from npu_backend.layer.case import LayerCase
from npu_backend.layer.feed_forward import feed_forward_stages
from npu_backend.layer.linear import Product, as_computed, on, packed_of, stacked
from npu_backend.layer.weights import BIAS
from npu_backend.operators import (
    Activations,
    Rows,
    gated,
    grouped_dynamic_linear,
    grouped_linear,
    grouped_packed_linear,
    in_token_order,
    quantize_per_token,
    route,
    spread,
    weighted_sum,
)

Grouped = Callable[[Rows], Tensor]
ROUTING = (
    *("npu::npu_moe_gating_top_k", "npu::npu_moe_init_routing_v2"),
    *("npu::npu_grouped_matmul", "npu::npu_moe_finalize_routing"),
)
"""Operators of routed experts of every kind."""


def moe_stages(case: LayerCase, stages: Stages, device: torch.device) -> None:
    """All stages of a layer with experts after attention, `out` last: the sum in float32, one cast."""
    config, x = case.config, stages["post_norm"]
    gate, bias = (on(case.arrays[name], device) for name in ("mlp.gate.weight", BIAS))
    stages["router_logits"] = torch.nn.functional.linear(x.float(), gate)
    choice = route(
        stages["router_logits"],
        bias,
        top_k=config.num_experts_per_tok,
        groups=config.n_group,
        chosen_groups=config.topk_group,
        factor=config.routed_scaling_factor,
    )
    stages["expert_index"], stages["expert_weight"] = choice
    _expert_stages(case, x, choice.expert, stages, device)
    stages["routed"] = weighted_sum(stages["expert_down"], choice.weight)
    total = stages["attended"].float() + stages["routed"].float()
    if config.n_shared_experts:
        shared = feed_forward_stages(case, x, stages, device, "mlp.shared_experts", "shared_")
        total = total + shared.float()
    stages["out"] = total.half()


def _expert_stages(case: LayerCase, x: Tensor, expert: Tensor, stages: Stages, device: torch.device) -> None:
    config, top_k = case.config, case.config.num_experts_per_tok
    a = None if _kind(case, "gate_proj") == "FLOAT" else quantize_per_token(x)
    values, scale = (x, None) if a is None else a
    rows = spread(values, expert, config.n_routed_experts, scale)
    out = _grouped(case, ("gate_proj", "up_proj"), device)(rows)
    gate_up = keep(stages, "expert_gate_up", Product(in_token_order(out, rows.place, top_k), a))
    stages["expert_activated"] = activated = gated(gate_up)
    a = None if _kind(case, "down_proj") == "FLOAT" else quantize_per_token(activated.flatten(0, 1))
    out = _grouped(case, ("down_proj",), device)(_by_expert(activated.flatten(0, 1), a, rows))
    in_order = None if a is None else _as_stated(a, top_k)
    keep(stages, "expert_down", Product(in_token_order(out, rows.place, top_k), in_order))


def _kind(case: LayerCase, part: str) -> str:
    return case.kinds[f"mlp.experts.0.{part}"]


def _by_expert(values: Tensor, a: Activations | None, rows: Rows) -> Rows:
    """Rows in the order of tokens and choices, sorted as `rows` are."""
    order = torch.argsort(rows.place.long())
    if a is None:
        return rows._replace(values=values[order], token_scale=None)
    assert a.token_scale is not None
    return rows._replace(values=a.integers[order], token_scale=a.token_scale[order])


def _as_stated(a: Activations, top_k: int) -> Activations:
    assert a.token_scale is not None
    return Activations(a.integers.unflatten(0, (-1, top_k)), a.token_scale.unflatten(0, (-1, top_k)))


def _grouped(case: LayerCase, parts: tuple[str, ...], device: torch.device) -> Grouped:
    """The product of one matrix, or of gate and up together, of all experts."""
    arrays, kind = case.arrays, _kind(case, parts[0])
    matrices = [[f"mlp.experts.{e}.{part}" for part in parts] for e in range(case.config.n_routed_experts)]
    if kind == "W4A8_DYNAMIC":
        packed = packed_of(arrays, matrices, device)
        product: Grouped = partial(grouped_packed_linear, packed=packed)
    else:
        weight = on(np.stack([stacked(arrays, names, "weight").T for names in matrices]), device)
        if kind == "FLOAT":
            return partial(grouped_linear, weight=weight)
        scales = np.stack([stacked(arrays, names, "weight_scale")[:, 0] for names in matrices])
        weight_scale = on(scales.astype(np.float32), device)
        product = partial(grouped_dynamic_linear, weight=weight, weight_scale=weight_scale)

    def compute(rows: Rows) -> Tensor:
        with as_computed(case.arithmetic):
            return product(rows)

    return compute
