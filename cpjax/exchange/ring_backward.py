"""The ring backwards: shards travel once more, and the derivatives of their keys and values travel with them.

    step s       rank r holds the shard of rank (r − s) mod cp, adds to its dk and dv, and to its own dq

A shard is sent cp − 1 times as before; its dk and dv cp times, for the last transfer brings them home. Both are on
their way while a step computes what it adds. What is kept from the forward pass is the rank's own inputs and result,
O(seq/cp); autodiff through the loop would keep all blocks.
The derivatives do not depend on how keys met queries forwards, so this serves every exchange.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import without_pads
from cpjax.blocks.tiles_backward import attend_backward
from cpjax.blocks.varying import varying
from cpjax.exchange.blocks import Shard, packed, repeated, to_next
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
    out, lse, dout, dlse = (jnp.asarray(x) for x in (*result, *cotangent))
    nothing = jnp.isneginf(lse)
    dout = jnp.where(nothing[..., None], 0.0, without_pads(dout, q_tokens))
    delta = jnp.where(nothing, 0.0, (dout * out).sum(axis=-1) - without_pads(dlse, q_tokens))

    def derivatives(shard: Shard) -> tuple[Array, list[Array], Callable]:
        """What a shard adds to dq, and to its dk and dv, which travel as one."""
        dq, *dkv = attend_backward(query, shard[0], shard[1], q_tokens, shard[2], attention, lse, delta, dout)
        return dq, *packed(tuple(dkv))

    shard = (key, value, kv_tokens)
    if cp == 1:
        dq, dkv, apart = derivatives(shard)
        return dq, *apart(dkv)

    def added(state: tuple[list[Array], list[Array], Array], last: bool = False) -> tuple:
        """One more shard. Its dk and dv so far arrive while it is computed what it adds to them."""
        present, dkv, dq = state
        arriving, dkv = present if last else to_next(present, axis_name), to_next(dkv, axis_name)
        more, new, _ = derivatives(unpacked(present))
        return arriving, [old + x for old, x in zip(dkv, new, strict=True)], dq + more

    parcel, unpacked = packed(shard)
    arriving = to_next(parcel, axis_name)
    dq, dkv, apart = derivatives(shard)
    state = repeated(added, varying((arriving, dkv, dq), like=arriving), cp - 2)
    _, dkv, dq = added(state, last=True)
    return dq, *apart(to_next(dkv, axis_name))
