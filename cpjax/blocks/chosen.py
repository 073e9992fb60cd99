"""Blocks by name, and what each of them can compute.

The readable block defines what is right, and computes everything. The others are kernels of a platform, and compute
less; what they cannot compute is refused, and never computed by another block instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Array

from cpjax.attention import Attention
from cpjax.blocks.cudnn import attend_cudnn
from cpjax.blocks.splash import LANES, attend_splash
from cpjax.blocks.tiles import attend as attend_tiles
from cpjax.errors import InputError
from cpjax.mask import Tokens
from cpjax.partial import Partial
from cpjax.precision import Precision, precision_of

DEFAULT = "tiles"


@dataclass(frozen=True)
class Block:
    """A block, and its limits. Those of a block that is no kernel are empty."""

    name: str
    attend: Callable[[Array, Array, Array, Tokens, Tokens, Attention], Partial]
    about: str = ""
    precisions: Mapping[str, str] = field(default_factory=dict)
    """Dtype of query, key and value → the profile that it computes, and is judged in."""
    platforms: tuple[str, ...] = ()
    head_multiple: int = 1
    head_most: int = 0
    """Head dims of keys and of values."""
    run_multiple: int = 1
    """Tokens of a run."""

    @property
    def is_kernel(self) -> bool:
        """Whether it belongs to a platform."""
        return bool(self.platforms)

    def precision(self, precision: Precision | str | None, dtype: Any) -> Precision:
        """The profile that is computed, or the one that is said.

        >>> block_of("splash").precision(None, np.float32).name, block_of("tiles").precision(None, np.float16).name
        ('float32', 'flash_fp16')

        Raises:
          InputError: the block does not take the dtype, or does not compute the profile that is said.
        """
        if not self.is_kernel:
            return precision_of(precision, dtype)
        name = np.dtype(dtype).name
        if name not in self.precisions:
            raise InputError(
                f"attend={self.name!r} takes arrays of {' or '.join(self.precisions)}, and these are of {name}; cast "
                f"them, or leave attend out"
            )
        found = precision_of(self.precisions[name], dtype)
        if precision is not None and precision_of(precision, dtype) != found:
            raise InputError(
                f"precision is {precision_of(precision, dtype).name!r}; {self.about} computes {found.name!r} of "
                f"arrays of {name}: say that, or leave precision or attend out"
            )
        return found

    def check(self, query: Any, key: Any, value: Any, attention: Attention) -> None:
        """Refuse what the kernel cannot compute of one device's arrays.

        Raises:
          InputError: softcap, window, head dims, dtype or precision.
        """
        if not self.is_kernel:
            return
        self.precision(attention.precision, query.dtype)
        for name, said in (("softcap", attention.softcap), ("window", attention.mask.window)):
            if said is not None:
                raise InputError(f"{name} is {said}; attend={self.name!r} computes none, leave {name} or attend out")
        for name, size in (("head_dim", key.shape[3]), ("the value's head_dim", value.shape[3])):
            if size % self.head_multiple or not 0 < size <= self.head_most:
                raise InputError(
                    f"{name} is {size}; attend={self.name!r} takes multiples of {self.head_multiple} up to "
                    f"{self.head_most}: fill up with zeros (and give the scale), or leave attend out"
                )

    def check_run(self, tokens: int, run: int, runs: int) -> None:
        """Refuse a text of so many tokens, cut into equal runs.

        Raises:
          InputError: a run is no multiple of what the kernel takes at a time.
        """
        if self.is_kernel and (run % self.run_multiple or not run):
            step = self.run_multiple * runs
            raise InputError(
                f"{tokens} tokens make {runs} runs of {run}; attend={self.name!r} takes runs of a multiple of "
                f"{self.run_multiple}: pad the text to {max(-(-tokens // step), 1) * step} tokens at its end (a causal "
                f"mask hides the pads), or leave attend out"
            )


BLOCKS = {
    block.name: block
    for block in (
        Block("tiles", attend_tiles),
        Block(
            "splash",
            attend_splash,
            "JAX's Splash attention",
            {"bfloat16": "scaled_query_bf16", "float32": "float32"},
            platforms=("tpu", "cpu"),
            head_multiple=64,
            head_most=256,
            run_multiple=LANES,
        ),
        Block(
            "cudnn",
            attend_cudnn,
            "cuDNN's attention",
            {"float16": "scaled_query_fp16", "bfloat16": "scaled_query_bf16"},
            platforms=("gpu",),
            head_multiple=8,
            head_most=256,
        ),
    )
}
"""Name → block; "tiles" is the readable one."""


def block_of(name: str) -> Block:
    """The named block.

    >>> block_of("splash").precisions["bfloat16"]
    'scaled_query_bf16'

    Raises:
      InputError: for an unknown name; it lists the known ones.
    """
    if name not in BLOCKS:
        raise InputError(f"unknown attend {name!r:.40}; known are {', '.join(BLOCKS)}")
    return BLOCKS[name]
