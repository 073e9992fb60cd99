"""Two mesh axes: all-to-all over heads inside a node, a ring between nodes (arXiv 2405.07719).

With axes (outer, inner) of sizes R and I, rank (o, i) is rank o·I + i of the layout. Inside node o the all-to-all
leaves on each rank all tokens of the node and N/I heads; these travel round the ring of the R nodes.

    step s       rank (o, i) attends, for its heads, to the shards of the I ranks of node (o − s) mod R
"""

from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend as attend_in_tiles
from cpjax.exchange.all_to_all import to_few_heads, to_few_tokens
from cpjax.exchange.blocks import Attend
from cpjax.exchange.ring import ring_attention
from cpjax.mask import Tokens
from cpjax.partial import Partial


def all_to_all_ring_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K _"],
    value: Float[Array, "B s K _"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
    *,
    axis_name: tuple[str, str],
    chunks: int = 1,
    attend: Attend = attend_in_tiles,
) -> Partial:
    """What one device does; arguments and result as in `cpjax.exchange.ring.ring_attention`.

    Args:
      axis_name: (outer, inner): the ring's axis and the all-to-all's; tokens are sharded over both, outer first.

    Raises:
      InputError: if the number of query or of key/value heads is not a multiple of the inner ranks.
    """
    outer, inner = axis_name
    moved = to_few_heads(query, key, value, q_tokens, kv_tokens, inner)
    result = ring_attention(*moved, attention, axis_name=outer, chunks=chunks * lax.axis_size(inner), attend=attend)
    return to_few_tokens(result, inner)
