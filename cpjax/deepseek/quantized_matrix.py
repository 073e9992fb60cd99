"""A quantised weight in the place of a matrix: what is stored, and how a run computes with it.

A checkpoint's reader gives what is stored (`cpjax.deepseek.quantized.Quantized`). `ready` adds what only the run knows:

    arithmetic   exact, or as the vendor's hardware does
    axis_name    the axis of the mesh over which the columns of o_proj and down_proj are cut, so that every rank has a
                 summand; None: this device has all columns

On a rank that has some of the columns, quant_bias is added on rank 0 alone. The scale of a token is taken from the
token's largest number over all ranks in exact arithmetic: integers are those of one device. In the vendor's arithmetic
each rank takes the largest of its own columns, so integers and results depend on tp.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec
from jax.tree_util import GetAttrKey, register_dataclass, tree_map_with_path
from jaxtyping import Array, Float

from cpjax.deepseek.matrix import Matrix
from cpjax.deepseek.quantized import DynamicW4A8, DynamicW8A8, Quantized, StaticW8A8
from cpjax.deepseek.quantized_cut import bias_once, quantized_specs
from cpjax.deepseek.quantized_linear import Arithmetic, quantized_linear

SUMMANDS = {"o_proj", "down_proj"}
"""Weights of which a rank of tp has some of the columns; experts are not cut over tp, a device has whole ones."""


@register_dataclass
@dataclass(frozen=True)
class QuantizedMatrix:
    """A `cpjax.deepseek.matrix.Matrix`; a pytree whose arrays are those that are stored."""

    stored: Quantized
    arithmetic: Arithmetic = field(default="exact", metadata={"static": True})
    axis_name: str | None = field(default=None, metadata={"static": True})

    def times(self, x: Float[Array, "*B k"]) -> Float[Array, "*B n"]:
        """x Wᵀ in the dtype of x; of some of the columns a summand of it."""
        stored = self.stored
        if self.axis_name is not None:
            stored = bias_once(stored, lax.axis_index(self.axis_name))
        maximum_over = self.axis_name if self.arithmetic == "exact" else None
        return quantized_linear(x, stored, str(x.dtype), self.arithmetic, maximum_over)


def is_quantized(x: Any) -> bool:
    """Whether it is what is stored of a quantised weight.

    >>> import numpy as np
    >>> is_quantized(DynamicW8A8(np.ones((1, 1), np.int8), np.ones(1, np.float32)))
    True
    """
    return isinstance(x, StaticW8A8 | DynamicW8A8 | DynamicW4A8)


def specs_of_stored(specs: Any, weights: Any) -> Any:
    """Specs of matrices, with those of everything that is stored wherever a matrix is quantised.

    Args:
      specs: a tree of PartitionSpec, as `ModelWeights`.
      weights: the same tree of weights, or of whatever has their shapes.
    """

    def one(spec: PartitionSpec, weight: Any) -> Any:
        return quantized_specs(weight, spec) if is_quantized(weight) else spec

    return jax.tree.map(one, specs, weights, is_leaf=lambda x: isinstance(x, PartitionSpec))


def ready(weights: Any, arithmetic: Arithmetic = "exact", axis_name: str | None = None) -> Any:
    """A tree of weights, as `ModelWeights`, with a `QuantizedMatrix` wherever something quantised stands.

    Args:
      axis_name: the axis of tp on a mesh; None: one device has all.
    """

    def one(path: tuple, weight: Any) -> Any:
        if not is_quantized(weight):
            return weight
        names = {key.name for key in path if isinstance(key, GetAttrKey)}
        is_summand = bool(names & SUMMANDS) and "experts" not in names
        return QuantizedMatrix(weight, arithmetic, axis_name if is_summand else None)

    return tree_map_with_path(one, weights, is_leaf=lambda x: is_quantized(x) or isinstance(x, Matrix))
