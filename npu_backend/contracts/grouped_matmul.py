"""What npu::npu_grouped_matmul accepts, with one x, one weight of all groups, and rows cut into groups (group_type 0).

    x         weight                   scale               per_token_scale   bias            output
    float     the same dtype [E, k, n]  –                   –                 –               the same
    int8      int8 [E, k, n]            float32 [E, n]      float32 [m]       int32 [E, n]    float16
    int8      int8 [E, k, n]            bfloat16 [E, n]     float32 [m]       int32 [E, n]    bfloat16
    int8      int32 [E, k, n/8]         int64 [E, (G,) n]   float32 [m]       float32 [E, n]  float16, bfloat16

The last is W4A8: eight numbers of 4 bits in an int32, lowest bits first, one scale a column or one for each of G
groups of k, and a bias that undoes the −8 (see the emulation). It is not in the tables of op-plugin's page; the call is
that of vllm-ascend (quantization/methods/w4a8.py, 01697b3e), whose results are BF16: FP16 is an inference. The other
rows are tables of op-plugin's page (docs/context/torch_npu-npu_grouped_matmul.md, 2026). Lists of several tensors are
not implemented here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npu_backend.contracts.dtypes import dtype_of
from npu_backend.contracts.refuse import Refusal
from npu_backend.contracts.rms_norm import FLOATS

GROUPS, INNER = 1024, 65536
"""Most groups, and the first number that a last dim may not be."""
PACKED = 8
_refusal = Refusal("npu_grouped_matmul")
Tensors = Sequence[Tensor] | None


class Call(NamedTuple):
    """A checked call."""

    x: Tensor  # [m, k]
    weight: Tensor  # [E, k, n], or [E, k, n / 8] in int32
    lengths: list[int]  # rows of each group
    out: torch.dtype
    scale: Tensor | None  # of int64 always [E, G, n]
    per_token: Tensor | None
    bias: Tensor | None


def check(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Tensors = None,
    scale: Tensors = None,
    per_token_scale: Tensors = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: int | None = None,
    **more: Any,
) -> Call:
    """Arguments as in the schema.

    Raises:
      RuntimeError: what the vendor refuses, and what is not computed here.
    """
    require, not_implemented = _refusal.require, _refusal.not_implemented
    require(group_type in (-1, 0, 2), f"group_type only supports -1, 0 and 2, but got {group_type}")
    require(bool(x) and bool(weight), "The number of x and weight should be greater than 0")
    not_implemented(len(x) == len(weight) == 1 and weight[0].dim() == 3, "several tensors; give one x, one weight 3-D")
    not_implemented(group_type == 0 and group_list is not None, f"group_type {group_type}, only rows in groups")
    not_implemented(split_item in (2, 3), f"split_item {split_item}, only one result")
    not_implemented(not act_type, f"act_type {act_type}")
    unused = ("offset", "antiquant_scale", "antiquant_offset", "activation_input", "activation_quant_scale")
    unused += ("activation_quant_offset", "x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype")
    _refusal.only_defaults({name: more.get(name) or None for name in unused})
    assert group_list is not None
    lengths = _lengths(group_list, group_list_type or 0, len(weight[0]), len(x[0]))
    _check_shapes(x[0], weight[0])
    parts = [part[0] if part else None for part in (scale, per_token_scale, bias)]
    out = dtype_of(output_dtype, x[0].dtype)
    not_implemented(out in FLOATS, f"output_dtype {output_dtype}")
    assert out is not None
    return _kind(Call(x[0], weight[0], lengths, out, *parts))


def _lengths(group_list: Tensor, group_list_type: int, groups: int, rows: int) -> list[int]:
    parameter = _refusal.parameter
    _refusal.not_implemented(group_list_type in (0, 1), f"group_list_type {group_list_type}")
    parameter(group_list.dtype == torch.int64, f"group_list is {group_list.dtype}, must be int64")
    parameter(group_list.shape == (groups,), f"group_list is {tuple(group_list.shape)}, must be [{groups}]")
    parameter(groups <= GROUPS, f"{groups} groups, at most {GROUPS}")
    numbers = group_list.tolist()
    if group_list_type == 1:
        parameter(groups != 1, "group_list of counts must not have length 1; give the row ends, group_list_type 0")
        lengths = numbers
    else:
        lengths = [end - start for start, end in zip([0, *numbers], numbers, strict=False)]
    is_right = all(n >= 0 for n in lengths) and sum(lengths) == rows
    parameter(is_right, f"group_list {numbers} must rise to the {rows} rows of x, or add up to them")
    return lengths


def _check_shapes(x: Tensor, weight: Tensor) -> None:
    parameter = _refusal.parameter
    parameter(x.dim() == 2, f"x has {x.dim()} dims, must have 2")
    parameter(x.shape[1] == weight.shape[1], f"x has k {x.shape[1]}, weight {weight.shape[1]}, must be equal")
    parameter(max(x.shape[1], weight.shape[2]) < INNER, f"last dims must be below {INNER}")


def _kind(call: Call) -> Call:
    """The row of the table that a call is, its scale in the shape that all of W4A8 have."""
    x, weight, parameter = call.x, call.weight, _refusal.parameter
    if x.dtype in FLOATS:
        parameter(weight.dtype == x.dtype == call.out, f"x {x.dtype}, weight {weight.dtype}, output {call.out}")
        parameter(call.scale is None and call.per_token is None, "scales need x in int8")
        _refusal.not_implemented(call.bias is None, "bias of floats")
        return call
    parameter(x.dtype == torch.int8, f"x is {x.dtype}, must be float16, bfloat16, float32 or int8")
    _refusal.not_implemented(call.per_token is not None, "int8 without per_token_scale")
    _refusal.not_implemented(weight.dtype in (torch.int8, torch.int32), f"weight in {weight.dtype} beside x in int8")
    assert call.per_token is not None
    parameter(call.per_token.dtype == torch.float32, f"per_token_scale is {call.per_token.dtype}, must be float32")
    parameter(call.per_token.shape == (len(x),), f"per_token_scale must be [{len(x)}]")
    parameter(call.scale is not None, "scale must be given with x in int8")
    return _check_w8a8(call) if weight.dtype == torch.int8 else _check_w4a8(call)


def _check_w8a8(call: Call) -> Call:
    parameter, shape = _refusal.parameter, (call.weight.shape[0], call.weight.shape[2])
    assert call.scale is not None
    takes = {torch.float16: torch.float32, torch.bfloat16: torch.bfloat16}.get(call.out)
    parameter(call.scale.dtype == takes, f"scale {call.scale.dtype} with output {call.out}")
    parameter(call.scale.shape == shape, f"scale is {tuple(call.scale.shape)}, must be {shape}")
    if call.bias is not None:
        is_right = call.bias.dtype == torch.int32 and call.bias.shape == shape
        parameter(is_right, f"bias is {tuple(call.bias.shape)} {call.bias.dtype}, must be {shape} int32")
    return call


def _check_w4a8(call: Call) -> Call:
    parameter, (groups, k, packed) = _refusal.parameter, call.weight.shape
    assert call.scale is not None
    scale, n = call.scale, packed * PACKED
    parameter(call.out in (torch.float16, torch.bfloat16), f"output is {call.out}, must be float16 or bfloat16")
    parameter(scale.dtype == torch.int64, f"scale is {scale.dtype}, must be int64 with weight in 4 bits")
    scale = scale[:, None] if scale.dim() == 2 else scale
    is_right = scale.dim() == 3 and (scale.shape[0], scale.shape[2]) == (groups, n) and k % scale.shape[1] == 0
    parameter(is_right, f"scale is {tuple(call.scale.shape)}, must be [{groups}, n {n}] or [{groups}, G, {n}]")
    parameter(call.bias is not None, "bias must be given with weight in 4 bits: 8 Σ w·scale of each column")
    assert call.bias is not None
    is_right = call.bias.dtype == torch.float32 and call.bias.shape == (groups, n)
    parameter(is_right, f"bias is {tuple(call.bias.shape)} {call.bias.dtype}, must be [{groups}, {n}] float32")
    return call._replace(scale=scale)
