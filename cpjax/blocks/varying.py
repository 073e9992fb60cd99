"""Inside `jax.shard_map` an array's type says over which mesh axes it varies, and a loop's carry must keep its type."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def varying(x: Any, like: Any) -> Any:
    """`x`, each array of it typed as varying over the mesh as all of `like` together. Values stay.

    >>> varying(jnp.ones(2), like=jnp.zeros(3)).tolist()
    [1.0, 1.0]
    """
    over = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(like)))

    def one(leaf: Array) -> Array:
        missing = over - jax.typeof(leaf).manual_axis_type.varying
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(one, x)


def varying_full(shape: tuple[int, ...], x: float, dtype: Any, like: Any) -> Array:
    """`jnp.full`, varying as `like` does.

    >>> varying_full((2,), 0.5, jnp.float32, jnp.zeros(3)).tolist()
    [0.5, 0.5]
    """
    return varying(jnp.full(shape, x, dtype), like)
