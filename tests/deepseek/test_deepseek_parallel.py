"""On a mesh as on one device: prefill at once, token by token, rows of different lengths; what each device holds."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from source_mutant import mutant
from tiny_deepseek import IDS, TINY, random_checkpoint

from cpjax.deepseek import generate as generating
from cpjax.deepseek import parallel
from cpjax.deepseek.cache import CacheCut
from cpjax.deepseek.checkpoint import load
from cpjax.deepseek.config import KNOWN
from cpjax.deepseek.generate import Sharing, generate
from cpjax.deepseek.model import logits_of
from cpjax.deepseek.one_device import check, on_one_device
from cpjax.deepseek.parallel import extended_cache, model_mesh, prefill, setup, specs
from cpjax.errors import InputError
from cpjax.partition import Interleaved

pytestmark = pytest.mark.usefixtures("float64")

SETUPS = [(2, 1, "ring"), (2, 2, "gather"), (4, 1, "pass_query")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory, TINY, 2)


@pytest.fixture(scope="module")
def one_device(checkpoint):
    return load(checkpoint, "float64")


@pytest.fixture(scope="module")
def expected(checkpoint, one_device):
    """Logits of the whole text, on one device."""
    return np.asarray(on_one_device(TINY, one_device, jnp.asarray(IDS, jnp.int32)))


@pytest.fixture(scope="module")
def on_mesh(checkpoint):
    """cp, tp, exchange → setup and weights."""

    @functools.cache
    def made(cp, tp, exchange):
        how = setup(TINY, model_mesh(cp, tp), dtype="float64", exchange=exchange)
        return how, load(checkpoint, "float64", mesh=how.mesh, specs=specs(TINY))

    return made


def logits(how, weights, outcome):
    return np.asarray(logits_of(weights, how.config, outcome.hidden))


def near(a, b):
    assert a.shape == b.shape
    assert np.abs(a - b).max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("which", SETUPS)
def test_prefill_is_one_device(on_mesh, expected, which):
    """21 tokens, which no rank gets an equal share of."""
    how, weights = on_mesh(*which)
    near(logits(how, weights, prefill(how, weights, IDS)), expected)


def cut_off(lengths):
    """The text with another token wherever a row has ended."""
    return np.where(np.arange(IDS.shape[1])[None] < np.array(lengths)[:, None], IDS, 96)


@pytest.mark.parametrize("which", SETUPS)
def test_rows_of_different_lengths(on_mesh, expected, which):
    """A row's pads change nothing in it, nor in the other row."""
    how, weights = on_mesh(*which)
    found = logits(how, weights, prefill(how, weights, cut_off([21, 13]), [21, 13]))
    near(found[0], expected[0])
    near(found[1, :13], expected[1, :13])


# Prefix and chunks ----------------------------------------------------------------------------------------------------


def in_chunks(how, weights, sizes):
    """Logits of the text, prefilled in chunks of these sizes over the latents of those before; and the cache."""
    cut, cache, start, found = CacheCut(how.sizes[0], 2, IDS.shape[1]), None, 0, []
    for size in sizes:
        ids = IDS[:, start : start + size]
        outcome = prefill(how, weights, ids, cut=None if cache is None else cut, cache=cache)
        cache = extended_cache(how, cut, outcome, [size, size], cache, prompt=[21, 21])
        found.append(logits(how, weights, outcome))
        start += size
    return np.concatenate(found, axis=1), cache


@pytest.mark.slow
def test_in_chunks_is_at_once(on_mesh, expected):
    """The last chunk is shorter than the others. (Over cp and tp, with sp: `test_chunks_over_a_cache_on_all_ranks`.)"""
    how, weights = on_mesh(*SETUPS[2])
    found, cache = in_chunks(how, weights, [8, 8, 5])
    near(found, expected)
    whole = extended_cache(how, CacheCut(how.sizes[0], 2, 21), prefill(how, weights, IDS), [21, 21])
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
        near(np.asarray(a), np.asarray(b))


