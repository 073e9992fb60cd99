"""npu::npu_swiglu in our words."""

import torch
from torch import Tensor

from npu_backend import vendor


def gated(gate_up: Tensor) -> Tensor:
    """silu(first half of the last dim) · second half; one call of npu::npu_swiglu."""
    vendor.require("npu::npu_swiglu", gate_up.device)
    return torch.ops.npu.npu_swiglu(gate_up, -1)
