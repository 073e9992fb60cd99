"""The ring backwards: shards travel once more, and the derivatives of their keys and values travel with them.

    step s       rank r holds the shard of rank (r − s) mod cp, adds to its dk and dv, and to its own dq

A shard is sent cp − 1 times as before; its dk and dv cp times, for the last transfer brings them home. What is kept
from the forward pass is the rank's own inputs and result, O(seq/cp); autodiff through the loop would keep all blocks.
The derivatives do not depend on how keys met queries forwards, so this serves every exchange.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import without_pads
from cpjax.blocks.tiles_backward import attend_backward
from cpjax.mask import Tokens
from cpjax.partial import Partial


def ring_backward(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K H"],
    value: Float[Array, "B s K V"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
    result: Partial,
    cotangent: Partial,
    *,
    axis_name: str | tuple[str, ...],
) -> tuple[Float[Array, "B t N H"], Float[Array, "B s K H"], Float[Array, "B s K V"]]:
    """This device's dq, dk and dv, in the profile's compute dtype.

    Args:
      query, key, value, q_tokens, kv_tokens: this device's shards.
      result, cotangent: what the forward pass gave, and the derivatives with respect to its `out` and `lse`. Rows that
        saw no key contribute nothing, whatever their cotangent.
    """
    cp = lax.axis_size(axis_name)
    to_next = [(rank, (rank + 1) % cp) for rank in range(cp)]
    out, lse, dout, dlse = (jnp.asarray(x) for x in (*result, *cotangent))
    nothing = jnp.isneginf(lse)
    dout = jnp.where(nothing[..., None], 0.0, without_pads(dout, q_tokens))
    delta = jnp.where(nothing, 0.0, (dout * out).sum(axis=-1) - without_pads(dlse, q_tokens))
    shard, dq, dkv = (key, value, kv_tokens), None, None
    for step in range(cp):
        arriving = lax.ppermute(shard, axis_name, to_next) if step < cp - 1 else shard
        more = attend_backward(query, shard[0], shard[1], q_tokens, shard[2], attention, lse, delta, dout)
        dq = more[0] if dq is None else dq + more[0]
        dkv = more[1:] if dkv is None else jax.tree.map(jnp.add, dkv, more[1:])
        dkv = lax.ppermute(dkv, axis_name, to_next) if cp > 1 else dkv
        shard = arriving
    assert dq is not None  # cp >= 1
    assert dkv is not None
    return dq, dkv[0], dkv[1]
