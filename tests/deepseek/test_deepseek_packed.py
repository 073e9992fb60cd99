"""Packed batches: requests one behind the other in one row, each with its own prefix; each is as if it were alone."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from source_mutant import mutant
from tiny_deepseek import TINY, random_checkpoint

from cpjax.deepseek import parallel
from cpjax.deepseek.cache import CacheCut
from cpjax.deepseek.checkpoint import load
from cpjax.deepseek.layout import layout_of
from cpjax.deepseek.model import logits_of
from cpjax.deepseek.one_device import on_one_device
from cpjax.deepseek.parallel import decode_step, extended_cache, model_mesh, prefill, setup, specs
from cpjax.errors import InputError
from cpjax.mask import PAD

pytestmark = pytest.mark.usefixtures("float64")

SETUPS = [(2, 1, "ring", 2), (2, 2, "gather", 4), (4, 1, "pass_query", 4)]
"""cp, tp, exchange, ranks that share the cache (4 of cp 2 and tp 2: sp). Experts are cut over all devices."""

MOST_CACHED, MOST_NEW, STEPS = 8, 16, 2
TEXTS = np.random.default_rng(3).integers(0, TINY.vocab_size, (3, MOST_CACHED + MOST_NEW + STEPS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory, TINY, 2)


@pytest.fixture(scope="module")
def alone(checkpoint):
    """Logits of each text by itself, on one device."""
    weights, text = load(checkpoint, "float64"), jnp.asarray(TEXTS, jnp.int32)
    return [np.asarray(on_one_device(TINY, weights, one[None]))[0] for one in text]


@pytest.fixture(scope="module")
def on_mesh(checkpoint):
    """cp, tp, exchange → setup, weights, and the latents of the beginnings of all texts."""

    @functools.cache
    def made(cp, tp, exchange, _):
        how = setup(TINY, model_mesh(cp, tp), dtype="float64", exchange=exchange)
        weights = load(checkpoint, "float64", mesh=how.mesh, specs=specs(TINY))
        return how, weights, prefill(how, weights, TEXTS[:, :MOST_CACHED])

    return made


@st.composite
def batches(draw, cp):
    """How many tokens each request has in the cache, and how many new ones.

    Filled up they are always as many together, so that one program computes all batches.
    """
    unit = 2 * cp
    parts = draw(st.permutations([MOST_NEW // unit, 1, MOST_NEW // unit // 2]))
    new = [draw(st.integers(unit * (part - 1) + 1, unit * part)) for part in parts]
    return tuple(draw(st.integers(0, MOST_CACHED)) for _ in new), tuple(new)


def of_texts(start, counts):
    """Of each text so many tokens from a place on; behind them the last token that there is."""
    here = np.asarray(start)[:, None] + np.arange(MOST_NEW)
    wanted = np.take_along_axis(TEXTS, np.minimum(here, TEXTS.shape[1] - 1), axis=1)
    return np.where(np.arange(MOST_NEW) < np.asarray(counts)[:, None], wanted, TINY.vocab_size - 1)


def packed(on_mesh, which, cached, new):
    """Logits of the new tokens of each request; the cache after them, and its cut."""
    (how, weights, beginnings), ranks = on_mesh(*which), which[-1]
    cut, prompt = CacheCut(ranks, 2, TEXTS.shape[1], is_last_moved=True), np.add(cached, new)
    cache = extended_cache(how, cut, beginnings, cached, prompt=prompt)
    outcome = prefill(how, weights, of_texts(cached, new), new, cut=cut, cache=cache, is_packed=True)
    logits = np.asarray(logits_of(weights, TINY, outcome.hidden))
    return [row[:count] for row, count in zip(logits, new, strict=True)], extended_cache(how, cut, outcome, new, cache)


def near(found, alone, start):
    """Each request's logits are those of its text from a place on, alone."""
    for row, (one, whole, first) in enumerate(zip(found, alone, start, strict=True)):
        assert np.abs(one - whole[first : first + len(one)]).max() < 1e-10, f"request {row}"


@pytest.mark.slow
@pytest.mark.parametrize("which", SETUPS)
def test_each_request_is_as_if_alone(on_mesh, alone, which):
    """No prefix, another, and all but one token; and, over all ranks of cp and tp, decoding goes on from each end."""

    @settings(max_examples=6)
    @example(((0, 8, 3), (16, 1, 5)))
    @given(batches(which[0]))
    def law(batch):
        cached, new = batch
        found, cache = packed(on_mesh, which, cached, new)
        near(found, alone, cached)
        how, weights, _ = on_mesh(*which)
        for step in range(STEPS if which == SETUPS[1] else 0):
            place = np.add(cached, new) + step
            token = jnp.asarray(TEXTS[np.arange(3), place][:, None], jnp.int32)
            cut = CacheCut(which[-1], 2, TEXTS.shape[1], is_last_moved=True)
            logits, _, cache = decode_step(how, cut, weights, token, cache)
            near(np.asarray(logits), alone, place)

    law()


