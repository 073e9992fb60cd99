"""Activations on the edge between two integers, where two exact computations may differ by right.

Integers are the same on any number of ranks as long as x is. But x differs by the order of sums, 1e-15 of a token's
size or so, and where it lies so near to a tie of rounding (half way between two integers, or between two float32
numbers) the one computation takes the integer above and the other that below, which changes a layer's result by a step
of its scale. A check that fails is told how many activations of one device lie so near.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.matrix import Matrix
from cpjax.deepseek.model import ModelWeights, forward
from cpjax.deepseek.quantized import StaticW8A8
from cpjax.deepseek.quantized_linear import Arithmetic
from cpjax.deepseek.quantized_matrix import QuantizedMatrix, ready
from cpjax.deepseek.watched import Watched

NEAR = 1e-13
"""Relative to the largest number of a token: ten to a hundred times what the order of sums changes."""


class Near(NamedTuple):
    """A count."""

    near: int
    """Activations whose integer, and tokens whose scale, is another one within `NEAR`."""
    all: int


def near_ties(x: Float[np.ndarray, "*B k"], matrix: QuantizedMatrix) -> Near:
    """Of what goes into one layer, in NumPy.

    >>> from cpjax.deepseek.quantized import DynamicW8A8
    >>> matrix = QuantizedMatrix(DynamicW8A8(np.ones((1, 3), np.int8), np.ones(1, np.float32)))
    >>> near_ties(np.array([[127.0, 2.5 + 2.0**-23, 3.1]]), matrix)  # half way from 2.5 to the next float32
    Near(near=1, all=4)
    """
    size = np.abs(x).max(axis=-1, keepdims=True)
    below, above = (
        (x + sign * NEAR * size, ((size + sign * NEAR * size).astype(np.float32) / np.float32(127))) for sign in (-1, 1)
    )
    if isinstance(matrix.stored, StaticW8A8):
        scale, offset = (np.asarray(part, np.float32) for part in matrix.stored[1:3])
        integers = [np.rint(y.astype(np.float32) / scale + offset).clip(-128, 127) for y, _ in (below, above)]
        return Near(int((integers[0] != integers[1]).sum()), x.size)
    scales = [scale for _, scale in (below, above)]
    integers = [np.rint(y.astype(np.float32) / np.where(scales[0] > 0, scales[0], 1)) for y, _ in (below, above)]
    near = (integers[0] != integers[1]).sum() + (scales[0] != scales[1]).sum()
    return Near(int(near), x.size + size.size)


def count_near_ties(
    config: DeepseekConfig, weights: ModelWeights, text: Int[Array, "B T"], arithmetic: Arithmetic = "exact"
) -> Near:
    """Of a whole text on one device, which is computed once more for it.

    Args:
      weights: float64, on one device.
    """
    found: list[Near] = []

    def tell(x: Any, matrix: QuantizedMatrix) -> None:
        found.append(near_ties(np.asarray(x), matrix))

    # Compiled, though for one use: op by op it takes longer.
    jax.jit(lambda weights, text: forward(weights, config, text))(
        watched(ready(weights, arithmetic), tell), text
    ).block_until_ready()
    jax.effects_barrier()
    return Near(sum(each.near for each in found), sum(each.all for each in found))


def watched(weights: Any, tell: Callable[[Any, Any], None]) -> Any:
    """A tree of weights in which every quantised one tells what it is given."""
    each = partial(_watched, tell=tell)
    return jax.tree.map(each, weights, is_leaf=lambda x: isinstance(x, Matrix))


def _watched(weight: Any, tell: Callable[[Any, Any], None]) -> Any:
    return Watched(weight, tell) if isinstance(weight, QuantizedMatrix) else weight
