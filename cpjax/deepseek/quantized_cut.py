"""What a rank of tp holds of a quantised layer: some of its rows (column-parallel), or of its columns (row-parallel).

The names are those of x Wᵀ: a column-parallel layer (gate, up, q_b) is cut in its outputs, which are rows of W; a
row-parallel one (down, o) in its inputs, and its ranks' results are summed. A summand must not be counted tp times:
quant_bias is added on rank 0 alone (as vllm-ascend does), and of scale_bias each rank takes the parts of its columns.

`quantized_part` cuts arrays; `quantized_specs` and `bias_once` say the same of arrays that JAX cuts over a mesh.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

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


def quantized_specs(weights: Any, spec: P) -> Any:
    """How devices cut what is stored of a matrix that they cut as `spec` says: the same NamedTuple, of PartitionSpec.

    Axes before the matrix's own two, as of stacked experts, are cut in all that is stored.

    Args:
      weights: a `Quantized`, of arrays or of whatever has a shape.
      spec: of the matrix, `[…, n, k]`; packed rows are cut with their bytes.

    >>> from cpjax.deepseek.quantized import DynamicW8A8
    >>> weights = DynamicW8A8(np.ones((4, 8), np.int8), np.ones(4, np.float32))
    >>> quantized_specs(weights, P(None, "tp")) == DynamicW8A8(P(None, "tp"), P(None))
    True
    """
    missing = len(weights.weight.shape) - len(spec)
    *lead, rows, columns = (*spec, *(None,) * missing)
    matrix, row, one = P(*lead, rows, columns), P(*lead, rows), P(*lead, None)
    if isinstance(weights, StaticW8A8):
        return StaticW8A8._make((matrix, one, one, row, row))
    if isinstance(weights, DynamicW4A8):
        second = None if weights.weight_scale_second is None else matrix
        return DynamicW4A8._make((matrix, row, matrix, second))
    return type(weights)._make((matrix, row))


def bias_once(weights: Quantized, rank: Int[Array, ""]) -> Quantized:
    """What a rank computes with that has some of the columns: a static layer's quant_bias is 0 but on rank 0."""
    if not isinstance(weights, StaticW8A8):
        return weights
    bias = jnp.asarray(weights.quant_bias)
    return weights._replace(quant_bias=jnp.where(rank == 0, bias, jnp.zeros_like(bias)))
