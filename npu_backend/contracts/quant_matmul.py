"""What npu::npu_quant_matmul accepts of int8 by int8 (shape inference of torch_npu 2.13.0; op-plugin's page, 2026).

    output     scale                pertoken_scale     bias
    float16    int64 or float32     none               int32                  W8A8, static
    float16    float32              float32 [m]        int32, float32         W8A8, a scale a token
    bfloat16   float32, bfloat16    none, float32 [m]  int32, float32

The accumulators themselves (output int32) are given too. int8 results, A4W4 and A8W4 are not implemented here.
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.dtypes import dtype_of
from npu_backend.contracts.refuse import Refusal

INNER = 65535
"""Most numbers in a last dim."""
_refusal = Refusal("npu_quant_matmul")


def check(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    **more: Any,
) -> torch.dtype:
    """`x1` is `[…, m, k]`, `x2` `[k, n]`; the dtype of the result.

    Raises:
      RuntimeError: what the vendor refuses, and what is not computed here.
    """
    require, parameter, not_implemented = _refusal.require, _refusal.parameter, _refusal.not_implemented
    out = dtype_of(output_dtype, torch.int8)
    outs = (torch.float16, torch.bfloat16, torch.int32)
    not_implemented(x1.dtype == torch.int8 and x2.dtype == torch.int8, f"{x1.dtype} by {x2.dtype}, only int8 by int8")
    not_implemented(out in outs, f"output_dtype {output_dtype}, only float16, bfloat16 and int32")
    _refusal.only_defaults({"offset": offset} | more)
    assert out is not None
    require(2 <= x1.dim() <= 6, f"x1 dim num should be 2 ~ 6, please check x1 dim num: {x1.dim()}")
    require(2 <= x2.dim() <= 6, f"x2 dim num should be 2 ~ 6 when x1's dtype is int8, got {x2.dim()}")
    not_implemented(x2.dim() == 2, "a batch of x2")
    (k, n), rows = x2.shape, x1.shape[-2]
    require(x1.shape[-1] == k, f"k dim of x1 and x2 need be same, got {x1.shape[-1]} and {k}")
    parameter(max(k, n) <= INNER, f"x2 is {tuple(x2.shape)}; no last dim may be above {INNER}")
    require(scale.dim() == 1, f"the scale dim num must be 1, got {scale.dim()}")
    require(scale.shape[0] in (1, n), f"the scale 1st dim value must be 1 or x2 n dim value {n}, got {scale.shape[0]}")
    _check_scale(scale, pertoken_scale, out)
    if pertoken_scale is not None:
        parameter(pertoken_scale.dtype == torch.float32, f"pertoken_scale is {pertoken_scale.dtype}, must be float32")
        require(pertoken_scale.dim() == 1, f"the pertoken_scale dim num must be 1, got {pertoken_scale.dim()}")
        parameter(x1.dim() == 2 and len(pertoken_scale) == rows, f"pertoken_scale must be [{rows}], and x1 [m, k]")
    if bias is not None:
        _check_bias(bias, pertoken_scale, out, n)
    return out


def _check_scale(scale: Tensor, pertoken_scale: Tensor | None, out: torch.dtype) -> None:
    require, parameter = _refusal.require, _refusal.parameter
    if scale.dtype == torch.bfloat16:
        require(
            out in (torch.bfloat16, torch.int32),
            "When scale's dtype is bfloat16, output_dtype must be bfloat16 or int32",
        )
    if out == torch.int32:
        require(
            scale.dtype in (torch.bfloat16, torch.float32),
            f"When output_dtype is int32, scale's dtype must be bfloat16 or float32, got {scale.dtype}",
        )
        parameter(pertoken_scale is None, "pertoken_scale must not be given with output int32")
    takes = {torch.float16: (torch.int64, torch.float32)}.get(out, (torch.float32, torch.bfloat16))
    takes = (torch.float32,) if out == torch.float16 and pertoken_scale is not None else takes
    parameter(scale.dtype in takes, f"scale is {scale.dtype}, must be one of {takes}")


def _check_bias(bias: Tensor, pertoken_scale: Tensor | None, out: torch.dtype, n: int) -> None:
    require = _refusal.require
    kinds = (torch.int32, torch.bfloat16, torch.float32, torch.float16)
    require(bias.dtype in kinds, f"bias's type supported for int32, bfloat16, float16 and float32, got {bias.dtype}")
    if bias.dtype == torch.bfloat16:
        require(out == torch.bfloat16, "When bias dtype is bfloat16, output_dtype must be bfloat16")
    if out == torch.int32:
        require(bias.dtype == torch.int32, "When output_dtype dtype is int32, bias_dtype must be int32")
    if bias.dtype == torch.float16:
        require(pertoken_scale is not None, "Bias dtype cannot be float16 when pertoken not given.")
        require(out == torch.float16, "When bias dtype is float16 and pertoken is given, output_dtype must be float16")
    if bias.dtype == torch.float32 and out == torch.float16:
        _refusal.parameter(pertoken_scale is not None, "bias in float32 needs pertoken_scale with output float16")
    _refusal.parameter(bias.shape == (n,), f"bias {tuple(bias.shape)} must be [{n}]")
