"""One block: queries against keys in tiles, the FlashAttention-2 recurrence (arXiv 2307.08691, algorithm 1).

Scores of one tile of keys at a time are computed and thrown away; what stays per query is the running maximum m, the
sum l of exp(s − m) and the sum acc of exp(s − m)·v. A new maximum rescales both. The stages are functions of their
own, because in which format each of them rounds is part of the specification and is tested stage by stage.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from cpjax.attention import Attention
from cpjax.blocks.varying import varying_full
from cpjax.mask import PAD, Mask, Tokens, visible
from cpjax.partial import Partial, divisor, finite, log_sum
from cpjax.precision import KEY_TILE, Precision, scale_in
from cpjax.rounding import rounded

QUERY_TILE = 256
"""Queries a tile; no part of the numerics."""

State = TypeVar("State")


class Running(NamedTuple):
    """The state between two tiles, per query and head, in the profile's compute dtype."""

    maximum: Float[Array, "B K G T"]
    total: Float[Array, "B K G T"]
    weighted: Float[Array, "B K G T V"]


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
) -> Partial:
    """Attention of every query over the keys of this block that it may see.

    Args:
      query, key, value: any float dtype; converted exactly to the profile's compute dtype. N is a multiple of K, and
        query heads n·G … n·G+G−1 share key/value head n. Pads may hold anything, NaN included.
      q_tokens, kv_tokens: places of the queries `[B, T]` and keys `[B, S]`.

    Returns:
      Partial with `out` `[B, T, N, V]` and `lse` `[B, T, N]`, rounded to the profile's out and lse formats, both
      stored in its compute dtype. A query that sees no key gets (0, −inf).

    >>> from cpjax.mask import Mask, tokens
    >>> from cpjax.precision import profile
    >>> place, x = tokens(1, 2), jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> attend(0 * x, x, x, place, place, Attention(Mask(), 1.0, profile("float32"))).out.ravel().tolist()
    [1.0, 2.0]
    """
    compute = attention.precision.compute
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    query = without_pads(query, q_tokens).astype(compute)
    key, value = (without_pads(x, kv_tokens).astype(compute) for x in (key, value))
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    # Heads come before tokens from here on, so that no product has to transpose what it is given, tile after tile.
    q_stacks = [(heads_first(q), places) for q, places in tiles((grouped, q_tokens), QUERY_TILE)]
    kv_stacks = [(heads_first(k), heads_first(v), places) for k, v, places in tiles((key, value, kv_tokens), KEY_TILE)]

    def rows(tile: tuple[Array, Tokens]) -> tuple[Array, Array]:
        return _attend_rows(*tile, kv_stacks, attention)

    # Each query's row is by itself; tiles of queries only keep the scores of a tile in a cache.
    parts = [
        lax.map(rows, stack) if len(stack[0]) > 1 else jax.tree.map(lambda x: x[None], rows(_only(stack)))
        for stack in q_stacks
    ]
    out, lse = tokens_first([out for out, _ in parts]), tokens_first([lse[..., None] for _, lse in parts])
    return Partial(out.reshape(batch, length, heads, value.shape[-1]), lse.reshape(batch, length, heads))


def _attend_rows(
    query: Float[Array, "B K G T H"], q_tokens: Tokens, stacks: list, attention: Attention
) -> tuple[Float[Array, "B K G T V"], Float[Array, "B K G T"]]:
    """One tile of queries over all tiles of keys; a tile of which no query sees a key is left out."""
    precision = attention.precision

    def step(state: Running, tile: tuple[Array, Array, Tokens]) -> Running:
        key, value, kv_tokens = tile

        def computed(seen: Array | bool) -> Running:
            return accumulate(state, scores(query, key, seen, attention), value, precision)

        return where_seen(attention.mask, q_tokens, kv_tokens, computed, state)

    state = _nothing_yet(query, stacks[0])
    for stack in stacks:
        if len(stack[0]) > 1:
            state, _ = lax.scan(lambda state, tile: (step(state, tile), None), state, stack)
        else:
            state = step(state, _only(stack))
    return finish(state, precision)


