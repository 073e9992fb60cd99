"""Ranges of what goes into static layers: one scale for all activations has to be found before there are any.

The float model reads a text of random tokens on one device, in float32, and the least and the largest number that goes
into each weight is written down. What lies outside is cut off when the quantised model runs, as with the vendor's
tool, which reads texts of its own. From a range [low, high], 0 in it, follow

    input_scale   =  (high − low) / 255
    input_offset  =  round(−128 − low / input_scale)                   so that low becomes −128, high 127
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.model import forward
from cpjax.deepseek.names import weights_of
from cpjax.deepseek.watched import Watched

TOKENS = 128
"""Of the text."""


class Range(NamedTuple):
    """What was seen; 0 is always in it."""

    low: float = 0.0
    high: float = 0.0

    @property
    def scale(self) -> float:
        """input_scale; 1 where nothing but 0 was seen."""
        return (self.high - self.low) / 255 or 1.0

    @property
    def offset(self) -> float:
        """input_offset, a whole number.

        >>> Range(-1.0, 254.0).scale, Range(-1.0, 254.0).offset
        (1.0, -127.0)
        """
        return float(np.round(-128 - self.low / self.scale))


def input_ranges(
    config: DeepseekConfig, tensors: dict[str, np.ndarray], names: Iterable[str], seed: int
) -> dict[str, Range]:
    """The range of the inputs of each of these weights, none of them of experts.

    Args:
      tensors: all weights of the model, floats, by name.
      seed: of the text.
    """
    watched, found = set(names), dict.fromkeys(names, Range())

    def get(name: str) -> jax.Array | Watched:
        weight = jnp.asarray(tensors[name].astype(np.float32))
        if name not in watched:
            return weight

        def tell(x: Any, _: Any) -> None:
            seen = found[name]
            found[name] = Range(min(seen.low, float(x.min())), max(seen.high, float(x.max())))

        return Watched(weight, tell)

    count = min(TOKENS, config.max_position_embeddings)
    text = np.random.default_rng(seed).integers(0, config.vocab_size, (1, count))
    weights = weights_of(config, get, jnp.stack)
    jax.jit(lambda *x: forward(x[0], config, x[1]))(weights, jnp.asarray(text, jnp.int32)).block_until_ready()
    jax.effects_barrier()
    return found
