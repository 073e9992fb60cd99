"""Blocks: MindIE's KV cache under sp and cp, cut into blocks of 128 tokens that are dealt round the ranks."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from cpjax.partition.cached import Cached
from cpjax.partition.kv_cache import BLOCK, block_ranks


@dataclass(frozen=True)
class Blocks(Cached):
    """Block b of a request is on rank b mod cp, its last block on the last rank (`cpjax.partition.kv_cache`).

    `cp` counts the ranks that share a cache, cp·sp of the deployment. Case files call this partition "decode".

    >>> Blocks(2, block=2).owners(0, 7)
    array([0, 0, 1, 1, 0, 0, 1])
    """

    block: int = BLOCK
    name: ClassVar[str] = "blocks"

    def owners(self, request: int, length: int) -> Int[np.ndarray, " S"]:
        """The same for every request."""
        return np.repeat(block_ranks(length, self.cp, self.block), self.block)[:length]
