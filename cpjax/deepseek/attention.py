"""A layer's latent attention but for the attending: hidden state → query and latent, and back (arXiv 2405.04434, §2.1).

    query      =  W_qb · norm(W_qa x)  or  W_q x          per head [D + R], the last R rotated
    c_kv       =  norm(first C of W_kva x)                what is cached and travels, with
    k_rope     =  rotate(last R of W_kva x)               one for all heads
    k[n], v[n] =  W_kvb[n] c_kv                           made where they are used, or absorbed (cpjax.latent)
    result     =  W_o · (out of all heads)

The two norms inside have eps 1e-6 in DeepSeek's own code and in Hugging Face's, whatever `rms_norm_eps` says.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.matrix import Matrix
from cpjax.deepseek.quantized import Quantized
from cpjax.deepseek.rope import rotate
from cpjax.latent import UpProjection, expand
from cpjax.mask import Tokens

LATENT_EPS = 1e-6
"""Of `q_a_layernorm` and `kv_a_layernorm`."""


class MlaWeights(NamedTuple):
    """Weights by their names in the checkpoint, `[out, in]`; of `q_proj` and `q_a_proj … q_b_proj` one is None.

    All matrices but `kv_b_proj` may be `Quantized`; `cpjax.deepseek.quantized_matrix.ready` makes a `Matrix` of them.
    """

    kv_a_proj_with_mqa: Float[Array, "_ M"] | Quantized | Matrix
    kv_a_layernorm: Float[Array, " C"]
    kv_b_proj: Float[Array, "_ C"]
    o_proj: Float[Array, "M _"] | Quantized | Matrix
    q_proj: Float[Array, "_ M"] | Quantized | Matrix | None = None
    q_a_proj: Float[Array, "L M"] | Quantized | Matrix | None = None
    q_a_layernorm: Float[Array, " L"] | None = None
    q_b_proj: Float[Array, "_ L"] | Quantized | Matrix | None = None


class Latent(NamedTuple):
    """What stays of a token: `c_kv` `[B, T, C]` after its norm, `k_rope` `[B, T, R]` after its rotation, as halves."""

    c_kv: Float[Array, "*L B T C"]
    k_rope: Float[Array, "*L B T R"]


def linear(x: Float[Array, "*B K"], weight: Any) -> Float[Array, "*B M"]:
    """x Wᵀ, accumulated in the dtype of both.

    Args:
      weight: an array `[M, K]`, or a `cpjax.deepseek.matrix.Matrix`, which has a product of its own.

    >>> linear(jnp.ones((2, 3)), jnp.ones((4, 3))).shape
    (2, 4)
    """
    if isinstance(weight, Matrix):
        return weight.times(x)
    return jnp.einsum("...K,MK->...M", x, weight, precision="highest")


def rms_norm(x: Float[Array, "*B M"], weight: Float[Array, " M"], eps: float) -> Float[Array, "*B M"]:
    """w · x / √(mean x² + eps) (arXiv 1910.07467).

    >>> rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), 0.0)
    Array([0.84852815, 1.1313709 ], dtype=float32)
    """
    size = jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return (x * size) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def query_of(
    weights: MlaWeights,
    config: DeepseekConfig,
    x: Float[Array, "B T M"],
    cos: Float[Array, "B T r"],
    sin: Float[Array, "B T r"],
) -> Float[Array, "B T N Q"]:
    """Queries `[B, T, N, D + R]` of the heads whose weights these are, the part without rope first."""
    if weights.q_proj is not None:
        query = linear(x, weights.q_proj)
    else:
        assert weights.q_a_proj is not None
        assert weights.q_a_layernorm is not None
        assert weights.q_b_proj is not None
        query = linear(rms_norm(linear(x, weights.q_a_proj), weights.q_a_layernorm, LATENT_EPS), weights.q_b_proj)
    query = query.reshape(*x.shape[:2], -1, config.head_dim)
    nope, rope = jnp.split(query, [config.qk_nope_head_dim], axis=-1)
    rope = rotate(rope, cos, sin, is_interleaved=config.rope_interleave)
    return jnp.concatenate([nope, rope], axis=-1)


def latent_of(
    weights: MlaWeights,
    config: DeepseekConfig,
    x: Float[Array, "B T M"],
    cos: Float[Array, "B T r"],
    sin: Float[Array, "B T r"],
) -> Latent:
    """What is cached of these tokens."""
    c_kv, k_rope = jnp.split(linear(x, weights.kv_a_proj_with_mqa), [config.kv_lora_rank], axis=-1)
    rotated = rotate(k_rope[:, :, None], cos, sin, is_interleaved=config.rope_interleave)
    return Latent(rms_norm(c_kv, weights.kv_a_layernorm, LATENT_EPS), rotated[:, :, 0])


def up_projection(weights: MlaWeights, config: DeepseekConfig) -> UpProjection:
    """`kv_b_proj` as `cpjax.latent` takes it: of each head first D rows for its key, then V for its value."""
    rows = weights.kv_b_proj.reshape(-1, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
    key, value = jnp.split(rows.transpose(2, 0, 1), [config.qk_nope_head_dim], axis=2)
    return UpProjection(key, value)


def output_of(weights: MlaWeights, out: Float[Array, "B T N V"]) -> Float[Array, "B T M"]:
    """The heads' results projected back; of some of the heads a summand of it."""
    return linear(out.reshape(*out.shape[:2], -1), weights.o_proj)


def attend_on_one_device(
    query: Float[Array, "B T N Q"],
    latent: Latent,
    up: UpProjection,
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
) -> Float[Array, "B T N V"]:
    """Attention over all latents at once, expanded: what every exchange must come to."""
    key, value = expand(latent.c_kv, latent.k_rope, up, attention)
    return jnp.asarray(attend(query, key, value, q_tokens, kv_tokens, attention).out)
