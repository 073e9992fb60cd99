"""Greedy decoding on a mesh.

prompt  ─prefill─▶  latents, first token  ─cut─▶  cache  ─step─▶  next token  ─step─▶  …
in chunks: each is prefilled with what is cached of those before it; so is a prompt whose beginning is cached
several prompts: a row each, or packed in one row; each has its own length, and goes on from its own end
disaggregated: the cache is handed over to a decode instance, which has weights and devices of its own
with drafts: a step takes several tokens (`cpjax.deepseek.draft`), and there are fewer of them
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpjax.deepseek.cache import Cache, CacheCut
from cpjax.deepseek.checkpoint import Advance
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
from cpjax.deepseek.model import ModelWeights, logits_of
from cpjax.deepseek.mtp import MtpWeights
from cpjax.deepseek.parallel import Setup, checked_ids, decode_step, extended_cache, prefill
from cpjax.errors import InputError

BLOCK = 128
"""Tokens of a block of the cache, as in MindIE."""


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
    """Bytes of latents that each rank of the decode instance has fetched; None: the same instance decoded."""


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
    """A decode instance: its mesh, with cp 1, and the weights on it; the MTP modules where it drafts."""

    setup: Setup
    weights: ModelWeights
    modules: tuple[MtpWeights, ...] = ()


def rows_of(prompts: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Prompts as rows of equal length, filled up with 0, and how many tokens each has.

    >>> rows_of([[7], [8, 9]])
    (array([[7, 0],
           [8, 9]]), array([1, 2]))
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    rows = np.zeros((len(prompts), lengths.max(initial=0)), int)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows, lengths


def generate(
    setup: Setup,
    weights: ModelWeights,
    ids: Int[Any, "B T"],
    steps: int,
    *,
    lengths: Sequence[int] | Int[np.ndarray, " B"] | None = None,
    cached: Sequence[int] | Int[np.ndarray, " B"] | None = None,
    is_packed: bool = False,
    sharing: Sharing = Sharing(),  # noqa: B008
    chunk: int | None = None,
    modules: tuple[MtpWeights, ...] = (),
    draft: int = 0,
    border: str = "exact",
    decoder: Decoder | None = None,
    advance: Advance = lambda what, done, total: None,
) -> Generated:
    """The `steps` tokens that follow each prompt, each the one with the largest logit (of equal ones the first).

    Args:
      ids: the prompts; shorter ones are filled up at their end with any id.
      lengths: tokens of each prompt; None: T.
      cached: how many of them are in the cache already, all but one at most; None: none. They are computed first, as
        another request with the same beginning would have left them.
      is_packed: prompts are prefilled in one row, one behind the other (`cpjax.deepseek.layout`); else in a row each.
      chunk: tokens of a prompt that are prefilled at once; None: all of them.
      modules, draft, border: MTP modules, how many tokens they draft for a step (0: none), and how the tokens that
        follow are found in the prefill (`cpjax.deepseek.draft`). What is generated does not depend on them.
      decoder: takes the caches over after the prefill, and decodes; None: the same devices do.
      advance: is told how many tokens there are.

    Raises:
      InputError: ids that the model does not have; prompts without a token that is not cached; no step, an empty chunk;
        more tokens than the model has positions for; drafts that the modules cannot make.
    """
    ids = checked_ids(setup.config, ids)
    if steps < 1:
        raise InputError(f"steps is {steps}; it is the number of new tokens, at least 1")
    prompt = _checked_prompts(ids, lengths, cached)
    length = int(prompt.lengths.max())
    if length + steps > setup.config.max_position_embeddings:
        raise InputError(
            f"{length} tokens and {steps} steps are more than the model's max_position_embeddings, "
            f"{setup.config.max_position_embeddings}; give fewer"
        )
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}; it is the number of tokens that are prefilled at once, at least 1")
    if border not in BORDERS:
        raise InputError(f"border is {border!r:.60}; it must be {' or '.join(BORDERS)}")
    if border == "vendor" and (chunk is not None or prompt.cached.any()):
        raise InputError(
            "the vendor's border is that of a prompt at once; leave chunk and cached out, or give border exact"
        )
    started = time.perf_counter()
    # The last step may draft tokens beyond the end.
    cut = sharing.cut(setup, length + steps + draft)
    last = prompt.last(chunk)
    who = drafter(setup, weights, modules, draft, cut, last) if draft else None
    there = drafter(*decoder, draft, cut, last) if draft and decoder is not None else None
    found = _prefilled(setup, weights, prompt, cut, chunk, who, border, is_packed)
    seconds = {"prefill": time.perf_counter() - started, "first step": 0.0, "further steps": 0.0}
    advance("tokens", 1, steps)
    size = None
    if decoder is not None:
        started = time.perf_counter()
        setup, weights, _ = decoder
        cut, found, size = _handed_over(cut, found, setup)
        who = None if there is None else there._replace(cut=cut)
        seconds["hand-over"] = time.perf_counter() - started
    if who is None:
        generated = _one_by_one(setup, weights, cut, steps, found, seconds, advance)
    else:
        generated = _with_drafts(who, prompt, steps, found, seconds, advance)
    return generated._replace(handed_over=size)


class _Prompts(NamedTuple):
    """What is asked for."""

    ids: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, " B"]
    cached: Int[np.ndarray, " B"]

    def parts(self, chunk: int | None) -> list[Int[np.ndarray, " B"]]:
        """How many tokens of each prompt each prefill takes: what is cached, then chunks."""
        left, found = self.lengths - self.cached, [self.cached] if self.cached.any() else []
        while left.any():
            found.append(left if chunk is None else np.minimum(left, chunk))
            left = left - found[-1]
        return found

    def last(self, chunk: int | None) -> int:
        """Tokens of the last part of a prompt, of the prompt that has fewest."""
        new = self.lengths - self.cached
        return int((new if chunk is None else (new - 1) % chunk + 1).min())


def _checked_prompts(ids: Int[np.ndarray, "B T"], lengths: Any, cached: Any) -> _Prompts:
    batch, width = ids.shape
    lengths = np.full(batch, width) if lengths is None else np.asarray(lengths)
    cached = np.zeros(batch, int) if cached is None else np.asarray(cached)
    for name, counts in (("lengths", lengths), ("cached", cached)):
        if counts.shape != (batch,):
            raise InputError(f"there are {len(ids)} prompts, and {name} is {counts.tolist()}; give one number a prompt")
    if not 1 <= lengths.min() <= lengths.max() <= width:
        raise InputError(f"prompts have {lengths.tolist()} tokens of rows of {width}; give 1 to {width} for each")
    if cached.min() < 0 or (cached >= lengths).any():
        raise InputError(
            f"{cached.tolist()} tokens are cached of prompts of {lengths.tolist()}; give 0 to all but one for each"
        )
    return _Prompts(ids, lengths, cached)


class _Prefilled(NamedTuple):
    """After the prefill."""

    logits: Float[np.ndarray, "B W"]
    """Of the first new token."""
    hidden: Float[Array, "B n M"]
    """Of each prompt's last token, or last tokens as many as modules draft; before the last norm."""
    cache: Cache
    modules: list[Cache]
    """Caches of the modules that draft."""


