"""The same text on one device, as a check of what was generated.

The check is one pass over prompt and tokens together on one device, in which nothing is cut, cached, absorbed or
merged: its logits at each place must be those of the step, and the token must be its choice. In float64 only: there the
two differ by 1e-14 or so, and a difference that matters cannot hide behind rounding.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.generate import Generated, texts_of
from cpjax.deepseek.model import ModelWeights, forward
from cpjax.deepseek.quantized_linear import Arithmetic
from cpjax.errors import InputError

TOLERANCE = 1e-10
"""Largest |difference| of logits in float64 that is none, relative to the largest |logit| where that is above 1."""


class Checked(NamedTuple):
    """How the steps compare with one device."""

    difference: float
    """Largest |difference| of a logit; NaN if there is one."""
    allowed: float
    other: int | None
    """The first step at which one device chooses another token."""

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.difference <= self.allowed and self.other is None


@partial(jax.jit, static_argnums=(0, 3))
def on_one_device(
    config: DeepseekConfig, weights: ModelWeights, text: Int[Array, "B T"], arithmetic: Arithmetic = "exact"
) -> Float[Array, "B T W"]:
    """`forward`, compiled."""
    return forward(weights, config, text, arithmetic=arithmetic)


def check(
    config: DeepseekConfig,
    weights: ModelWeights,
    ids: Int[Any, "B T"],
    generated: Generated,
    arithmetic: Arithmetic = "exact",
    *,
    lengths: Sequence[int] | Int[np.ndarray, " B"] | None = None,
) -> Checked:
    """Hold what was generated against one device.

    Args:
      weights: float64, on one device.
      ids, lengths: the prompts, as they were given to `generate`.
      arithmetic: of quantised weights; as in what was generated.

    Raises:
      InputError: weights that are not float64.
    """
    if weights.norm.dtype != "float64":
        raise InputError(f"the check is made in float64, the weights are {weights.norm.dtype}; load them in float64")
    batch, steps = generated.ids.shape
    text = texts_of(ids, generated, lengths)
    filled = np.zeros((batch, max(map(len, text))), np.int32)
    for row, one in zip(filled, text, strict=True):
        row[: len(one)] = one  # no token sees what stands behind it
    whole = np.asarray(on_one_device(config, weights, jnp.asarray(filled), arithmetic))
    expected = np.stack([row[len(one) - steps : len(one)] for row, one in zip(whole, text, strict=True)])
    others = np.flatnonzero((expected.argmax(axis=2) != generated.ids).any(axis=0))
    return Checked(
        float(np.abs(generated.logits - expected).max()),
        TOLERANCE * max(1.0, float(np.abs(expected).max())),
        int(others[0]) if len(others) else None,
    )
