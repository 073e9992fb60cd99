"""The latents of past tokens, cut over the S ranks that share a cache, by blocks that they take in turns.

    b        =  ⌊p / block⌋                    the block of the token at position p
    rank(b)  =  b mod S                        its slots on a rank follow those of the rank's blocks before it

S is cp, or with sp cp·tp: then the ranks of tp, which would all hold the same latents, hold different ones. MindIE
(`cpjax.partition.Blocks`) moves the last block of a prompt to the last rank, and deals on from there:

    n        =  max(⌈prompt / block⌉, S)       a prompt of at most S blocks is not moved
    rank(b)  =  b mod S                        b < n − 1
             =  (b − n) mod S                  else: of the prompt's last block S − 1, of the one behind it 0

With n = S this is dealing in turns. Where a token lies changes no result but in the last bits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from cpjax.deepseek.attention import Latent
from cpjax.errors import InputError
from cpjax.mask import PAD, Tokens


@dataclass(frozen=True)
class CacheCut:
    """Where tokens lie: blocks of `block` tokens on `ranks` ranks, room for `capacity` tokens together.

    `is_last_moved`: the last block of a prompt is on the last rank, as in MindIE.

    >>> CacheCut(ranks=2, block=2, capacity=5).positions(jnp.array([0]))[0]
    Array([[0, 1, 4, 5],
           [2, 3, 6, 7]], dtype=int32)
    >>> CacheCut(ranks=2, block=1, capacity=4, is_last_moved=True).positions(jnp.array([3]))[0]
    Array([[0, 3, 5],
           [1, 2, 4]], dtype=int32)

    Raises:
      InputError: no rank, no token in a block, or no room.
    """

    ranks: int
    block: int
    capacity: int
    is_last_moved: bool = False

    def __post_init__(self):
        """Refuse a cache that holds nothing."""
        for name in ("ranks", "block", "capacity"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of the cache is {getattr(self, name)}; it must be at least 1")

    @property
    def slots(self) -> int:
        """Of each rank: where a block is moved, a rank may get one more than its share."""
        return (-(-self.capacity // (self.block * self.ranks)) + self.is_last_moved) * self.block

    def _turns(self, prompt: Int[Array, " B"]) -> Int[Array, "B 1"]:
        """n of each row."""
        blocks = -(-prompt // self.block) if self.is_last_moved else jnp.zeros_like(prompt)
        return jnp.maximum(blocks, self.ranks)[:, None]

    def _before(self, turns: Int[Array, "B *n"], rank: Int[Array, "..."]) -> Int[Array, "..."]:
        """How many of blocks 0 … n − 2 a rank has."""
        return (turns + self.ranks - 2 - rank) // self.ranks

    def place(self, position: Int[Array, "B t"], prompt: Int[Array, " B"]) -> tuple[Int[Array, "B t"], ...]:
        """Rank and slot of the tokens at these positions of rows that began with prompts of so many tokens.

        >>> cut = CacheCut(ranks=2, block=2, capacity=5)
        >>> [x.tolist() for x in cut.place(jnp.array([[3, 4]]), jnp.array([5]))]
        [[[1, 0]], [[1, 2]]]
        """
        turns, ranks, block = self._turns(prompt), self.ranks, position // self.block
        is_early = block < turns - 1
        rank = jnp.where(is_early, block, block - turns) % ranks
        # (rank + 1) // ranks is 1 on the last rank, whose the first of the later blocks is, the prompt's last.
        late = self._before(turns, rank) + (block - turns) // ranks + (rank + 1) // ranks
        return rank, jnp.where(is_early, block // ranks, late) * self.block + position % self.block

    def positions(self, prompt: Int[Array, " B"]) -> Int[Array, "B S s"]:
        """The position in the text that belongs in each slot of each rank."""
        slot = jnp.arange(self.slots, dtype=jnp.int32)[None, None]
        rank = jnp.arange(self.ranks, dtype=jnp.int32)[None, :, None]
        turns, number = self._turns(prompt.astype(jnp.int32))[:, :, None], slot // self.block
        before = self._before(turns, rank)
        late = turns + (number - before - (rank + 1) // self.ranks) * self.ranks + rank
        return jnp.where(number < before, number * self.ranks + rank, late) * self.block + slot % self.block


class Cache(NamedTuple):
    """Latents of all layers, `[L, B, S·slots, …]`, rank after rank; how many tokens of each row they are.

    Slots behind the last token may hold anything: a shorter `length` takes the last tokens back.
    """

    latent: Latent
    length: Int[Array, " B"]
    prompt: Int[Array, " B"]
    """Tokens of each row's prompt, by which its last block is placed."""


