"""The ring: queries stay, key/value shards travel from rank to rank (arXiv 2310.01889).

    step 0       rank r attends to its own shard
    step s       rank r attends to the shard of rank (r − s) mod cp, which has just come from rank r − 1

The next shard is sent before the current one is used, so a compiler or a DMA engine may do both at once. There are
cp steps and cp − 1 transfers; with one rank nothing is sent. The steps between the first and the last are one loop, so
the program is as large for any cp.
"""

from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend as attend_in_tiles
from cpjax.blocks.varying import varying
from cpjax.exchange.blocks import Attend, Shard, finished, fold, packed, repeated, to_next
from cpjax.mask import Tokens
from cpjax.partial import Partial


def ring_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K _"],
    value: Float[Array, "B s K _"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
    *,
    axis_name: str,
    chunks: int = 1,
    attend: Attend = attend_in_tiles,
) -> Partial:
    """What one device does; call it inside `jax.shard_map` over the mesh axis `axis_name`.

    Args:
      query, key, value: this device's shards `[B, t, N, H]`, `[B, s, K, H]`, `[B, s, K, V]`.
      q_tokens, kv_tokens: the places of their tokens.
      chunks: in how many equal pieces a shard's keys are computed and merged, one after the other (2 for zigzag,
        whose shards are two runs of the sequence). It decides only in which order roundings happen.
      attend: computes one block. With another one than the default, key and value may be whatever it expects.

    Returns:
      This device's `out` `[B, t, N, V]` and `lse` `[B, t, N]`, stored in the profile's compute dtype.
    """
    cp = lax.axis_size(axis_name)
    shard = (key, value, kv_tokens)

    def attended(result: Partial | None, shard: Shard) -> Partial:
        return fold(result, query, q_tokens, shard, attention, chunks, attend)

    if cp == 1:
        return finished(attended(None, shard), attention)

    def step(state: tuple[list[Array], Partial]) -> tuple[list[Array], Partial]:
        present, result = state
        arriving = to_next(present, axis_name)
        return arriving, attended(result, unpacked(present))

    parcel, unpacked = packed(shard)
    arriving = to_next(parcel, axis_name)
    result = varying(attended(None, shard), like=arriving)
    last, result = repeated(step, (arriving, result), cp - 2)
    return finished(attended(result, unpacked(last)), attention)