def where_seen(
    mask: Mask, q_tokens: Tokens, kv_tokens: Tokens, computed: Callable[[Array | bool], State], hidden: State
) -> State:
    """`computed(seen)` of a tile; `hidden` where no query sees a key of it, which must be the same to the bit.

    `seen` is `[B, 1, 1, T, S]`, or True where every query sees every key: then no pair is looked at. Which of the three
    it is follows from the least and greatest places of the tile; where these leave it open, every pair is looked at.
    """
    some = lambda: computed(jnp.asarray(visible(mask, q_tokens, kv_tokens))[:, None, None])  # noqa: E731
    if kv_tokens.position.shape[1] != KEY_TILE:
        return some()  # small ones, as in tests, are not worth a branch
    return lax.switch(seen_of(mask, q_tokens, kv_tokens), [lambda: hidden, some, lambda: computed(True)])


def seen_of(mask: Mask, q: Tokens, kv: Tokens) -> Int[Any, ""]:
    """How much of a tile is seen: 0 nothing, 2 every pair, 1 what remains. From the ranges of places, in O(T + S).

    >>> from cpjax.mask import tokens
    >>> new, old = tokens(1, 4, start=4), tokens(1, 4)
    >>> [seen_of(Mask(), *pair).item() for pair in ((old, new), (old, old), (new, old))]
    [0, 1, 2]
    """
    (q_first, q_last), (kv_first, kv_last) = ((x.position.min(), x.position.max()) for x in (q, kv))
    q_segments, kv_segments = ((x.segment.min(), x.segment.max()) for x in (q, kv))
    one_request = (q_segments[0] == q_segments[1]) & (kv_segments[0] == kv_segments[1])
    every = one_request & (q_segments[0] == kv_segments[0]) & (q_segments[0] != PAD)
    some = (q_segments[1] >= kv_segments[0]) & (kv_segments[1] >= q_segments[0])
    some = some & (q_segments[1] != PAD) & (kv_segments[1] != PAD)
    if mask.is_causal:
        every, some = every & (q_first >= kv_last), some & (q_last >= kv_first)
    if mask.window is not None:
        every = every & (q_last - kv_first < mask.window) & (kv_last - q_first < mask.window)
        some = some & (q_first - kv_last < mask.window) & (kv_first - q_last < mask.window)
    return some.astype(jnp.int32) + (some & every).astype(jnp.int32)


def scores(
    query: Float[Array, "B K G T H"],
    key: Float[Array, "B K S H"],
    seen: Bool[Array, "B 1 1 T S"] | bool,
    attention: Attention,
) -> Float[Array, "B K G T S"]:
    """`scale · q·k` (through the softcap), rounded where the profile says, −inf where the key is not seen."""
    fmt, of_query, scale = attention.precision.score, attention.precision.query, rounded_scale(attention)
    query = rounded(query * scale, of_query) if of_query else query
    scaled = rounded(jnp.einsum("BKGTH,BKSH->BKGTS", query, key, precision="highest"), fmt)
    scaled = scaled if of_query else rounded(scaled * scale, fmt)
    if attention.softcap is not None:
        scaled = rounded(attention.softcap * jnp.tanh(scaled / attention.softcap), fmt)
    return jnp.where(seen, scaled, -jnp.inf)


def rounded_scale(attention: Attention) -> Float[Array, ""]:
    """The scale that the profile multiplies with, in its compute dtype; also of a scale that is traced."""
    precision, scale = attention.precision, attention.scale
    if isinstance(scale, float):
        return jnp.asarray(scale_in(precision, scale), precision.compute)
    return jnp.asarray(scale).astype(precision.score).astype(precision.compute)


