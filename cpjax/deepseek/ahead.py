"""Asynchronous scheduling: the host starts a step of decoding before it has read the tokens of the one before.

    device   a step's choice goes into the next step without leaving the device
    host     reads a step's tokens when `ahead` more steps have been started, and so learns that late that all requests
             have come to their end; what those steps give is dropped

The steps compute the same in the same order, so every token is the same to the bit: what changes is how many steps are
started in vain. MindIE does so with MINDIE_ASYNC_SCHEDULING_ENABLE=1, one step ahead. Here JAX runs on its own while
the host has not asked for a value.
"""

from collections import deque
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cpjax.deepseek.cache import Cache, CacheCut
from cpjax.deepseek.model import ModelWeights
from cpjax.deepseek.parallel import Setup, decode_step
from cpjax.errors import InputError


def decode_ahead(
    setup: Setup,
    cut: CacheCut,
    weights: ModelWeights,
    first: Int[Array, " B"],
    cache: Cache,
    steps: int,
    *,
    ahead: int = 1,
    end: int | None = None,
    told: Callable[[str, int], None] = lambda what, step: None,
) -> list[list[int]]:
    """The tokens of each row, at most `steps`, up to its first `end` token, which is the last one.

    Args:
      first: the first new token of each row, int32; it may still be on its way.
      cache: after the prompts, with room for `steps` − 1 tokens more.
      ahead: steps that are started before a step's tokens are read; 0: none, the host waits for each.
      end: the token that ends a request; None: none does.
      told: is told "start" or "read" and the number of the token, in the order in which the host does it.

    Raises:
      InputError: no step, or less than none ahead.
    """
    if steps < 1 or ahead < 0:
        raise InputError(f"steps is {steps} and ahead {ahead}; give at least 1 step, and 0 or more ahead")
    rows: list[list[int]] = [[] for _ in range(len(first))]
    has_ended, waiting, token, started = np.zeros(len(first), bool), deque([first]), first, 1
    for number in range(steps):
        while started < min(steps, number + 1 + ahead):
            told("start", started)
            logits, _, cache = decode_step(setup, cut, weights, token[:, None], cache)
            token = logits[:, 0].argmax(axis=1).astype(jnp.int32)
            waiting.append(token)
            started += 1
        told("read", number)
        for row, one in enumerate(np.asarray(waiting.popleft()).tolist()):
            if not has_ended[row]:
                rows[row].append(one)
                has_ended[row] = one == end
        if has_ended.all():
            break
    return rows
