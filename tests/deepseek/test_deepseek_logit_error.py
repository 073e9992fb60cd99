"""Attention in half formats: where the drawn roundings are, what they predict, which faults stand out of them.

The size of σ is tested on a model without experts, whose errors are normal; faults on one with them.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_mutant import mutant
from tiny_deepseek import IDS, TINY, random_checkpoint

from cpjax.crosscheck import judge
from cpjax.deepseek import generate as generating
from cpjax.deepseek import logit_error, one_device, parallel, simulate
from cpjax.deepseek.checkpoint import load
from cpjax.deepseek.generate import Sharing, generate
from cpjax.deepseek.logit_error import DRAWS, FAR, Rounds, count_other_experts, drawing, spread, unchanged
from cpjax.deepseek.model import as_handed_over, run_layers
from cpjax.deepseek.one_device import check, filled
from cpjax.deepseek.parallel import model_mesh, setup, specs
from cpjax.errors import InputError
from cpjax.latent import UpProjection, expand, latent_attention_on_device
from cpjax.mask import Tokens, tokens
from cpjax.partition import Zigzag
from cpjax.precision import Precision, profile
from cpjax.rounding import rounded

pytestmark = pytest.mark.usefixtures("float64")

DENSE = replace(TINY, first_k_dense_replace=2)
ONE = replace(DENSE, num_hidden_layers=1)
STEPS = 5
HALF = ("flash_fp16", "ring_mla_fp16", "decode_fp16_lse", "flash_bf16")


@pytest.fixture(scope="module")
def weights_of(tmp_path_factory):
    """Config → the weights, on one device or on a mesh."""
    checkpoints = {config: random_checkpoint(tmp_path_factory, config, 2) for config in (TINY, DENSE, ONE)}

    @functools.cache
    def made(config, mesh=None):
        return load(checkpoints[config], "float64", mesh=mesh, specs=None if mesh is None else specs(config))

    return made


def generated(weights_of, config, precision, sizes=(1, 1), ids=IDS, **more):
    how = setup(config, model_mesh(*sizes), dtype="float64", precision=precision)
    return generate(how, weights_of(config, how.mesh), ids, STEPS, sharing=Sharing(2, **more))


def texts_with(seed):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (4, 21))


# The roundings --------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["float16", "bfloat16"]), st.integers(-30, 14), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_drawn_rounding_has_the_variance_of_a_real_one(fmt, exponent, seed):
    """Of uniform numbers below a power of two: as large, as wide as rounding to nearest; none of what needs none."""
    x = np.random.default_rng(seed).uniform(1, 2, 4000) * 2.0**exponent * np.array([1, -1] * 2000)
    real = rounded(x, fmt) - x
    drawn = np.asarray(drawing(jax.random.key(seed))(jnp.asarray(x), fmt)) - x
    assert np.abs(drawn).max() <= np.abs(real).max() * 1.01
    assert abs(drawn.std() / real.std() - 1) < 0.08  # each is known to 1.5 %, five times of both together
    assert abs(drawn.mean()) < 5 * real.std() / 4000**0.5
    there = jnp.asarray(rounded(x, fmt))
    np.testing.assert_array_equal(drawing(jax.random.key(seed))(there, fmt), there)
    np.testing.assert_array_equal(drawing(jax.random.key(seed))(jnp.asarray(x), "float32"), x)


def test_calls_and_keys_draw_other_numbers():
    draw, x = drawing(jax.random.key(0)), jnp.full(50, 1.0001)
    first, second = (np.asarray(draw(x, "float16") - x) for _ in range(2))
    other = np.asarray(drawing(jax.random.key(1))(x, "float16") - x)
    assert abs(np.corrcoef([first, second, other]) - np.eye(3)).max() < 0.6
    # Sums of x and a rounding are rounded to 2^-53; the least of the 50 roundings is about 1e-6.
    np.testing.assert_allclose(drawing(jax.random.key(0), 6.0)(x, "float16") - x, 6 * first, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("precision", HALF)
def test_they_are_where_the_model_rounds(weights_of, precision):
    """With rounding to nearest in place of drawn ones they give the model's logits: prefill in two chunks, then decode.

    What is left are roundings that sums in float32 turn over. In a model of one layer they are few, so most logits
    differ by far less than one place more or less makes of it; in the next layer they would turn over many.
    """
    found = generated(weights_of, ONE, precision)
    text, ends = filled(IDS, found)
    rounds, lengths = Rounds(profile(precision), 2, 1), jnp.asarray(ends - STEPS + 1)
    same = logit_error._run(ONE, rounds, weights_of(ONE), text, lengths, rounded).logits[:, -STEPS:]
    sigma = spread(ONE, weights_of(ONE), text, lengths, rounds).sigma[:, -STEPS:]
    assert np.median(np.abs(np.asarray(same) - found.logits) / sigma) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "sizes"),
    [("flash_fp16", (1, 1)), ("flash_fp16", (4, 1)), ("ring_mla_fp16", (2, 1)), ("decode_fp16_lse", (4, 1))],
)
def test_sigma_is_the_size_of_the_error(weights_of, precision, sizes):
    """Of four texts; cp 4 merges eight chunks in the prefill, and four ranks in decode."""
    ids = texts_with(1)
    found = generated(weights_of, DENSE, precision, sizes, ids)
    text, ends = filled(ids, found)
    rounds = Rounds(profile(precision), 2 * sizes[0], sizes[0])
    whole = spread(DENSE, weights_of(DENSE), text, jnp.asarray(ends - STEPS + 1), rounds)
    ratio = (found.logits - whole.logits[:, -STEPS:]) / whole.sigma[:, -STEPS:]
    assert 0.8 < np.sqrt(np.mean(np.square(ratio))) < 1.25
    assert np.abs(ratio).max() < 6


# The check ------------------------------------------------------------------------------------------------------------


def checked(weights_of, found, precision, sizes, ids=IDS, ranks=None):
    rounds = Rounds(profile(precision), 2 * sizes[0], ranks or sizes[0])
    return check(TINY, weights_of(TINY), ids, found, rounds=rounds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "more", "ranks"), [((2, 2), {"is_sp": True}, 4), ((4, 1), {"is_last_moved": True}, 4)]
)
def test_correct_texts_pass(weights_of, sizes, more, ranks):
    for ids in (IDS, texts_with(3)[:2]):
        found = generated(weights_of, TINY, "flash_fp16", sizes, ids, **more)
        assert checked(weights_of, found, "flash_fp16", sizes, ids, ranks).passed


PLACES = "                places,\n                places,"
MERGED = "merge(result, before, setup.attention.precision)"
FAULTS = {
    "prefill, a place too far": ("_prefill", PLACES, PLACES.replace("places,", "_late(places),", 1)),
    "prefill, scale": ("_prefill", "setup.attention,\n                axis_name", "_other(setup.attention), axis_name"),
    "prefill, prefix left out": ("_prefill", MERGED, "result"),
    "prefill, prefix alone": ("_prefill", MERGED, "before"),
    "decode, values of the neighbour": (
        "decode_step",
        "c_kv[:, :, None],\n",
        "jnp.roll(c_kv, 1, axis=1)[:, :, None],\n",
    ),
    "decode, scale": ("decode_step", "new, there, attention,", "new, there, _other(attention),"),
    "decode, its own token unseen": ("decode_step", "new = Tokens(position,", "new = Tokens(position - 1,"),
}
"""Function, what stands there, and what stands there now: of one rank of two, or of both."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults_stand_out(weights_of, name):
    """Prefilled in two chunks, the second over a prefix. None differs by less than four times what is allowed."""
    with pytest.MonkeyPatch.context() as patch:
        # A scale without mscale; queries that see one key too many.
        patch.setattr(parallel, "_other", lambda how: replace(how, scale=TINY.head_dim**-0.5), raising=False)
        patch.setattr(parallel, "_late", lambda at: at._replace(position=at.position + 1), raising=False)
        mutant(patch, parallel, *FAULTS[name])
        patch.setattr(generating, "decode_step", parallel.decode_step)
        patch.setattr(generating, "prefill", parallel.prefill)
        how = setup(TINY, model_mesh(2, 1), dtype="float64", precision="flash_fp16")
        found = generate(how, weights_of(TINY, how.mesh), IDS, STEPS, sharing=Sharing(2), chunk=14)
    said = checked(weights_of, found, "flash_fp16", (2, 1))
    assert said.difference > 4 * said.allowed