def _prefilled(
    setup: Setup,
    weights: ModelWeights,
    prompt: _Prompts,
    cut: CacheCut,
    chunk: int | None,
    who: Drafter | None,
    border: str,
    is_packed: bool,
) -> _Prefilled:
    """The prompts through the model, and through the modules that draft."""
    ids, lengths, _ = prompt
    cp, kept = setup.sizes[0], 1 if who is None else len(who.modules)
    start = np.zeros_like(lengths)
    cache = logits = caches = hidden = None
    for part in prompt.parts(chunk):
        place = np.minimum(start[:, None] + np.arange(part.max()), ids.shape[1] - 1)
        here = partial(np.take_along_axis, indices=place, axis=1)
        before = None if cache is None else cut
        outcome = prefill(setup, weights, here(ids), part, cut=before, cache=cache, is_packed=is_packed)
        cache = extended_cache(setup, cut, outcome, part, cache, prompt=lengths)
        # A prompt that has ended before keeps what it had; in one that goes on nobody asks for the end.
        end = jnp.asarray((part[:, None] + np.arange(-kept, 0)).clip(0))[:, :, None]
        ended = jnp.take_along_axis(outcome.hidden, end, axis=1)
        hidden = ended if hidden is None else jnp.where(jnp.asarray(part > 0)[:, None, None], ended, hidden)
        start = start + part
        logits = np.asarray(logits_of(weights, setup.config, hidden[:, -1:])[:, 0])
        if who is not None:
            # Only a prompt's last part comes to the place of `first`; before it the prompt has all tokens that follow.
            first = logits.argmax(axis=1)
            tokens = lambda shift, here=here, first=first: here(following(ids, lengths, first, shift, cp, border))  # noqa: E731
            caches = prefill_modules(who, tokens, outcome.hidden, part, caches, lengths, is_packed=is_packed)
    assert cache is not None  # a prompt has a token
    assert hidden is not None
    assert logits is not None
    return _Prefilled(logits, hidden, cache, caches or [])


