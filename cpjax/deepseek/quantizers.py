"""Quantised weights made of float ones, symmetric for each row: for random checkpoints, in NumPy as files want them.

How the vendor's tool chooses its scales (the largest weight at 7, at 7.5, or searched) was not read; here the largest
weight is the largest integer. Sums are made in float64 and rounded once.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, Int8

from cpjax.deepseek.quantized import DynamicW4A8, DynamicW8A8, StaticW8A8
from cpjax.errors import InputError


def quantize_rows(
    weight: Float[np.ndarray, "*N k"], bits: int
) -> tuple[Int8[np.ndarray, "*N k"], Float32[np.ndarray, "*N"]]:
    """Integers, and the scale of each row: max |w| / (2^(bits − 1) − 1), and 1 for a row of zeros.

    >>> integers, scale = quantize_rows(np.array([[1.0, -0.4], [0.0, 0.0]]), 4)
    >>> integers.tolist(), scale.round(3).tolist()
    ([[7, -3], [0, 0]], [0.14300000667572021, 1.0])
    """
    largest = 2 ** (bits - 1) - 1
    scale = (np.abs(weight).max(axis=-1) / largest).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.round(weight / scale[..., None]), -largest, largest).astype(np.int8), scale


def static_w8a8(
    weight: Float[np.ndarray, "n k"],
    input_scale: float,
    input_offset: float,
    bias: Float[np.ndarray, " n"] | None = None,
    scale_as: Literal["int64", "float32"] = "int64",
) -> StaticW8A8:
    """With quant_bias = round(bias / deq_scale − input_offset · Σₖ w); `scale_as` "int64" for FP16 models.

    >>> made = static_w8a8(np.array([[1.0, -0.5]]), 1 / 127, 3.0, scale_as="float32")
    >>> made.weight.tolist(), made.quant_bias.tolist()
    ([[127, -64]], [-189])
    """
    integers, weight_scale = quantize_rows(weight, 8)
    deq_scale = np.float32(input_scale) * weight_scale
    offset = np.float64(np.float32(input_offset)) * integers.sum(axis=1)
    quant_bias = np.round((0.0 if bias is None else bias / deq_scale.astype(np.float64)) - offset)
    return StaticW8A8(
        integers,
        np.array([input_scale], np.float32),
        np.array([input_offset], np.float32),
        deq_scale.view(np.uint32).astype(np.int64) if scale_as == "int64" else deq_scale,
        quant_bias.astype(np.int32),
    )


def dynamic_w8a8(weight: Float[np.ndarray, "n k"]) -> DynamicW8A8:
    """One scale a row.

    >>> dynamic_w8a8(np.array([[1.0, -0.5]])).weight
    array([[127, -64]], dtype=int8)
    """
    return DynamicW8A8(*quantize_rows(weight, 8))


def dynamic_w4a8(weight: Float[np.ndarray, "n k"], group: int | None = None, parts: int = 1) -> DynamicW4A8:
    """One scale a row; or to 8 bits for each row first, and these to 4 bits for each `group` of k.

    `parts` are those of `scale_bias`: 16 for down_proj and o_proj, else 1.

    Raises:
      InputError: n is odd, or k no multiple of `group` or of `parts`.

    >>> made = dynamic_w4a8(np.array([[7.0, -7.0, 1.0], [2.0, 14.0, 0.0]]))
    >>> made.weight.tolist(), made.weight_scale.tolist(), made.scale_bias.tolist()
    ([[23, 121, 1]], [1.0, 2.0], [[8.0], [128.0]])
    """
    n, k = weight.shape
    if n % 2:
        raise InputError(f"{n} rows cannot be packed two in a byte; give an even number")
    for what, size in ((f"groups of {group}", group or k), (f"{parts} parts", parts)):
        if k % size:
            raise InputError(f"{k} columns do not come in {what}; give a divisor of {k}")
    if group is None:
        integers, scale = quantize_rows(weight, 4)
        second, scales = None, scale[:, None].astype(np.float64)
    else:
        first, scale = quantize_rows(weight, 8)
        integers, second = quantize_rows(first.reshape(n, -1, group).astype(np.float32), 4)
        integers, scales = integers.reshape(n, k), scale[:, None].astype(np.float64) * second
    dequantized = integers * np.repeat(scales, k // scales.shape[1], axis=1)
    scale_bias = 8 * dequantized.reshape(n, parts, -1).sum(axis=2)
    return DynamicW4A8(pack_int4(integers), scale, scale_bias.astype(np.float32), second)


def pack_int4(integers: Int8[np.ndarray, "n k"]) -> Int8[np.ndarray, "h k"]:
    """−8 … 7 in half the bytes: row 2i in the low nibble, row 2i + 1 in the high one.

    >>> hex(pack_int4(np.array([[-1], [2]], np.int8)).item())
    '0x2f'
    """
    return ((integers[1::2] << 4) | (integers[0::2] & 15)).astype(np.int8)
