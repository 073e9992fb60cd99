"""Context-parallel attention in Flax NNX: a layer, and the function that `nnx.MultiHeadAttention` takes.

Needs `pip install cpjax[flax]`.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from cpjax.errors import InputError
from cpjax.mask import Tokens
from cpjax.parallel import context_parallel_attention

OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(context_parallel_attention).parameters.items()
    if parameter.kind == parameter.KEYWORD_ONLY and name not in ("mesh", "sink", "computation")
)
"""Keywords of `context_parallel_attention` that may be chosen when a model is made: those that are no arrays."""


@dataclass(frozen=True)
class AttentionFunction:
    """`context_parallel_attention` with its options chosen, as `attention_fn` of `flax.nnx.MultiHeadAttention`.

    A value: equal where its options are, hashable, so a module that holds it can be split, merged and jitted.
    """

    mesh: Mesh | AbstractMesh | None
    options: tuple[tuple[str, Any], ...]

    def __call__(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B S N H"],
        value: Float[Array, "*B S N V"],
        *,
        mask: Any = None,
        bias: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = True,
        is_causal: bool = False,
        **others: Any,
    ) -> Float[Array, "*B T N V"]:
        """The result without its lse; any number of batch axes.

        Raises:
          InputError: what Flax's own function would compute and this one does not: a mask or bias as an array, dropout.
        """
        for name, given in (("mask", mask), ("bias", bias)):
            if given is not None:
                raise InputError(
                    f"{name} is an array, which some device would hold whole; give attention_fn mask=cpjax.Mask(…)"
                )
        if dropout_rate > 0 and not deterministic:
            raise InputError(f"dropout_rate is {dropout_rate}; weights are never whole on a device, leave it 0")
        query_, key_, value_ = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        out = context_parallel_attention(query_, key_, value_, mesh=self.mesh, **dict(self.options)).out
        return jnp.asarray(out).astype(query.dtype).reshape(*query.shape[:-1], value.shape[-1])


def attention_fn(*, mesh: Mesh | AbstractMesh | None = None, **options: Any) -> AttentionFunction:
    """For `nnx.MultiHeadAttention(…, attention_fn=attention_fn(mesh=mesh))`: all else of a model stays as it is.

    Args:
      mesh: where attention runs; None: the mesh that is set when it runs.
      options: names of `OPTIONS`, keywords of `context_parallel_attention`. Without a mask it is causal.

    Raises:
      InputError: an unknown option, or one that cannot be hashed.

    >>> from cpjax.parallel import cp_mesh
    >>> chosen = attention_fn(mesh=cp_mesh(2), exchange="gather")
    >>> layer = nnx.MultiHeadAttention(2, 8, decode=False, attention_fn=chosen, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 4, 8))).shape
    (1, 4, 8)
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise InputError(f"unknown option {unknown[0]!r}; known are {', '.join(OPTIONS)}")
    if options.get("lengths") is not None:
        options["lengths"] = tuple(options["lengths"])
    for name, given in options.items():
        try:
            hash(given)
        except TypeError:
            raise InputError(f"option {name} is {given!r}, which cannot be hashed; give a plain value") from None
    return AttentionFunction(mesh, tuple(sorted(options.items())))


class ContextParallelAttention(nnx.Module):
    """Projections to heads, `context_parallel_attention`, projection back; grouped-query heads; no bias.

    Args:
      features: width of the model.
      heads, kv_heads, head_dim: N, K, H; value head dim is H too.
      mesh: where attention runs; None: the mesh that is set when it runs.
      rngs: for the initial weights.
      dtype: of the projections' inputs and results, and so of query, key and value.
      options: as of `attention_fn`.

    Raises:
      InputError: an unknown option.

    >>> from cpjax.parallel import cp_mesh
    >>> layer = ContextParallelAttention(8, 4, 2, 16, mesh=cp_mesh(2), rngs=nnx.Rngs(0))
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
        mesh: Mesh | AbstractMesh | None = None,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        **options: Any,
    ):
        """Make the weights."""
        self.attention = attention_fn(mesh=mesh, **options)
        to_heads = lambda n: nnx.LinearGeneral(features, (n, head_dim), use_bias=False, dtype=dtype, rngs=rngs)  # noqa: E731
        self.query, self.key, self.value = to_heads(heads), to_heads(kv_heads), to_heads(kv_heads)
        self.out = nnx.LinearGeneral((heads, head_dim), features, axis=(-2, -1), use_bias=False, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B T D"], tokens: Tokens | None = None) -> Float[Array, "B T D"]:
        """`[B, T, D]` in natural order to the same; `tokens` are the places (None: one request a row)."""
        projected = self.query(x), self.key(x), self.value(x)
        chosen = self.attention
        result = context_parallel_attention(*projected, tokens, tokens, mesh=chosen.mesh, **dict(chosen.options))
        return self.out(jnp.asarray(result.out).astype(self.dtype))
