"""Decode: a few new queries over a cache that is cut by tokens. The cache stays where it is; partials are exchanged.

    every rank   attends, for all queries, to the keys that its own cache holds: (out, lse), (0, −inf) without any
    exchange     one all-gather of these partials, in the profile's out and lse formats
    every rank   merges them in the order of the ranks, so that all of them get the same bits

MindIE's decode with sp > 1, over its cp·sp ranks: `decode_fp16_lse` sends out and lse in FP16 and adds up in float32.
There a rank merges its own heads only (all-to-all over sp, then all-gather over cp); the same partials meet in the same
order, so no bit depends on it. It merges all of them at once and without a maximum, Σ exp(lse) out / Σ exp(lse), which
overflows at lse 88.7; `merge` takes the maximum off first.
"""

from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend as attend_in_tiles
from cpjax.exchange.blocks import Attend, finished
from cpjax.mask import Tokens
from cpjax.partial import Partial, merge, sink_partial
from cpjax.precision import Precision


def decode_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B s K _"],
    value: Float[Array, "B s K _"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
    *,
    axis_name: str | tuple[str, ...],
    sink: Float[Array, " N"] | None = None,
    attend: Attend = attend_in_tiles,
) -> Partial:
    """What one device does; call it inside `jax.shard_map` over the mesh axis `axis_name` (or axes, outermost first).

    Args:
      query, q_tokens: all queries of all requests, the same on every device.
      key, value, kv_tokens: what this device's cache holds, `[B, s, K, H]`; as many slots on every device, the unused
        ones pads (segment −1).
      sink: per query head, the logit of one more key with value 0; merged last, once.
      attend: computes the block, as in `cpjax.exchange.ring.ring_attention`.

    Returns:
      `out` `[B, T, N, V]` and `lse` `[B, T, N]` of all queries over all caches, the same on every device, stored in the
      profile's compute dtype.

    >>> import jax
    >>> from cpjax.mask import Mask, tokens
    >>> from cpjax.parallel import cp_mesh
    >>> from cpjax.precision import profile
    >>> how = Attention(Mask(), 1.0, profile("decode_fp16_lse"))
    >>> device = lambda *arrays: jax.tree.map(lambda x: x[None], decode_attention(*arrays, how, axis_name="cp"))
    >>> x, new, cut = jax.numpy.arange(4.0).reshape(1, 4, 1, 1), tokens(1, 1, start=3), jax.P(None, "cp")
    >>> specs = (jax.P(), cut, cut, jax.P(), cut)
    >>> program = jax.jit(jax.shard_map(device, mesh=cp_mesh(2), in_specs=specs, out_specs=jax.P("cp")))
    >>> program(0 * x[:, :1], x, x, new, tokens(1, 4)).out.ravel()  # logits 0: the mean, on both devices
    Array([1.5, 1.5], dtype=float32)
    """
    precision = attention.precision
    mine = attend(query, key, value, q_tokens, kv_tokens, attention)
    if lax.axis_size(axis_name) == 1:
        return finished(_with_sink(mine, sink, precision), attention)
    # The casts lose nothing: the block has been rounded to these formats. They are what is sent.
    sent = mine.out.astype(precision.out), mine.lse.astype(precision.lse)
    outs, lses = (x.astype(precision.compute) for x in lax.all_gather(sent, axis_name))
    result = Partial(outs[0], lses[0])
    for rank in range(1, len(outs)):
        result = merge(result, Partial(outs[rank], lses[rank]), precision)
    return finished(_with_sink(result, sink, precision), attention)


def _with_sink(result: Partial, sink: Float[Array, " N"] | None, precision: Precision) -> Partial:
    return result if sink is None else merge(result, sink_partial(sink, result), precision)
