"""From a prefill instance to a decode instance: a cache of latents changes hands, the model's or an MTP module's.

    prefill side   S ranks, a prompt's blocks on each as `CacheCut` deals them out
    decode side    each rank fetches all blocks, rank by rank, and stores them one behind the other as they come

So the order of blocks is not the prompt's there. Attention does not mind: a k_rope carries its position in it, and who
sees what follows from positions. New tokens are stored behind the prompt's: they are where a block ends that is only
partly filled, if that block has come last. It has where it lies on the last rank, as MindIE places it.

Source: generate_link_map (model_wrapper/utils/config.py) and router_impl.py of Ascend/MindIE-LLM; `cpjax.mindie.link`
prints the same map for two configs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from cpjax.deepseek.cache import Cache, CacheCut
from cpjax.deepseek.parallel import Setup
from cpjax.errors import InputError


@dataclass(frozen=True)
class Fetched(CacheCut):
    """Where tokens lie on the one rank of a decode instance: block, capacity, is_last_moved as of the prefill side.

    `sources`: ranks of the prefill side.

    >>> Fetched(ranks=1, block=1, capacity=6, is_last_moved=True, sources=2).positions(jnp.array([5]))
    Array([[[0, 2, 1, 3, 4, 5]]], dtype=int32)
    """

    sources: int = 1

    @property
    def source(self) -> CacheCut:
        """Of the prefill side."""
        return CacheCut(self.sources, self.block, self.capacity, self.is_last_moved)

    @property
    def slots(self) -> int:
        """As many as whole blocks have."""
        return -(-self.capacity // self.block) * self.block

    def _order(self, prompt: Int[Array, " B"]) -> Int[Array, "B n"]:
        """The block of the text in each place: those of the prompt by rank, then the others."""
        first = jnp.arange(0, self.slots, self.block, dtype=jnp.int32)[None]
        first = jnp.broadcast_to(first, (len(prompt), self._blocks))
        rank, slot = self.source.place(first, prompt)
        behind = self.sources * self.source.slots
        fetched = rank * self.source.slots + slot
        return jnp.argsort(jnp.where(first < prompt[:, None], fetched, behind + first), axis=1).astype(jnp.int32)

    @property
    def _blocks(self) -> int:
        return self.slots // self.block

    def place(self, position: Int[Array, "B t"], prompt: Int[Array, " B"]) -> tuple[Int[Array, "B t"], ...]:
        """Rank 0, and the slot."""
        target = jnp.argsort(self._order(prompt), axis=1).astype(jnp.int32)
        # A block beyond the last has no place: its tokens are not kept.
        block = jnp.take_along_axis(target, jnp.minimum(position // self.block, self._blocks - 1), axis=1)
        block = jnp.where(position < self.slots, block, self._blocks)
        return jnp.zeros_like(position), block * self.block + position % self.block

    def positions(self, prompt: Int[Array, " B"]) -> Int[Array, "B S s"]:
        """The position in the text that belongs in each slot."""
        within = jnp.arange(self.block, dtype=jnp.int32)[None, None]
        return (self._order(prompt)[:, :, None] * self.block + within).reshape(len(prompt), 1, -1)


class HandedOver(NamedTuple):
    """The cache on the decode side."""

    cut: Fetched
    cache: Cache
    bytes_per_rank: int
    """What each decode rank fetches: latents of the prompts' tokens, all layers."""


def hand_over(cut: CacheCut, cache: Cache, setup: Setup) -> HandedOver:
    """The cache of a prefill instance, fetched by every rank of a decode instance.

    Args:
      cut, cache: after the prefill, on its devices.
      setup: of the decode instance, on other devices or the same; its cp is 1.

    Raises:
      InputError: a decode instance with cp, which MindIE does not have.
    """
    if setup.sizes[0] != 1:
        raise InputError(f"the decode instance has cp {setup.sizes[0]}; only a prefill instance has cp, give it cp 1")
    to = Fetched(1, cut.block, cut.capacity, cut.is_last_moved, cut.ranks)
    position = to.positions(cache.prompt)[:, 0]
    rank, slot = cut.place(position, cache.prompt)
    is_there = (position < cache.length[:, None]) & (slot < cut.slots)
    index, row = jnp.where(is_there, rank * cut.slots + slot, 0), jnp.arange(len(position))[:, None]

    def fetched(x: Array) -> Array:
        return jnp.where(is_there[None, :, :, None], x[:, row, index], 0)

    latent = jax.tree.map(fetched, cache.latent)
    tokens, item = int(cache.length.sum()), latent.c_kv.dtype.itemsize
    size = tokens * item * sum(x.shape[0] * x.shape[-1] for x in latent)
    here = jax.NamedSharding(setup.mesh, P())
    return HandedOver(to, jax.device_put(cache._replace(latent=latent), here), size)
