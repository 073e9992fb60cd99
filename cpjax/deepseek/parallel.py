"""The model on a mesh of cp × tp devices. Tokens are cut over cp, heads and inner columns over tp, experts over both.

    prefill    tokens lie in zigzag from the embedding to the last layer, so nothing is moved in between; each layer's
               latents travel by an exchange (`cpjax.latent`), expanded to this device's heads where they are used
    decode     one new token a row, the same on all ranks of cp; queries are absorbed, each rank attends to its part of
               the cache, and partials are merged in the order of the ranks (`cpjax.exchange.decode`)
    prefix     of tokens that are cached already, or a prompt in chunks: the cached latents are gathered, attended to as
               one block, and merged last, as MindIE does (docs/mindie.md)
    experts    each device has E / (cp·tp) of them, computes them for the tokens of all ranks of cp, and sums come home

What is summed over devices is summed in the model's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend
from cpjax.deepseek.attention import Latent
from cpjax.deepseek.cache import Cache, CacheCut, cache_tokens, empty, with_new, with_text
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.model import (
    ModelWeights,
    Outcome,
    Parts,
    as_handed_over,
    attention_for,
    logits_of,
    run_layers,
)
from cpjax.deepseek.moe import MoeWeights, experts_of, mlp, route
from cpjax.deepseek.names import cut_axis, weights_of
from cpjax.deepseek.quantized_cut import quantized_specs
from cpjax.deepseek.quantized_linear import Arithmetic
from cpjax.deepseek.quantized_matrix import is_quantized, ready
from cpjax.errors import InputError
from cpjax.exchange.blocks import finished
from cpjax.exchange.decode import decode_attention
from cpjax.latent import HEADLESS, UpProjection, expand, latent_attention_on_device
from cpjax.mask import PAD, Tokens
from cpjax.partial import Partial, merge
from cpjax.partition import Zigzag
from cpjax.precision import Precision

AXES = ("cp", "tp")


def model_mesh(cp: int, tp: int = 1) -> Mesh:
    """A mesh with axes "cp" and "tp" over the first cp·tp devices.

    >>> dict(model_mesh(2, 2).shape)
    {'cp': 2, 'tp': 2}

    Raises:
      InputError: a size below 1, or fewer devices; on a CPU it says how to simulate more.
    """
    for name, size in (("cp", cp), ("tp", tp)):
        if size < 1:
            raise InputError(f"{name} is {size}; it is a number of ranks, at least 1")
    devices = jax.devices()
    if len(devices) < cp * tp:
        raise InputError(
            f"cp is {cp} and tp {tp}, but JAX sees {len(devices)} device(s); on a CPU call "
            f"jax.config.update('jax_num_cpu_devices', {cp * tp}) before JAX is first used"
        )
    return jax.make_mesh((cp, tp), AXES, devices=devices[: cp * tp], axis_types=(AxisType.Auto,) * 2)


@dataclass(frozen=True)
class Setup:
    """What is no operand: model, mesh, and how it is computed. Another value is another program.

    Raises:
      InputError: a mesh that does not divide heads, columns or experts; an exchange that deals out heads.
    """

    config: DeepseekConfig
    mesh: Mesh
    attention: Attention
    exchange: str = "ring"
    arithmetic: Arithmetic = "exact"

    def __post_init__(self):
        """Refuse what cannot be cut."""
        config, (cp, tp) = self.config, self.sizes
        if self.exchange not in HEADLESS:
            raise InputError(f"exchange is {self.exchange!r:.60}; a latent takes one of {', '.join(HEADLESS)}")
        has_experts = config.is_moe(config.num_hidden_layers - 1)
        counts = {"num_attention_heads": config.num_attention_heads, "intermediate_size": config.intermediate_size}
        if has_experts and config.n_shared_experts:
            counts["moe_intermediate_size · n_shared_experts"] = config.moe_intermediate_size * config.n_shared_experts
        for name, count in counts.items():
            if count % tp:
                raise InputError(f"{name} is {count}, which tp {tp} does not divide; make tp a divisor of it")
        if has_experts and config.n_routed_experts % (cp * tp):
            raise InputError(
                f"n_routed_experts is {config.n_routed_experts}, which cp·tp = {cp * tp} devices cannot share equally; "
                "make their product a divisor of it"
            )

    @property
    def sizes(self) -> tuple[int, int]:
        """Ranks of cp, and of tp."""
        return self.mesh.shape["cp"], self.mesh.shape["tp"]


def setup(
    config: DeepseekConfig,
    mesh: Mesh,
    *,
    dtype: str,
    precision: Precision | str | None = None,
    exchange: str = "ring",
    arithmetic: Arithmetic = "exact",
) -> Setup:
    """A `Setup` with the model's mask and scale.

    Args:
      dtype: of the weights, float64 or float32.
      precision: profile of attention; None follows from dtype.
      exchange: how latents meet queries in the prefill, one of `cpjax.latent.HEADLESS`.
      arithmetic: of quantised weights; "vendor" depends on tp (`cpjax.deepseek.quantized_matrix`).
    """
    return Setup(config, mesh, attention_for(config, precision, dtype), exchange, arithmetic)


def specs(config: DeepseekConfig) -> ModelWeights:
    """How devices cut the weights: a `ModelWeights` of PartitionSpec."""

    def spec(name: str) -> P:
        axis = cut_axis(name)
        return P() if axis is None else P(*(None,) * axis, "tp")

    return weights_of(config, spec, lambda _: P(AXES))


def specs_of(weights: ModelWeights, config: DeepseekConfig) -> ModelWeights:
    """`specs` for these weights: of a quantised one there is a spec for everything that is stored."""
    each = lambda spec, weight: quantized_specs(weight, spec) if is_quantized(weight) else spec  # noqa: E731
    return jax.tree.map(each, specs(config), weights, is_leaf=lambda x: isinstance(x, P))


def prefill(
    setup: Setup,
    weights: ModelWeights,
    ids: Int[Any, "B T"],
    lengths: Sequence[int] | Int[np.ndarray, " B"] | None = None,
    *,
    cut: CacheCut | None = None,
    cache: Cache | None = None,
) -> Outcome:
    """Tokens at once: their last hidden state and the latents of all layers, in natural order.

    Args:
      ids: token ids; rows that are shorter are filled up at their end with any id.
      lengths: tokens of each row; None: T.
      cut, cache: tokens that stand before these, from an earlier prefill or another request with the same beginning;
        rows may have different numbers of them, or none. None: nothing stands before.

    Raises:
      InputError: ids that the model does not have; a cache without its cut.
    """
    if (cut is None) != (cache is None):
        raise InputError("cut says how the cache is cut; give both or none of them")
    ids = checked_ids(setup.config, ids)
    batch, length = ids.shape
    lengths = np.full(batch, length) if lengths is None else lengths
    chunks = 2 * setup.sizes[0]
    padded = np.pad(ids, ((0, 0), (0, -length % chunks)))
    found = _prefill(setup, cut, weights, jnp.asarray(padded, jnp.int32), jnp.asarray(lengths, jnp.int32), cache)
    return Outcome(found.hidden[:, :length], jax.tree.map(lambda x: x[:, :, :length], found.latent))


def checked_ids(config: DeepseekConfig, ids: Int[Any, "B T"]) -> Int[np.ndarray, "B T"]:
    """Token ids as NumPy integers.

    Raises:
      InputError: there is none, or one is not in the vocabulary; more than the model has positions for.
    """
    found = np.asarray(ids)
    if not found.size:
        raise InputError("there is no token; give at least one id")
    if found.min() < 0 or found.max() >= config.vocab_size:
        wrong = found.min() if found.min() < 0 else found.max()
        raise InputError(f"token id {wrong} is none of the model's; they are 0 to {config.vocab_size - 1}")
    if found.shape[1] > config.max_position_embeddings:
        raise InputError(
            f"{found.shape[1]} tokens are more than the model's max_position_embeddings, "
            f"{config.max_position_embeddings}; give fewer"
        )
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    setup: Setup, cut: CacheCut | None, weights: ModelWeights, ids: Array, lengths: Array, cache: Cache | None
) -> Outcome:
    zigzag = Zigzag(setup.sizes[0])
    order = zigzag.order(ids.shape[1])
    index = jnp.broadcast_to(jnp.asarray(order, jnp.int32)[None], ids.shape)
    position = index if cache is None else index + cache.length[:, None]
    places = Tokens(position, jnp.where(index < lengths[:, None], 0, PAD).astype(jnp.int32))

    def device(
        weights: ModelWeights, ids: Array, places: Tokens, held: Latent | None, length: Array | None
    ) -> tuple[Array, Latent]:
        def attending(number: int, query: Array, latent: Latent, up: UpProjection) -> Array:
            (query,) = as_handed_over(setup.attention, query)
            c_kv, k_rope = as_handed_over(setup.attention, *latent)
            up = UpProjection(*as_handed_over(setup.attention, *up))
            result = latent_attention_on_device(
                query,
                c_kv,
                k_rope,
                up,
                places,
                places,
                setup.attention,
                axis_name="cp",
                exchange=setup.exchange,
                chunks=zigzag.chunks_per_rank,
            )
            if cut is not None and held is not None and length is not None:
                mine = jax.tree.map(lambda x: x[number], held)
                before = _prefix(setup.attention, cut, query, mine, length, up, places)
                result = finished(merge(result, before, setup.attention.precision), setup.attention)
            return jnp.asarray(result.out)

        parts = Parts(_summed, partial(_moe, is_cut=True))
        weights = ready(weights, setup.arithmetic, "tp")
        outcome = run_layers(weights, setup.config, ids, places.position, attending, parts)
        return outcome.hidden, outcome.latent

    runs, slots = P(None, "cp"), P(None, None, "cp")
    program = jax.shard_map(
        device,
        mesh=setup.mesh,
        in_specs=(specs_of(weights, setup.config), runs, runs, slots, P()),
        out_specs=(runs, slots),
    )
    hidden, latent = program(weights, ids[:, order], places, *((None, None) if cache is None else cache))
    back = np.argsort(order)
    place = lambda x, spec: lax.with_sharding_constraint(x, jax.NamedSharding(setup.mesh, spec))  # noqa: E731
    latent = jax.tree.map(lambda x: place(x[:, :, back], P(None, None, "cp")), latent)
    return Outcome(place(hidden[:, back], runs), latent)


def _prefix(
    attention: Attention,
    cut: CacheCut,
    query: Array,
    held: Latent,
    length: Array,
    up: UpProjection,
    places: Tokens,
) -> Partial:
    """Attention of this device's queries over all that is cached, gathered from the ranks of cp."""
    c_kv, k_rope = as_handed_over(attention, *(lax.all_gather(x, "cp", axis=1, tiled=True) for x in held))
    position = jnp.broadcast_to(jnp.asarray(cut.positions.ravel(), jnp.int32)[None], c_kv.shape[:2])
    there = Tokens(position, jnp.where(position < length[:, None], 0, PAD).astype(jnp.int32))
    key, value = expand(c_kv, k_rope, up, attention)
    return attend(query, key, value, places, there, attention)