def _handed_over(cut: CacheCut, found: _Prefilled, setup: Setup) -> tuple[CacheCut, _Prefilled, int]:
    """The caches of the model and of the modules on a decode instance, and what each of its ranks has fetched."""
    model, *modules = (hand_over(cut, cache, setup) for cache in (found.cache, *found.modules))
    hidden = jax.device_put(found.hidden, jax.NamedSharding(setup.mesh, jax.P()))
    there = found._replace(cache=model.cache, modules=[one.cache for one in modules], hidden=hidden)
    return model.cut, there, sum(one.bytes_per_rank for one in (model, *modules))


def _one_by_one(
    setup: Setup,
    weights: ModelWeights,
    cut: CacheCut,
    steps: int,
    prompt: _Prefilled,
    seconds: dict[str, float],
    advance: Advance,
) -> Generated:
    """The tokens after the prompts, a token a step."""
    found, cache = [prompt.logits], prompt.cache
    for step in range(1, steps):
        started = time.perf_counter()
        token = jnp.asarray(found[-1].argmax(axis=1), jnp.int32)
        logits, _, cache = decode_step(setup, cut, weights, token[:, None], cache)
        found.append(np.asarray(logits[:, 0]))
        seconds["first step" if step == 1 else "further steps"] += time.perf_counter() - started
        advance("tokens", step + 1, steps)
    logits = np.stack(found, axis=1)
    return Generated(logits.argmax(axis=2), logits, seconds)


def _with_drafts(
    who: Drafter,
    asked: _Prompts,
    steps: int,
    prompt: _Prefilled,
    seconds: dict[str, float],
    advance: Advance,
) -> Generated:
    """The same with drafts; rows go on at their own pace, and stand still when they have all of theirs."""
    batch, cache, caches = len(asked.ids), prompt.cache, prompt.modules
    first = prompt.logits.argmax(axis=1)
    window = first_window(who, asked.ids, asked.lengths, first, prompt.hidden)
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


def texts_of(
    ids: Int[Any, "B T"], generated: Generated, lengths: Sequence[int] | Int[np.ndarray, " B"] | None = None
) -> list[Int[np.ndarray, " _"]]:
    """Each prompt and its new tokens together, but for the last, which nothing was computed of."""
    rows = np.asarray(ids)
    lengths = [rows.shape[1]] * len(rows) if lengths is None else lengths
    of_rows = zip(rows, lengths, generated.ids, strict=True)
    return [np.concatenate([row[:length], new[:-1]]).astype(np.int32) for row, length, new in of_rows]
