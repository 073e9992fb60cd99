"""A ring in both directions: shards travel to the next and to the previous rank at the same time.

    step 0       rank r attends to its own shard
    step s       rank r attends to the shards of ranks r − s and r + s (mod cp), one from either neighbour

Links that carry traffic both ways at once are used fully, and there are ⌊cp/2⌋ + 1 steps instead of cp. Every rank
still receives cp − 1 shards: with cp even, the two that would meet at the last step are the same, and one is sent.
"""

from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend as attend_in_tiles
from cpjax.exchange.blocks import Attend, finished, fold
from cpjax.mask import Tokens
from cpjax.partial import Partial


def ring_both_ways_attention(
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
    """What one device does; arguments and result as in `cpjax.exchange.ring.ring_attention`."""
    cp = lax.axis_size(axis_name)
    to_next = [(rank, (rank + 1) % cp) for rank in range(cp)]
    to_previous = [(rank, (rank - 1) % cp) for rank in range(cp)]
    shards, result = [(key, value, kv_tokens)], None
    for step in range(cp // 2 + 1):
        arriving = []
        if 2 * (step + 1) <= cp:
            arriving.append(lax.ppermute(shards[0], axis_name, to_next))
        if 2 * (step + 1) < cp:
            arriving.append(lax.ppermute(shards[-1], axis_name, to_previous))
        for shard in shards:
            result = fold(result, query, q_tokens, shard, attention, chunks, attend)
        shards = arriving
    assert result is not None  # cp >= 1
    return finished(result, attention)
