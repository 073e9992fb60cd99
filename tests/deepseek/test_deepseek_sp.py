"""SP: the cache of latents cut over cp and tp together, and MindIE's placement of a prompt's last block."""

import jax.numpy as jnp
import numpy as np
import pytest
from source_mutant import mutant
from tiny_deepseek import IDS, TINY, random_checkpoint

from cpjax.deepseek import cache as caching
from cpjax.deepseek import parallel
from cpjax.deepseek.cache import CacheCut
from cpjax.deepseek.checkpoint import load
from cpjax.deepseek.model import logits_of
from cpjax.deepseek.one_device import on_one_device
from cpjax.deepseek.parallel import extended_cache, model_mesh, prefill, setup, specs
from cpjax.errors import InputError
from cpjax.partition import Blocks

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory, TINY, 2)


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Logits of the whole text, on one device."""
    return np.asarray(on_one_device(TINY, load(checkpoint, "float64"), jnp.asarray(IDS, jnp.int32)))


@pytest.fixture(scope="module")
def on_mesh(checkpoint):
    """cp 2 and tp 2: a cache over 4 ranks."""
    how = setup(TINY, model_mesh(2, 2), dtype="float64")
    return how, load(checkpoint, "float64", mesh=how.mesh, specs=specs(TINY))


def decoded(how, weights, cut, lengths, steps):
    """Logits of all steps after prompts of these lengths."""
    cache = extended_cache(how, cut, prefill(how, weights, IDS[:, :13], lengths), lengths)
    found = []
    for i in range(steps):
        new = jnp.asarray([[row[length + i]] for row, length in zip(IDS, lengths, strict=True)], jnp.int32)
        logits, _, cache = parallel.decode_step(how, cut, weights, new, cache)
        found.append(np.asarray(logits)[:, 0])
    return np.stack(found, axis=1)


def difference(a, b):
    assert a.shape == b.shape
    return np.abs(a - b).max()


@pytest.mark.slow
@pytest.mark.parametrize("is_last_moved", [False, True])
def test_decode_over_cp_and_tp(on_mesh, expected, is_last_moved):
    """Rows of 13 and 4 tokens, in blocks of 2: a row with a block for each rank and more, and one with fewer."""
    found = decoded(*on_mesh, CacheCut(4, 2, 21, is_last_moved), [13, 4], 8)
    assert difference(found, np.stack([expected[0, 13:21], expected[1, 4:12]])) < 1e-10


@pytest.mark.slow
def test_chunks_over_a_cache_on_all_ranks(on_mesh, expected):
    """A prefix that all ranks gather from all ranks."""
    how, weights = on_mesh
    cut, cache, found = CacheCut(4, 2, 21, is_last_moved=True), None, []
    for start in (0, 7, 14):
        ids = IDS[:, start : start + 7]
        outcome = prefill(how, weights, ids, cut=None if cache is None else cut, cache=cache)
        cache = extended_cache(how, cut, outcome, [7, 7], cache, prompt=[21, 21])
        found.append(np.asarray(logits_of(weights, TINY, outcome.hidden)))
    assert difference(np.concatenate(found, axis=1), expected) < 1e-10


def held_apart(how, weights, cut):
    """Of each device, in the order of the ranks, which tokens of row 0's prompt it holds."""
    outcome = prefill(how, weights, IDS[:, :13], [13, 13])
    cache = extended_cache(how, cut, outcome, [13, 13])
    text, place = np.asarray(outcome.latent.c_kv)[0, 0, :13], {d: n for n, d in enumerate(how.mesh.devices.ravel())}
    found = {}
    for shard in cache.latent.c_kv.addressable_shards:
        rows = np.asarray(shard.data)[0, 0]
        assert len(rows) == cut.slots
        same = np.abs(rows[:, None] - text[None]).max(axis=2) < 1e-12
        found[place[shard.device]] = [int(np.flatnonzero(row)[0]) for row in same if row.any()]
    return [found[rank] for rank in range(len(found))]


def owned(ranks, block, length):
    """The same by the vendor's rule."""
    owners = Blocks(ranks, block).owners(0, length)
    return [np.flatnonzero(owners == rank).tolist() for rank in range(ranks)]


def test_each_rank_holds_what_mindie_s_does(on_mesh):
    """Token 12 is the last block, and on the last rank: in turn it would be rank 2's."""
    assert held_apart(*on_mesh, CacheCut(4, 2, 21, is_last_moved=True)) == owned(4, 2, 13)
    assert held_apart(*on_mesh, CacheCut(4, 2, 21)) == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12], [6, 7]]


@pytest.mark.parametrize(("ranks", "block"), [(1, 2), (2, 3), (4, 1), (3, 2)])
def test_every_token_has_one_slot(ranks, block):
    """Of prompts of 1 to 20 tokens as MindIE has it; behind them a rank is filled up, then the next has its turn."""
    cut, prompt = CacheCut(ranks, block, 24, is_last_moved=True), list(range(1, 21))
    position = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32)[None], (20, 24))
    rank, slot = (np.asarray(x) for x in cut.place(position, jnp.asarray(prompt, jnp.int32)))
    for row, length in zip(rank, prompt, strict=True):
        np.testing.assert_array_equal(row[:length], Blocks(ranks, block).owners(0, length))
        for p in range(length, 24):
            assert row[p] == (row[p - 1] if p % block else (row[p - 1] + 1) % ranks)
    assert slot.max() < cut.slots
    there = np.asarray(cut.positions(jnp.asarray(prompt, jnp.int32)))
    np.testing.assert_array_equal(there[np.arange(20)[:, None], rank, slot], position)


# Broken on purpose ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("axis_name=axes", 'axis_name="cp"'),  # each rank of tp merges its own column of the mesh only
        ('lax.axis_index("tp") * heads, heads', "0, heads"),  # the first rank's heads for everybody's
        ("rank = lax.axis_index(axes)", "rank = lax.axis_index(axes[::-1])"),  # sp before cp
    ],
)
def test_a_broken_merge_is_seen(on_mesh, expected, old, new):
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch, parallel, "decode_step", old, new)
        found = decoded(*on_mesh, CacheCut(4, 2, 21), [13, 13], 2)
    assert difference(found, expected[:, 13:15]) > 1e-4


def test_a_last_block_on_the_wrong_rank_is_seen(on_mesh, expected):
    """Where it is looked for it is not; and a cache that does both wrongly is not MindIE's."""
    cut = CacheCut(4, 2, 20, is_last_moved=True)  # another capacity: another program, traced with what is broken
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch, caching, "CacheCut", "block, block - turns) % ranks", "block, block - turns + 1) % ranks")
        patch.setattr(CacheCut, "place", caching.CacheCut.place)
        assert held_apart(*on_mesh, cut) != owned(4, 2, 13)
        assert difference(decoded(*on_mesh, cut, [13, 13], 2), expected[:, 13:15]) > 1e-4


def test_a_cut_over_other_ranks(on_mesh):
    how, weights = on_mesh
    with pytest.raises(InputError, match="cut over 3 ranks; give cp, 2, or with sp cp·tp, 4"):
        extended_cache(how, CacheCut(3, 2, 21), prefill(how, weights, IDS[:, :13], [13, 13]), [13, 13])
