"""A linear layer of any kind on the vendor's operators, and its weights as these take them.

    kind           activations          product
    FLOAT          –                    torch.nn.functional.linear: FP16, float32 sums, one cast
    W8A8           npu_quantize         npu_quant_matmul, deq_scale in int64 as stored
    W8A8_DYNAMIC   npu_dynamic_quant    npu_quant_matmul with pertoken_scale
    W4A8_DYNAMIC   npu_dynamic_quant    npu_grouped_matmul with one group: npu_quant_matmul has no 4-bit weights with a
                                        scale a column

Layers whose rows are computed together (gate and up) become one, and so their activations are quantised once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from npu_backend.emulation import arithmetic
from npu_backend.operators import (
    Activations,
    PackedExperts,
    dynamic_linear,
    packed_linear,
    quantize_per_token,
    quantize_static,
    static_linear,
)

Arrays = Mapping[str, np.ndarray]
OPERATORS = {
    "FLOAT": (),
    "W8A8": ("npu::npu_quantize", "npu::npu_quant_matmul"),
    "W8A8_DYNAMIC": ("npu::npu_dynamic_quant", "npu::npu_quant_matmul"),
    "W4A8_DYNAMIC": ("npu::npu_dynamic_quant", "npu::npu_grouped_matmul"),
}
"""What each kind calls."""


class Product(NamedTuple):
    """x Wᵀ `[T, n]` float16, and what x was quantised to; None of floats."""

    out: Tensor
    activations: Activations | None


Linear = Callable[[Tensor], Product]


def as_computed(how: str) -> AbstractContextManager:
    """Within it the CPU kernels compute quantised products in this arithmetic of a case: "exact" or "vendor".

    An NPU has only its own, so there it means nothing.
    """
    return arithmetic("exact") if how == "exact" else nullcontext()


def linear_of(arrays: Arrays, names: Sequence[str], kind: str, how: str, device: torch.device) -> Linear:
    """The layer of these names, one below the other."""
    return {"FLOAT": _float, "W8A8": _static, "W8A8_DYNAMIC": _dynamic, "W4A8_DYNAMIC": _packed}[kind](
        arrays, names, how, device
    )


def stacked(arrays: Arrays, names: Sequence[str], part: str) -> np.ndarray:
    """One part of all layers, one below the other."""
    return np.concatenate([arrays[f"{name}.{part}"] for name in names])


def on(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of the array on the device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _float(arrays: Arrays, names: Sequence[str], _: str, device: torch.device) -> Linear:
    weight = on(stacked(arrays, names, "weight"), device)
    return lambda x: Product(torch.nn.functional.linear(x, weight), None)


def _static(arrays: Arrays, names: Sequence[str], how: str, device: torch.device) -> Linear:
    first = names[0]  # all of one kind of activations, see `check_values`
    parts = ("input_scale", "input_offset")
    scale, offset = (on(arrays[f"{first}.{part}"].astype(np.float32), device) for part in parts)
    weight = on(stacked(arrays, names, "weight").T, device)
    deq_scale, bias = (on(stacked(arrays, names, part), device) for part in ("deq_scale", "quant_bias"))

    def compute(x: Tensor) -> Product:
        a = quantize_static(x, scale, offset)
        with as_computed(how):
            return Product(static_linear(a, weight, deq_scale, bias), a)

    return compute


def _dynamic(arrays: Arrays, names: Sequence[str], how: str, device: torch.device) -> Linear:
    weight = on(stacked(arrays, names, "weight").T, device)
    scale = on(stacked(arrays, names, "weight_scale")[:, 0].astype(np.float32), device)

    def compute(x: Tensor) -> Product:
        a = quantize_per_token(x)
        with as_computed(how):
            return Product(dynamic_linear(a, weight, scale), a)

    return compute


def _packed(arrays: Arrays, names: Sequence[str], how: str, device: torch.device) -> Linear:
    packed = packed_of(arrays, [names], device)

    def compute(x: Tensor) -> Product:
        a = quantize_per_token(x)
        with as_computed(how):
            return Product(packed_linear(a, packed), a)

    return compute


def packed_of(arrays: Arrays, matrices: Sequence[Sequence[str]], device: torch.device) -> PackedExperts:
    """4-bit weights of E matrices, each of some layers one below the other, as npu_grouped_matmul takes them.

    A file has rows 2i and 2i + 1 in a byte. Turned around, those bytes of a row of k are columns beside each other, and
    four of them are an int32 with eight numbers, lowest bits first. Both levels of scales are multiplied in float32.
    """
    weights, scales, biases = [], [], []
    for names in matrices:
        weights.append(np.ascontiguousarray(stacked(arrays, names, "weight").T).view(np.int32))
        scale = stacked(arrays, names, "weight_scale").astype(np.float32)
        if f"{names[0]}.weight_scale_second" in arrays:
            scale = scale * stacked(arrays, names, "weight_scale_second").astype(np.float32)
        scales.append(np.ascontiguousarray(scale.T).view(np.uint32).astype(np.int64))
        biases.append(_bias(arrays, names))
    return PackedExperts(*(on(np.stack(parts), device) for parts in (weights, scales, biases)))


def _bias(arrays: Arrays, names: Sequence[str]) -> np.ndarray:
    """scale_bias of all columns; a file has it in sums over parts of k, which are added in float32."""
    return np.concatenate([arrays[f"{name}.scale_bias"].sum(axis=1, dtype=np.float32) for name in names])