@pytest.mark.slow
def test_other_roundings_stand_out(weights_of):
    """BF16 in place of FP16; NaN; and a logit that is off by a tenth."""
    coarse = generated(weights_of, TINY, "flash_bf16", (2, 1))
    assert not checked(weights_of, coarse, "flash_fp16", (2, 1)).passed
    fine = generated(weights_of, TINY, "flash_fp16", (2, 1))
    assert checked(weights_of, fine, "flash_fp16", (2, 1)).passed
    for logits in (fine.logits * np.nan, fine.logits + 0.1 * (np.arange(97) == 96)):
        assert not checked(weights_of, fine._replace(logits=logits), "flash_fp16", (2, 1)).passed


@pytest.mark.slow
def test_a_logit_that_no_rounding_reaches(weights_of):
    """Its σ is 0: it may differ as it may in float64."""
    found = generated(weights_of, TINY, "float64")
    exact = Rounds(Precision("exact", "float64", "float64", "float64", "float16"), 2, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logit_error, "drawing", lambda key: unchanged)
        patch.setattr(one_device, "spread", spread.__wrapped__)  # a compiled one may be there from before
        for moved, passes in ((0.0, True), (1e-8, False)):
            other = found._replace(logits=found.logits + moved)
            assert check(TINY, weights_of(TINY), IDS, other, rounds=exact).passed == passes