def test_rows_with_different_prefixes(on_mesh, expected):
    """One row has 7 tokens cached, the other none; of the new tokens one has 8, the other 6, then pads.

    The programs are those of the chunks.
    """
    how, weights = on_mesh(*SETUPS[2])
    cut, lengths = CacheCut(4, 2, 21), [7, 0]
    beginnings = np.where(np.arange(8) < np.array(lengths)[:, None], IDS[:, :8], 96)
    cache = extended_cache(how, cut, prefill(how, weights, beginnings, lengths), lengths, prompt=[15, 6])
    new = np.stack([IDS[0, 7:15], np.where(np.arange(8) < 6, IDS[1, :8], 96)])
    found = logits(how, weights, prefill(how, weights, new, [8, 6], cut=cut, cache=cache))
    near(found[0], expected[0, 7:15])
    near(found[1, :6], expected[1, :6])


# Decode ---------------------------------------------------------------------------------------------------------------


def decoded(how, weights, lengths, steps):
    """Logits of all steps after prompts of these lengths; blocks of the cache have as many tokens as tp ranks."""
    cut = CacheCut(how.sizes[0], how.sizes[1], IDS.shape[1])
    cache = extended_cache(how, cut, prefill(how, weights, cut_off(lengths), lengths), lengths)
    found = []
    for i in range(steps):
        new = jnp.asarray([row[length + i] for row, length in zip(IDS, lengths, strict=True)], jnp.int32)
        logits, _, cache = parallel.decode_step(how, cut, weights, new[:, None], cache)
        found.append(np.asarray(logits[:, 0]))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("which", SETUPS[:2])
def test_token_by_token_is_at_once(on_mesh, expected, which):
    near(decoded(*on_mesh(*which), [1, 1], 20), expected[:, 1:])


def test_decoding_rows_of_different_lengths(on_mesh, expected):
    found = decoded(*on_mesh(*SETUPS[0]), [9, 4], 12)
    near(found, np.stack([expected[0, 9:], expected[1, 4:16]]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cache.length + ids.shape[1], cache.prompt", "cache.length, cache.prompt"),  # a token does not see itself
        ("position = cache.length[:, None]", "position = 1 + cache.length[:, None]"),
        ("Parts(_summed,", 'Parts(partial(lax.pmax, axis_name="tp"),'),  # a sum forgotten JAX itself refuses
    ],
)
def test_a_broken_step_is_seen(on_mesh, expected, old, new):
    how, weights = on_mesh(*SETUPS[1])
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch, parallel, "decode_step", old, new)
        found = decoded(how, weights, [9, 9], 3)
    assert np.abs(found - expected[:, 9:12]).max() > 1e-4


