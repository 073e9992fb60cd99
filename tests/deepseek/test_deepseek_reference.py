"""Against Hugging Face's DeepseekV3: angles, scale, router, logits; float64 to 1e-10, and its own float32 to 1e-4."""

import functools
import json
from dataclasses import replace

import huggingface_deepseek as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from source_mutant import mutant
from strategies import examples
from transformers import DeepseekV3Config

from cpjax.deepseek import attention, model, moe, rope
from cpjax.deepseek.attention import attend_on_one_device, linear, rms_norm
from cpjax.deepseek.checkpoint import load, load_mtp, open_checkpoint, write_random
from cpjax.deepseek.config import SMALL, Yarn, config_of, read_config
from cpjax.deepseek.model import attention_for, forward, run_layers
from cpjax.deepseek.moe import MlpWeights, MoeWeights
from cpjax.deepseek.mtp import draft
from cpjax.deepseek.rope import cos_sin
from cpjax.mask import Tokens, tokens

YARN = Yarn(factor=40.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)
TINY = replace(SMALL, vocab_size=97, hidden_size=48, num_hidden_layers=2, yarn=YARN)
IDS = np.random.default_rng(0).integers(0, 97, (2, 40))
CONFIGS = {
    "as DeepSeek-V3": TINY,
    "plain rope": replace(TINY, yarn=None),
    "two mscales": replace(TINY, yarn=replace(YARN, mscale=0.707)),
    "no mscale": replace(TINY, yarn=replace(YARN, mscale=None, mscale_all_dim=None)),
    "halves": replace(TINY, rope_interleave=False),
    "no q_lora": replace(TINY, q_lora_rank=None),
    "weights not divided": replace(TINY, norm_topk_prob=False),
    "a large eps": replace(TINY, rms_norm_eps=1e-3),
    "wide values, one group": replace(TINY, v_head_dim=40, n_group=1, topk_group=1),
    "two shared experts": replace(TINY, n_shared_experts=2, first_k_dense_replace=0),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name of a config → its checkpoint, written when it is first asked for."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def folder(name):
        write_random(root / name, CONFIGS[name], seed=1)
        return root / name

    return folder


@pytest.fixture(scope="session")
def expected(folders):
    """Name of a config → the reference's logits."""
    return functools.cache(lambda name: reference.logits(folders(name), IDS))


def ours(folder, dtype="float64"):
    checkpoint = open_checkpoint(folder)
    return np.asarray(forward(load(checkpoint, dtype), checkpoint.config, jnp.asarray(IDS, jnp.int32)))


def difference(a, b):
    assert a.shape == b.shape
    return np.abs(a - b).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_logits(folders, expected, name):
    with jax.enable_x64(True):
        found = ours(folders(name))
    assert np.abs(expected(name)).max() > 1
    assert difference(found, expected(name)) < 1e-10


@pytest.mark.slow
def test_logits_as_the_reference_computes_them(folders, expected):
    """Its float32 norms, router, angles and softmax in a float64 model; and this model in float32."""
    as_it_is = reference.logits(folders("as DeepSeek-V3"), IDS, is_lifted=False)
    assert 1e-10 < difference(as_it_is, expected("as DeepSeek-V3")) < 1e-4
    with jax.enable_x64(True):
        assert difference(ours(folders("as DeepSeek-V3")), as_it_is) < 1e-4
    assert difference(ours(folders("as DeepSeek-V3"), "float32"), as_it_is) < 1e-4


def test_a_checkpoint_that_the_reference_writes_is_read(folders, expected, tmp_path):
    """In several files with an index, and its config in its own spelling."""
    with reference.precision(True):
        reference.read(folders("two shared experts")).save_pretrained(tmp_path, max_shard_size="100KB")
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert read_config(tmp_path) == read_config(folders("two shared experts"))
    with jax.enable_x64(True):
        assert difference(ours(tmp_path), expected("two shared experts")) < 1e-10


@pytest.mark.slow
def test_the_draft_module(folders):
    """Logits of the token after the next, of all places at once."""
    folder = folders("as DeepSeek-V3")
    checkpoint = open_checkpoint(folder)
    config, tensors = checkpoint.config, {n: x for f in folder.glob("*.safetensors") for n, x in load_file(f).items()}
    with jax.enable_x64(True):
        weights, (module,), ids = load(checkpoint, "float64"), load_mtp(checkpoint, "float64"), jnp.asarray(IDS)
        how = attention_for(config, None, "float64")
        place = Tokens(*(jnp.asarray(x) for x in tokens(2, 39)))
        attending = lambda number, query, latent, up: attend_on_one_device(query, latent, up, place, place, how)  # noqa: E731
        outcome = run_layers(weights, config, ids[:, :-1], place.position, attending)
        hidden = rms_norm(outcome.hidden, weights.norm, config.rms_norm_eps)
        drafted, latent = draft(weights, module, config, ids[:, 1:], hidden, place.position, attending)
        found = np.asarray(linear(drafted, weights.lm_head))
    assert latent.c_kv.shape == (2, 39, config.kv_lora_rank)
    assert difference(found, reference.drafts(folder, IDS, tensors, config.num_hidden_layers)) < 1e-10


# Angles and scale ----------------------------------------------------------------------------------------------------

AMOUNTS = st.sampled_from([None, 0.5, 0.707, 1.0])
YARNS = st.builds(
    Yarn,
    factor=st.sampled_from([1.0, 4.0, 40.0]),
    original_max_position_embeddings=st.sampled_from([64, 4096, 10**7]),  # the last: both ends of the ramp beyond R
    beta_fast=st.sampled_from([32.0, 2.0]),
    beta_slow=st.sampled_from([1.0, 2.0]),
    mscale=AMOUNTS,
    mscale_all_dim=AMOUNTS,
    attention_factor=st.sampled_from([None, 1.25]),
    truncate=st.booleans(),
)


@examples(0.5)
@given(st.none() | YARNS, st.sampled_from([4, 8, 64]), st.sampled_from([100.0, 10000.0]), st.integers(0, 2**17))
def test_angles_and_scale(yarn, dims, theta, start):
    config = replace(TINY, yarn=yarn, qk_rope_head_dim=dims, rope_theta=theta)
    said = {key: value for key, value in config.as_json().items() if key not in ("rope_scaling", "rope_theta")}
    kind = {"rope_type": "default"} if yarn is None else {"rope_type": "yarn"} | vars(yarn)
    other = DeepseekV3Config(**said, rope_parameters=kind | {"rope_theta": theta})
    position = start + np.arange(5)[None]
    with jax.enable_x64(True):
        cos, sin = cos_sin(config, jnp.asarray(position), "float64")
    wanted_cos, wanted_sin = reference.angles(other, position)
    assert difference(np.concatenate([cos, cos], axis=2), wanted_cos) < 1e-10
    assert difference(np.concatenate([sin, sin], axis=2), wanted_sin) < 1e-10
    assert config.softmax_scale == pytest.approx(reference.softmax_scale(other), rel=1e-14)
    assert config_of(json.loads(json.dumps(other.to_dict()))) == config


# The router ----------------------------------------------------------------------------------------------------------


def routed(seed, shift, config):
    """Weights of all experts by the reference and by us; the biases are about `shift`."""
    rng = np.random.default_rng(seed)
    x, gate = rng.normal(size=(9, config.hidden_size)), rng.normal(size=(config.n_routed_experts, config.hidden_size))
    bias = shift + 0.3 * rng.normal(size=config.n_routed_experts)
    wanted = reference.route(DeepseekV3Config(**config.as_json()), x, gate / 5, bias)
    nothing = MlpWeights(*(jnp.zeros(()),) * 3)
    with jax.enable_x64(True):
        weights = MoeWeights(jnp.asarray(gate / 5), jnp.asarray(bias), nothing, None)
        return wanted, np.asarray(moe.route(weights, config, jnp.asarray(x)))


@examples(0.3)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, -2.0, 2.0]), st.booleans(), st.sampled_from([(1, 1), (4, 2)]))
def test_the_router(seed, shift, is_divided, groups):
    config = replace(TINY, norm_topk_prob=is_divided, n_group=groups[0], topk_group=groups[1])
    wanted, found = routed(seed, shift, config)
    assert ((found > 0).sum(axis=1) == config.num_experts_per_tok).all()
    assert difference(found, wanted) < 1e-12


