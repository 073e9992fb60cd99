"""Weights that tell what they are given: for input ranges, and for activations that lie on a tie of rounding.

What is told comes by a callback to the host, from inside compiled loops too, and may come late: the caller waits with
`jax.effects_barrier`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float

from cpjax.deepseek.attention import linear


@register_dataclass
@dataclass(frozen=True)
class Watched:
    """A `cpjax.deepseek.matrix.Matrix` that computes as `weight` does, and calls `tell(x, weight)` before.

    >>> import jax.numpy as jnp
    >>> seen = []
    >>> out = Watched(jnp.ones((1, 2)), lambda x, weight: seen.append(float(x.max()))).times(jnp.array([[1.0, 3.0]]))
    >>> jax.effects_barrier()
    >>> seen, out.item()
    ([3.0], 4.0)
    """

    weight: Any
    tell: Callable[[Any, Any], None] = field(metadata={"static": True})

    def times(self, x: Float[Array, "*B k"]) -> Float[Array, "*B n"]:
        """x Wᵀ."""
        jax.debug.callback(self.tell, x, self.weight)
        return linear(x, self.weight)