def _summed(x: Array) -> Array:
    """Summands of heads or columns, added up."""
    return lax.psum(x, "tp")


def _moe(weights: MoeWeights, config: DeepseekConfig, x: Float[Array, "B t M"], *, is_cut: bool) -> Array:
    """Experts on a device that has some of them.

    Args:
      is_cut: the ranks of cp have different tokens; else they all have the same ones.
    """
    flat = x.reshape(-1, x.shape[-1])
    weight = route(weights, config, flat)
    tokens = flat
    if is_cut:
        tokens, weight = lax.all_gather((flat, weight), "cp", axis=0, tiled=True)
    count = jax.tree.leaves(weights.experts)[0].shape[0]
    mine = lax.dynamic_slice_in_dim(weight, lax.axis_index(AXES) * count, count, axis=1)
    out = lax.psum(experts_of(weights.experts, mine, tokens), "tp")
    out = lax.psum_scatter(out, "cp", scatter_dimension=0, tiled=True) if is_cut else lax.psum(out, "cp")
    if weights.shared_experts is not None:
        out = out + lax.psum(mlp(weights.shared_experts, flat), "tp")
    return out.reshape(x.shape)


class Next(NamedTuple):
    """What a step of decoding gives."""

    logits: Float[Array, "B W"]
    cache: Cache


