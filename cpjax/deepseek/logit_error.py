"""What rounding in attention may do to a logit: a standard deviation of each, from drawn roundings.

    the roundings   each number that a profile rounds gets x + h · u, with h the spacing of the format at x and u
                    uniform in (−½, ½): independent, without a mean, and 0 where x is in the format as it is
    the deviation   logits L of one device in float64, and L_k of the same device with the roundings of draw k:
                    σ² = Σ (L_k − L)² / K, for each logit
    the statistic   t = (logit − L) / σ is distributed as Student's t with K degrees of freedom, if errors are normal;
                    the largest of n may come to the quantile at 1 − 10⁻⁶ / 2n

So the error travels through norms, quantised products and layers as it is: nothing is made linear. (Monte Carlo
arithmetic: D. S. Parker, UCLA CSD-970002, 1997.) What is computed in float32 errs by 2⁻¹³ of an FP16 rounding and is
left out. Where rounding decides which experts a token goes to, errors are not normal; `count_other_experts` says so.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
from jaxtyping import Array, Bool, Float, Int

from cpjax.deepseek.attention import Latent
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.model import ModelWeights, Parts, logits_of, run_layers
from cpjax.deepseek.moe import MoeWeights, moe, route
from cpjax.deepseek.quantized_linear import Arithmetic
from cpjax.deepseek.quantized_matrix import ready
from cpjax.errors import InputError
from cpjax.latent import UpProjection
from cpjax.partial import Partial, divisor, finite, log_sum, merge
from cpjax.precision import FORMAT, Precision, profile, scale_in

DRAWS = 32
"""K: σ is known to 1/√(2K), an eighth; the quantile knows that."""

FALSE_ALARM = 1e-6
"""Probability that a correct text fails, if errors are normal."""

FAR = 6.0
"""Roundings so many times as large change the experts of no token: then real ones do not either."""

EXACT = profile("float64")
"""What is not drawn is computed in it."""

Draw = Callable[[Array, str], Array]
"""Numbers and a format → the numbers with a drawn rounding to it; formats that are not half are left alone."""


class Rounds(NamedTuple):
    """In which places a deployment rounds."""

    precision: Precision
    chunks: int
    """Equal runs of a text whose results are merged in the prefill: 2·cp in zigzag."""
    ranks: int
    """Over which the cache is cut in decode; as many results are merged."""


class Spread(NamedTuple):
    """Logits of one device, and what rounding may do to them."""

    logits: Float[Array, "B T W"]
    """In float64, with the scale as the profile rounds it."""
    sigma: Float[Array, "B T W"]


@partial(jax.jit, static_argnames=("config", "rounds", "arithmetic"))
def spread(
    config: DeepseekConfig,
    weights: ModelWeights,
    text: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    rounds: Rounds,
    arithmetic: Arithmetic = "exact",
) -> Spread:
    """Logits of whole texts on one device, and their standard deviations under `rounds`.

    Args:
      weights: float64, on one device.
      lengths: how many tokens of each row are the prompt's, whose attention is expanded; that of the rest is absorbed.
      arithmetic: of quantised weights.

    Raises:
      InputError: a profile whose out has no half format: no rounding of float32 is drawn.
    """
    if rounds.precision.out not in FORMAT:
        raise InputError(
            f"precision {rounds.precision.name} rounds out to {rounds.precision.out}; the error of logits is known for "
            f"{' and '.join(FORMAT)}"
        )
    weights = ready(weights, arithmetic)

    def logits(draw: Draw) -> Array:
        return _run(config, rounds, weights, text, lengths, draw).logits

    exact = logits(unchanged)
    squares = jax.lax.map(lambda key: (logits(drawing(key)) - exact) ** 2, _keys())
    return Spread(exact, jnp.sqrt(squares.mean(axis=0)))


def most(count: int) -> float:
    """The largest |t| of so many logits that a correct text may have.

    >>> [round(most(n), 1) for n in (1, 100, 10_000)]
    [6.0, 7.7, 9.4]
    """
    from scipy.special import stdtrit  # slow to import

    return float(-stdtrit(DRAWS, FALSE_ALARM / (2 * count)))


@partial(jax.jit, static_argnames=("config", "rounds", "arithmetic", "times"))
def count_other_experts(
    config: DeepseekConfig,
    weights: ModelWeights,
    text: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    rounds: Rounds,
    arithmetic: Arithmetic = "exact",
    times: float = 1.0,
) -> Int[Array, ""]:
    """In how many of `DRAWS` draws, with roundings `times` as large, a token goes to other experts somewhere."""
    weights = ready(weights, arithmetic)

    def chosen(draw: Draw) -> tuple[Array, ...]:
        return _run(config, rounds, weights, text, lengths, draw).chosen

    exact = chosen(unchanged)

    def is_other(key: Array) -> Array:
        found = chosen(drawing(key, times))
        return jnp.asarray([(a != b).any() for a, b in zip(exact, found, strict=True)], bool).any()

    return jax.lax.map(is_other, _keys()).sum()


def _keys() -> Array:
    """Of the draws: the same for every text, so that a check says the same twice."""
    return jax.random.split(jax.random.key(0), DRAWS)


def unchanged(x: Array, fmt: str) -> Array:
    """No rounding."""
    del fmt
    return x


def drawing(key: Array, times: float = 1.0) -> Draw:
    """Roundings that follow from a key, `times` as large as they are; each call's from another part of the key.

    >>> x = jnp.array([1.0, 1.0001])
    >>> changed = abs(drawing(jax.random.key(0))(x, "float16") - x)
    >>> changed[0] == 0, 0 < changed[1] < 2**-11
    (Array(True, dtype=bool), Array(True, dtype=bool))
    """
    count = itertools.count()

    def draw(x: Array, fmt: str) -> Array:
        if fmt not in FORMAT:
            return x
        info = ml_dtypes.finfo(FORMAT[fmt])
        _, exponent = jnp.frexp(x)  # x = f · 2^exponent with f in [½, 1)
        spacing = jnp.ldexp(jnp.ones_like(x), jnp.maximum(exponent - 1, info.minexp) - info.nmant)
        part = jax.random.uniform(jax.random.fold_in(key, next(count)), x.shape, x.dtype, -0.5, 0.5)
        return jnp.where(x.astype(fmt).astype(x.dtype) == x, x, x + times * spacing * part)

    return draw


class _Run(NamedTuple):
    logits: Float[Array, "B T W"]
    chosen: tuple[Bool[Array, "_ E"], ...]
    """Of each layer with experts: who gets which token."""


def _run(
    config: DeepseekConfig, rounds: Rounds, weights: ModelWeights, text: Array, lengths: Array, draw: Draw
) -> _Run:
    """The model on one device, its attention with drawn roundings."""
    given, scale = rounds.precision.out, scale_in(rounds.precision, config.softmax_scale)
    place = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
    is_prompt = (place < lengths[:, None])[:, :, None, None]
    chunk = jnp.minimum(place // -(-lengths // rounds.chunks)[:, None], rounds.chunks - 1)
    attend = partial(_attend, draw, rounds.precision, scale)
    chosen = []

    def watched(weights: MoeWeights, config: DeepseekConfig, x: Array) -> Array:
        chosen.append(route(weights, config, x.reshape(-1, x.shape[-1])) > 0)
        return moe(weights, config, x)

    def attending(number: int, query: Array, latent: Latent, up: UpProjection) -> Array:
        del number
        c_kv, k_rope = (draw(x, given) for x in latent)
        nope = up.key.shape[2]
        # Prefill: a kernel gets keys and values of the heads, made of rounded latents and weights, and rounded again.
        of_key, of_value = (draw(x, given) for x in up)
        key = draw(jnp.einsum("BSC,CND->BSND", c_kv, of_key, precision="highest"), given)
        value = draw(jnp.einsum("BSC,CNV->BSNV", c_kv, of_value, precision="highest"), given)
        rope = jnp.broadcast_to(k_rope[:, :, None], (*key.shape[:3], k_rope.shape[2]))
        key = jnp.concatenate([key, rope], axis=-1)
        expanded = attend(draw(query, given), key, value, chunk, rounds.chunks)
        # Decode: it gets absorbed queries, and latents as keys and values.
        inner = jnp.einsum("BTND,CND->BTNC", query[..., :nope], up.key, precision="highest")
        inner = draw(jnp.concatenate([inner, query[..., nope:]], axis=-1), given)
        one_head = (jnp.concatenate([c_kv, k_rope], axis=-1)[:, :, None], c_kv[:, :, None])
        inner = attend(inner, *one_head, place % rounds.ranks, rounds.ranks)
        absorbed = jnp.einsum("BTNC,CNV->BTNV", inner, up.value, precision="highest")
        return jnp.where(is_prompt, expanded, absorbed)

    hidden = run_layers(weights, config, text, place, attending, Parts(moe=watched)).hidden
    return _Run(logits_of(weights, config, hidden), tuple(chosen))


def _attend(
    draw: Draw,
    precision: Precision,
    scale: float,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    part: Int[Array, "B S"],
    parts: int,
) -> Float[Array, "B T N V"]:
    """Causal attention; the results over the keys of each part are merged one after the other. K is N or 1."""
    key, value = (jnp.broadcast_to(x, (*x.shape[:2], query.shape[2], x.shape[3])) for x in (key, value))
    if precision.query:
        query = draw(query * scale, precision.query)
    score = draw(jnp.einsum("BTNH,BSNH->BTNS", query, key, precision="highest"), precision.score)
    score = score if precision.query else draw(score * scale, precision.score)
    causal = jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))[None, :, None]
    out, lse = _blocks(draw, precision, jnp.where(causal, score, -jnp.inf), value, part, parts)
    result = Partial(out[:, :, :, 0], lse[..., 0])
    for number in range(1, parts):
        result = _merged(draw, precision, result, Partial(out[:, :, :, number], lse[..., number]))
    out = jnp.asarray(result.out)
    return out if precision.carry == precision.out else draw(out, precision.out)


def _blocks(
    draw: Draw,
    precision: Precision,
    score: Float[Array, "B T N S"],
    value: Float[Array, "B S N V"],
    part: Int[Array, "B S"],
    parts: int,
) -> tuple[Float[Array, "B T N P V"], Float[Array, "B T N P"]]:
    """Attention over the keys of each part, as if they were one tile: out and lse."""
    held = jax.nn.one_hot(part, parts, dtype=score.dtype)
    maximum = jnp.where(held[:, None, None] > 0, score[..., None], -jnp.inf).max(axis=3)
    of_key = jnp.broadcast_to(part[:, None, None], score.shape)
    p = jnp.exp(draw(score - jnp.take_along_axis(finite(maximum), of_key, axis=3), precision.distance))
    total = jnp.einsum("BTNS,BSP->BTNP", draw(p, precision.total), held, precision="highest")
    values = held[:, :, :, None, None] * value[:, :, None]
    weighted = jnp.einsum("BTNS,BSPNV->BTNPV", draw(p, precision.probability), values, precision="highest")
    out = draw(weighted / divisor(total)[..., None], precision.out)
    return out, draw(log_sum(finite(maximum), total), precision.lse)


def _merged(draw: Draw, precision: Precision, a: Partial, b: Partial) -> Partial:
    """Merged, and rounded where both have seen a key."""
    merged = merge(a, b, EXACT)
    alone = (jnp.isneginf(a.lse) | jnp.isneginf(b.lse))[..., None]
    return merged._replace(out=jnp.where(alone, merged.out, draw(jnp.asarray(merged.out), precision.carry)))
