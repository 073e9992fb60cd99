"""The derivative of one block, in tiles: what FlashAttention-2 does backwards (arXiv 2307.08691, algorithm 2).

With the final `lse` of a query over *all* its keys, the weight of any key is p = exp(s − lse), whatever block it lies
in. So every block's part of the derivatives can be computed by itself, and they add up:

    delta = Σᵥ dout·out − dlse         dv = pᵀ dout        ds = p (dout vᵀ − delta)        dq = scale ds k
                                                                                            dk = scale dsᵀ q

Tiles of queries lie inside tiles of keys, so what is computed at once stays in a cache:

    for each tile of keys:  dk = dv = 0;  for each tile of queries:  dk, dv += …;  dq += …
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import (
    KEY_TILE,
    QUERY_TILE,
    heads_first,
    rounded_scale,
    scores,
    tiles,
    tokens_first,
    where_seen,
    without_pads,
)
from cpjax.blocks.varying import varying_full
from cpjax.mask import Tokens
from cpjax.partial import finite


def attend_backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    dout: Float[Array, "B T N V"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """What this block contributes to dq, and its keys' dk and dv, in the profile's compute dtype.

    Roundings of the forward pass count as the identity; nothing is rounded here.

    Args:
      query, key, value, q_tokens, kv_tokens, attention: as for `cpjax.blocks.tiles.attend`.
      lse, delta, dout: of the final result; finite, 0 in rows that saw nothing.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    compute = attention.precision.compute
    scale = rounded_scale(attention)
    query = without_pads(query, q_tokens).astype(compute)
    key, value = (without_pads(x, kv_tokens).astype(compute) for x in (key, value))
    rows = (x.reshape(batch, length, kv_heads, heads // kv_heads, -1) for x in (query, dout, lse, delta))
    q_stacks = [_Rows.of(*cut) for cut in tiles((*rows, q_tokens), QUERY_TILE)]

    def tile(q: _Rows, key: Array, value: Array, seen: Array | bool) -> tuple[Array, Array, Array]:
        s = scores(q.query, key, seen, attention)
        p = jnp.exp(s - finite(q.lse))
        dp = jnp.einsum("BKGTV,BKSV->BKGTS", q.dout, value, precision="highest")
        ds = p * (dp - q.delta) * scale
        if attention.softcap is not None:
            ds = ds * (1 - jnp.where(seen, s / attention.softcap, 0.0) ** 2)
        dq = jnp.einsum("BKGTS,BKSH->BKGTH", ds, key, precision="highest")
        dk = jnp.einsum("BKGHT,BKGTS->BKHS", q.query_across, ds, precision="highest")
        return dq, dk, jnp.einsum("BKGVT,BKGTS->BKVS", q.dout_across, p, precision="highest")

    def keys(dqs: list[Array], block: tuple[Array, Array, Tokens]) -> tuple[list[Array], tuple[Array, Array]]:
        """One tile of keys with all queries: adds to their dq, and gives its own dk and dv."""
        key, value, kv_tokens = block

        def queries(dkv: tuple[Array, Array], q: _Rows) -> tuple[tuple[Array, Array], Array]:
            def computed(seen: Array | bool) -> tuple[tuple[Array, Array], Array]:
                dq, dk, dv = tile(q, key, value, seen)
                return (dkv[0] + dk, dkv[1] + dv), dq

            hidden = dkv, zeros(q.query.shape)
            return where_seen(attention.mask, q.places, kv_tokens, computed, hidden)

        dkv, new = (zeros(jnp.swapaxes(key, -1, -2).shape), zeros(jnp.swapaxes(value, -1, -2).shape)), []
        for stack in q_stacks:
            dkv, dq = _each(queries, dkv, stack)
            new.append(dq)
        dk, dv = (jnp.swapaxes(x, -1, -2) for x in dkv)
        return [old + more for old, more in zip(dqs, new, strict=True)], (dk, dv)

    zeros = partial(varying_full, x=0.0, dtype=compute, like=(q_stacks, key, value, kv_tokens, scale))
    dqs, dks, dvs = [zeros(stack.query.shape) for stack in q_stacks], [], []
    for k, v, places in tiles((key, value, kv_tokens), KEY_TILE):
        dqs, (dk, dv) = _each(keys, dqs, (heads_first(k), heads_first(v), places))
        dks.append(dk)
        dvs.append(dv)
    return tokens_first(dqs).reshape(batch, length, heads, head_dim), tokens_first(dks), tokens_first(dvs)


class _Rows(NamedTuple):
    """Tiles of queries `[n, B, K, G, T, …]`, with all that is theirs.

    The two that are summed over queries are there a second time with the tokens last, made once for all tiles of keys:
    XLA computes pᵀ dout on a CPU at a third of the speed of doutᵀ p, where no matrix is read across its rows.
    """

    query: Float[Array, "*n B K G T H"]
    dout: Float[Array, "*n B K G T V"]
    lse: Float[Array, "*n B K G T 1"]
    delta: Float[Array, "*n B K G T 1"]
    places: Tokens
    query_across: Float[Array, "*n B K G H T"]
    dout_across: Float[Array, "*n B K G V T"]

    @classmethod
    def of(cls, query: Array, dout: Array, lse: Array, delta: Array, places: Tokens) -> "_Rows":
        query, dout, lse, delta = (heads_first(x) for x in (query, dout, lse, delta))
        return cls(query, dout, lse, delta, places, *(jnp.swapaxes(x, -1, -2) for x in (query, dout)))


def _each(step: Callable, carry: Any, stack: Any) -> tuple[Any, Any]:
    """`lax.scan`, without a loop where there is one tile."""
    if len(jax.tree.leaves(stack)[0]) > 1:
        return lax.scan(step, carry, stack)
    carry, made = step(carry, jax.tree.map(lambda x: x[0], stack))
    return carry, jax.tree.map(lambda x: x[None], made)