def extended_cache(
    setup: Setup,
    cut: CacheCut,
    outcome: Outcome,
    lengths: Sequence[int] | Int[np.ndarray, " B"],
    cache: Cache | None = None,
) -> Cache:
    """The cache after a prefill, each rank's part on its device; `cache` is what the prefill was given.

    It must have room for them (`CacheCut.capacity`); what has none is not kept.
    """
    return _extended(setup, cut, outcome.latent, jnp.asarray(lengths, jnp.int32), cache)


@partial(jax.jit, static_argnums=(0, 1))
def _extended(setup: Setup, cut: CacheCut, latent: Latent, lengths: Array, cache: Cache | None) -> Cache:
    where = jax.NamedSharding(setup.mesh, P(None, None, "cp"))
    cache = with_text(cut, empty(cut, latent) if cache is None else cache, latent, lengths)
    return cache._replace(latent=jax.tree.map(lambda x: lax.with_sharding_constraint(x, where), cache.latent))


@partial(jax.jit, static_argnums=(0, 1))
def decode_step(setup: Setup, cut: CacheCut, weights: ModelWeights, ids: Int[Array, " B"], cache: Cache) -> Next:
    """One new token a row, at the position after the last: its logits, and the cache with it.

    The cache must have room for it (`CacheCut.capacity`); what has none is not kept.

    Args:
      ids: the new tokens, int32.
    """
    config, attention = setup.config, setup.attention

    def device(weights: ModelWeights, ids: Array, held: Latent, length: Array) -> tuple[Array, Latent]:
        rank = lax.axis_index("cp")
        position = length[:, None]
        new = Tokens(position, jnp.zeros_like(position))
        there = cache_tokens(cut, length + 1, rank)

        def attending(number: int, query: Array, latent: Latent, up: UpProjection) -> Array:
            mine = jax.tree.map(lambda x: x[number : number + 1], held)
            one = jax.tree.map(lambda x: x[None], latent)
            c_kv, k_rope = (x[0] for x in with_new(cut, mine, one, length, rank))
            nope, rope = jnp.split(query, [config.qk_nope_head_dim], axis=-1)
            absorbed = jnp.einsum("BTND,CND->BTNC", nope, up.key, precision="highest")
            query, key, value = as_handed_over(
                attention,
                jnp.concatenate([absorbed, rope], axis=-1),
                jnp.concatenate([c_kv, k_rope], axis=-1)[:, :, None],
                c_kv[:, :, None],
            )
            result = decode_attention(query, key, value, new, there, attention, axis_name="cp")
            out = jnp.asarray(result.out).astype(up.value.dtype)
            return jnp.einsum("BTNC,CNV->BTNV", out, up.value, precision="highest")

        parts = Parts(_summed, partial(_moe, is_cut=False))
        weights = ready(weights, setup.arithmetic, "tp")
        outcome = run_layers(weights, config, ids[:, None], position, attending, parts)
        # A rank's result is its own until somebody joins them: all of them are equal.
        return outcome.hidden[None], with_new(cut, held, outcome.latent, length, rank)

    part = P(None, None, "cp")
    program = jax.shard_map(
        device,
        mesh=setup.mesh,
        in_specs=(specs_of(weights, config), P(), part, P()),
        out_specs=(P("cp"), part),
    )
    hidden, latent = program(weights, ids, cache.latent, cache.length)
    return Next(logits_of(weights, config, hidden[0])[:, 0], Cache(latent, cache.length + 1))
