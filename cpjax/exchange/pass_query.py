"""Pass-query: keys and values stay, queries travel round the ring with the result they have so far.

    step s       rank r attends, for the queries of rank (r − s) mod cp, to its own keys and values,
                 and merges into the result that came with them; after cp steps the results are home

Worth it where the keys are many and the queries few: a long cached prefix, or decoding (arXiv 2411.01783). Queries
are sent cp − 1 times, before they are used; results cp times, after. With one rank nothing is sent.
"""

from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend as attend_in_tiles
from cpjax.exchange.blocks import Attend, finished, fold
from cpjax.mask import Tokens
from cpjax.partial import Partial


def pass_query_attention(
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
    visitor, shard, result = (query, q_tokens), (key, value, kv_tokens), None
    for step in range(cp):
        arriving = lax.ppermute(visitor, axis_name, to_next) if step < cp - 1 else visitor
        result = fold(result, visitor[0], visitor[1], shard, attention, chunks, attend)
        if cp > 1:
            result = lax.ppermute(result, axis_name, to_next)
        visitor = arriving
    assert result is not None  # cp >= 1
    return finished(result, attention)
