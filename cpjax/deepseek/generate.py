"""Greedy decoding on a mesh, and the same text on one device as a check.

    prompt  ─prefill─▶  latents, first token  ─cut─▶  cache  ─step─▶  next token  ─step─▶  …
    in chunks: each is prefilled with what is cached of those before it

The check is one pass over prompt and tokens together on one device, in which nothing is cut, cached, absorbed or
merged: its logits at each place must be those of the step, and the token must be its choice. In float64 only: there the
two differ by 1e-14 or so, and a difference that matters cannot hide behind rounding.
"""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpjax.deepseek.cache import CacheCut
from cpjax.deepseek.checkpoint import Advance
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.model import ModelWeights, forward, logits_of
from cpjax.deepseek.parallel import Setup, checked_ids, decode_step, extended_cache, prefill
from cpjax.deepseek.quantized_linear import Arithmetic
from cpjax.errors import InputError

BLOCK = 128
"""Tokens of a block of the cache, as in MindIE."""

TOLERANCE = 1e-10
"""Largest |difference| of logits in float64 that is none, relative to the largest |logit| where that is above 1."""


class Generated(NamedTuple):
    """What came of a prompt."""

    ids: Int[np.ndarray, "B steps"]
    """The new tokens."""
    logits: Float[np.ndarray, "B steps W"]
    """Of which each is the largest."""
    seconds: dict[str, float]
    """prefill and first step, with compilation; all further steps together."""


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


def generate(
    setup: Setup,
    weights: ModelWeights,
    ids: Int[Any, "B T"],
    steps: int,
    *,
    block: int = BLOCK,
    chunk: int | None = None,
    advance: Advance = lambda what, done, total: None,
) -> Generated:
    """The `steps` tokens that follow a prompt, each the one with the largest logit (of equal ones the first).

    Args:
      ids: the prompts, all of one length.
      block: tokens of a block of the cache; a short text lies on few ranks if it is large.
      chunk: tokens of the prompt that are prefilled at once; None: all of them.
      advance: is told how many tokens there are.

    Raises:
      InputError: ids that the model does not have; no step, an empty chunk; more tokens than the model has positions
        for.
    """
    ids = checked_ids(setup.config, ids)
    if steps < 1:
        raise InputError(f"steps is {steps}; it is the number of new tokens, at least 1")
    length = ids.shape[1]
    if length + steps > setup.config.max_position_embeddings:
        raise InputError(
            f"{length} tokens and {steps} steps are more than the model's max_position_embeddings, "
            f"{setup.config.max_position_embeddings}; give fewer"
        )
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}; it is the number of tokens that are prefilled at once, at least 1")
    started = time.perf_counter()
    cut, cache, outcome = CacheCut(setup.sizes[0], block, length + steps), None, None
    for part in np.split(ids, range(chunk or length, length, chunk or length), axis=1):
        outcome = prefill(setup, weights, part, cut=None if cache is None else cut, cache=cache)
        cache = extended_cache(setup, cut, outcome, np.full(len(ids), part.shape[1]), cache)
    assert cache is not None  # a prompt has a token
    assert outcome is not None
    found = [np.asarray(logits_of(weights, setup.config, outcome.hidden[:, -1:])[:, 0])]
    seconds = {"prefill": time.perf_counter() - started, "first step": 0.0, "further steps": 0.0}
    advance("tokens", 1, steps)
    for step in range(1, steps):
        started = time.perf_counter()
        token = jnp.asarray(found[-1].argmax(axis=1), jnp.int32)
        logits, cache = decode_step(setup, cut, weights, token, cache)
        found.append(np.asarray(logits))
        seconds["first step" if step == 1 else "further steps"] += time.perf_counter() - started
        advance("tokens", step + 1, steps)
    logits = np.stack(found, axis=1)
    return Generated(logits.argmax(axis=2), logits, seconds)


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
) -> Checked:
    """Hold what was generated against one device.

    Args:
      weights: float64, on one device.
      ids: the prompts.
      arithmetic: of quantised weights; as in what was generated.

    Raises:
      InputError: weights that are not float64.
    """
    if weights.norm.dtype != "float64":
        raise InputError(f"the check is made in float64, the weights are {weights.norm.dtype}; load them in float64")
    steps = generated.ids.shape[1]
    whole = np.asarray(on_one_device(config, weights, text_of(ids, generated), arithmetic))
    expected = whole[:, -steps:]
    others = np.flatnonzero((expected.argmax(axis=2) != generated.ids).any(axis=0))
    return Checked(
        float(np.abs(generated.logits - expected).max()),
        TOLERANCE * max(1.0, float(np.abs(expected).max())),
        int(others[0]) if len(others) else None,
    )


def text_of(ids: Int[Any, "B T"], generated: Generated) -> Int[Array, "B _"]:
    """Prompts and new tokens together, but for the last, which nothing was computed of."""
    return jnp.asarray(np.concatenate([np.asarray(ids), generated.ids[:, :-1]], axis=1), jnp.int32)
