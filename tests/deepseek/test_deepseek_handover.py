"""Disaggregated: prefill on some devices, the cache handed over, decode on others; the tokens are one device's."""

import jax.numpy as jnp
import numpy as np
import pytest
from source_mutant import mutant
from tiny_deepseek import IDS, TINY, random_checkpoint

from cpjax.deepseek import handover
from cpjax.deepseek.cache import CacheCut
from cpjax.deepseek.checkpoint import load
from cpjax.deepseek.handover import Fetched, hand_over
from cpjax.deepseek.one_device import on_one_device
from cpjax.deepseek.parallel import decode_step, extended_cache, model_mesh, prefill, setup, specs
from cpjax.errors import InputError
from cpjax.mindie.deployment import Sizes
from cpjax.mindie.link import transfers

pytestmark = pytest.mark.usefixtures("float64")

LENGTHS = [13, 4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory, TINY, 2)


@pytest.fixture(scope="module")
def expected(checkpoint):
    """Logits of the whole text, on one device."""
    whole = np.asarray(on_one_device(TINY, load(checkpoint, "float64"), jnp.asarray(IDS, jnp.int32)))
    return np.stack([row[length : length + 6] for row, length in zip(whole, LENGTHS, strict=True)])


@pytest.fixture(scope="module")
def instances(checkpoint):
    """Prefill: cp 2 and tp 2, on four devices. Decode: tp 2, on two others. Each with its weights."""
    found = []
    for mesh in (model_mesh(2, 2), model_mesh(1, 2, first=4)):
        how = setup(TINY, mesh, dtype="float64")
        found.append((how, load(checkpoint, "float64", mesh=mesh, specs=specs(TINY))))
    return found


@pytest.fixture(scope="module")
def prefilled(instances):
    """The prompts' latents, on the prefill instance."""
    return prefill(*instances[0], IDS[:, :13], LENGTHS)


def cached(instances, prefilled, ranks):
    """A cache over cp, or over cp and tp (sp), blocks of 2, the last one moved as MindIE does."""
    cut = CacheCut(ranks, 2, 21, is_last_moved=True)
    return cut, extended_cache(instances[0][0], cut, prefilled, LENGTHS)


def decoded(decode, cut, cache):
    found = []
    for i in range(6):
        new = jnp.asarray([[row[length + i]] for row, length in zip(IDS, LENGTHS, strict=True)], jnp.int32)
        logits, _, cache = decode_step(decode[0], cut, decode[1], new, cache)
        found.append(np.asarray(logits)[:, 0])
    return np.stack(found, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_decode_on_other_devices_is_one_device(instances, prefilled, expected, ranks):
    cut, cache, size = hand_over(*cached(instances, prefilled, ranks), instances[1][0])
    assert {d.id for d in cache.latent.c_kv.devices()} == {4, 5}
    assert size == sum(LENGTHS) * 8 * TINY.num_hidden_layers * (TINY.kv_lora_rank + TINY.qk_rope_head_dim)
    assert np.abs(decoded(instances[1], cut, cache) - expected).max() < 1e-10


def test_a_block_from_another_rank_is_seen(instances, prefilled, expected, monkeypatch):
    """The right places, of the wrong rank's slots."""
    wrong = "(cut.ranks - 1 - rank) * cut.slots + slot, 0)"
    mutant(monkeypatch, handover, "hand_over", "rank * cut.slots + slot, 0)", wrong)
    cut, cache, _ = handover.hand_over(*cached(instances, prefilled, 2), instances[1][0])
    assert np.abs(decoded(instances[1], cut, cache) - expected).max() > 1e-3


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 13, 16, 29])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_blocks_come_in_the_order_of_the_link_map(ranks, tokens):
    """Of `cpjax mindie link`, whose code is another; and what is new is stored right behind the prompt."""
    cut = Fetched(1, 128, tokens * 128 + 300, is_last_moved=True, sources=ranks)
    prompt = tokens * 128 - 5
    sizes = {"dp": 1, "sp": 1, "tp": 1, "pp": 1, "moe_ep": 1, "moe_tp": 1}
    said = transfers(Sizes(ranks, cp=ranks, **sizes), Sizes(1, cp=1, **sizes), prompt)[0]
    place = lambda position: int(cut.place(jnp.array([[position]], jnp.int32), jnp.array([prompt], jnp.int32))[1][0, 0])  # noqa: E731
    assert [place(one.block * 128) for one in said] == [one.target * 128 for one in said]
    assert sorted(one.target for one in said) == list(range(tokens))
    assert [place(prompt + i) for i in (0, 4, 5, 200)] == [prompt + i for i in (0, 4, 5, 200)]


@pytest.mark.parametrize("is_last_moved", [False, True])
@pytest.mark.parametrize("sources", [1, 2, 3])
def test_places_and_positions_are_inverse(sources, is_last_moved):
    prompts = jnp.arange(1, 12, dtype=jnp.int32)
    cut = Fetched(1, 2, 17, is_last_moved, sources=sources)
    position = jnp.broadcast_to(jnp.arange(cut.slots, dtype=jnp.int32)[None], (len(prompts), cut.slots))
    rank, slot = cut.place(position, prompts)
    assert not np.asarray(rank).any()
    back = jnp.take_along_axis(cut.positions(prompts)[:, 0], slot, axis=1)
    np.testing.assert_array_equal(back, position)


def test_where_the_last_block_is_not_moved_new_tokens_would_fall_into_the_prompt():
    """3 blocks on 2 ranks, the last one half full: dealt out in turns it is fetched before block 1."""
    for is_last_moved, slot in ((True, 5), (False, 3)):
        cut = Fetched(1, 2, 8, is_last_moved, sources=2)
        assert int(cut.place(jnp.array([[5]], jnp.int32), jnp.array([5], jnp.int32))[1][0, 0]) == slot


def test_a_decode_instance_with_cp_is_refused(instances, prefilled):
    cut, cache = cached(instances, prefilled, 2)
    with pytest.raises(InputError, match="the decode instance has cp 2; only a prefill instance has cp"):
        hand_over(cut, cache, instances[0][0])
