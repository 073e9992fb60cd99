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
from cpjax.blocks.varying import varying
from cpjax.exchange.blocks import Attend, finished, fold, packed, repeated, to_next
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
    shard = (key, value, kv_tokens)

    def attended(result: Partial | None, query: Array, q_tokens: Tokens) -> Partial:
        return fold(result, query, q_tokens, shard, attention, chunks, attend)

    if cp == 1:
        return finished(attended(None, query, q_tokens), attention)

    def sent(result: Partial) -> Partial:
        parcel, unpacked = packed(result)
        return unpacked(to_next(parcel, axis_name))

    def step(state: tuple[list[Array], Partial]) -> tuple[list[Array], Partial]:
        present, result = state
        arriving = to_next(present, axis_name)
        return arriving, sent(attended(result, *unpacked(present)))

    parcel, unpacked = packed((query, q_tokens))
    arriving = to_next(parcel, axis_name)
    result = varying(sent(attended(None, query, q_tokens)), like=arriving)
    last, result = repeated(step, (arriving, result), cp - 2)
    return finished(sent(attended(result, *unpacked(last))), attention)
