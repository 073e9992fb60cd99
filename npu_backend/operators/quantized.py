"""Quantised linear layers in our words: npu::npu_quantize, npu_dynamic_quant, npu_quant_matmul."""

from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend import vendor
from npu_backend.errors import InputError


class Activations(NamedTuple):
    """What activations were quantised to: integers `[…, k]` int8, and with a scale a token `[…]` float32."""

    integers: Tensor
    token_scale: Tensor | None = None


def quantize_static(x: Tensor, input_scale: Tensor, input_offset: Tensor) -> Activations:
    """round(x / input_scale + input_offset), clipped to int8; one call of npu::npu_quantize, which divides.

    vLLM-Ascend calls the same operator with 1 / input_scale in the dtype of x, which it multiplies by.

    Args:
      x: `[T, k]`.
      input_scale, input_offset: `[1]` float32. The operator takes whole offsets.

    Raises:
      InputError: an offset that is not whole, or a scale that is not positive.
    """
    offset, scale = input_offset.item(), input_scale.item()
    if not abs(offset) < torch.inf or offset != round(offset) or not -128 <= offset <= 127:
        raise InputError(f"input_offset is {offset:g}; npu_quantize takes a whole number from -128 to 127")
    if not 0 < scale < torch.inf:
        raise InputError(f"input_scale is {scale:g}; it must be positive and finite")
    vendor.require("npu::npu_quantize", x.device)
    zero_point = input_offset.to(torch.int32)
    return Activations(torch.ops.npu.npu_quantize(x, input_scale.float(), zero_point, torch.qint8, -1, True))


def quantize_per_token(x: Tensor) -> Activations:
    """s = max |x| / 127 and round(x / s) of each token of `[T, k]`; one call of npu::npu_dynamic_quant."""
    vendor.require("npu::npu_dynamic_quant", x.device)
    return Activations(*torch.ops.npu.npu_dynamic_quant(x, dst_type=torch.int8))


def static_linear(a: Activations, weight: Tensor, deq_scale: Tensor, quant_bias: Tensor) -> Tensor:
    """(Σ a·w + quant_bias) · deq_scale, `[T, n]` float16; one call of npu::npu_quant_matmul.

    Args:
      a: `[T, k]`.
      weight: `[k, n]` int8.
      deq_scale: `[n]`, int64 with the bits of a float32, or float32.
      quant_bias: `[n]` int32.
    """
    vendor.require("npu::npu_quant_matmul", weight.device)
    return torch.ops.npu.npu_quant_matmul(a.integers, weight, deq_scale, bias=quant_bias, output_dtype=torch.float16)


def dynamic_linear(a: Activations, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """(Σ a·w) · weight_scale · token scale, `[T, n]` float16; one call of npu::npu_quant_matmul.

    Args:
      a: `[T, k]`, with a scale a token.
      weight: `[k, n]` int8.
      weight_scale: `[n]` float32.

    Raises:
      InputError: activations without a scale a token.
    """
    if a.token_scale is None:
        raise InputError("activations have no scale a token; quantise them with quantize_per_token")
    vendor.require("npu::npu_quant_matmul", weight.device)
    return torch.ops.npu.npu_quant_matmul(
        a.integers, weight, weight_scale, pertoken_scale=a.token_scale, output_dtype=torch.float16
    )
