"""npu::npu_rms_norm and npu::npu_add_rms_norm in our words."""

from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend import vendor
from npu_backend.errors import InputError


class AddedNorm(NamedTuple):
    """A sum and its norm."""

    total: Tensor
    normed: Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean x² + eps) over the last dim; one call of npu::npu_rms_norm.

    Args:
      x: `[…, M]` float16, bfloat16 or float32.
      weight: `[M]`, of the same dtype.
      eps: above 0, or tokens of zeros are NaN.

    Raises:
      InputError: what the operator cannot express.
    """
    _check(x, weight, eps)
    vendor.require("npu::npu_rms_norm", x.device)
    return torch.ops.npu.npu_rms_norm(x, weight, eps)[0]


def add_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> AddedNorm:
    """x + more and its norm; one call of npu::npu_add_rms_norm.

    Args:
      x, more: `[…, M]`, alike.
      weight, eps: as in `norm`.

    Raises:
      InputError: what the operator cannot express.
    """
    _check(x, weight, eps)
    if (x.shape, x.dtype) != (more.shape, more.dtype):
        raise InputError(f"{tuple(x.shape)} {x.dtype} and {tuple(more.shape)} {more.dtype} cannot be added: make equal")
    vendor.require("npu::npu_add_rms_norm", x.device)
    normed, _, total = torch.ops.npu.npu_add_rms_norm(x, more, weight, eps)
    return AddedNorm(total, normed)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise InputError(
            f"weight {tuple(weight.shape)} {weight.dtype} is not of x {tuple(x.shape)} {x.dtype}; give [{x.shape[-1]}]"
        )
    if not eps > 0:
        raise InputError(f"eps is {eps:g}; it must be above 0")
