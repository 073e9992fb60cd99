"""Interleaved: vLLM's decode context parallelism, whose ranks take turns by tokens, or by small groups of tokens."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError
from cpjax.partition.cached import Cached


@dataclass(frozen=True)
class Interleaved(Cached):
    """Token t of a request is in the cache of rank (t // size) mod cp; `size` is vLLM's `cp_kv_cache_interleave_size`.

    >>> Interleaved(2).owners(0, 5), Interleaved(2, size=2).owners(0, 5)
    (array([0, 1, 0, 1, 0]), array([0, 0, 1, 1, 0]))

    Raises:
      InputError: a size below 1.
    """

    size: int = 1
    name: ClassVar[str] = "interleaved"

    def __post_init__(self):
        """Refuse a group without tokens."""
        super().__post_init__()
        if self.size < 1:
            raise InputError(f"size is {self.size}; it is the number of tokens that stay together, at least 1")

    def owners(self, request: int, length: int) -> Int[np.ndarray, " S"]:
        """The same for every request."""
        return np.arange(length) // self.size % self.cp