def accumulate(
    state: Running, score: Float[Array, "B K G T S"], value: Float[Array, "B K S V"], precision: Precision
) -> Running:
    """The state after one more tile: m' = max(m, max s), l' = l e^(m − m') + Σ e^(s − m'), acc' alike."""
    # No result depends on the maximum (it cancels), so no derivative goes through it.
    maximum = lax.stop_gradient(jnp.maximum(state.maximum, score.max(axis=-1, initial=-jnp.inf)))
    base = finite(maximum)
    p = jnp.exp(rounded(score - base[..., None], precision.distance))
    rescale = jnp.exp(rounded(state.maximum - base, precision.distance))
    weighted = jnp.einsum("BKGTS,BKSV->BKGTV", rounded(p, precision.probability), value, precision="highest")
    return Running(
        maximum,
        state.total * rescale + rounded(p, precision.total).sum(axis=-1),
        state.weighted * rescale[..., None] + weighted,
    )


def finish(state: Running, precision: Precision) -> tuple[Float[Array, "B K G T V"], Float[Array, "B K G T"]]:
    """out = acc / l and lse = m + ln l, rounded to the profile's out and lse formats."""
    out = rounded(state.weighted / divisor(state.total)[..., None], precision.out)
    return out, rounded(log_sum(finite(state.maximum), state.total), precision.lse)


def without_pads(x: Float[Array, "B T *rest"], tokens: Tokens) -> Float[Array, "B T *rest"]:
    """`x` with zeros in the rows of pads: a weight of 0 does not keep out a NaN, for 0 · NaN is NaN.

    >>> from cpjax.mask import tokens
    >>> without_pads(jnp.full((1, 2, 1), jnp.nan), tokens(1, 0, pads=2)).ravel().tolist()
    [0.0, 0.0]
    """
    pad = (tokens.segment == PAD).reshape(x.shape[:2] + (1,) * (x.ndim - 2))
    return jnp.where(pad, jnp.zeros_like(x), x)


def tiles(block, tile: int) -> list:
    """An array `[B, T, …]`, or a tuple of them, cut along T into stacks `[n, B, tile, …]`.

    First a stack of all whole tiles, if there are any, then one of the rest, if there is one. Nothing at all is one
    tile of length 0.

    >>> [stack.shape for stack in tiles(jnp.zeros((1, 1100, 8)), 512)]
    [(2, 1, 512, 8), (1, 1, 76, 8)]
    """
    length = jax.tree.leaves(block)[0].shape[1]
    whole = length // tile * tile

    def part(start: int, stop: int, tile: int):
        return jax.tree.map(
            lambda x: jnp.moveaxis(x[:, start:stop].reshape(x.shape[0], -1 if tile else 1, tile, *x.shape[2:]), 1, 0),
            block,
        )

    rest = [part(whole, length, length - whole)] if whole < length or not length else []
    return ([part(0, whole, tile)] if whole else []) + rest


def heads_first(stack: Float[Array, "n B T *heads X"]) -> Float[Array, "n B *heads T X"]:
    """The same tiles with the tokens next to last.

    >>> heads_first(jnp.zeros((2, 1, 512, 8, 64))).shape
    (2, 1, 8, 512, 64)
    """
    return jnp.moveaxis(stack, 2, -2)


def tokens_first(stacks: list[Float[Array, "_n B *heads _T X"]]) -> Float[Array, "B T *heads X"]:
    """The stacks of tiles joined again, tokens second: the inverse of `tiles` and `heads_first`.

    >>> x = jnp.arange(10.0).reshape(1, 5, 2, 1)
    >>> bool((tokens_first([heads_first(stack) for stack in tiles(x, 2)]) == x).all())
    True
    """
    moved = [jnp.moveaxis(stack, (0, -2), (1, 2)) for stack in stacks]
    return jnp.concatenate([x.reshape(x.shape[0], -1, *x.shape[3:]) for x in moved], axis=1)


def _only(stack):
    return jax.tree.map(lambda x: x[0], stack)


def _nothing_yet(query: Float[Array, "B K G T H"], stack: tuple[Array, Array, Tokens]) -> Running:
    """The state before the first tile."""
    rows, like = query.shape[:-1], (query, stack)
    full = partial(varying_full, dtype=query.dtype, like=like)
    return Running(full(rows, -jnp.inf), full(rows, 0.0), full((*rows, stack[1].shape[-1]), 0.0))
