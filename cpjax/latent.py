"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1): what travels is a latent shared by all heads.

    k[n] = [c_kv W_UK[n] ; k_rope]        v[n] = c_kv W_UV[n]                       per token: C + R numbers travel

Two ways to use it, of equal result:

    expanded     keys and values of the heads are made where they are used, on the rank that attends to them (prefill)
    absorbed     q_nope W_UK[n]ᵀ · c_kv = q_nope · k_nope, so queries go to the latent's space: one key/value head of
                 dim C + R and C, and W_UV is applied to the result (decoding)

For DeepSeek-V3 C = 512, R = 64: 576 numbers a token instead of 5,120 for 16 heads (192 + 128 each), 40,960 for 128.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend
from cpjax.errors import InputError
from cpjax.exchange.device import EXCHANGES
from cpjax.mask import Tokens
from cpjax.partial import Partial

HEADLESS = ("ring", "ring_both_ways", "gather", "pass_query")
"""Exchanges that do not deal out heads: a latent has none."""


class UpProjection(NamedTuple):
    """From the latent to each head's key (its part without rope) and value."""

    key: Float[Array, "C N D"]
    value: Float[Array, "C N V"]


def latent_attention_on_device(
    query: Float[Array, "B t N Q"],
    c_kv: Float[Array, "B s C"],
    k_rope: Float[Array, "B s R"],
    up: UpProjection,
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
    *,
    axis_name: str,
    exchange: str = "gather",
    absorbed: bool = False,
    chunks: int = 1,
) -> Partial:
    """What one device does, inside `jax.shard_map` over `axis_name`; differentiable by autodiff through the loop.

    Args:
      query: `[B, t, N, D + R]`, the part without rope first.
      c_kv, k_rope: this device's latents (after their norm and rope). They are all that travels, with their places.
      up: weights of this device's heads.
      exchange: one of `HEADLESS`; the default is MindIE's.
      absorbed: compute in the latent's space.

    Returns:
      `out` `[B, t, N, V]` and `lse` `[B, t, N]`, stored in the profile's compute dtype. What a kernel would be handed
      (expanded keys and values, absorbed queries) is rounded to the dtype of the inputs.

    Raises:
      InputError: an exchange that deals out heads; head dims that disagree.

    >>> import jax
    >>> from cpjax.mask import Mask, tokens
    >>> from cpjax.parallel import cp_mesh
    >>> from cpjax.precision import profile
    >>> attention = Attention(Mask(), scale=1.0, precision=profile("flash_fp16"))
    >>> c_kv, place = jnp.arange(4.0).reshape(1, 4, 1), tokens(1, 4)
    >>> up = UpProjection(jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), 10.0))
    >>> def device(query, c_kv, q_tokens, kv_tokens):
    ...     return latent_attention_on_device(
    ...         query, c_kv, c_kv, up, q_tokens, kv_tokens, attention, axis_name="cp").out
    >>> shards = jax.P(None, "cp")
    >>> program = jax.jit(jax.shard_map(device, mesh=cp_mesh(2), in_specs=shards, out_specs=shards))
    >>> program(jnp.zeros((1, 4, 1, 2)), c_kv, place, place).ravel()  # means of the values so far
    Array([ 0.,  5., 10., 15.], dtype=float32)
    """
    nope = up.key.shape[2]
    if exchange not in HEADLESS:
        raise InputError(
            f"exchange is {exchange!r}; a latent has no heads to deal out, use one of {', '.join(HEADLESS)}"
        )
    if query.shape[3] != nope + k_rope.shape[2]:
        raise InputError(
            f"query head_dim is {query.shape[3]}; it must be the up-projection's {nope} plus rope's {k_rope.shape[2]}"
        )
    block = _attend_absorbed if absorbed else partial(_attend_expanded, up)
    if absorbed:
        inner = _product("BTND,CND->BTNC", query[..., :nope], up.key, attention)
        query = jnp.concatenate([inner, query[..., nope:]], axis=-1)
    one_head = (c_kv[:, :, None], k_rope[:, :, None])
    run = EXCHANGES[exchange]
    result = run(query, *one_head, q_tokens, kv_tokens, attention, axis_name=axis_name, chunks=chunks, attend=block)
    if not absorbed:
        return result
    compute = attention.precision.compute
    out = jnp.einsum("BTNC,CNV->BTNV", result.out, up.value.astype(compute), precision="highest")
    return Partial(out, result.lse)


def expand(
    c_kv: Float[Array, "B s C"], k_rope: Float[Array, "B s R"], up: UpProjection, attention: Attention
) -> tuple[Float[Array, "B s N Q"], Float[Array, "B s N V"]]:
    """Keys `[B, s, N, D + R]` and values `[B, s, N, V]` of all heads, in the latent's dtype.

    >>> from cpjax.mask import Mask
    >>> from cpjax.precision import profile
    >>> up = UpProjection(jnp.ones((2, 4, 3)), jnp.ones((2, 4, 5)))
    >>> key, value = expand(jnp.ones((1, 6, 2)), jnp.ones((1, 6, 1)), up, Attention(Mask(), 1.0, profile("float32")))
    >>> key.shape, value.shape
    ((1, 6, 4, 4), (1, 6, 4, 5))
    """
    key = _product("BSC,CND->BSND", c_kv, up.key, attention)
    value = _product("BSC,CNV->BSNV", c_kv, up.value, attention)
    rope = jnp.broadcast_to(k_rope[:, :, None], (*key.shape[:3], k_rope.shape[2]))
    return jnp.concatenate([key, rope], axis=-1), value


def _attend_expanded(up, query, c_kv, k_rope, q_tokens, kv_tokens, attention) -> Partial:
    key, value = expand(c_kv[:, :, 0], k_rope[:, :, 0], up, attention)
    return attend(query, key, value, q_tokens, kv_tokens, attention)


def _attend_absorbed(query, c_kv, k_rope, q_tokens, kv_tokens, attention) -> Partial:
    return attend(query, jnp.concatenate([c_kv, k_rope], axis=-1), c_kv, q_tokens, kv_tokens, attention)


def _product(indices: str, x: Array, weight: Array, attention: Attention) -> Array:
    compute = attention.precision.compute
    return jnp.einsum(indices, x.astype(compute), weight.astype(compute), precision="highest").astype(x.dtype)
