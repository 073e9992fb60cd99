"""Greedy decoding with drafts: a few tokens are guessed, one step verifies them all, and what is wrong is taken back.

    prompt   the model's prefill, then each module's, over a cache of its own: module k (from 1) takes at place i the
             hidden state of i and token i + k, which may be another rank's
    draft    L tokens are cached, and token L is known: module k says token L + k. It runs over the last places, with
             the model's own hidden states. One module alone is applied again, to its own hidden state and its draft
    verify   one step of the model over token L and N drafts, which see each other causally
    accept   the longest run of drafts that are the model's choice, and one token more, its choice after them
    back     caches are as long as what was accepted; slots behind that are written anew
    handed over: modules run over the prompt where the prefill is, and draft where the decode instance is; their caches
             travel as the model's does, and with them the hidden states of the prompt's last places

What is generated is what greedy decoding without drafts generates, whatever the modules say: a draft only saves a step.
MindIE drafts so with one module (mtp_plugin.py and mtp/decoding_policy.py in mindie_llm/text_generator/plugins of
Ascend/MindIE-LLM); DeepSeek-V3 (arXiv 2412.19437, §2.2) has one as well, and defines several.

*Border.* On a rank of the prefill lie two runs of a request's tokens, one early and one late. The token after the last
of a run is another rank's; the exact shift is made before tokens are cut. MindIE turns each rank's whole list by one,
and puts each request's new token at the end of its part: at the border of the runs a place gets the first token of the
rank's other run, and at the end of the part the new token. That is right on the last rank, whose runs are neighbours,
and at the end of rank 0, if there are no pads. Only drafts can get worse by it. No place gets another request's token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpjax.deepseek.attention import rms_norm
from cpjax.deepseek.cache import Cache, CacheCut
from cpjax.deepseek.model import ModelWeights
from cpjax.deepseek.mtp import Drafting, MtpWeights
from cpjax.deepseek.parallel import Setup, decode_step, extended_cache, prefill
from cpjax.errors import InputError
from cpjax.partition import Zigzag
from cpjax.wording import counted

BORDERS = ("exact", "vendor")
"""How the tokens that follow are found in the prefill."""


class Window(NamedTuple):
    """The last places of a text, over which m modules run: m − 1 old ones, then those of the last step."""

    hidden: Float[Array, "B W M"]
    """Of the model, after its last norm."""
    following: Int[np.ndarray, "B W"]
    """The token after each place."""
    start: Int[np.ndarray, " B"]
    """The first place."""
    last: Int[np.ndarray, " B"]
    """Index of the last place whose hidden state and following token are known; what stands behind it is not used."""


class Drafter(NamedTuple):
    """What drafts: modules on the mesh, how many tokens they draft together, and the cut of their caches."""

    setup: Setup
    weights: ModelWeights
    modules: tuple[MtpWeights, ...]
    tokens: int
    cut: CacheCut


class Drafted(NamedTuple):
    """What drafting came to."""

    tokens: int
    """Tokens that are drafted for a step."""
    steps: int
    """Steps that verified them; without drafts there is one a token."""
    accepted: tuple[tuple[int, ...], ...]
    """Of each row, how many drafts each step accepted, until the row had all its tokens."""


def drafter(
    setup: Setup, weights: ModelWeights, modules: tuple[MtpWeights, ...], count: int, cut: CacheCut, prompt: int
) -> Drafter:
    """With as many modules as are needed.

    Args:
      prompt: tokens of the part of a prompt that is prefilled last, of which the modules draft; of the shortest one.

    Raises:
      InputError: no token to draft, no module; several modules, but fewer than tokens; a part with fewer tokens than
        modules.
    """
    if count < 1:
        raise InputError(f"draft is {count}; it is the number of tokens that are drafted for a step, at least 1")
    if not modules:
        raise InputError("there is no MTP module to draft with; take a checkpoint that has one, or draft nothing")
    if 1 < len(modules) < count:
        raise InputError(
            f"{count} tokens are to be drafted, but of {len(modules)} modules each drafts one; draft at most "
            f"{len(modules)}"
        )
    modules = modules[:count]
    if prompt < len(modules):
        raise InputError(
            f"the last part of a prompt has {counted(prompt, 'token')}, and {len(modules)} modules draft; give at "
            "least as many, or another chunk"
        )
    return Drafter(setup, weights, modules, count, cut)


def following(
    ids: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    first: Int[np.ndarray, " B"],
    shift: int,
    cp: int,
    border: str = "exact",
) -> Int[np.ndarray, "B T"]:
    """For each place i of a prompt token i + `shift`, as the prefill of a module takes it; 0 where it is not known yet.

    Args:
      lengths: tokens of each prompt.
      first: the model's first new token of each row, which follows the prompt.
      border: "vendor" gives what MindIE's ranks get, with pads of token 0; each prompt is filled up for itself.

    >>> ids, first = np.arange(10, 18)[None], np.array([99])
    >>> following(ids, np.array([8]), first, 1, 2)
    array([[11, 12, 13, 14, 15, 16, 17, 99]])
    >>> following(ids, np.array([8]), first, 1, 2, "vendor")  # chunks 0 and 3 are rank 0's, 1 and 2 rank 1's
    array([[11, 16, 13, 14, 15, 99, 17, 99]])

    Raises:
      InputError: the vendor's border with more than one module.
    """
    if border == "vendor" and shift != 1:
        raise InputError("the vendor's shift is that of one module; give border exact, or draft 1 token")
    found = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        if border == "exact":
            text = np.append(ids[row, :length], first[row])[shift : shift + length]
            found[row, : len(text)] = text
        else:
            found[row, :length] = _turned(ids[row, :length], int(first[row]), cp)
    return found


def _turned(ids: Int[np.ndarray, " T"], first: int, cp: int) -> Int[np.ndarray, " T"]:
    """Each rank's list of a prompt turned by one, the new token at its end."""
    padded = np.pad(ids, (0, -len(ids) % (2 * cp)))
    order = Zigzag(cp).order(len(padded))
    local = np.roll(padded[order].reshape(cp, -1), -1, axis=1)
    local[:, -1] = first
    found = np.empty_like(padded)
    found[order] = local.ravel()
    return found[: len(ids)]


