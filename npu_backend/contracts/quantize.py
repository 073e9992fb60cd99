"""What npu::npu_quantize accepts (op-plugin docs/context/torch_npu-npu_quantize.md, aclnnQuantize.md, 2026).

With `div_mode` it divides by scales in float32 and adds whole zero points; without, it multiplies by scales of the
dtype of the input. Outputs other than int8 are not implemented.
"""

import torch
from torch import Tensor

from npu_backend.contracts.dtypes import dtype_of
from npu_backend.contracts.refuse import Refusal

_refusal = Refusal("npu_quantize")


def check(x: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int, div_mode: bool) -> None:
    """Scales and zero points are `[1]`, or one for each place along `axis`.

    Raises:
      RuntimeError: what the vendor refuses, and what is not computed here.
    """
    require = _refusal.parameter
    floats = (torch.float32, torch.float16, torch.bfloat16)
    require(x.dtype in floats, f"input is {x.dtype}, must be float32, float16 or bfloat16")
    require(-x.dim() <= axis < x.dim(), f"axis is {axis}, must be from {-x.dim()} to {x.dim() - 1}")
    _refusal.not_implemented(dtype_of(dtype, torch.int8) in (torch.int8, torch.qint8), f"dtype {dtype}, only int8")
    if div_mode:
        require(scales.dtype in floats, f"scales are {scales.dtype}, must be float32, float16 or bfloat16")
        _refusal.not_implemented(scales.dtype == torch.float32, f"scales in {scales.dtype}")
        whole = (torch.int32, torch.int8, torch.uint8)
    else:
        require(axis == x.dim() - 1 or -2 < axis < 0, f"axis is {axis}, must be the last without div_mode")
        _refusal.not_implemented(scales.dtype == x.dtype, f"scales in {scales.dtype} beside input in {x.dtype}")
        whole = (scales.dtype,)
    _check_row("scales", scales, x, axis)
    if zero_points is not None:
        require(zero_points.dtype in whole, f"zero_points are {zero_points.dtype}, must be one of {whole}")
        require(zero_points.shape == scales.shape, "zero_points and scales must have the same shape")


def _check_row(name: str, row: Tensor, x: Tensor, axis: int) -> None:
    fits = row.dim() == 1 and row.shape[0] in (1, x.shape[axis])
    _refusal.parameter(fits, f"{name} {tuple(row.shape)} must be [1] or [{x.shape[axis]}]")