def test_each_device_holds_its_part(on_mesh):
    how, weights = on_mesh(*SETUPS[1])
    shape = lambda x: x.sharding.shard_shape(x.shape)  # noqa: E731
    attention, feed = weights.layers[1].self_attn, weights.layers[1].mlp
    assert shape(attention.kv_b_proj) == (2 * 32, 32), "2 of 4 heads"
    assert shape(attention.o_proj) == (48, 2 * 16)
    assert shape(attention.kv_a_proj_with_mqa) == (40, 48), "latents are everybody's"
    assert shape(feed.experts.gate_proj) == (2, 32, 48), "2 of 8 experts"
    assert shape(weights.layers[0].mlp.down_proj) == (48, 96 // 2)
    cache = extended_cache(how, CacheCut(2, 2, 24), prefill(how, weights, IDS), [21, 21])
    assert shape(cache.latent.c_kv) == (2, 2, 12, 32)


# Greedy decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_generated_is_one_device_s(on_mesh, one_device):
    how, weights = on_mesh(*SETUPS[1])
    told, prompt = [], IDS[:, :9]
    found = generate(how, weights, prompt, 13, sharing=Sharing(block=2), advance=lambda *x: told.append(x))
    assert told[-1] == ("tokens", 13, 13)
    said = check(TINY, one_device, prompt, found)
    assert said.passed
    assert said.difference < 1e-12
    again = generate(how, weights, prompt, 13, sharing=Sharing(block=2), chunk=5)
    assert (again.ids == found.ids).all()
    assert check(TINY, one_device, prompt, again).passed
    other = found._replace(ids=(found.ids + (np.arange(13) == 12)) % 97)
    assert check(TINY, one_device, prompt, other).other == 12
    assert not check(TINY, one_device, prompt, found._replace(logits=found.logits * np.nan)).passed
    assert not check(TINY, one_device, prompt, found._replace(logits=found.logits + 1e-8)).passed


def test_a_check_needs_float64(checkpoint):
    weights = load(checkpoint, "float32")
    with pytest.raises(InputError, match="the check is made in float64"):
        check(TINY, weights, IDS, generating.Generated(IDS, IDS * 1.0, {}))


# The cut of the cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "block"), [(1, 1), (2, 3), (5, 2)])
def test_every_token_has_one_slot(ranks, block):
    cut, prompt = CacheCut(ranks, block, 40), jnp.array([17])
    (rank,), (slot,) = (np.asarray(x) for x in cut.place(jnp.arange(40)[None], prompt))
    np.testing.assert_array_equal(rank, Interleaved(ranks, block).owners(0, 40))
    np.testing.assert_array_equal(np.asarray(cut.positions(prompt))[0, rank, slot], np.arange(40))


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "mesh", "more", "message"),
    [
        (TINY, (1, 8), {}, "num_attention_heads is 4, which tp 8 does not divide"),
        (replace(TINY, intermediate_size=9), (1, 2), {}, "intermediate_size is 9, which tp 2 does not divide"),
        (replace(TINY, n_routed_experts=12), (8, 1), {}, "n_routed_experts is 12, which cp·tp = 8"),
        (TINY, (1, 1), {"exchange": "all_to_all"}, "a latent takes one of ring"),
        (TINY, (1, 1), {"precision": "half"}, "unknown precision 'half'"),
    ],
)
def test_what_cannot_be_cut(config, mesh, more, message):
    with pytest.raises(InputError, match=message):
        setup(config, model_mesh(*mesh), dtype="float64", **more)


def test_other_bad_input(on_mesh):
    how, weights = on_mesh(*SETUPS[0])
    for ids, message in (
        ([[]], "there is no token"),
        ([[97]], "token id 97 is none of the model's; they are 0 to 96"),
        ([[1, -1]], "token id -1 is none"),
    ):
        with pytest.raises(InputError, match=message):
            prefill(how, weights, np.array(ids, int))
    with pytest.raises(InputError, match="give both or none"):
        prefill(how, weights, IDS, cut=CacheCut(2, 1, 1))
    with pytest.raises(InputError, match="chunk is 0"):
        generate(how, weights, IDS, 1, chunk=0)
    with pytest.raises(InputError, match="steps is 0"):
        generate(how, weights, IDS, 0)
    with pytest.raises(InputError, match="more than the model's max_position_embeddings"):
        generate(how, weights, IDS, 163840)
    with pytest.raises(InputError, match="JAX sees 8 device"):
        model_mesh(4, 4)
    with pytest.raises(InputError, match="tp is 0"):
        model_mesh(1, 0)
    with pytest.raises(InputError, match="block of the cache is 0"):
        CacheCut(1, 0, 1)


def test_the_real_model_can_be_cut_as_the_vendor_does():
    """cp 2, tp 8, experts over all 16: the shapes divide (nothing is computed)."""
    found = specs(KNOWN["DeepSeek-R1"])
    assert found.layers[60].mlp.experts.gate_proj == jax.P(("cp", "tp"))
    assert found.layers[0].self_attn.o_proj == jax.P(None, "tp")