ONE_LESS = "(cache.length - jnp.array([0, 0, 1], jnp.int32))"


@pytest.mark.parametrize(
    ("function", "old", "new", "wrong"),
    [
        # Of request 2 the prefix is a token short; its new tokens are a place too low; positions do not start anew.
        ("_prefill", "cache_tokens(cut, cache.length,", f"cache_tokens(cut, {ONE_LESS},", {2}),
        ("_prefill", "index + cache.length", f"index + {ONE_LESS}", {2}),
        ("_prefill", "index + cache.length", "index + 16 * layout.request + cache.length", {1, 2}),
        # A request sees the prefix of the next one; all new tokens are one request.
        ("_prefix", "*map(beside, there)", "beside(there[0]), beside(there[1]) - 1", {0, 1, 2}),
        ("_prefill", "[layout.request], segment)", "[layout.request], 0 * segment)", {0, 1, 2}),
        # The places of the cache's ranks exchanged.
        ("_prefill", "else cache_tokens", "else (lambda *x: Tokens(*(y[:, ::-1] for y in cache_tokens(*x))))", {1, 2}),
    ],
)
def test_a_broken_pack_is_seen(on_mesh, alone, function, old, new, wrong):
    """And in which requests."""
    cached, added = (0, 8, 3), (16, 1, 5)
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch, parallel, function, old, new)
        if function != "_prefill":
            mutant(patch, parallel, "_prefill", "index, segment", "index, segment")  # traced anew
        found, _ = packed(on_mesh, SETUPS[0], cached, added)
    pairs = enumerate(zip(found, alone, cached, strict=True))
    seen = {n for n, (one, whole, first) in pairs if np.abs(one - whole[first : first + len(one)]).max() > 1e-4}
    assert seen == wrong


# The layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_packed", [False, True])
@given(lengths=st.lists(st.integers(0, 13), min_size=1, max_size=4).filter(any), cp=st.integers(1, 3))
def test_every_rank_gets_its_part_of_every_request(is_packed, lengths, cp):
    """Of a request in 2·cp equal chunks rank r has chunks r and 2·cp − 1 − r; a token that is not there is nobody's."""
    width = max(lengths)
    layout = layout_of(lengths, width, cp, is_packed=is_packed)
    index, request = (x.reshape(len(x), cp, -1) for x in layout.tokens)

    def filled(length):
        return -(-length // (2 * cp)) * 2 * cp

    for number, length in enumerate(lengths):
        chunk = filled(length if is_packed else width) // (2 * cp)
        for rank in range(cp):
            mine = index[:, rank][request[:, rank] == number]
            runs = [range(r * chunk, (r + 1) * chunk) for r in (rank, 2 * cp - 1 - rank)]
            assert sorted(mine) == [i for run in runs for i in run if i < length]
    assert (request == PAD).sum() == index.size - sum(lengths)
    assert index.size == (sum(map(filled, lengths)) if is_packed else len(lengths) * filled(width))


@pytest.mark.parametrize("is_packed", [False, True])
def test_laid_out_and_back(is_packed):
    lengths, x = [5, 0, 3], np.arange(3 * 6 * 2).reshape(3, 6, 2)
    layout = layout_of(lengths, 6, 2, is_packed=is_packed)
    back = layout.back(layout.laid(x))
    for row, one, length in zip(x, back, lengths, strict=True):
        np.testing.assert_array_equal(one[:length], row[:length])


# Refused --------------------------------------------------------------------------------------------------------------


def test_bad_input(on_mesh):
    how, weights, beginnings = on_mesh(*SETUPS[0])
    for lengths, message in (
        ([4, -1, 2], "requests have .4, -1, 2. new tokens of rows of 8; give 0 to 8 for each, not 0 for all"),
        ([9, 1, 1], "give 0 to 8 for each"),
        ([0, 0, 0], "not 0 for all"),
        ([1, 1], "there are 2 lengths and 3 rows; give one length a row"),
    ):
        with pytest.raises(InputError, match=message):
            prefill(how, weights, TEXTS[:, :8], lengths, is_packed=True)
    cut = CacheCut(2, 2, 16)
    cache = extended_cache(how, cut, beginnings, [1, 1, 1])
    with pytest.raises(InputError, match="the cache has 3 rows, and there are 2 requests; give one a request"):
        prefill(how, weights, TEXTS[:2, :8], cut=cut, cache=cache, is_packed=True)
