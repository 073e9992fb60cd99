"""Multi-token prediction: a module that drafts the token after the next (DeepSeek-V3, arXiv 2412.19437, §2.2).

    x[i]       =  W · [norm embedding(token[i + 1]) ; norm hidden[i]]         hidden: after the model's last norm
    hidden'[i] =  norm layer(x)[i]                                            a decoder layer with experts of its own
    logits[i]  =  lm_head · hidden'[i]                                        of token i + 2

The k-th module takes what the one before it has left behind, and the embedding of token i + k. It stands in the file as
layer `num_hidden_layers` + k − 1, and shares embedding and head with the model. As for the model, what attends and what
completes a sum is handed in: on a mesh `cpjax.deepseek.parallel` does.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cpjax.deepseek.attention import Latent, linear, rms_norm
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.model import Attending, LayerWeights, ModelWeights, Parts, layer
from cpjax.deepseek.rope import cos_sin


class MtpWeights(NamedTuple):
    """One module: `enorm` of the embedding, `hnorm` of the hidden state, `eh_proj` `[M, 2 M]`, `norm` of the result."""

    enorm: Float[Array, " M"]
    hnorm: Float[Array, " M"]
    eh_proj: Float[Array, "M _"]
    layer: LayerWeights
    norm: Float[Array, " M"]


class Drafting(NamedTuple):
    """What makes of the model's own pass that of a module: its weights, and the hidden states before it."""

    module: MtpWeights
    hidden: Float[Array, "B t M"]


def draft(
    weights: ModelWeights,
    module: MtpWeights,
    config: DeepseekConfig,
    following: Int[Array, "B t"],
    hidden: Float[Array, "B t M"],
    position: Int[Array, "B t"],
    attending: Attending,
    parts: Parts | None = None,
) -> tuple[Float[Array, "B t M"], Latent]:
    """The module's hidden state, of which `lm_head` makes logits, and the latents that its own cache keeps.

    Args:
      following: the token after the one that each hidden state belongs to.
      hidden: after the model's last norm, or what the module before left behind.
      position: of the hidden states; that of the following tokens gives the same result, but another cache.
      attending, parts: as in `cpjax.deepseek.model.run_layers`.
    """
    embedded = rms_norm(weights.embed_tokens[following], module.enorm, config.rms_norm_eps)
    before = rms_norm(hidden, module.hnorm, config.rms_norm_eps)
    x = linear(jnp.concatenate([embedded, before], axis=-1), module.eh_proj)
    angles = cos_sin(config, position, str(x.dtype))
    x, latent = layer(module.layer, config, config.num_hidden_layers, x, angles, attending, parts or Parts())
    return rms_norm(x, module.norm, config.rms_norm_eps), latent
