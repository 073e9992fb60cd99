"""Drafting: modules on a mesh, several tokens a step, what is accepted; the tokens are those without drafts.

Prompts are of different lengths, and packed in one row: no module takes another request's token. And steps that are
started before the last one's tokens are read, with the same programs.
"""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from source_mutant import mutant
from tiny_deepseek import random_checkpoint

from cpjax.deepseek import draft as drafting
from cpjax.deepseek import generate as generating
from cpjax.deepseek import parallel
from cpjax.deepseek.ahead import decode_ahead
from cpjax.deepseek.attention import attend_on_one_device, linear, rms_norm
from cpjax.deepseek.cache import Cache
from cpjax.deepseek.checkpoint import load, load_mtp
from cpjax.deepseek.config import SMALL
from cpjax.deepseek.draft import following
from cpjax.deepseek.generate import Decoder, Sharing, generate
from cpjax.deepseek.model import attention_for, run_layers
from cpjax.deepseek.moe import MoeWeights
from cpjax.deepseek.mtp import Drafting, draft
from cpjax.deepseek.one_device import check, on_one_device
from cpjax.deepseek.parallel import extended_cache, model_mesh, mtp_specs, prefill, setup, specs
from cpjax.errors import InputError
from cpjax.mask import Tokens, tokens

pytestmark = pytest.mark.usefixtures("float64")

TINY = replace(
    SMALL,
    vocab_size=31,
    hidden_size=48,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    n_routed_experts=8,
    num_nextn_predict_layers=2,
)
IDS = np.random.default_rng(0).integers(0, 31, (8, 9))
LENGTHS = np.array([9, 5, 7, 9, 3, 8, 6, 9])
STEPS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory, TINY, 1)


def quieter(layer, by):
    """A layer that adds less to the hidden state."""
    feed = layer.mlp.experts if isinstance(layer.mlp, MoeWeights) else layer.mlp
    feed = feed._replace(down_proj=feed.down_proj * by)
    if isinstance(layer.mlp, MoeWeights):
        shared = layer.mlp.shared_experts
        feed = layer.mlp._replace(experts=feed, shared_experts=shared._replace(down_proj=shared.down_proj * by))
    return layer._replace(self_attn=layer.self_attn._replace(o_proj=layer.self_attn.o_proj * by), mlp=feed)


def guessing(weights, modules):
    """Weights with which modules are often right, and often wrong: of random ones 1 draft in 31 would be right.

    The model's choice depends mostly on the last token; a module takes little but the token that follows.
    """
    wide = TINY.hidden_size
    weights = weights._replace(layers=tuple(quieter(x, 0.8) for x in weights.layers))
    keeps = jnp.concatenate([jnp.eye(wide), 0.3 * jnp.eye(wide)], axis=1)
    return weights, tuple(m._replace(eh_proj=keeps, layer=quieter(m.layer, 0.5)) for m in modules)


@pytest.fixture(scope="module")
def one_device(checkpoint):
    return guessing(load(checkpoint, "float64"), load_mtp(checkpoint, "float64"))


@pytest.fixture(scope="module")
def on_mesh(checkpoint):
    """cp 2 and tp 2: setup, weights, modules."""
    return instance(checkpoint, model_mesh(2, 2))


def instance(checkpoint, mesh):
    weights = load(checkpoint, "float64", mesh=mesh, specs=specs(TINY))
    modules = load_mtp(checkpoint, "float64", mesh=mesh, specs=mtp_specs(TINY))
    return setup(TINY, mesh, dtype="float64"), *guessing(weights, modules)


@functools.partial(jax.jit, static_argnums=0)
def drafts_of_a_text(config, weights, modules, text):
    """On one device, of the k-th module at every place i its hidden state, latents, and draft of token i + k + 1."""
    attention, found, count = attention_for(config, None, "float64"), [], text.shape[1]

    def attending(number, query, latent, up):
        place = Tokens(*(jnp.asarray(x) for x in tokens(len(text), query.shape[1])))
        return attend_on_one_device(query, latent, up, place, place, attention)

    position = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], text.shape)
    hidden = run_layers(weights, config, text, position, attending).hidden
    hidden = rms_norm(hidden, weights.norm, config.rms_norm_eps)
    for k, module in enumerate(modules, start=1):
        n = count - k
        hidden, latent = draft(weights, module, config, text[:, k:], hidden[:, :n], position[:, :n], attending)
        found.append((hidden, latent.c_kv, linear(hidden, weights.lm_head).argmax(axis=2)))
    return found


