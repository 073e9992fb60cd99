"""The derivative of one block, in tiles: what FlashAttention-2 does backwards (arXiv 2307.08691, algorithm 2).

With the final `lse` of a query over *all* its keys, the weight of any key is p = exp(s − lse), whatever block it lies
in. So every block's part of the derivatives can be computed by itself, and they add up:

    delta = Σᵥ dout·out − dlse         dv = pᵀ dout        ds = p (dout vᵀ − delta)        dq = scale ds k
                                                                                            dk = scale dsᵀ q
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import KEY_TILE, heads_first, rounded_scale, scores, tiles, tokens_first, without_pads
from cpjax.mask import Tokens, visible
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
    batch, length, heads, _ = query.shape
    kv_heads = key.shape[2]
    compute = attention.precision.compute
    scale = rounded_scale(attention)
    query = without_pads(query, q_tokens).astype(compute)
    key, value = (without_pads(x, kv_tokens).astype(compute) for x in (key, value))
    grouped = (batch, length, kv_heads, heads // kv_heads)
    query, dout = (heads_first(x.reshape(1, *grouped, x.shape[-1]))[0] for x in (query, dout))
    lse, delta = (x.reshape(grouped).transpose(0, 2, 3, 1) for x in (lse, delta))

    def tile(key: Array, value: Array, kv_tokens: Tokens):
        seen = jnp.asarray(visible(attention.mask, q_tokens, kv_tokens))[:, None, None]
        s = scores(query, key, seen, attention)
        p = jnp.exp(s - finite(lse)[..., None])
        dv = jnp.einsum("BKGTS,BKGTV->BKSV", p, dout, precision="highest")
        dp = jnp.einsum("BKGTV,BKSV->BKGTS", dout, value, precision="highest")
        ds = p * (dp - delta[..., None]) * scale
        if attention.softcap is not None:
            ds = ds * (1 - jnp.where(seen, s / attention.softcap, 0.0) ** 2)
        dq = jnp.einsum("BKGTS,BKSH->BKGTH", ds, key, precision="highest")
        return dq, jnp.einsum("BKGTS,BKGTH->BKSH", ds, query, precision="highest"), dv

    def step(dq: Array, block: tuple[Array, Array, Tokens]):
        more, dk, dv = tile(*block)
        return dq + more, (dk, dv)

    total, dks, dvs = None, [], []
    for k, v, places in tiles((key, value, kv_tokens), KEY_TILE):
        stack = heads_first(k), heads_first(v), places
        # The first tile is a step of its own: inside shard_map a scan's carry must vary over the mesh from the start.
        first, others = jax.tree.map(lambda x: x[0], stack), jax.tree.map(lambda x: x[1:], stack)
        dq, dk, dv = tile(*first)
        total = dq if total is None else total + dq
        dks.append(dk[None])
        dvs.append(dv[None])
        if len(others[0]):
            total, (dk, dv) = lax.scan(step, total, others)
            dks.append(dk)
            dvs.append(dv)
    assert total is not None  # there is at least one tile, if of length 0
    dq = jnp.moveaxis(total, 3, 1).reshape(batch, length, heads, query.shape[-1])
    return dq, tokens_first(dks), tokens_first(dvs)
