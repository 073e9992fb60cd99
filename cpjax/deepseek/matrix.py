"""A weight that is no array but knows its own product: what `cpjax.deepseek.attention.linear` takes beside arrays.

Quantised weights are such (`cpjax.deepseek.quantized_matrix`), and weights that tell what they are given
(`cpjax.deepseek.watched`). The layers of the model say `linear(x, weight)` of all of them.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float


@runtime_checkable
class Matrix(Protocol):
    """It stands for a matrix W, `[n, k]`; to be cut or stacked as arrays are, it is a pytree.

    >>> import numpy as np
    >>> isinstance(np.ones((2, 2)), Matrix)
    False
    """

    def times(self, x: Float[Array, "*B k"]) -> Float[Array, "*B n"]:
        """x Wᵀ, in the dtype of x."""
        ...