def generated(on_mesh, count, modules, **more):
    how, weights, every = on_mesh
    of_all = {"lengths": LENGTHS, "is_packed": True, "sharing": Sharing(2, is_sp=True)}
    return generate(how, weights, IDS, STEPS, **of_all, modules=every[:modules], draft=count, **more)


def checked(one_device, found):
    return check(TINY, one_device[0], IDS, found, lengths=LENGTHS)


def accepted(found):
    """Of each row, what its steps accepted."""
    assert found.drafted is not None
    return found.drafted.accepted


@pytest.fixture(scope="module")
def plain(on_mesh):
    """Without drafts."""
    return generated(on_mesh, 0, 0)


@pytest.fixture(scope="module")
def texts(plain):
    """Prompts and what is generated; then zeros."""
    found = np.zeros((len(IDS), IDS.shape[1] + STEPS), int)
    for row, ids, length, new in zip(found, IDS, LENGTHS, plain.ids, strict=True):
        row[: length + STEPS] = [*ids[:length], *new]
    return found


@pytest.fixture(scope="module")
def of_the_text(one_device, texts):
    """`drafts_of_a_text` of them."""
    return drafts_of_a_text(TINY, *one_device, jnp.asarray(texts, jnp.int32))


@pytest.fixture(scope="module")
def right(of_the_text, texts):
    """Whether module k drafts, at every place i, the token that comes: `[k − 1][row, i]`, of token i + k + 1."""
    found = []
    for k, (_, _, said) in enumerate(of_the_text, start=1):
        wanted = texts[:, k + 1 :]
        found.append(np.asarray(said)[:, : wanted.shape[1]] == wanted)
    return found


def accepted_by_hand(right, count):
    """What each step of each row accepts: a draft that is right with all before it; the end cuts the last ones off."""
    return tuple(accepted_of_row(right, row, count) for row in range(len(IDS)))


def accepted_of_row(right, row, count):
    known, end, found = LENGTHS[row] + 1, LENGTHS[row] + STEPS, []
    while known < end:
        here, n = known - 2, 0
        while n < count and known + n + 1 < end and right[n][row, here]:
            n += 1
        found.append(n)
        known += n + 1
    return tuple(found)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "modules"), [(1, 1), (2, 2)])
def test_tokens_are_those_without_drafts(on_mesh, one_device, plain, right, count, modules):
    """And accepted is what one device, which has the whole text at once, says will be."""
    found = generated(on_mesh, count, modules)
    np.testing.assert_array_equal(found.ids, plain.ids)
    assert checked(one_device, found).passed
    assert accepted(found) == accepted_by_hand(right, count)
    every = sum(accepted(found), ())
    assert {0, count} <= set(every), "else this text shows nothing"
    assert found.drafted.steps == max(map(len, accepted(found)))
    assert sum(every) > len(IDS)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"chunk": 5, "cached": [4, 0, 6, 8, 2, 1, 5, 3]}, {"border": "vendor"}])
def test_other_prefills(on_mesh, plain, right, more):
    """Over prefixes, in chunks, nothing changes; with the vendor's border drafts may, tokens do not."""
    found = generated(on_mesh, 1, 1, **more)
    np.testing.assert_array_equal(found.ids, plain.ids)
    if "chunk" in more:
        assert accepted(found) == accepted_by_hand(right, 1)


def test_one_module_drafts_two_tokens(on_mesh, plain, right):
    """Applied to its own hidden state the second time. Where the first draft is wrong, nothing is accepted."""
    found = generated(on_mesh, 2, 1)
    np.testing.assert_array_equal(found.ids, plain.ids)
    for row, one in enumerate(accepted(found)):
        known = LENGTHS[row] + 1
        for n in one:
            last = known + 1 == LENGTHS[row] + STEPS
            assert (n > 0) == (right[0][row, known - 2] and not last)
            known += n + 1
    assert 2 in sum(accepted(found), ())


@pytest.mark.slow
def test_a_decode_instance_drafts(on_mesh, checkpoint, plain, right):
    """The caches of both modules go with the model's to other devices. There is accepted what one device says."""
    decoder = Decoder(*instance(checkpoint, model_mesh(1, 2, first=4)))
    found = generated(on_mesh, 2, 2, decoder=decoder)
    np.testing.assert_array_equal(found.ids, plain.ids)
    assert accepted(found) == accepted_by_hand(right, 2)
    assert found.handed_over == LENGTHS.sum() * 8 * (1 + 2) * (TINY.kv_lora_rank + TINY.qk_rope_head_dim)
    with pytest.raises(InputError, match="there is no MTP module to draft with"):
        generated(on_mesh, 2, 2, decoder=decoder._replace(modules=()))


