"""All-to-all over heads: each rank gives away its tokens of most heads and gets all tokens of a few (arXiv 2309.14509).

    before       rank r holds T/cp tokens of all heads
    inside       rank r holds all T tokens of N/cp heads, and computes them as one device would
    after        rank r holds the result of T/cp tokens of all heads again

The tokens that arrive lie in the order of the ranks that held them. Their keys are computed in that order, chunk by
chunk, and merged as in `gather_attention`, so roundings fall in the same places.
"""

import jax
from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend as attend_in_tiles
from cpjax.errors import InputError
from cpjax.exchange.blocks import Attend, finished, fold
from cpjax.mask import Tokens
from cpjax.partial import Partial


def all_to_all_attention(
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
    """What one device does; arguments and result as in `cpjax.exchange.ring.ring_attention`.

    Raises:
      InputError: if the number of query or of key/value heads is not a multiple of the ranks.
    """
    cp = lax.axis_size(axis_name)
    query, key, value, q_tokens, kv_tokens = to_few_heads(query, key, value, q_tokens, kv_tokens, axis_name)
    shard = (key, value, kv_tokens)
    result = finished(fold(None, query, q_tokens, shard, attention, cp * chunks, attend), attention)
    return to_few_tokens(result, axis_name)


def to_few_heads(
    query: Array, key: Array, value: Array, q_tokens: Tokens, kv_tokens: Tokens, axis_name: str
) -> tuple[Array, Array, Array, Tokens, Tokens]:
    """All tokens of N/cp heads, from some tokens of all heads."""
    cp = lax.axis_size(axis_name)
    for name, x in (("query", query), ("key/value", key)):
        if x.shape[2] % cp:
            raise InputError(
                f"{x.shape[2]} {name} heads cannot be dealt to {cp} ranks; for all-to-all heads must be a multiple of "
                f"the ranks: repeat the key/value heads, or use another exchange"
            )
    if cp == 1:
        return query, key, value, q_tokens, kv_tokens
    query, key, value = (lax.all_to_all(x, axis_name, 2, 1, tiled=True) for x in (query, key, value))
    q_tokens, kv_tokens = lax.all_gather((q_tokens, kv_tokens), axis_name, axis=1, tiled=True)
    return query, key, value, q_tokens, kv_tokens


def to_few_tokens(result: Partial, axis_name: str) -> Partial:
    """The way back: this rank's tokens, all heads."""
    if lax.axis_size(axis_name) == 1:
        return result
    return jax.tree.map(lambda x: lax.all_to_all(x, axis_name, 1, 2, tiled=True), result)
