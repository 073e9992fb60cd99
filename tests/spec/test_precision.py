"""Each profile rounds where it says, bit for bit with a NumPy twin, stage by stage, under `jit`."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpy_twin as twin
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from programs import attention, exact, same
from strategies import RULES, SCALE, examples

from cpjax.blocks import tiles
from cpjax.errors import InputError
from cpjax.mask import tokens
from cpjax.partial import Partial, merge
from cpjax.precision import PROFILES, profile, scale_in
from cpjax.rounding import rounded

pytestmark = pytest.mark.optimized

NAMES = sorted(twin.PROFILES)
T, V = 24, 3
SEED = st.integers(0, 2**32 - 1)
staged = functools.cache(lambda f, *static: jax.jit(f, static_argnums=static))


def one_head(x):
    """`[T, …]` as the stages take it, `[1, 1, 1, T, …]`."""
    return x[None, None, None]


@pytest.mark.parametrize("name", NAMES)
@examples(0.5)
@given(SEED, st.sampled_from([RULES[0], RULES[4]]))
def test_scores(name, seed, rule):
    rng = np.random.default_rng(seed)
    query, key, seen = exact(rng, T, 4), exact(rng, 9, 4), rng.random((T, 9)) < 0.7
    # With a power of two nobody would miss the rounding of q·k. With another, XLA may join it with the softcap.
    scale = 0.3 if rule.softcap is None else SCALE
    found = staged(tiles.scores, 3)(
        query[None, None, None], key[None, None], one_head(seen), replace(attention(rule, name), scale=scale)
    )
    stages = twin.PROFILES[name]
    assert twin.one_of([found[0, 0, 0]], lambda v: [twin.scores(query, key, seen, scale, rule.softcap, stages, v)])


def state(rng, stages):
    """A state between two tiles, some rows of which have seen nothing."""
    m = twin.to(3 * rng.normal(size=T), stages.score)
    total, acc = rng.random(T).astype(np.float32) * 20 + 1, rng.normal(size=(T, V)).astype(np.float32)
    nothing = rng.random(T) < 0.2
    m[nothing], total[nothing], acc[nothing] = -np.inf, 0, 0
    return m, total, acc


@pytest.mark.parametrize("name", NAMES)
@examples(0.5)
@given(SEED)
def test_accumulate(name, seed):
    rng, stages = np.random.default_rng(seed), twin.PROFILES[name]
    before = state(rng, stages)
    score = np.where(rng.random((T, 2)) < 0.3, -np.inf, twin.to(3 * rng.normal(size=(T, 2)), stages.score))
    score, value = score.astype(np.float32), twin.to(rng.normal(size=(2, V)), "float16")
    running = tiles.Running(*map(one_head, map(jnp.asarray, before)))
    after = staged(tiles.accumulate, 3)(running, one_head(score), value[None, None], profile(name))
    assert twin.one_of([x[0, 0, 0] for x in after], lambda v: twin.accumulate(before, score, value, stages, v))


@pytest.mark.parametrize("name", NAMES)
@examples(0.5)
@given(SEED)
def test_finish(name, seed):
    rng, stages = np.random.default_rng(seed), twin.PROFILES[name]
    last = state(rng, stages)
    found = staged(tiles.finish, 1)(tiles.Running(*map(one_head, map(jnp.asarray, last))), profile(name))
    assert twin.one_of([x[0, 0, 0] for x in found], lambda v: twin.finish(last, stages, v))


@pytest.mark.parametrize("name", NAMES)
@examples(0.5)
@given(SEED)
def test_merge(name, seed):
    rng, stages = np.random.default_rng(seed), twin.PROFILES[name]

    def some():
        out, lse = twin.to(rng.normal(size=(T, V)), stages.out), twin.to(3 * rng.normal(size=T), stages.lse)
        nothing = rng.random(T) < 0.2
        out[nothing], lse[nothing] = 0, -np.inf
        return out, lse

    a, b = some(), some()
    as_partial = lambda x: Partial(jnp.asarray(x[0])[None, :, None], jnp.asarray(x[1])[None, :, None])  # noqa: E731
    found = staged(merge, 2)(as_partial(a), as_partial(b), profile(name))
    assert twin.one_of([found.out[0, :, 0], found.lse[0, :, 0]], lambda v: twin.merge(a, b, stages, v))


@functools.cache
def block_in_tiles_of_two(name):
    """Tiles of two keys, so that every sum has one rounding and its order does not matter."""

    def run(*arrays):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "KEY_TILE", 2)
            return tiles.attend(*arrays, attention(RULES[0], name))

    return jax.jit(run)


@pytest.mark.parametrize("name", NAMES)
@examples(0.5)
@given(SEED, st.integers(1, 16))
def test_a_whole_block(name, seed, divisor):
    rng = np.random.default_rng(seed)
    query, key = exact(rng, T, 4) / divisor, exact(rng, 7, 4)
    assume(divisor in (1, 2, 4, 8, 16))
    value = twin.to(rng.normal(size=(7, V)), "float16")
    q_place, place = tokens(1, T), tokens(1, 7)
    found = block_in_tiles_of_two(name)(query[None, :, None], key[None, :, None], value[None, :, None], q_place, place)
    seen = np.arange(T)[:, None] >= np.arange(7)
    assert twin.one_of(
        [found.out[0, :, 0], found.lse[0, :, 0]],
        lambda v: twin.attend(query, key, value, seen, SCALE, None, twin.PROFILES[name], 2, v),
    )


def test_a_tile_has_512_keys():
    """Key 512 outweighs all by e²⁰: in its tile p is 0 in FP16, in the tile before p is 1, rescaled later."""
    nothing = jnp.zeros((1, 513, 1, 1), jnp.float16)
    key, value = nothing.at[0, 512].set(20), nothing.at[0, 511].set(60_000)
    full = replace(attention(RULES[1], "flash_fp16"), scale=1.0)
    found = tiles.attend(jnp.ones((1, 1, 1, 1), jnp.float16), key, value, tokens(1, 1), tokens(1, 513), full)
    assert float(found.out[0, 0, 0, 0]) == pytest.approx(60_000 * np.exp(-20), rel=2**-11)


@pytest.mark.parametrize("name", NAMES)
def test_no_two_profiles_compute_the_same(name):
    """Else the tests above would not tell them apart."""
    rng = np.random.default_rng(0)
    query, key, value = exact(rng, T, 4) / 8, exact(rng, 7, 4), twin.to(rng.normal(size=(7, V)), "float16")
    seen = np.ones((T, 7), bool)

    def merged(stages):
        parts = [
            twin.attend(query, key[s], value[s], seen[:, s], 0.3, None, stages, 2, twin.Variant())
            for s in (slice(0, 4), slice(4, 7))
        ]
        return twin.merge(*parts, stages, twin.Variant())

    others = [merged(stages) for other, stages in twin.PROFILES.items() if other != name]
    assert not any(same(merged(twin.PROFILES[name]), other) for other in others)


def test_the_twin_knows_every_rounding_profile():
    assert {*twin.PROFILES, "float32", "float64"} == {name for name, p in PROFILES.items() if not p.is_normalised}
    for name, stages in twin.PROFILES.items():
        p = profile(name)
        assert stages == (p.score, p.probability, p.out, p.carry, p.lse, p.query, p.total)
        assert (p.compute, p.scale, p.distance) == ("float32", p.score, p.score)


@pytest.mark.parametrize("name", [name for name, p in PROFILES.items() if p.is_normalised])
def test_a_profile_that_tiles_cannot_compute_is_refused(name):
    with pytest.raises(InputError, match=f"'{name}'.*one to judge in.*'flash_fp16'"):
        attention(RULES[0], name)


@given(st.floats(width=32, allow_nan=False), st.sampled_from(["float16", "bfloat16"]))
def test_rounding_is_a_cast_under_jit_and_in_numpy(x, fmt):
    with np.errstate(over="ignore"):
        expected = np.float32([x]).astype(twin.FORMAT[fmt]).astype(np.float32)
        np.testing.assert_array_equal(rounded(np.float32([x]), fmt), expected)
    np.testing.assert_array_equal(staged(rounded, 1)(np.float32([x]), fmt), expected)


def test_derivatives_pass_through_rounding():
    slope = jax.grad(lambda x: 1e-9 * rounded(x, "float16"))(jnp.float32(1.0))
    assert slope == np.float32(1e-9)  # a cast's own derivative would be cast too, and be 0


def test_scale_is_rounded_with_the_scores():
    assert scale_in(profile("flash_fp16"), 192**-0.5) == np.float32(192**-0.5)
    assert scale_in(profile("ring_mla_fp16"), 192**-0.5) == np.float16(192**-0.5)
    assert scale_in(profile("ring_mla_fp16"), 192**-0.5) / 192**-0.5 - 1 == pytest.approx(-3.5e-4, rel=0.02)


def test_unknown_profile_is_refused():
    with pytest.raises(InputError, match="unknown precision 'fp8'; known are float64, float32, flash_fp16"):
        profile("fp8")
