"""Greedy decoding on a mesh, and the same text on one device as a check.

    prompt  ─prefill─▶  latents, first token  ─cut─▶  cache  ─step─▶  next token  ─step─▶  …
    in chunks: each is prefilled with what is cached of those before it
    disaggregated: the cache is handed over to a decode instance, which has weights and devices of its own
    with drafts: a step takes several tokens (`cpjax.deepseek.draft`), and there are fewer of them

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

from cpjax.deepseek.cache import Cache, CacheCut
from cpjax.deepseek.checkpoint import Advance
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.draft import (
    BORDERS,
    Drafted,
    Drafter,
    agreed,
    drafter,
    drafts,
    first_window,
    following,
    next_window,
    prefill_modules,
)
from cpjax.deepseek.handover import hand_over
from cpjax.deepseek.model import ModelWeights, forward, logits_of
from cpjax.deepseek.mtp import MtpWeights
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
    drafted: Drafted | None = None
    handed_over: int | None = None
    """Bytes that each rank of the decode instance has fetched; None: the same instance decoded."""


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


class Sharing(NamedTuple):
    """How ranks share the cache."""

    block: int = BLOCK
    """Tokens of a block; a short text lies on few ranks if it is large."""
    is_sp: bool = False
    """Cut over cp and tp together, and not over cp alone."""
    is_last_moved: bool = False
    """The last block of a prompt is on the last rank, as in MindIE."""

    def cut(self, setup: Setup, capacity: int) -> CacheCut:
        """The cut of a cache with room for so many tokens a row."""
        cp, tp = setup.sizes
        return CacheCut(cp * tp if self.is_sp else cp, self.block, capacity, self.is_last_moved)


class Decoder(NamedTuple):
    """A decode instance: its mesh, with cp 1, and the weights on it."""

    setup: Setup
    weights: ModelWeights


def generate(
    setup: Setup,
    weights: ModelWeights,
    ids: Int[Any, "B T"],
    steps: int,
    *,
    sharing: Sharing = Sharing(),  # noqa: B008
    chunk: int | None = None,
    modules: tuple[MtpWeights, ...] = (),
    draft: int = 0,
    border: str = "exact",
    decoder: Decoder | None = None,
    advance: Advance = lambda what, done, total: None,
) -> Generated:
    """The `steps` tokens that follow a prompt, each the one with the largest logit (of equal ones the first).

    Args:
      ids: the prompts, all of one length.
      chunk: tokens of the prompt that are prefilled at once; None: all of them.
      modules, draft, border: MTP modules, how many tokens they draft for a step (0: none), and how the tokens that
        follow are found in the prefill (`cpjax.deepseek.draft`). What is generated does not depend on them.
      decoder: takes the cache over after the prefill, and decodes; None: the same devices do.
      advance: is told how many tokens there are.

    Raises:
      InputError: ids that the model does not have; no step, an empty chunk; more tokens than the model has positions
        for; drafts that the modules cannot make, or of a decode instance.
    """
    if draft and decoder is not None:
        raise InputError("drafts are made by the instance that did the prefill; leave out the drafts, or the decoder")
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
    if border not in BORDERS:
        raise InputError(f"border is {border!r:.60}; it must be {' or '.join(BORDERS)}")
    if border == "vendor" and chunk is not None:
        raise InputError("the vendor's border is that of a prompt at once; leave chunk out, or give border exact")
    started = time.perf_counter()
    # The last step may draft tokens beyond the end.
    cut = sharing.cut(setup, length + steps + draft)
    last = length if chunk is None else (length - 1) % chunk + 1
    who = drafter(setup, weights, modules, draft, cut, last) if draft else None
    prompt = _prefilled(setup, weights, ids, cut, chunk, who, border)
    seconds = {"prefill": time.perf_counter() - started, "first step": 0.0, "further steps": 0.0}
    advance("tokens", 1, steps)
    if who is not None:
        return _with_drafts(who, ids, steps, prompt, seconds, advance)
    found, cache, size = [prompt.logits], prompt.cache, None
    if decoder is not None:
        started = time.perf_counter()
        cut, cache, size = hand_over(cut, cache, decoder.setup)
        setup, weights = decoder
        seconds["hand-over"] = time.perf_counter() - started
    for step in range(1, steps):
        started = time.perf_counter()
        token = jnp.asarray(found[-1].argmax(axis=1), jnp.int32)
        logits, _, cache = decode_step(setup, cut, weights, token[:, None], cache)
        found.append(np.asarray(logits[:, 0]))
        seconds["first step" if step == 1 else "further steps"] += time.perf_counter() - started
        advance("tokens", step + 1, steps)
    logits = np.stack(found, axis=1)
    return Generated(logits.argmax(axis=2), logits, seconds, handed_over=size)


class _Prompt(NamedTuple):
    """After the prefill."""

    logits: Float[np.ndarray, "B W"]
    """Of the first new token."""
    hidden: Float[Array, "B t M"]
    """Of the last part, before the last norm."""
    cache: Cache
    modules: list[Cache] | None
    """Caches of the modules that draft."""


def _prefilled(
    setup: Setup,
    weights: ModelWeights,
    ids: Int[np.ndarray, "B T"],
    cut: CacheCut,
    chunk: int | None,
    who: Drafter | None,
    border: str,
) -> _Prompt:
    """The prompt through the model, and through the modules that draft."""
    (batch, length), cp = ids.shape, setup.sizes[0]
    cache = logits = caches = outcome = None
    for start in range(0, length, chunk or length):
        part = ids[:, start : start + (chunk or length)]
        outcome = prefill(setup, weights, part, cut=None if cache is None else cut, cache=cache)
        whole = np.full(batch, length)
        cache = extended_cache(setup, cut, outcome, np.full(batch, part.shape[1]), cache, prompt=whole)
        logits = np.asarray(logits_of(weights, setup.config, outcome.hidden[:, -1:])[:, 0])
        if who is not None:
            # Only the last part comes to the place of `first`; before it the prompt has all tokens that follow.
            here, first = slice(start, start + part.shape[1]), logits.argmax(axis=1)
            tokens = lambda shift, here=here, first=first: following(ids, first, shift, cp, border)[:, here]  # noqa: E731
            caches = prefill_modules(who, tokens, outcome.hidden, caches, length)
    assert cache is not None  # a prompt has a token
    assert outcome is not None
    assert logits is not None
    return _Prompt(logits, outcome.hidden, cache, caches)


def _with_drafts(
    who: Drafter,
    ids: Int[np.ndarray, "B T"],
    steps: int,
    prompt: _Prompt,
    seconds: dict[str, float],
    advance: Advance,
) -> Generated:
    """The tokens after a prompt; rows go on at their own pace, and stand still when they have all of theirs."""
    batch, cache, caches = len(ids), prompt.cache, prompt.modules
    assert caches is not None
    first = prompt.logits.argmax(axis=1)
    window = first_window(who, ids, first, prompt.hidden)
    found, tokens = [[row] for row in prompt.logits], [[int(one)] for one in first]
    accepted: list[list[int]] = [[] for _ in range(batch)]
    step = 0
    while any(len(row) < steps for row in tokens):
        started = time.perf_counter()
        guess, caches = drafts(who, caches, window)
        run = np.concatenate([np.array([[row[-1]] for row in tokens]), guess], axis=1)
        length = cache.length
        logits, hidden, cache = decode_step(who.setup, who.cut, who.weights, jnp.asarray(run, jnp.int32), cache)
        logits = np.asarray(logits)
        choice = logits.argmax(axis=2)
        right = agreed(guess, choice)
        taken = np.minimum(right + 1, [steps - len(row) for row in tokens])
        cache = cache._replace(length=length + jnp.asarray(taken, jnp.int32))
        for row, count in enumerate(taken):
            if count:
                accepted[row].append(int(count) - 1)
            found[row] += list(logits[row, :count])
            tokens[row] += choice[row, :count].tolist()
        window = next_window(window, len(who.modules), hidden, choice, np.maximum(taken - 1, 0))
        step += 1
        seconds["first step" if step == 1 else "further steps"] += time.perf_counter() - started
        advance("tokens", min(map(len, tokens)), steps)
    drafted = Drafted(who.tokens, step, tuple(map(tuple, accepted)))
    return Generated(np.array(tokens), np.array(found), seconds, drafted)


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
