"""A Flax NNX attention layer over context-parallel attention. Needs `pip install cpjax[flax]`."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cpjax.mask import Tokens
from cpjax.parallel import context_parallel_attention


class ContextParallelAttention(nnx.Module):
    """Projections to heads, `context_parallel_attention`, projection back; grouped-query heads; no bias.

    Args:
      features: width of the model.
      heads, kv_heads, head_dim: N, K, H; value head dim is H too.
      mesh: where attention runs.
      rngs: for the initial weights.
      dtype: of the projections' inputs and results, and so of query, key and value.
      options: handed to `context_parallel_attention`: axis_name, head_axis, batch_axis, partition, exchange, mask,
        scale, softcap, precision.

    >>> from cpjax.parallel import cp_mesh
    >>> layer = ContextParallelAttention(8, 4, 2, 16, mesh=cp_mesh(2), rngs=nnx.Rngs(0), precision="float32")
    >>> layer(jnp.ones((1, 4, 8))).shape
    (1, 4, 8)
    """

    def __init__(
        self,
        features: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        mesh: Mesh,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        **options: Any,
    ):
        """Make the weights."""
        to_heads = lambda n: nnx.LinearGeneral(features, (n, head_dim), use_bias=False, dtype=dtype, rngs=rngs)  # noqa: E731
        self.query, self.key, self.value = to_heads(heads), to_heads(kv_heads), to_heads(kv_heads)
        self.out = nnx.LinearGeneral((heads, head_dim), features, axis=(-2, -1), use_bias=False, dtype=dtype, rngs=rngs)
        self.mesh, self.options, self.dtype = mesh, options, dtype

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens | None = None) -> Float[Array, "B T D"]:
        """`[B, T, D]` in natural order to the same; `tokens` are the places (None: one request a row)."""
        projected = self.query(x), self.key(x), self.value(x)
        result = context_parallel_attention(*projected, tokens, tokens, mesh=self.mesh, **self.options)
        return self.out(jnp.asarray(result.out).astype(self.dtype))
