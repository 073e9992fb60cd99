"""One block: queries against keys in tiles, the FlashAttention-2 recurrence (arXiv 2307.08691, algorithm 1).

Scores of one tile of keys at a time are computed and thrown away; what stays per query is the running maximum m, the
sum l of exp(s − m) and the sum acc of exp(s − m)·v. A new maximum rescales both. The stages are functions of their
own, because in which format each of them rounds is part of the specification and is tested stage by stage.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from cpjax.mask import Mask, Tokens, visible
from cpjax.partial import Partial, divisor, finite
from cpjax.precision import Precision, rounded, scale_in

KEY_TILE = 512
"""Keys a tile; the vendor's kernel takes 512 columns a step too. Part of the numerics: p is rounded relative to the
maximum so far."""


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
    *,
    mask: Mask,
    scale: float,
    precision: Precision,
) -> Partial:
    """Attention of every query over the keys of this block that it may see.

    Args:
      query, key, value: any float dtype; converted exactly to `precision.compute`. N is a multiple of K, and query
        heads n·G … n·G+G−1 share key/value head n.
      q_tokens, kv_tokens: places of the queries `[B, T]` and keys `[B, S]`.

    Returns:
      Partial with `out` `[B, T, N, V]`, rounded to `precision.out`, and `lse` `[B, T, N]`, both stored in
      `precision.compute`. A query that sees no key gets (0, −inf).
    """
    batch, length, heads, _ = query.shape
    kv_heads = key.shape[2]
    query, key, value = (x.astype(precision.compute) for x in (query, key, value))
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, -1)

    def step(state: Running, key: Array, value: Array, kv_tokens: Tokens) -> Running:
        seen = visible(mask, q_tokens, kv_tokens)[:, None, None]
        return accumulate(state, scores(grouped, key, seen, scale, precision), value, precision)

    # The first tile is a step of its own: inside shard_map a scan's carry must vary over the mesh from the start.
    first, *others = _tiles((key, value, kv_tokens))
    state = step(_nothing_yet(grouped, value), *first)
    for tiles in others:
        state, _ = lax.scan(lambda state, tile: (step(state, *tile), None), state, tiles)
    out, lse = finish(state, precision)
    return Partial(
        out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1),
        lse.transpose(0, 3, 1, 2).reshape(batch, length, heads),
    )


def scores(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B S K H"],
    seen: Bool[Array, "B 1 1 T S"],
    scale: float,
    precision: Precision,
) -> Float[Array, "B K G T S"]:
    """`scale · q·k`, rounded where the profile says, −inf where the key is not seen."""
    raw = jnp.einsum("BTKGH,BSKH->BKGTS", query, key, precision="highest")
    raw = rounded(raw, precision.score)
    scaled = rounded(raw * jnp.asarray(scale_in(precision, scale), raw.dtype), precision.score)
    return jnp.where(seen, scaled, -jnp.inf)


def accumulate(
    state: Running, score: Float[Array, "B K G T S"], value: Float[Array, "B S K V"], precision: Precision
) -> Running:
    """The state after one more tile: m' = max(m, max s), l' = l e^(m − m') + Σ e^(s − m'), acc' alike."""
    maximum = jnp.maximum(state.maximum, score.max(axis=-1))
    base = finite(maximum)
    p = jnp.exp(rounded(score - base[..., None], precision.score))
    rescale = jnp.exp(rounded(state.maximum - base, precision.score))
    mean_part = jnp.einsum("BKGTS,BSKV->BKGTV", rounded(p, precision.probability), value, precision="highest")
    return Running(
        maximum,
        state.total * rescale + p.sum(axis=-1),
        state.weighted * rescale[..., None] + mean_part,
    )


def finish(state: Running, precision: Precision) -> tuple[Float[Array, "B K G T V"], Float[Array, "B K G T"]]:
    """out = acc / l, rounded to the profile's out format, and lse = m + ln l."""
    out = rounded(state.weighted / divisor(state.total)[..., None], precision.out)
    return out, finite(state.maximum) + jnp.log(state.total)


def _nothing_yet(query: Array, value: Array) -> Running:
    batch, length, kv_heads, group, _ = query.shape
    rows = (batch, kv_heads, group, length)
    return Running(
        jnp.full(rows, -jnp.inf, query.dtype),
        jnp.zeros(rows, query.dtype),
        jnp.zeros((*rows, value.shape[-1]), query.dtype),
    )


def _tiles(block: tuple[Array, Array, Tokens]) -> list:
    """The first tile of the keys, then stacks of tiles `[n, B, tile, …]`: the whole ones, and the rest if any."""
    length = block[0].shape[1]
    whole = (length - KEY_TILE) // KEY_TILE * KEY_TILE if length > KEY_TILE else 0
    cuts = [min(KEY_TILE, length), min(KEY_TILE, length) + whole]

    def part(start: int, stop: int, tile: int):
        return jax.tree.map(
            lambda x: jnp.moveaxis(x[:, start:stop].reshape(x.shape[0], -1, tile, *x.shape[2:]), 1, 0), block
        )

    first = jax.tree.map(lambda x: x[:, : cuts[0]], block)
    stacks = [part(cuts[0], cuts[1], KEY_TILE)] if whole else []
    return [first, *stacks, *([part(cuts[1], length, length - cuts[1])] if cuts[1] < length else [])]