def test_float32_is_refused(weights_of):
    with pytest.raises(InputError, match="precision float32 rounds out to float32; the error of logits is known for"):
        spread(TINY, weights_of(TINY), jnp.asarray(IDS), jnp.array([21, 21]), Rounds(profile("float32"), 2, 1))


# The experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_experts_that_rounding_decides_on(weights_of):
    """Huge roundings send tokens elsewhere in every draw; a bias that decides lets none do so, nor does no rounding."""
    weights, rounds = weights_of(TINY), Rounds(profile("flash_fp16"), 2, 1)
    sparse = weights.layers[1]

    def count(times, **change):
        layers = (weights.layers[0], sparse._replace(mlp=sparse.mlp._replace(**change)))
        text, lengths = jnp.asarray(IDS, jnp.int32), jnp.array([21, 17])
        return int(count_other_experts(TINY, weights._replace(layers=layers), text, lengths, rounds, times=times))

    assert count(1000.0) == DRAWS
    assert count(FAR, e_score_correction_bias=10 * jnp.arange(8.0)) == 0
    assert count(0.0) == 0


def test_the_reason_is_said():
    assert "in 3 of 32 draws of the roundings a token goes to other experts" in simulate.reason_of_experts(3, 32)
    assert "but in 2 with roundings 6 times as large" in simulate.reason_of_experts(0, 2)
    assert "so that is not why" in simulate.reason_of_experts(0, 0)


# Attention, by the judge ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["flash_fp16", "ring_mla_fp16"])
def test_attention_of_every_layer_is_judged(weights_of, precision):
    """Queries and latents of the model, over four ranks in zigzag: out and lse, against exact attention."""
    how = setup(TINY, model_mesh(4, 1), dtype="float64", precision=precision)
    there = np.asarray(Zigzag(4).order(16))
    place, said = Tokens(*(jnp.asarray(x)[:, there] for x in tokens(2, 16))), []

    def attending(number, query, latent, up):
        given = as_handed_over(how.attention, query, *latent, *up)
        query, c_kv, k_rope, *up = (jnp.asarray(np.asarray(x)) for x in given)  # no longer of one device
        up = UpProjection(*up)

        def device(query, c_kv, k_rope, places):
            return latent_attention_on_device(
                query, c_kv, k_rope, up, places, places, how.attention, axis_name="cp", exchange="ring", chunks=2
            )

        program = jax.shard_map(device, mesh=how.mesh, in_specs=jax.P(None, "cp"), out_specs=jax.P(None, "cp"))
        found = jax.jit(program)(query, c_kv, k_rope, place)
        of_heads = (query, *expand(c_kv, k_rope, up, how.attention), found.out.astype(jnp.float16), found.lse)
        back = [np.asarray(x)[:, np.argsort(there)] for x in of_heads]
        said.append(judge(*back, scale=TINY.softmax_scale, cp=4, precision=precision))
        return jnp.asarray(np.asarray(found.out), jnp.float64)

    run_layers(weights_of(TINY), TINY, jnp.asarray(IDS[:, :16])[:, there], place.position, attending)
    assert len(said) == 2
    assert all(one.passed for one in said), [str(one) for one in said]
