"""Stages of a dense feed-forward layer, and of shared experts: gate and up in one product, silu(gate) · up, down."""

import torch
from torch import Tensor

from npu_backend.layer.attention import Stages, keep
from npu_backend.layer.case import LayerCase
from npu_backend.layer.linear import linear_of
from npu_backend.operators import gated


def feed_forward_stages(
    case: LayerCase, x: Tensor, stages: Stages, device: torch.device, name: str = "mlp", prefix: str = ""
) -> Tensor:
    """`gate_up`, `activated`, `down` of the layer of this name, their names prefixed; the last is returned."""
    arrays, how = case.arrays, case.arithmetic
    together, last = [f"{name}.gate_proj", f"{name}.up_proj"], f"{name}.down_proj"
    gate_up = linear_of(arrays, together, case.kinds[together[0]], how, device)
    down = linear_of(arrays, [last], case.kinds[last], how, device)
    stages[f"{prefix}activated"] = activated = gated(keep(stages, f"{prefix}gate_up", gate_up(x)))
    return keep(stages, f"{prefix}down", down(activated))


def dense_stages(case: LayerCase, stages: Stages, device: torch.device) -> None:
    """All stages of a dense layer after attention, `out` last: the sum in FP16."""
    down = feed_forward_stages(case, stages["post_norm"], stages, device)
    stages["out"] = stages["attended"] + down
