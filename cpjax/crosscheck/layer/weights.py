"""A linear weight as a case has it, unpacked into float64: integers and scales, exactly what is stored."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.layer.case import LayerCase
from cpjax.deepseek.description import FLOAT

LOW_32, TOP_19 = 0xFFFFFFFF, 0xFFFFE000
"""Bits of an int64 deq_scale that are a float32; of a float32 scale that the hardware keeps."""

BITS, LARGEST = 4, 7
"""Of a nibble; its largest integer."""


class Linear(NamedTuple):
    """What is stored of one weight; None where its kind has no such thing."""

    kind: str
    weight: Float[np.ndarray, "n k"]
    """Numbers, or integers where it is quantised."""
    input_scale: float | None = None
    input_offset: float | None = None
    deq_scale: Float[np.ndarray, " n"] | None = None
    quant_bias: Float[np.ndarray, " n"] | None = None
    weight_scale: Float[np.ndarray, " n"] | None = None
    second: Float[np.ndarray, "n G"] | None = None
    scale_bias: Float[np.ndarray, " n"] | None = None


def linear_of(case: LayerCase, name: str) -> Linear:
    """The weight `name`, without `.weight`."""
    kind = case.kinds.get(name, FLOAT)

    def given(last: str) -> np.ndarray | None:
        return case.tensors.get(f"{name}.{last}")

    stored = case.tensors[f"{name}.weight"]
    if kind == FLOAT:
        return Linear(kind, stored.astype(np.float64))
    if (deq := given("deq_scale")) is not None:
        scale, offset, bias = given("input_scale"), given("input_offset"), given("quant_bias")
        assert scale is not None
        assert offset is not None
        assert bias is not None
        if deq.dtype == np.int64:
            deq = (deq & LOW_32).astype(np.uint32).view(np.float32)
        numbers = (float(scale[0]), float(offset[0]), deq.astype(np.float64), bias.astype(np.float64))
        return Linear(kind, stored.astype(np.float64), *numbers)
    row_scale = given("weight_scale")
    assert row_scale is not None
    row_scale = row_scale[:, 0].astype(np.float64)
    if (bias := given("scale_bias")) is None:
        return Linear(kind, stored.astype(np.float64), weight_scale=row_scale)
    second = given("weight_scale_second")
    return Linear(
        kind,
        unpacked(stored),
        weight_scale=row_scale,
        second=None if second is None else second.astype(np.float64),
        scale_bias=bias.astype(np.float64).sum(axis=1),
    )


def unpacked(packed: Int[np.ndarray, "h k"]) -> Float[np.ndarray, "n k"]:
    """Rows 2i from the low nibbles of bytes i, rows 2i + 1 from the high ones, −8 … 7.

    >>> unpacked(np.array([[0x2F]], np.int8)).tolist()
    [[-1.0], [2.0]]
    """
    high = packed.astype(np.int16) >> BITS
    low = packed.astype(np.int16) - 2**BITS * high
    low = np.where(low > LARGEST, low - 2**BITS, low)
    return np.stack([low, high], axis=1).reshape(-1, packed.shape[1]).astype(np.float64)


def top_19_bits(scale: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """What is left of a float32 scale if only sign, exponent and 10 bits of the fraction count.

    >>> top_19_bits(np.array([1 + 2**-10 + 2**-11])) == 1 + 2**-10
    array([ True])
    """
    bits = scale.astype(np.float32).view(np.uint32) & np.uint32(TOP_19)
    return bits.view(np.float32).astype(np.float64)