def prefill_modules(
    who: Drafter,
    following: Callable[[int], Int[np.ndarray, "B t"]],
    hidden: Float[Array, "B t M"],
    lengths: Int[np.ndarray, " B"],
    caches: list[Cache] | None,
    prompt: Int[np.ndarray, " B"],
    *,
    is_packed: bool = False,
) -> list[Cache]:
    """The modules' caches after a part of the prompts.

    Args:
      following: number of a module, from 1 → the tokens that it takes at these places.
      hidden: the model's, before its last norm.
      lengths: tokens of each row in this part.
      caches: after the parts before; None: this is the first.
      prompt: tokens of each whole prompt.
      is_packed: as in `cpjax.deepseek.parallel.prefill`.
    """
    hidden, found = rms_norm(hidden, who.weights.norm, who.setup.config.rms_norm_eps), []
    for number, module in enumerate(who.modules):
        before = None if caches is None else caches[number]
        outcome = prefill(
            who.setup,
            who.weights,
            following(number + 1),
            lengths,
            cut=None if before is None else who.cut,
            cache=before,
            drafting=Drafting(module, hidden),
            is_packed=is_packed,
        )
        found.append(extended_cache(who.setup, who.cut, outcome, lengths, before, prompt=prompt))
        hidden = outcome.hidden
    return found


def first_window(
    who: Drafter,
    ids: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    first: Int[np.ndarray, " B"],
    hidden: Float[Array, "B n M"],
) -> Window:
    """The ends of the prompts.

    Args:
      lengths: tokens of each prompt.
      hidden: of each prompt's last tokens, at least as many as there are modules, before the model's last norm.
    """
    old, batch = len(who.modules), len(ids)
    hidden = rms_norm(hidden[:, -old:], who.weights.norm, who.setup.config.rms_norm_eps)
    place = lengths[:, None] + np.arange(1 - old, 0)
    known = np.concatenate([np.take_along_axis(ids, place, axis=1), first[:, None]], axis=1)
    return Window(
        jnp.pad(hidden, ((0, 0), (0, who.tokens), (0, 0))),
        np.pad(known, ((0, 0), (0, who.tokens))),
        lengths - old,
        np.full(batch, old - 1),
    )


def next_window(
    window: Window,
    modules: int,
    hidden: Float[Array, "B n M"],
    choice: Int[np.ndarray, "B n"],
    accepted: Int[np.ndarray, " B"],
) -> Window:
    """After a step of n tokens, of which the first and `accepted` drafts are right.

    Args:
      hidden: of the step, after the last norm.
      choice: the model's, after each token of the step.
    """
    old = window.last[:, None] + np.arange(2 - modules, 1)
    kept = jnp.take_along_axis(window.hidden, jnp.asarray(old)[:, :, None], axis=1)
    return Window(
        jnp.concatenate([kept, hidden], axis=1),
        np.concatenate([np.take_along_axis(window.following, old, axis=1), choice], axis=1),
        window.start + window.last + 2 - modules,
        modules - 1 + accepted,
    )


def drafts(who: Drafter, caches: list[Cache], window: Window) -> tuple[Int[np.ndarray, "B N"], list[Cache]]:
    """The tokens after the last that is known, and the modules' caches."""
    rows, last = np.arange(len(window.last)), window.last
    text = np.pad(window.following, ((0, 0), (0, who.tokens)))
    hidden, width, found, kept = window.hidden, window.following.shape[1], [], []
    for number, (module, cache) in enumerate(zip(who.modules, caches, strict=True)):
        if number:
            text[rows, last + number] = found[-1]
        run = jnp.asarray(text[:, number : number + width], jnp.int32)
        cache = cache._replace(length=jnp.asarray(window.start, jnp.int32))
        logits, hidden, cache = decode_step(who.setup, who.cut, who.weights, run, cache, Drafting(module, hidden))
        found.append(np.asarray(logits)[rows, last].argmax(axis=1))
        kept.append(cache)
    here = hidden[rows, last][:, None]
    cache = kept[-1]._replace(length=jnp.asarray(window.start + last + 1, jnp.int32))
    while len(found) < who.tokens:  # one module alone: its own hidden state stands for the model's
        run = jnp.asarray(found[-1][:, None], jnp.int32)
        logits, here, cache = decode_step(who.setup, who.cut, who.weights, run, cache, Drafting(who.modules[0], here))
        found.append(np.asarray(logits)[:, 0].argmax(axis=1))
        kept[-1] = cache
    return np.stack(found, axis=1), kept


def agreed(draft: Int[np.ndarray, "B N"], choice: Int[np.ndarray, "B n"]) -> Int[np.ndarray, " B"]:
    """How many drafts, from the first on, are the model's choice.

    >>> agreed(np.array([[1, 2, 3], [1, 9, 3]]), np.array([[1, 2, 4, 5], [1, 2, 3, 4]]))
    array([2, 1])
    """
    return np.cumprod(draft == choice[:, :-1], axis=1).sum(axis=1)
