"""The same text on one device, as a check of what was generated.

The check is one pass over prompt and tokens together on one device, in which nothing is cut, cached, absorbed or
merged: its logits at each place must be those of the step, and the token must be its choice. In float64 the two differ
by 1e-14 or so, and a difference that matters cannot hide behind rounding. Where attention rounds to a half format, each
logit has a standard deviation (`cpjax.deepseek.logit_error`), and its difference is counted in it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.generate import Generated, rows_of, texts_of
from cpjax.deepseek.logit_error import Rounds, most, spread
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
    is_in_sigma: bool = False
    """Differences are in standard deviations of the logit under rounding, which may choose another token."""

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.difference <= self.allowed and (self.is_in_sigma or self.other is None)


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
    rounds: Rounds | None = None,
) -> Checked:
    """Hold what was generated against one device.

    Args:
      weights: float64, on one device.
      ids, lengths: the prompts, as they were given to `generate`.
      arithmetic: of quantised weights; as in what was generated.
      rounds: where attention rounded to a half format; None: nowhere, it is float64.

    Raises:
      InputError: weights that are not float64; a profile whose out has no half format.
    """
    if weights.norm.dtype != "float64":
        raise InputError(f"the check is made in float64, the weights are {weights.norm.dtype}; load them in float64")
    steps = generated.ids.shape[1]
    texts, ends = filled(ids, generated, lengths)

    def of_steps(logits: Array) -> Float[np.ndarray, "B steps W"]:
        return np.stack([row[end - steps : end] for row, end in zip(np.asarray(logits), ends, strict=True)])

    if rounds is None:
        expected, sigma = of_steps(on_one_device(config, weights, texts, arithmetic)), None
    else:
        found = spread(config, weights, texts, jnp.asarray(ends - steps + 1), rounds, arithmetic)
        expected, sigma = of_steps(found.logits), of_steps(found.sigma)
    difference = np.abs(generated.logits - expected)
    allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if sigma is not None:
        # A logit that no rounding reaches may differ as it may in float64.
        difference, allowed = difference / np.hypot(sigma, allowed), most(expected.size)
    others = np.flatnonzero((expected.argmax(axis=2) != generated.ids).any(axis=0))
    return Checked(float(difference.max()), allowed, int(others[0]) if len(others) else None, rounds is not None)


def filled(
    ids: Int[Any, "B T"], generated: Generated, lengths: Sequence[int] | Int[np.ndarray, " B"] | None = None
) -> tuple[Int[Array, "B X"], Int[np.ndarray, " B"]]:
    """`texts_of` in rows of one length, and the length of each: no token sees what stands behind its text."""
    rows, ends = rows_of([one.tolist() for one in texts_of(ids, generated, lengths)])
    return jnp.asarray(rows, jnp.int32), ends
