"""Feed-forward layers: gate, up and down; and the experts, of which a router chooses a few for each token.

    score[e]   =  sigmoid(x · w[e])
    choice[e]  =  score[e] + bias[e]                          the bias only chooses (arXiv 2412.19437, §2.1.2)
    groups     :  the `topk_group` groups whose two best choices have the largest sum; all others are out
    chosen     :  the `num_experts_per_tok` largest choices that are left
    weight[e]  =  factor · score[e] / (Σ score of the chosen + 1e-20)          the division only with `norm_topk_prob`
    result     =  Σ weight[e] · expert[e](x) + shared(x)

Every expert is computed for every token and multiplied by its weight, 0 for most: no token is dropped, and nothing
depends on how many tokens want the same expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cpjax.deepseek.attention import linear
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.matrix import Matrix
from cpjax.deepseek.quantized import Quantized


class MlpWeights(NamedTuple):
    """`gate_proj` and `up_proj` `[F, M]`, `down_proj` `[M, F]`; of many experts with an axis `[E, …]` before.

    What is stored of a quantised one has that axis in all its parts.
    """

    gate_proj: Float[Array, "*E F M"] | Quantized | Matrix
    up_proj: Float[Array, "*E F M"] | Quantized | Matrix
    down_proj: Float[Array, "*E M F"] | Quantized | Matrix


class MoeWeights(NamedTuple):
    """`gate` `[E, M]` and `e_score_correction_bias` `[E]` are the router's; `shared_experts` None: there are none."""

    gate: Float[Array, "E M"]
    e_score_correction_bias: Float[Array, " E"]
    experts: MlpWeights
    shared_experts: MlpWeights | None


def mlp(weights: MlpWeights, x: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
    """down(silu(gate x) · up x).

    >>> mlp(MlpWeights(jnp.ones((3, 2)), jnp.ones((3, 2)), jnp.ones((2, 3))), jnp.zeros((1, 2)))
    Array([[0., 0.]], dtype=float32)
    """
    return linear(jax.nn.silu(linear(x, weights.gate_proj)) * linear(x, weights.up_proj), weights.down_proj)


def route(weights: MoeWeights, config: DeepseekConfig, x: Float[Array, "T M"]) -> Float[Array, "T E"]:
    """The weight of every expert for every token, 0 where it is not chosen.

    Which of two experts of equal choice is taken is not said; the lower here.

    >>> from cpjax.deepseek.config import SMALL
    >>> width = SMALL.hidden_size
    >>> gate = MoeWeights(jnp.zeros((16, width)), jnp.arange(16.0) * 0.1, None, None)
    >>> route(gate, SMALL, jnp.ones((1, width))).round(3)[0, -8:]  # all scores are ½; the bias chooses the last 4
    Array([0.   , 0.   , 0.   , 0.   , 0.625, 0.625, 0.625, 0.625], dtype=float32)
    """
    score = jax.nn.sigmoid(linear(x, weights.gate))
    choice = score + weights.e_score_correction_bias[None]
    if config.groups > 1:
        grouped = choice.reshape(-1, config.groups, config.n_routed_experts // config.groups)
        group_score = lax.top_k(grouped, 2)[0].sum(axis=-1)
        best = lax.top_k(group_score, config.chosen_groups)[1]
        is_in = jax.nn.one_hot(best, config.groups, dtype=bool).any(axis=1)
        choice = jnp.where(is_in[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
    chosen = lax.top_k(choice, config.num_experts_per_tok)[1]
    weight = jnp.take_along_axis(score, chosen, axis=1)
    if config.norm_topk_prob:
        weight = weight / (weight.sum(axis=-1, keepdims=True) + 1e-20)
    weight = weight * config.routed_scaling_factor
    return jnp.zeros_like(score).at[jnp.arange(len(x))[:, None], chosen].set(weight)


def experts_of(experts: MlpWeights, weight: Float[Array, "T E"], x: Float[Array, "T M"]) -> Float[Array, "T M"]:
    """Σ over these experts of weight · expert(x), one expert after the other: E·T·F numbers are never there at once."""

    def weighted(one: tuple[MlpWeights, Array]) -> Array:
        return one[1][:, None] * mlp(one[0], x)

    first, rest = (jax.tree.map(lambda x, part=part: x[part], (experts, weight.T)) for part in (0, slice(1, None)))
    # The sum begins with an expert and not with zeros, which would not vary over a mesh as it does.
    return lax.scan(lambda total, one: (total + weighted(one), None), weighted(first), rest)[0]


def moe(weights: MoeWeights, config: DeepseekConfig, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
    """Routed and shared experts, all on one device."""
    flat = x.reshape(-1, x.shape[-1])
    out = experts_of(weights.experts, route(weights, config, flat), flat)
    if weights.shared_experts is not None:
        out = out + mlp(weights.shared_experts, flat)
    return out.reshape(x.shape)
