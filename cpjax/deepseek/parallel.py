"""The model on a mesh of cp × tp devices. Tokens are cut over cp, heads and inner columns over tp, experts over both.

    prefill    tokens lie in zigzag from the embedding to the last layer, so nothing is moved in between; each layer's
               latents travel by an exchange (`cpjax.latent`), expanded to this device's heads where they are used
    packed     several requests lie in one row of tokens: each is a segment, which sees itself and its own prefix
    decode     one new token a row or a few, the same on all ranks of cp; queries are absorbed, each rank attends to its
               part of the cache, and partials are merged in the order of the ranks (`cpjax.exchange.decode`)
    sp         the cache is cut over cp and tp together: a rank attends with the heads of all ranks of tp, gathered, to
               its part, and keeps its own heads of the merged result
    drafts     a module of multi-token prediction runs as a layer more, in prefill and decode, over a cache of its own
    prefix     of tokens that are cached already, or a prompt in chunks: the cached latents are gathered, attended to as
               one block, and merged last, as MindIE does (docs/mindie.md)
    experts    each device has E / (cp·tp) of them, computes them for the tokens of all ranks of cp, and sums come home

What is summed over devices is summed in the model's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend
from cpjax.deepseek.attention import Latent, linear, rms_norm
from cpjax.deepseek.cache import Cache, CacheCut, cache_tokens, empty, rows, with_new, with_text
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.layout import Layout, layout_of
from cpjax.deepseek.model import (
    Attending,
    ModelWeights,
    Outcome,
    Parts,
    as_handed_over,
    attention_for,
    run_layers,
)
from cpjax.deepseek.moe import MoeWeights, experts_of, mlp, route
from cpjax.deepseek.mtp import Drafting, MtpWeights, draft
from cpjax.deepseek.names import cut_axis, mtp_of, weights_of
from cpjax.deepseek.quantized_linear import Arithmetic
from cpjax.deepseek.quantized_matrix import ready, specs_of_stored
from cpjax.errors import InputError
from cpjax.exchange.blocks import finished
from cpjax.exchange.decode import decode_attention
from cpjax.latent import HEADLESS, UpProjection, expand, latent_attention_on_device
from cpjax.mask import Tokens
from cpjax.partial import Partial, merge
from cpjax.partition import Zigzag
from cpjax.precision import Precision

AXES = ("cp", "tp")


def model_mesh(cp: int, tp: int = 1, first: int = 0) -> Mesh:
    """A mesh with axes "cp" and "tp" over cp·tp devices, the first of all or those behind `first` others.

    >>> dict(model_mesh(2, 2).shape)
    {'cp': 2, 'tp': 2}

    Raises:
      InputError: a size below 1, or fewer devices; on a CPU it says how to simulate more.
    """
    for name, size in (("cp", cp), ("tp", tp)):
        if size < 1:
            raise InputError(f"{name} is {size}; it is a number of ranks, at least 1")
    devices = jax.devices()
    stop = first + cp * tp
    if len(devices) < stop:
        others = f", behind {first} other devices" if first else ""
        raise InputError(
            f"cp is {cp} and tp {tp}{others}, but JAX sees {len(devices)} device(s); on a CPU call "
            f"jax.config.update('jax_num_cpu_devices', {stop}) before JAX is first used"
        )
    return jax.make_mesh((cp, tp), AXES, devices=devices[first:stop], axis_types=(AxisType.Auto,) * 2)


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
    return weights_of(config, _spec, lambda _: P(AXES))


def mtp_specs(config: DeepseekConfig) -> tuple[MtpWeights, ...]:
    """The same of the MTP modules."""
    return mtp_of(config, _spec, lambda _: P(AXES))


def _spec(name: str) -> P:
    axis = cut_axis(name)
    return P() if axis is None else P(*(None,) * axis, "tp")


def cache_axes(setup: Setup, cut: CacheCut) -> tuple[str, ...]:
    """The axes of the mesh over which a cache is cut: cp, or with sp both.

    Raises:
      InputError: a cut over another number of ranks.
    """
    cp, tp = setup.sizes
    if cut.ranks not in (cp, cp * tp):
        raise InputError(f"the cache is cut over {cut.ranks} ranks; give cp, {cp}, or with sp cp·tp, {cp * tp}")
    return AXES[:1] if cut.ranks == cp else AXES


def specs_of(weights: ModelWeights, config: DeepseekConfig) -> ModelWeights:
    """`specs` for these weights: of a quantised one there is a spec for everything that is stored."""
    return specs_of_stored(specs(config), weights)


def prefill(
    setup: Setup,
    weights: ModelWeights,
    ids: Int[Any, "B T"],
    lengths: Sequence[int] | Int[np.ndarray, " B"] | None = None,
    *,
    cut: CacheCut | None = None,
    cache: Cache | None = None,
    drafting: Drafting | None = None,
    is_packed: bool = False,
) -> Outcome:
    """Tokens at once: their last hidden state and the latents of all layers, in natural order, a row for each request.

    Args:
      ids: token ids; rows that are shorter are filled up at their end with any id. With `drafting` the ones
        that follow.
      lengths: tokens of each row; None: T.
      cut, cache: tokens that stand before these, from an earlier prefill or another request with the same beginning;
        rows may have different numbers of them, or none. None: nothing stands before.
      is_packed: requests are computed in one row, one behind the other (`cpjax.deepseek.layout`); else in a row each.
      drafting: None: the model. A module, and the hidden states of the tokens, in natural order: the module in its
        place; what comes back and what is cached are then its own (`cpjax.deepseek.mtp.draft`).

    Raises:
      InputError: ids that the model does not have; lengths that the rows do not have; a cache without its cut, of other
        rows, or over another number of ranks.
    """
    if (cut is None) != (cache is None):
        raise InputError("cut says how the cache is cut; give both or none of them")
    ids = checked_ids(setup.config, ids)
    if cache is not None and len(cache.length) != len(ids):
        raise InputError(
            f"the cache has {len(cache.length)} rows, and there are {len(ids)} requests; give one a request"
        )
    lengths = np.full(len(ids), ids.shape[1]) if lengths is None else np.asarray(lengths)
    if len(lengths) != len(ids):
        raise InputError(f"there are {len(lengths)} lengths and {len(ids)} rows; give one length a row")
    layout = layout_of(lengths, ids.shape[1], setup.sizes[0], is_packed=is_packed)
    laid = np.asarray(layout.laid(ids), np.int32)
    found = _prefill(setup, cut, weights, *jax.tree.map(jnp.asarray, (laid, layout)), cache, drafting)
    length = ids.shape[1]
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
    setup: Setup,
    cut: CacheCut | None,
    weights: ModelWeights,
    ids: Array,
    layout: Layout,
    cache: Cache | None,
    drafting: Drafting | None,
) -> Outcome:
    """`ids` are laid out, what comes back is not."""
    index, segment = layout.tokens
    places = Tokens(index if cache is None else index + cache.length[layout.request], segment)
    there = None if cut is None or cache is None else cache_tokens(cut, cache.length, cache.prompt)
    axes = AXES[:1] if cut is None else cache_axes(setup, cut)

    def device(
        weights: ModelWeights,
        ids: Array,
        places: Tokens,
        held: Latent | None,
        there: Tokens | None,
        drafting: Drafting | None,
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
                chunks=Zigzag(setup.sizes[0]).chunks_per_rank,
            )
            if held is not None and there is not None:
                mine = jax.tree.map(lambda x: x[number], held)
                before = _prefix(setup.attention, axes, query, mine, there, up, places)
                result = finished(merge(result, before, setup.attention.precision), setup.attention)
            return jnp.asarray(result.out)

        parts = Parts(_summed, partial(_moe, is_cut=True))
        weights = ready(weights, setup.arithmetic, "tp")
        outcome = _run(weights, setup.config, drafting, ids, places.position, attending, parts)
        return outcome.hidden, outcome.latent

    runs = P(None, "cp")
    program = jax.shard_map(
        device,
        mesh=setup.mesh,
        in_specs=(
            *(specs_of(weights, setup.config), runs, runs, P(None, None, axes), P()),
            _drafting_specs(setup, drafting, runs),
        ),
        out_specs=(runs, P(None, None, "cp")),
    )
    if drafting is not None:
        drafting = drafting._replace(hidden=layout.laid(drafting.hidden))
    hidden, latent = program(weights, ids, places, None if cache is None else cache.latent, there, drafting)
    place = lambda x, spec: lax.with_sharding_constraint(x, jax.NamedSharding(setup.mesh, spec))  # noqa: E731
    latent = jax.tree.map(lambda x: place(jax.vmap(layout.back)(x), P(None, None, "cp")), latent)
    return Outcome(place(layout.back(hidden), runs), latent)


def _prefix(
    attention: Attention,
    axes: tuple[str, ...],
    query: Array,
    held: Latent,
    there: Tokens,
    up: UpProjection,
    places: Tokens,
) -> Partial:
    """Attention of this device's queries over all that is cached, gathered from all ranks, in their order.

    Of packed queries, which are one row, the cached rows are laid one behind the other: each is a segment of its own.
    """

    def beside(x: Array) -> Array:
        return x.reshape(len(query), -1, *x.shape[2:])

    gathered = (lax.all_gather(x, axes, axis=1, tiled=True) for x in held)
    c_kv, k_rope = as_handed_over(attention, *map(beside, gathered))
    key, value = expand(c_kv, k_rope, up, attention)
    return attend(query, key, value, places, Tokens(*map(beside, there)), attention)


def _run(
    weights: ModelWeights,
    config: DeepseekConfig,
    drafting: Drafting | None,
    ids: Array,
    position: Array,
    attending: Attending,
    parts: Parts,
) -> Outcome:
    """The model's layers, or a module's one; layers count from 0 either way, as in the cache."""
    if drafting is None:
        return run_layers(weights, config, ids, position, attending, parts)

    def first(number: int, query: Array, latent: Latent, up: UpProjection) -> Array:
        return attending(0, query, latent, up)

    hidden, latent = draft(weights, drafting.module, config, ids, drafting.hidden, position, first, parts)
    return Outcome(hidden, jax.tree.map(lambda x: x[None], latent))


def _drafting_specs(setup: Setup, drafting: Drafting | None, hidden: P) -> Any:
    """A `Drafting` of PartitionSpec: all modules are cut alike, so the first one's cut is everybody's."""
    return None if drafting is None else Drafting(mtp_specs(setup.config)[0], cast("Any", hidden))


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

    logits: Float[Array, "B t W"]
    """Of the token after each new one."""
    hidden: Float[Array, "B t M"]
    """After the last norm."""
    cache: Cache


def extended_cache(
    setup: Setup,
    cut: CacheCut,
    outcome: Outcome,
    lengths: Sequence[int] | Int[np.ndarray, " B"],
    cache: Cache | None = None,
    *,
    prompt: Sequence[int] | Int[np.ndarray, " B"] | None = None,
) -> Cache:
    """The cache after a prefill, each rank's part on its device; `cache` is what the prefill was given.

    It must have room for them (`CacheCut.capacity`); what has none is not kept.

    Args:
      lengths: tokens of each row that are new.
      prompt: tokens of each row's whole prompt, said with its first part; None: `lengths`.
    """
    new = jnp.asarray(lengths, jnp.int32)
    whole = new if prompt is None else jnp.asarray(prompt, jnp.int32)
    return _extended(setup, cut, outcome.latent, new, whole, cache)


@partial(jax.jit, static_argnums=(0, 1))
def _extended(setup: Setup, cut: CacheCut, latent: Latent, lengths: Array, prompt: Array, cache: Cache | None) -> Cache:
    where = jax.NamedSharding(setup.mesh, P(None, None, cache_axes(setup, cut)))
    cache = with_text(cut, empty(cut, latent, prompt) if cache is None else cache, latent, lengths)
    return cache._replace(latent=jax.tree.map(lambda x: lax.with_sharding_constraint(x, where), cache.latent))


@partial(jax.jit, static_argnums=(0, 1))
def decode_step(
    setup: Setup,
    cut: CacheCut,
    weights: ModelWeights,
    ids: Int[Array, "B t"],
    cache: Cache,
    drafting: Drafting | None = None,
) -> Next:
    """A few new tokens a row, at the positions after the last: their logits, and the cache with them.

    Each sees what is cached, itself, and those before it in the step. The cache must have room for them
    (`CacheCut.capacity`); what has none is not kept.

    Args:
      ids: the new tokens, int32; with `drafting` the ones that follow them.
      drafting: None: the model. A module, and the hidden states of the new tokens: the module in its place, as in
        `prefill`.
    """
    config, attention, axes = setup.config, setup.attention, cache_axes(setup, cut)
    position = cache.length[:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    everything = cache_tokens(cut, cache.length + ids.shape[1], cache.prompt)

    def device(
        weights: ModelWeights,
        ids: Array,
        position: Array,
        held: Latent,
        there: Tokens,
        prompt: Array,
        drafting: Drafting | None,
    ) -> tuple[Array, Latent]:
        rank = lax.axis_index(axes)
        new = Tokens(position, jnp.zeros_like(position) + rows(len(position)))

        def attending(number: int, query: Array, latent: Latent, up: UpProjection) -> Array:
            mine = jax.tree.map(lambda x: x[number : number + 1], held)
            one = jax.tree.map(lambda x: x[None], latent)
            c_kv, k_rope = (x[0] for x in with_new(cut, mine, one, position, prompt, rank))
            nope, rope = jnp.split(query, [config.qk_nope_head_dim], axis=-1)
            absorbed = jnp.einsum("BTND,CND->BTNC", nope, up.key, precision="highest")
            query, key, value = as_handed_over(
                attention,
                jnp.concatenate([absorbed, rope], axis=-1),
                jnp.concatenate([c_kv, k_rope], axis=-1)[:, :, None],
                c_kv[:, :, None],
            )
            heads = query.shape[2]
            if "tp" in axes:
                query = lax.all_gather(query, "tp", axis=2, tiled=True)
            result = decode_attention(query, key, value, new, there, attention, axis_name=axes)
            out = jnp.asarray(result.out).astype(up.value.dtype)
            if "tp" in axes:
                out = lax.dynamic_slice_in_dim(out, lax.axis_index("tp") * heads, heads, axis=2)
            return jnp.einsum("BTNC,CNV->BTNV", out, up.value, precision="highest")

        parts = Parts(_summed, partial(_moe, is_cut=False))
        weights = ready(weights, setup.arithmetic, "tp")
        outcome = _run(weights, config, drafting, ids, position, attending, parts)
        # A rank's result is its own until somebody joins them: all of them are equal.
        return outcome.hidden[None], with_new(cut, held, outcome.latent, position, prompt, rank)

    part = P(None, None, axes)
    program = jax.shard_map(
        device,
        mesh=setup.mesh,
        in_specs=(
            *(specs_of(weights, config), P(), P(), part, P(None, axes), P()),
            _drafting_specs(setup, drafting, P()),
        ),
        out_specs=(P("cp"), part),
    )
    hidden, latent = program(weights, ids, position, cache.latent, everything, cache.prompt, drafting)
    hidden = hidden[0] if drafting is not None else rms_norm(hidden[0], weights.norm, config.rms_norm_eps)
    logits = linear(hidden, weights.lm_head)
    return Next(logits, hidden, cache._replace(latent=latent, length=cache.length + ids.shape[1]))