# What is easily got wrong --------------------------------------------------------------------------------------------


# What is broken → in which config it shows, and how it is broken.
TRAPS = {
    "mscale dropped from the scale": (
        "as DeepSeek-V3",
        lambda patch: patch.setattr(Yarn, "scale_factor", property(lambda yarn: 1.0)),
    ),
    "mscale once and not squared": (
        "as DeepSeek-V3",
        lambda patch: patch.setattr(Yarn, "scale_factor", property(lambda yarn: yarn.mscale_of(1.0))),
    ),
    "no factor on cos and sin": (
        "no mscale",
        lambda patch: patch.setattr(Yarn, "cos_factor", property(lambda yarn: 1.0)),
    ),
    "halves rotated for pairs": (
        "as DeepSeek-V3",
        lambda patch: mutant(patch, attention, "rotate", "if is_interleaved", "if not is_interleaved"),
    ),
    "a ramp of frequencies that is upside down": (
        "as DeepSeek-V3",
        lambda patch: mutant(patch, rope, "frequencies", "ramp = np.clip(", "ramp = 1 - np.clip("),
    ),
    "the config's eps in the norms of latents": (
        "a large eps",
        lambda patch: patch.setattr(attention, "LATENT_EPS", 1e-3),
    ),
    "1e-6 in the norms of layers": (
        "a large eps",
        lambda patch: mutant(
            patch, model, "layer", "x, weights.input_layernorm, config.rms_norm_eps", "x, weights.input_layernorm, 1e-6"
        ),
    ),
    "the bias in the experts' weights": (
        "as DeepSeek-V3",
        lambda patch: mutant(patch, moe, "route", "take_along_axis(score,", "take_along_axis(choice,"),
    ),
    "no bias in the choice": (
        "as DeepSeek-V3",
        lambda patch: mutant(patch, moe, "route", "score + weights.e_score_correction_bias[None]", "score"),
    ),
    "a group's score is its best expert's": (
        "as DeepSeek-V3",
        lambda patch: mutant(patch, moe, "route", "lax.top_k(grouped, 2)", "lax.top_k(grouped, 1)"),
    ),
    "weights divided that must not be": (
        "weights not divided",
        lambda patch: mutant(patch, moe, "route", "if config.norm_topk_prob:", "if True:"),
    ),
    "no routed_scaling_factor": (
        "as DeepSeek-V3",
        lambda patch: mutant(patch, moe, "route", "weight * config.routed_scaling_factor", "weight"),
    ),
}


@pytest.mark.parametrize("what", TRAPS)
def test_a_trap_is_seen(folders, expected, what):
    name, break_it = TRAPS[what]
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        break_it(patch)
        assert difference(ours(folders(name)), expected(name)) > 1e-5


def test_experts_of_other_groups_are_out_however_low_the_biases():
    """Older code gives them 0 and not −inf, and so chooses them once the biases are below −1."""
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch, moe, "route", "grouped, -jnp.inf)", "grouped, 0.0)")
        wanted, found = routed(0, -2.0, TINY)
        assert difference(found, wanted) > 0.1
        wanted, found = routed(0, 2.0, TINY)
        assert difference(found, wanted) < 1e-12
