"""What all exchanges share: computing a block, and merging the blocks of a shard into what is already there."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cpjax.attention import Attention
from cpjax.mask import Tokens
from cpjax.partial import Partial, merge
from cpjax.precision import Precision
from cpjax.rounding import rounded

Shard = tuple[Array, Array, Tokens]
"""Keys, values and the places of their tokens: what travels."""


Attend = Callable[[Array, Array, Array, Tokens, Tokens, Attention], Partial]
"""Query, key, value, places of both, attention → partial: one block, the part that no exchange cares about."""


def fold(
    result: Partial | None,
    query: Array,
    q_tokens: Tokens,
    shard: Shard,
    attention: Attention,
    chunks: int,
    attend: Attend,
) -> Partial:
    """`result` (None: nothing yet) merged with the blocks of a shard, whose keys are cut into `chunks` equal runs."""
    for key, value, kv_tokens in pieces(shard, chunks):
        block = attend(query, key, value, q_tokens, kv_tokens, attention)
        result = block if result is None else merge(result, block, attention.precision)
    assert result is not None  # chunks >= 1
    return result


def finished(result: Partial, attention: Attention) -> Partial:
    """The last result: `out` rounded to the format in which it is handed over."""
    return Partial(rounded(jnp.asarray(result.out), attention.precision.out), result.lse)


def delivered(result: Partial, precision: Precision) -> Partial:
    """The result as a caller gets it: `out` in the profile's out dtype, which loses nothing after `finished`."""
    return Partial(jnp.asarray(result.out).astype(precision.out), result.lse)


def pieces(shard: Shard, chunks: int) -> list[Shard]:
    """The shard cut along its tokens."""
    leaves, structure = jax.tree.flatten(shard)
    cut = zip(*(jnp.split(x, chunks, axis=1) for x in leaves), strict=True)
    return [jax.tree.unflatten(structure, piece) for piece in cut]
