"""Drafting: modules on a mesh, several tokens a step, what is accepted; the tokens are those without drafts."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from source_mutant import mutant

from cpjax.deepseek import draft as drafting
from cpjax.deepseek import generate as generating
from cpjax.deepseek import parallel
from cpjax.deepseek.attention import attend_on_one_device, linear, rms_norm
from cpjax.deepseek.cache import CacheCut
from cpjax.deepseek.checkpoint import load, load_mtp, open_checkpoint, write_random
from cpjax.deepseek.config import SMALL
from cpjax.deepseek.draft import following
from cpjax.deepseek.generate import Sharing, check, generate, on_one_device
from cpjax.deepseek.model import attention_for, run_layers
from cpjax.deepseek.moe import MoeWeights
from cpjax.deepseek.mtp import Drafting, draft
from cpjax.deepseek.parallel import extended_cache, model_mesh, mtp_specs, prefill, setup, specs
from cpjax.errors import InputError
from cpjax.mask import Tokens, tokens

TINY = replace(
    SMALL,
    vocab_size=31,
    hidden_size=48,
    num_hidden_layers=2,
    n_routed_experts=8,
    num_nextn_predict_layers=2,
)
IDS = np.random.default_rng(0).integers(0, 31, (2, 9))
STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft") / "model"
    write_random(folder, TINY, seed=5)
    return open_checkpoint(folder)


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
    weights = weights._replace(layers=tuple(quieter(x, 0.3) for x in weights.layers))
    keeps = jnp.concatenate([jnp.eye(wide), 0.2 * jnp.eye(wide)], axis=1)
    return weights, tuple(m._replace(eh_proj=keeps, layer=quieter(m.layer, 0.3)) for m in modules)


@pytest.fixture(scope="module")
def one_device(checkpoint):
    return guessing(load(checkpoint, "float64"), load_mtp(checkpoint, "float64"))


@pytest.fixture(scope="module")
def on_mesh(checkpoint):
    """cp 2 and tp 2: setup, weights, modules."""
    how = setup(TINY, model_mesh(2, 2), dtype="float64")
    weights = load(checkpoint, "float64", mesh=how.mesh, specs=specs(TINY))
    return how, *guessing(weights, load_mtp(checkpoint, "float64", mesh=how.mesh, specs=mtp_specs(TINY)))


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
    return generate(
        how, weights, IDS, STEPS, sharing=Sharing(2, is_sp=True), modules=every[:modules], draft=count, **more
    )


@pytest.fixture(scope="module")
def plain(on_mesh):
    """Without drafts."""
    return generated(on_mesh, 0, 0)


@pytest.fixture(scope="module")
def right(one_device, plain):
    """Whether each module, given the text that is generated, drafts token L + k: `[k][row, new token]`."""
    weights, modules = one_device
    text = np.concatenate([IDS, plain.ids], axis=1)
    found = drafts_of_a_text(TINY, weights, modules, jnp.asarray(text, jnp.int32))
    return [np.asarray(said)[:, : text.shape[1] - k - 1] == text[:, k + 1 :] for k, (_, _, said) in enumerate(found, 1)]


def accepted_by_hand(right, row, count):
    """What each step accepts if a draft counts where it and all before it are right; the end cuts the last ones off."""
    known, found = IDS.shape[1] + 1, []
    while known < IDS.shape[1] + STEPS:
        here, n = known - 2, 0
        while n < count and known + n + 1 < IDS.shape[1] + STEPS and right[n][row, here]:
            n += 1
        found.append(n)
        known += n + 1
    return tuple(found)


@pytest.mark.parametrize(("count", "modules"), [(1, 1), (2, 2)])
def test_tokens_are_those_without_drafts(on_mesh, one_device, plain, right, count, modules):
    """And accepted is what one device, which has the whole text at once, says will be."""
    found = generated(on_mesh, count, modules)
    np.testing.assert_array_equal(found.ids, plain.ids)
    assert check(TINY, one_device[0], IDS, found).passed
    drafted = found.drafted
    assert drafted.accepted == tuple(accepted_by_hand(right, row, count) for row in range(2))
    every = sum(drafted.accepted, ())
    assert {0, count} <= set(every), "else this text shows nothing"
    assert drafted.steps == max(map(len, drafted.accepted)) < STEPS - 1
