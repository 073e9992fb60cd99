"""Every kind of data draws valid problems, in the shapes that the trial promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from cpjax.trial import false_alarms
from cpjax.trial.draw import WORK
from cpjax.trial.emulators import PROFILES, attend, dtype_of
from cpjax.trial.held_out import HELD_OUT
from cpjax.trial.kinds import TUNING
from cpjax.trial.other_logits import OTHER_LOGITS
from cpjax.trial.problem import visible

KINDS = {**TUNING, **HELD_OUT}


def test_kinds_for_tuning_and_kinds_that_are_quoted_are_apart():
    assert not TUNING.keys() & HELD_OUT.keys()
    assert len(TUNING) >= 15
    assert len(HELD_OUT) >= 15
    first = [false_alarms.given(name, 0, 0).problem.query for name in ("tuning", "held-out")]
    assert first[0].shape != first[1].shape or (first[0] != first[1]).any()


@pytest.mark.parametrize("kind", KINDS)
@examples(0.08)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_kind_draws_finite_and_valid_problems(kind, seed):
    problem = KINDS[kind](np.random.default_rng(seed))
    batch, length, heads, head_dim = problem.query.shape
    keys, kv_heads = problem.key.shape[1:3]
    assert problem.key.shape == (batch, keys, kv_heads, head_dim)
    assert problem.value.shape[:3] == (batch, keys, kv_heads)
    assert heads % kv_heads == 0
    assert min(length, keys, problem.value.shape[3], problem.cp) >= 1
    # Mandatory sizes of the widest kinds may exceed the budget; nothing may exceed it by much.
    assert problem.query.size * keys <= 64 * WORK
    for array in (problem.query, problem.key, problem.value):
        assert array.dtype == np.float64
        assert np.isfinite(array).all()
    for places, of in ((problem.q_positions, problem.query), (problem.kv_positions, problem.key)):
        assert places is None or places.shape == of.shape[:2]
    assert (problem.q_positions is None) == (problem.kv_positions is None)
    if problem.is_causal and problem.q_positions is None:
        assert length == keys
    if problem.segments is not None:
        assert problem.segments.shape == (batch, keys)
        assert length == keys
    assert visible(problem, np.arange(keys)).shape == (batch, length, keys)


@pytest.mark.parametrize("profile", PROFILES)
@given(seed=st.integers(0, 2**32 - 1))
def test_casting_keeps_everything_finite(profile, seed):
    dtype = dtype_of(profile)
    rng = np.random.default_rng(seed)
    problem = KINDS[rng.choice(list(KINDS))](rng).cast(dtype)
    assert all(
        x.dtype.name == dtype and np.isfinite(x.astype(float)).all()
        for x in (problem.query, problem.key, problem.value)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", false_alarms.SETS)
def test_lengths_are_those_that_the_trial_promises(name):
    """Median at most 256; single queries, single keys and 8,192 keys or more all occur."""
    shapes = []
    for number in range(800):
        rng = np.random.default_rng([false_alarms.SETS[name], 0, number])
        chosen = {"tuning": TUNING, "held-out": HELD_OUT, "other logits": OTHER_LOGITS}[name]
        problem = chosen[list(chosen)[number % len(chosen)]](rng)
        shapes.append((problem.query.shape[1], problem.key.shape[1]))
    queries, keys = np.array(shapes).T
    assert np.median(queries) <= 256
    assert np.median(keys) <= 256
    assert np.mean(queries == 1) > 0.05
    assert np.mean(keys == 1) > 0.02
    assert np.mean(keys >= 8192) >= 0.01


def test_a_numbered_result_is_always_the_same():
    a, b = (false_alarms.given("held-out", 5, 77) for _ in range(2))
    assert (a.kind, a.profile, a.order) == (b.kind, b.profile, b.order)
    np.testing.assert_array_equal(a.result.out, b.result.out)
    np.testing.assert_array_equal(a.result.lse, b.result.lse)


@pytest.mark.slow
@pytest.mark.parametrize("name", false_alarms.SETS)
def test_correct_results_are_finite_and_close_to_float64(name):
    """A wide net for a broken emulator; whether they are right to the last bit is for test_trial_emulators."""
    profiles = set()
    for number in range(80):
        one = false_alarms.given(name, 1, number)
        exact = attend(one.problem, PROFILES["float64"])
        assert np.isfinite(one.result.out).all()
        np.testing.assert_array_equal(np.isneginf(one.result.lse), np.isneginf(exact.lse))
        if one.profile in ("float32", "float64"):
            size = np.abs(one.problem.value.astype(np.float64)).max() + 1e-30
            np.testing.assert_allclose(one.result.out, exact.out, rtol=0, atol=1e-3 * size)
        profiles.add(one.profile)
    assert len(profiles) >= 3