def empty(cut: CacheCut, like: Latent, prompt: Int[Array, " B"]) -> Cache:
    """A cache without tokens, for latents of these layers, rows and widths, and prompts of so many tokens.

    >>> one = jnp.ones((1, 1, 3, 1))
    >>> cache = empty(CacheCut(2, 1, 4), Latent(one, one), jnp.array([3]))
    >>> cache.latent.c_kv.ravel(), cache.length
    (Array([0., 0., 0., 0.], dtype=float32), Array([0], dtype=int32))
    """
    slots = cut.ranks * cut.slots
    latent = jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], slots, *x.shape[3:]), x.dtype), like)
    return Cache(latent, jnp.zeros(like.c_kv.shape[1], jnp.int32), prompt)


def with_text(cut: CacheCut, cache: Cache, latent: Latent, length: Int[Array, " B"]) -> Cache:
    """The cache with `length` more tokens a row, whose latents `[L, B, T, …]` lie in natural order; pads are not kept.

    >>> one = jnp.array([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    >>> cut, three = CacheCut(2, 1, 4), jnp.array([3])
    >>> with_text(cut, empty(cut, Latent(one, one), three), Latent(one, one), three).latent.c_kv.ravel()
    Array([1., 3., 2., 0.], dtype=float32)
    """
    index = jnp.arange(latent.c_kv.shape[2], dtype=jnp.int32)[None]
    rank, slot = cut.place(cache.length[:, None] + index, cache.prompt)
    # Out of range, so that the write is dropped, behind the last token of a row and where there is no room.
    is_kept = (index < length[:, None]) & (slot < cut.slots)
    place = jnp.where(is_kept, rank * cut.slots + slot, cut.ranks * cut.slots)
    row = rows(len(length))
    held = jax.tree.map(lambda x, y: x.at[:, row, place].set(y, mode="drop"), cache.latent, latent)
    return cache._replace(latent=held, length=cache.length + length)


def with_new(
    cut: CacheCut, held: Latent, new: Latent, position: Int[Array, "B t"], prompt: Int[Array, " B"], rank: Array
) -> Latent:
    """One rank's slots `[L, B, slots, …]`, with those of new tokens' latents `[L, B, t, …]` written that are its."""
    owner, slot = cut.place(position, prompt)
    # Out of range, so that the write is dropped, where the token is another rank's.
    index = jnp.where(owner == rank, slot, cut.slots)
    row = rows(len(position))
    return jax.tree.map(lambda x, y: x.at[:, row, index].set(y, mode="drop"), held, new)


def rows(count: int) -> Int[Array, "B 1"]:
    """The numbers of rows, to stand beside what each has."""
    return jnp.arange(count, dtype=jnp.int32)[:, None]


def cache_tokens(cut: CacheCut, length: Int[Array, " B"], prompt: Int[Array, " B"]) -> Tokens:
    """The places of what all ranks hold, rank after rank, when rows have `length` tokens.

    A token's segment is the number of its row; empty slots are pads.

    >>> cache_tokens(CacheCut(2, 1, 4), jnp.array([3]), jnp.array([3]))
    Tokens(position=Array([[0, 2, 1, 3]], dtype=int32), segment=Array([[ 0,  0,  0, -1]], dtype=int32))
    """
    position = cut.positions(prompt).reshape(len(prompt), -1)
    return Tokens(position, jnp.where(position < length[:, None], rows(len(prompt)), PAD))