# The prefill of modules -----------------------------------------------------------------------------------------------


def modules_on_mesh(on_mesh, first, border="exact"):
    """Hidden states and latents of all modules after the prompts."""
    how, weights, modules = on_mesh
    hidden = prefill(how, weights, IDS, LENGTHS, is_packed=True).hidden
    hidden, found = rms_norm(hidden, weights.norm, TINY.rms_norm_eps), []
    for k, module in enumerate(modules, start=1):
        ids = following(IDS, LENGTHS, first, k, 2, border if k == 1 else "exact")
        hidden, latent = prefill(how, weights, ids, LENGTHS, drafting=Drafting(module, hidden), is_packed=True)
        found.append((np.asarray(hidden), np.asarray(latent.c_kv)[0]))
    return found


def difference(found, wanted):
    """At each place of each prompt."""
    return np.abs(found - np.asarray(wanted)[:, :9]).max(axis=2)


def test_modules_over_the_prompt(on_mesh, plain, of_the_text):
    """9 tokens in 4 chunks: the first token of a chunk follows the last of another, on another rank.

    Module 2 knows one token less to follow, and so one place less.
    """
    for k, (found, wanted) in enumerate(zip(modules_on_mesh(on_mesh, plain.ids[:, 0]), of_the_text, strict=True)):
        is_known = np.arange(9) < LENGTHS[:, None] - k
        for a, b in zip(found, wanted[:2], strict=True):
            assert difference(a, b)[is_known].max() < 1e-10


def test_the_vendor_s_border_is_seen(on_mesh, plain, of_the_text):
    """Wherever another token is said to follow, and nowhere else.

    Of 9 tokens in chunks 0–2, 3–5, 6–8 and pads, rank 0 has the first and the last: token 2 gets a pad to follow it.
    """
    first, is_there = plain.ids[:, 0], np.arange(9) < LENGTHS[:, None]
    (_, c_kv), *_ = modules_on_mesh(on_mesh, first, "vendor")
    other = difference(c_kv, of_the_text[0][1]) > 1e-10
    said = [following(IDS, LENGTHS, first, 1, 2, border) for border in ("exact", "vendor")]
    np.testing.assert_array_equal(other[is_there], (said[0] != said[1])[is_there])
    assert np.flatnonzero(other[0]).tolist() == [2]
    assert other.sum() > 8


@pytest.mark.parametrize("cp", [1, 2, 3])
@pytest.mark.parametrize("length", [24, 21])
def test_what_follows_on_the_vendor_s_ranks(cp, length):
    """Written anew, rank by rank and token by token. One rank has the whole text, and only pads can come between."""
    text, size = np.arange(1, length + 1), 24 // (2 * cp)
    token = [*range(1, length + 1), *[0] * (24 - length)]
    wanted = {}
    for rank in range(cp):
        late = 2 * cp - 1 - rank
        places = [*range(rank * size, (rank + 1) * size), *range(late * size, (late + 1) * size)]
        for here, there in itertools.pairwise(places):
            wanted[here] = token[there]
        wanted[places[-1]] = 99
    # A shorter prompt stands before it.
    batch = np.stack([text[::-1], text]), np.array([3, length]), np.array([98, 99])
    assert following(*batch, 1, cp, "vendor")[1].tolist() == [wanted[i] for i in range(length)]
    assert following(*batch, 1, cp)[1].tolist() == [*range(2, length + 1), 99]
    assert following(*batch, 3, cp)[1].tolist() == [*range(4, length + 1), 99, 0, 0]
    assert following(*batch, 1, cp)[0].tolist() == [length - 1, length - 2, 98, *[0] * (length - 3)]


# Broken on purpose ----------------------------------------------------------------------------------------------------


def verified(on_mesh, plain):
    """Logits of a step with two tokens after the prompt."""
    how, weights, _ = on_mesh
    cut, cache = cached(on_mesh, STEPS + 1)
    return np.asarray(parallel.decode_step(how, cut, weights, jnp.asarray(plain.ids[:, :2], jnp.int32), cache).logits)


def cached(on_mesh, room):
    """The prompts, with room for so many tokens more."""
    how, weights, _ = on_mesh
    cut = Sharing(2, is_sp=True).cut(how, IDS.shape[1] + room)
    return cut, extended_cache(how, cut, prefill(how, weights, IDS, LENGTHS, is_packed=True), LENGTHS)


