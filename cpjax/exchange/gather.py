"""All-gather: every rank gets every key/value shard at once, then walks through them in the order of their ranks.

    step s       every rank attends to the shard of rank s

This is what MindIE runs for the prefill, with the latent of MLA in place of keys and values. The order in which
results are merged is the same on every rank: for cp 2 in zigzag a query meets chunks 0, 3, 1, 2 wherever it is, while
in a ring each rank begins with its own. Memory for all keys and values is the price, one collective the gain.
"""

import jax
from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend as attend_in_tiles
from cpjax.exchange.blocks import Attend, finished, fold
from cpjax.mask import Tokens
from cpjax.partial import Partial


def gather_attention(
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
    shard, result = (key, value, kv_tokens), None
    shards = lax.all_gather(shard, axis_name) if cp > 1 else jax.tree.map(lambda x: x[None], shard)
    for source in range(cp):
        held = jax.tree.map(lambda x, source=source: x[source], shards)
        result = fold(result, query, q_tokens, held, attention, chunks, attend)
    assert result is not None  # cp >= 1
    return finished(result, attention)
