"""What a rank of tp holds of a quantised layer: some of its rows (column-parallel), or of its columns (row-parallel).

The names are those of x Wᵀ: a column-parallel layer (gate, up, q_b) is cut in its outputs, which are rows of W; a
row-parallel one (down, o) in its inputs, and its ranks' results are summed. A summand must not be counted tp times:
quant_bias is added on rank 0 alone (as vllm-ascend does), and of scale_bias each rank takes the parts of its columns.
"""

from typing import Literal

import numpy as np

from cpjax.deepseek.quantized import DynamicW4A8, Numbers, Quantized, StaticW8A8
from cpjax.errors import InputError


def quantized_part(weights: Quantized, cut: Literal["rows", "columns"], rank: int, tp: int) -> Quantized:
    """What rank `rank` of `tp` holds.

    Raises:
      InputError: the ranks' shares are not equal, or would not be whole bytes, groups, or parts of scale_bias.

    >>> from cpjax.deepseek.quantized import DynamicW8A8
    >>> weights = DynamicW8A8(np.arange(8, dtype=np.int8).reshape(2, 4), np.ones(2, np.float32))
    >>> quantized_part(weights, "columns", 1, 2).weight.tolist()
    [[2, 3], [6, 7]]
    """

    def part(x: Numbers, axis: int, what: str) -> Numbers:
        if x.shape[axis] % tp:
            raise InputError(f"{x.shape[axis]} {what} cannot be cut over tp {tp}; give a tp that divides them")
        size = x.shape[axis] // tp
        share = slice(rank * size, (rank + 1) * size)
        return x[share] if axis == 0 else x[:, share]

    is_rows = cut == "rows"
    weight = part(weights.weight, 0 if is_rows else 1, "rows of bytes" if is_rows else "columns")
    if isinstance(weights, StaticW8A8):
        if is_rows:
            return weights._replace(
                weight=weight,
                deq_scale=part(weights.deq_scale, 0, "scales"),
                quant_bias=part(weights.quant_bias, 0, "biases"),
            )
        bias = weights.quant_bias if rank == 0 else weights.quant_bias * np.int32(0)
        return weights._replace(weight=weight, quant_bias=bias)
    if is_rows:
        weights = weights._replace(weight=weight, weight_scale=part(weights.weight_scale, 0, "scales"))
    else:
        weights = weights._replace(weight=weight)
    if isinstance(weights, DynamicW4A8):
        axis, second = (0 if is_rows else 1), weights.weight_scale_second
        weights = weights._replace(
            scale_bias=part(weights.scale_bias, axis, "parts of scale_bias"),
            weight_scale_second=None if second is None else part(second, axis, "groups"),
        )
    return weights