def test_tokens_of_a_step_see_those_before_them(on_mesh, one_device, plain, texts):
    whole = np.asarray(on_one_device(TINY, one_device[0], jnp.asarray(texts[:, :-1], jnp.int32)))
    wanted = np.stack([row[length : length + 2] for row, length in zip(whole, LENGTHS, strict=True)])
    assert np.abs(verified(on_mesh, plain) - wanted).max() < 1e-10
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch, parallel, "decode_step", "new = Tokens(position,", "new = Tokens(position + 1,")
        other = np.abs(verified(on_mesh, plain) - wanted).max(axis=(0, 2))
    assert other[0] > 1e-4, "it sees the draft after it"


def test_what_is_not_taken_back_is_seen(on_mesh, one_device, plain, right):
    """Of the model's cache by other tokens; of a module's by other drafts."""
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch, generating, "_with_drafts", "length + jnp.asarray(taken, jnp.int32)", "length + run.shape[1]")
        assert not checked(one_device, generated(on_mesh, 1, 1)).passed
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch, drafting, "drafts", "length=jnp.asarray(window.start, jnp.int32)", "length=cache.length")
        patch.setattr(generating, "drafts", drafting.drafts)
        found = generated(on_mesh, 1, 1)
    np.testing.assert_array_equal(found.ids, plain.ids)
    assert accepted(found) != accepted_by_hand(right, 1)


# Started ahead --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_steps_that_are_started_ahead(on_mesh, plain, ahead):
    """A row ends with its third token, the others with their last or never: nobody gets another token for it."""
    how, weights, _ = on_mesh
    (cut, cache), told, end = cached(on_mesh, STEPS), [], int(plain.ids[0, 2])
    first = jnp.asarray(plain.ids[:, 0], jnp.int32)
    tell = lambda *x: told.append(x)  # noqa: E731
    found = decode_ahead(how, cut, weights, first, cache, STEPS, ahead=ahead, end=end, told=tell)
    assert found == [row[: row.index(end) + 1] if end in row else row for row in plain.ids.tolist()]
    assert len(found[0]) <= 3 < max(map(len, found))
    if ahead:
        assert told.index(("start", 3)) < told.index(("read", 2))
    else:
        assert told.index(("start", 3)) > told.index(("read", 2))


def test_a_row_s_end_is_known_late(on_mesh, plain):
    """All rows are the same request, and end together: as many steps are in vain as were started ahead."""
    how, weights, _ = on_mesh
    row = int(np.argmax([len(set(row[:6])) for row in plain.ids]))
    end, first = int(plain.ids[row, 5]), jnp.full(len(IDS), plain.ids[row, 0], jnp.int32)
    cut, every = cached(on_mesh, STEPS)
    cache = Cache(
        jax.tree.map(lambda x: jnp.repeat(x[:, row : row + 1], len(IDS), axis=1), every.latent),
        *(jnp.full(len(IDS), x[row], jnp.int32) for x in every[1:]),
    )
    started = []
    for ahead in (0, 1):
        told = []
        tell = lambda *x, told=told: told.append(x)  # noqa: E731
        found = decode_ahead(how, cut, weights, first, cache, STEPS, ahead=ahead, end=end, told=tell)
        assert found == [plain.ids[row, : len(found[0])].tolist()] * len(IDS)
        assert found[0][-1] == end
        started.append(sum(what == "start" for what, _ in told))
    assert started[1] == started[0] + 1
    for steps, ahead in ((0, 1), (1, -1)):
        with pytest.raises(InputError, match="give at least 1 step, and 0 or more ahead"):
            decode_ahead(how, cut, weights, first, cache, steps, ahead=ahead)


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "modules", "more", "message"),
    [
        (-1, 1, {}, "draft is -1"),
        (1, 0, {}, "there is no MTP module"),
        (3, 2, {}, "3 tokens are to be drafted, but of 2 modules each drafts one; draft at most 2"),
        (1, 1, {"border": "lossy"}, "border is 'lossy'; it must be exact or vendor"),
        (2, 2, {"border": "vendor"}, "shift is that of one module"),
        (1, 1, {"border": "vendor", "chunk": 4}, "border is that of a prompt at once"),
        (1, 1, {"border": "vendor", "cached": [1] * 8}, "border is that of a prompt at once"),
        (2, 2, {"chunk": 8}, "the last part of a prompt has 1 token, and 2 modules draft"),
        (2, 2, {"cached": LENGTHS - 1}, "the last part of a prompt has 1 token, and 2 modules draft"),
    ],
)
def test_bad_input(on_mesh, draft, modules, more, message):
    with pytest.raises(InputError, match=message):
        generated(on_mesh, draft, modules, **more)
