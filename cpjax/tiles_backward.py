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
from cpjax.mask import Tokens, visible
from cpjax.partial import finite
from cpjax.precision import scale_in
from cpjax.tiles import KEY_TILE, scores, tiles, without_pads


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
      query, key, value, q_tokens, kv_tokens, attention: as for `cpjax.tiles.attend`.
      lse, delta, dout: of the final result; finite, 0 in rows that saw nothing.
    """
    batch, length, heads, _ = query.shape
    kv_heads = key.shape[2]
    compute = attention.precision.compute
    scale = jnp.asarray(scale_in(attention.precision, attention.scale), compute)
    query = without_pads(query, q_tokens).astype(compute)
    key, value = (without_pads(x, kv_tokens).astype(compute) for x in (key, value))
    grouped = (batch, length, kv_heads, heads // kv_heads)
    query, dout = (x.reshape(*grouped, x.shape[-1]) for x in (query, dout))
    lse, delta = (x.reshape(grouped).transpose(0, 2, 3, 1) for x in (lse, delta))

    def tile(key: Array, value: Array, kv_tokens: Tokens):
        seen = jnp.asarray(visible(attention.mask, q_tokens, kv_tokens))[:, None, None]
        s = scores(query, key, seen, attention)
        p = jnp.exp(s - finite(lse)[..., None])
        dv = jnp.einsum("BKGTS,BTKGV->BSKV", p, dout, precision="highest")
        dp = jnp.einsum("BTKGV,BSKV->BKGTS", dout, value, precision="highest")
        ds = p * (dp - delta[..., None]) * scale
        if attention.softcap is not None:
            ds = ds * (1 - jnp.where(seen, s / attention.softcap, 0.0) ** 2)
        dq = jnp.einsum("BKGTS,BSKH->BTKGH", ds, key, precision="highest")
        return dq, jnp.einsum("BKGTS,BTKGH->BSKH", ds, query, precision="highest"), dv

    def step(dq: Array, block: tuple[Array, Array, Tokens]):
        more, dk, dv = tile(*block)
        return dq + more, (dk, dv)

    total, dks, dvs = None, [], []
    for stack in tiles((key, value, kv_tokens), KEY_TILE):
        # The first tile is a step of its own: inside shard_map a scan's carry must vary over the mesh from the start.
        first, others = jax.tree.map(lambda x: x[0], stack), jax.tree.map(lambda x: x[1:], stack)
        dq, dk, dv = tile(*first)
        total = dq if total is None else total + dq
        dks.append(dk)
        dvs.append(dv)
        if len(others[0]):
            total, (dk, dv) = lax.scan(step, total, others)
            dks.append(_flat(dk))
            dvs.append(_flat(dv))
    assert total is not None  # there is at least one tile, if of length 0
    dq = total.reshape(batch, length, heads, query.shape[-1])
    return dq, jnp.concatenate(dks, axis=1), jnp.concatenate(dvs, axis=1)


def _flat(stack: Float[Array, "n B tile K X"]) -> Float[Array, "B n*tile K X"]:
    return jnp.moveaxis(stack, 0, 1).reshape(stack.shape[1], -1, *stack.shape[3:])
