"""What npu::npu_moe_init_routing_v2 accepts (shape inference of torch_npu 2.13.0), all experts here."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.refuse import Refusal

_refusal = Refusal("npu_moe_init_routing_v2")


def check(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    active_num: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    **more: Any,
) -> None:
    """`x` is `[T, H]`, `expert_idx` `[T, k]` int32.

    Raises:
      RuntimeError: what the vendor refuses, and what is not computed here: experts of other ranks, drop and pad.
    """
    require, parameter, not_implemented = _refusal.require, _refusal.parameter, _refusal.not_implemented
    require(x.dim() == 2, "the x shape support only 2d")
    require(expert_idx.dim() == 2, "the expert_idx shape support only 2d")
    require(len(x) == len(expert_idx), "the first dim of expert_idx and x should be the same")
    require(row_idx_type in (0, 1), "row_idx_type is None or invalid. must be in [0, 1]")
    require(drop_pad_mode in (0, 1), "drop_pad_mode is None or invalid. must be in [0, 1]")
    require(expert_tokens_num_type in (0, 1, 2), "expert_tokens_num_type is None or invalid. must be in [0, 1, 2]")
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.int8)
    parameter(x.dtype in dtypes, f"x is {x.dtype}, must be one of {dtypes}")
    parameter(expert_idx.dtype == torch.int32, f"expert_idx is {expert_idx.dtype}, must be int32")
    parameter(1 <= expert_num <= 10240, f"expert_num is {expert_num}, must be from 1 to 10240")
    is_there = bool(((expert_idx >= 0) & (expert_idx < expert_num)).all())
    parameter(is_there, f"expert_idx must be from 0 to {expert_num - 1}")
    rows = expert_idx.numel()
    parameter(active_num <= 0 or active_num == rows, f"active_num is {active_num}, must be {rows}, NUM_ROWS * K")
    not_implemented(list(active_expert_range) in ([], [0, expert_num]), f"active_expert_range {active_expert_range}")
    not_implemented(drop_pad_mode == 0, f"drop_pad_mode {drop_pad_mode}")
    not_implemented(expert_tokens_num_type != 2, "expert_tokens_num_type 2")
    not_implemented(quant_mode in (-1, 1), f"quant_mode {quant_mode}")
    _refusal.only_defaults({name: more.get(name) for name in ("offset", "x_dtype")})
    if quant_mode == 1:
        parameter(x.dtype != torch.int8, "x is int8 already, quant_mode must be -1")
        not_implemented(scale is None, "scale with quant_mode 1")
    elif scale is not None:
        require(scale.dim() == 1, "the scale shape support only 1D (bs,) in no quant mode")
        require(len(scale) == len(x), "the first dim of scale and the first dim of x should be the same")
        parameter(scale.dtype == torch.float32, f"scale is {scale.dtype}, must be float32")
