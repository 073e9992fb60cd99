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
from cpjax.blocks.varying import varying
from cpjax.exchange.blocks import Attend, Shard, finished, fold, packed, repeated, to_next, to_previous
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
    both, opposite = (cp - 1) // 2, cp % 2 == 0  # steps with two shards; whether one rank is as far either way
    shard = (key, value, kv_tokens)
    parcel, unpacked = packed(shard)

    def attended(result: Partial | None, *shards: Shard) -> Partial:
        for shard in shards:
            result = fold(result, query, q_tokens, shard, attention, chunks, attend)
        assert result is not None  # there is a shard
        return result

    def sent(present: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        return to_next(present[0], axis_name), to_previous(present[1], axis_name)

    def step(state: tuple[tuple[list[Array], list[Array]], Partial]) -> tuple:
        present, result = state
        return sent(present), attended(result, *map(unpacked, present))

    present, result = (parcel,), None
    if both:
        arriving = sent((parcel, parcel))
        result = varying(attended(None, shard), like=arriving)
        present, result = repeated(step, (arriving, result), both - 1)
    farthest = to_next(present[0], axis_name) if opposite else None
    result = attended(result, *map(unpacked, present))
    return finished(attended(result, unpacked(farthest)) if farthest is not None else result, attention)
