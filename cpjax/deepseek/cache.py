"""The latents of past tokens, cut over the ranks of cp by blocks that they take in turns.

    rank(p)  =  ⌊p / block⌋ mod cp                  of the token at position p
    slot(p)  =  ⌊p / (block · cp)⌋ · block + p mod block

This is `cpjax.partition.Interleaved`. MindIE's cache (`cpjax.partition.Blocks`) takes turns alike, but moves the last
block of a prompt to the last rank; where a token lies changes no result but in the last bits.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cpjax.deepseek.attention import Latent
from cpjax.errors import InputError
from cpjax.mask import PAD, Tokens


@dataclass(frozen=True)
class CacheCut:
    """Where tokens lie: `cp` ranks, blocks of `block` tokens, room for `capacity` tokens together.

    >>> CacheCut(cp=2, block=2, capacity=5).positions
    array([[0, 1, 4, 5],
           [2, 3, 6, 7]])

    Raises:
      InputError: no rank, no token in a block, or no room.
    """

    cp: int
    block: int
    capacity: int

    def __post_init__(self):
        """Refuse a cache that holds nothing."""
        for name in ("cp", "block", "capacity"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of the cache is {getattr(self, name)}; it must be at least 1")

    @property
    def slots(self) -> int:
        """Of each rank."""
        return -(-self.capacity // (self.block * self.cp)) * self.block

    @property
    def positions(self) -> Int[np.ndarray, "cp s"]:
        """The position in the text that belongs in each slot of each rank."""
        slot, rank = np.arange(self.slots), np.arange(self.cp)[:, None]
        return (slot // self.block * self.cp + rank) * self.block + slot % self.block

    def place(self, position: Int[Any, "*B"]) -> tuple[Int[Any, "*B"], Int[Any, "*B"]]:
        """Rank and slot of the tokens at these positions.

        >>> [x.tolist() for x in CacheCut(cp=2, block=2, capacity=5).place(jnp.array([3, 4]))]
        [[1, 0], [1, 2]]
        """
        round_ = self.block * self.cp
        return position // self.block % self.cp, position // round_ * self.block + position % self.block


class Cache(NamedTuple):
    """Latents of all layers, `[L, B, cp·slots, …]`, rank after rank, and how many tokens of each row they are."""

    latent: Latent
    length: Int[Array, " B"]


def empty(cut: CacheCut, like: Latent) -> Cache:
    """A cache without tokens, for latents of these layers, rows and widths.

    >>> one = jnp.ones((1, 1, 3, 1))
    >>> cache = empty(CacheCut(2, 1, 4), Latent(one, one))
    >>> cache.latent.c_kv.ravel(), cache.length
    (Array([0., 0., 0., 0.], dtype=float32), Array([0], dtype=int32))
    """
    slots = cut.cp * cut.slots
    latent = jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], slots, *x.shape[3:]), x.dtype), like)
    return Cache(latent, jnp.zeros(like.c_kv.shape[1], jnp.int32))


def with_text(cut: CacheCut, cache: Cache, latent: Latent, length: Int[Array, " B"]) -> Cache:
    """The cache with `length` more tokens a row, whose latents `[L, B, T, …]` lie in natural order; pads are not kept.

    >>> one = jnp.array([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    >>> cut = CacheCut(2, 1, 4)
    >>> with_text(cut, empty(cut, Latent(one, one)), Latent(one, one), jnp.array([3])).latent.c_kv.ravel()
    Array([1., 3., 2., 0.], dtype=float32)
    """
    index = jnp.arange(latent.c_kv.shape[2], dtype=jnp.int32)[None]
    rank, slot = cut.place(cache.length[:, None] + index)
    # Out of range, so that the write is dropped, behind the last token of a row.
    place = jnp.where(index < length[:, None], rank * cut.slots + slot, cut.cp * cut.slots)
    row = jnp.arange(len(length), dtype=jnp.int32)[:, None]
    held = jax.tree.map(lambda x, y: x.at[:, row, place].set(y, mode="drop"), cache.latent, latent)
    return Cache(held, cache.length + length)


def with_new(cut: CacheCut, held: Latent, new: Latent, position: Int[Array, " B"], rank: Int[Array, ""]) -> Latent:
    """One rank's slots `[L, B, slots, …]`, with a new token's latents `[L, B, 1, …]` written if it is this rank's."""
    owner, slot = cut.place(position)
    # Out of range, so that the write is dropped, where the token is another rank's.
    index = jnp.where(owner == rank, slot, cut.slots)
    row = jnp.arange(len(position))
    return jax.tree.map(lambda x, y: x.at[:, row, index].set(y[:, :, 0], mode="drop"), held, new)


def cache_tokens(cut: CacheCut, length: Int[Array, " B"], rank: Int[Array, ""]) -> Tokens:
    """The places of what one rank holds when every row has `length` tokens; empty slots are pads."""
    position = jnp.asarray(cut.positions, jnp.int32)[rank]
    position = jnp.broadcast_to(position[None], (len(length), cut.slots))
    return Tokens(position, jnp.where(position < length[:, None], 0, PAD).astype(jnp.int32))
