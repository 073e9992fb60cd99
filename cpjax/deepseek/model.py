"""Layers to logits. What attends, and what completes a sum, is handed in: the same text on one device and on a mesh.

    x  =  embedding of the tokens
    x  =  x + W_o · attended(norm x)          each layer
    x  =  x + feed_forward(norm x)
    logits  =  lm_head · norm x

Everything but attention is computed in the dtype of the weights, float64 or float32; attention has a profile. Quantised
weights have a product of their own (`cpjax.deepseek.quantized_matrix`), whose result is in the same dtype.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cpjax.attention import Attention
from cpjax.deepseek.attention import (
    Latent,
    MlaWeights,
    attend_on_one_device,
    latent_of,
    linear,
    output_of,
    query_of,
    rms_norm,
    up_projection,
)
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.moe import MlpWeights, MoeWeights, mlp, moe
from cpjax.deepseek.quantized_linear import Arithmetic
from cpjax.deepseek.quantized_matrix import ready
from cpjax.deepseek.rope import cos_sin
from cpjax.latent import UpProjection
from cpjax.mask import Mask, Tokens, tokens
from cpjax.precision import Precision, precision_of


class LayerWeights(NamedTuple):
    """One decoder layer; `mlp` has experts from `first_k_dense_replace` on."""

    input_layernorm: Float[Array, " M"]
    self_attn: MlaWeights
    post_attention_layernorm: Float[Array, " M"]
    mlp: MlpWeights | MoeWeights


class ModelWeights(NamedTuple):
    """All that is needed from tokens to logits; `embed_tokens` and `lm_head` are `[vocab, M]`."""

    embed_tokens: Float[Array, "W M"]
    layers: tuple[LayerWeights, ...]
    norm: Float[Array, " M"]
    lm_head: Float[Array, "W M"]


Attending = Callable[[int, Array, Latent, UpProjection], Array]
"""Layer, query `[B, t, N, D + R]`, latents of the same tokens, up-projection → out `[B, t, N, V]`."""


class Parts(NamedTuple):
    """What a device that has only some heads, columns and experts does besides; the default has all of them."""

    summed: Callable[[Array], Array] = lambda x: x
    """Adds up a summand that each device has, over the devices that cut heads and columns."""
    moe: Callable[[MoeWeights, DeepseekConfig, Array], Array] = moe


class Outcome(NamedTuple):
    """What the layers leave behind."""

    hidden: Float[Array, "B t M"]
    """Before the last norm."""
    latent: Latent
    """Of all layers, `[L, B, t, C]` and `[L, B, t, R]`: what a cache keeps."""


def layer(
    weights: LayerWeights,
    config: DeepseekConfig,
    number: int,
    x: Float[Array, "B t M"],
    angles: tuple[Float[Array, "B t r"], Float[Array, "B t r"]],
    attending: Attending,
    parts: Parts,
) -> tuple[Float[Array, "B t M"], Latent]:
    """One decoder layer: the new hidden state, and the latents of its tokens."""
    inner = rms_norm(x, weights.input_layernorm, config.rms_norm_eps)
    latent = latent_of(weights.self_attn, config, inner, *angles)
    query = query_of(weights.self_attn, config, inner, *angles)
    out = attending(number, query, latent, up_projection(weights.self_attn, config)).astype(x.dtype)
    x = x + parts.summed(output_of(weights.self_attn, out))
    inner = rms_norm(x, weights.post_attention_layernorm, config.rms_norm_eps)
    if isinstance(weights.mlp, MoeWeights):
        return x + parts.moe(weights.mlp, config, inner), latent
    return x + parts.summed(mlp(weights.mlp, inner)), latent


def run_layers(
    weights: ModelWeights,
    config: DeepseekConfig,
    ids: Int[Array, "B t"],
    position: Int[Array, "B t"],
    attending: Attending,
    parts: Parts | None = None,
) -> Outcome:
    """Tokens to the last layer's hidden state.

    Args:
      ids: token ids below `vocab_size`.
      position: where the tokens are in the text; in whatever order they lie.
      attending: what each layer does with queries and latents.
      parts: None: this device has everything.
    """
    angles = cos_sin(config, position, str(weights.norm.dtype))
    x, latents = weights.embed_tokens[ids], []
    for number, one in enumerate(weights.layers):
        x, latent = layer(one, config, number, x, angles, attending, parts or Parts())
        latents.append(latent)
    return Outcome(x, Latent(*(jnp.stack(same) for same in zip(*latents, strict=True))))


def logits_of(weights: ModelWeights, config: DeepseekConfig, hidden: Float[Array, "B t M"]) -> Float[Array, "B t W"]:
    """The last norm and the head."""
    return linear(rms_norm(hidden, weights.norm, config.rms_norm_eps), weights.lm_head)


def attention_for(config: DeepseekConfig, precision: Precision | str | None, dtype: str) -> Attention:
    """Causal attention with the model's softmax scale; precision None is that of the weights' dtype.

    >>> from cpjax.deepseek.config import KNOWN
    >>> attention_for(KNOWN["DeepSeek-V3"], None, "float32").scale
    0.1352337788608801
    """
    return Attention(Mask(), config.softmax_scale, precision_of(precision, dtype))


def as_handed_over(attention: Attention, *arrays: Array) -> tuple[Array, ...]:
    """Arrays in the dtype in which a kernel of this profile gets them: its out format."""
    return tuple(x.astype(attention.precision.out) for x in arrays)


def forward(
    weights: ModelWeights,
    config: DeepseekConfig,
    ids: Int[Array, "B T"],
    *,
    precision: Precision | str | None = None,
    arithmetic: Arithmetic = "exact",
) -> Float[Array, "B T W"]:
    """Logits of a whole text on one device, positions 0, 1, …: what all else must come to.

    Args:
      precision: profile of attention; None follows from the weights' dtype.
      arithmetic: of quantised weights.
    """
    weights = ready(weights, arithmetic)
    attention = attention_for(config, precision, str(weights.norm.dtype))
    place = Tokens(*(jnp.asarray(x) for x in tokens(*ids.shape)))

    def attending(number: int, query: Array, latent: Latent, up: UpProjection) -> Array:
        (query,) = as_handed_over(attention, query)
        latent, up = Latent(*as_handed_over(attention, *latent)), UpProjection(*as_handed_over(attention, *up))
        return attend_on_one_device(query, latent, up, place, place, attention)

    return logits_of(weights, config, run_layers(weights, config, ids, place.position, attending).hidden)
