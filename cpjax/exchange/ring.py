"""The ring: queries stay, key/value shards travel from rank to rank (arXiv 2310.01889).

    step 0       rank r attends to its own shard
    step s       rank r attends to the shard of rank (r − s) mod cp, which has just come from rank r − 1

The next shard is sent before the current one is used, so a compiler or a DMA engine may do both at once. There are
cp steps and cp − 1 transfers; with one rank nothing is sent.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cpjax.mask import Mask, Tokens
from cpjax.partial import Partial, merge
from cpjax.precision import Precision
from cpjax.tiles import attend as attend_in_tiles


class Attend(Protocol):
    """One block on one device: the part of the algorithm that the ring does not care about."""

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        q_tokens: Tokens,
        kv_tokens: Tokens,
        *,
        mask: Mask,
        scale: float,
        precision: Precision,
    ) -> Partial:
        """Attention of the queries over this block's keys; see `cpjax.tiles.attend`."""
        ...


def ring_attention(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K H"],
    value: Float[Array, "B s K V"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    *,
    axis_name: str,
    mask: Mask,
    scale: float,
    precision: Precision,
    chunks: int = 1,
    attend: Attend = attend_in_tiles,
) -> Partial:
    """What one device does; call it inside `jax.shard_map` over the mesh axis `axis_name`.

    Args:
      query, key, value, q_tokens, kv_tokens: this device's shards, with the places of their tokens.
      chunks: in how many equal pieces a shard's keys are computed and merged, one after the other (2 for zigzag,
        whose shards are two runs of the sequence). It decides only in which order roundings happen.
      attend: computes one block.

    Returns:
      This device's `out` `[B, t, N, V]` and `lse` `[B, t, N]`, stored in `precision.compute`.
    """
    cp = lax.axis_size(axis_name)
    to_next = [(rank, (rank + 1) % cp) for rank in range(cp)]
    shard = (key, value, kv_tokens)
    result = None
    for step in range(cp):
        arriving = lax.ppermute(shard, axis_name, to_next) if step < cp - 1 else shard
        for block in _pieces(shard, chunks):
            partial = attend(query, block[0], block[1], q_tokens, block[2], mask=mask, scale=scale, precision=precision)
            result = partial if result is None else merge(result, partial, precision)
        shard = arriving
    assert result is not None  # cp >= 1
    return result


def _pieces(shard: tuple[Array, Array, Tokens], chunks: int) -> list[tuple[Array, Array, Tokens]]:
    leaves, structure = jax.tree.flatten(shard)
    return [
        jax.tree.unflatten(structure, piece) for piece in zip(*(jnp.split(x, chunks, 1) for x in leaves), strict=True)
    ]
