"""The diagnosis: it names what was broken, says nothing of what is right, and owns up to what it cannot tell."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from cpjax.crosscheck import judge
from cpjax.crosscheck.diagnosis.cause import Cause
from cpjax.crosscheck.diagnosis.dictionary import Fault
from cpjax.crosscheck.diagnosis.places import numbers
from cpjax.crosscheck.diagnosis.words import causes
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.trial.emulators import PROFILES, attend
from cpjax.trial.faults import FAULTS, Bench
from cpjax.trial.localise import KINDS, count_one, places, problem
from cpjax.trial.problem import Problem, Result


def verdict_of(name, *, is_causal, order="ring", profile="flash_fp16", seed=0):
    p = problem(seed, cp=2, is_causal=is_causal, logits=1.0, heads=2)
    out, lse = FAULTS[name](Bench(p, PROFILES[profile], order))
    return judge(p.query, p.key, p.value, out, lse, **p.judge_arguments(), precision=profile, order=order)


SAYS = {
    "one key dropped": "key 1 was lost",
    "one key doubled": "key 1 was counted twice",
    "causal mask +1": "causal mask is shifted by +1",
    "causal mask −1": "causal mask is shifted by -1",
    "diagonal unmasked": "rank 0, step 0: query chunk 3 saw all of its own chunk",
    "scale +0.1 %": "the scale is 1.001 times the stated one",
    "scale +1 %": "the scale is 1.01 times the stated one",
    "heads exchanged": "head 0 has the outputs of head 1",
    "ranks exchanged": "chunk 0 (rank 0) has the outputs of chunk 1 (rank 1)",
    "chunk dropped": "key/value chunk 0 (of rank 0) never entered",
    "chunk doubled": "key/value chunk 0 (of rank 0) entered query chunk 0–3 twice",
    "chunk × 0.9": "with weight 0.9 instead of 1",
    "chunk × 0.99": "with weight 0.99 instead of 1",
    "not rescaled": "was not rescaled at merge 1",
    "BF16 probabilities": "probabilities rounded to BF16",
    "lse + 1e-4": "lse is off by +0.0001",
    "lse in log2": "base two",
    "zeros": "never written",
    "plain average": "plain average",
    "one NaN": "position 32, head 0 is the only row with a NaN",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_each_fault_is_named_first(name):
    said = verdict_of(name, is_causal=True)
    assert not said.passed
    assert SAYS[name] in said.diagnosis[0], said.diagnosis


@pytest.mark.slow
@pytest.mark.parametrize("name", ["another case", "one row + 1 %"])
def test_what_is_in_no_dictionary_is_not_named(name):
    said = verdict_of(name, is_causal=True).diagnosis
    assert "the cause is unknown" in said[0], said


def test_a_single_wrong_row_is_named_even_so():
    assert (
        "head 0 only, query chunk 2 (rank 1) only, position 32"
        in verdict_of("one row + 1 %", is_causal=True).diagnosis[-1]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "name"), [(0.0, "chunk dropped"), (2.0, "chunk doubled"), (0.9, "chunk × 0.9")])
def test_weights_are_recovered_to_three_decimals(weight, name):
    weights = verdict_of(name, is_causal=True).chunk_weights
    expected = np.where(np.tri(4, dtype=bool), 1.0, np.nan)
    expected[:, 0] = weight
    determined = ~np.isnan(weights)
    assert determined[np.tri(4, dtype=bool)].sum() >= 9
    np.testing.assert_allclose(weights[determined], expected[determined], atol=2e-3)


@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(["flash_fp16", "ring_mla_fp16", "float32"]))
@examples(0.3)
def test_correct_results_have_no_diagnosis(seed, is_causal, profile):
    p = problem(seed, cp=2, is_causal=is_causal, logits=2.0).cast("float32" if profile == "float32" else "float16")
    out, lse = attend(p, PROFILES[profile], "ring")
    said = judge(p.query, p.key, p.value, out, lse, **p.judge_arguments(), precision=profile, order="ring")
    assert said.passed, said.reasons
    assert said.diagnosis == []
    assert said.chunk_weights is None


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), st.booleans(), st.sampled_from(list(places(2))))
@examples(0.25)
def test_the_place_is_found(seed, kind, is_causal, place):
    if kind == "unmasked" and (not is_causal or place.step > 0):
        return
    said = count_one((2, is_causal, kind, place, seed, 1.0))
    unseen = {"changes nothing", "within rounding"}
    assert said.get("with lse", "alone") in {"alone", "among equals"} | unseen, said
    assert said.get("out alone", "alone") in {"alone", "among equals"} | unseen, said


def test_whole_numbers_are_written_as_runs():
    assert numbers(np.array([3, 1, 2, 7, 7, 9, 10])) == "1–3, 7, 9, 10"
    assert numbers(np.array([], int)) == "none"


@pytest.mark.parametrize("profile", ["float64", "float32", "flash_fp16"])
def test_outputs_that_are_exactly_zero_are_diagnosed_too(profile):
    """Beside 0 the spacing of float64 is so small that its square is none; a warning would fail this test."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 32, 2, 8)) for _ in range(3))
    value[..., :3] = 0
    p = Problem(query, key, value, 8**-0.5, is_causal=True, cp=2)
    p = p.cast(profile if profile.startswith("float") else "float16")
    right = attend(p, PROFILES[profile], "ring")
    wrong = attend(replace(p, is_causal=False), PROFILES[profile], "ring")

    def judged(result: Result):
        asked = {**p.judge_arguments(), "precision": profile, "order": "ring"}
        return judge(p.query, p.key, p.value, result.out, result.lse, **asked)

    assert judged(right).passed
    said = judged(wrong)
    assert not said.passed
    assert "no causal mask was applied" in said.diagnosis[0]
    assert not wrong.out[..., :3].any()


def test_faults_that_differ_do_not_share_a_sentence():
    """Of two query chunks: one sentence for one weight, two for two, and each merge with its own number."""
    arrays = (np.ones((1, 32, 1, 8), np.float16),) * 3
    asked = checked_problem(*arrays, cp=2)

    def said(*faults):
        return causes(asked, tuple(Cause(chunk, (fault,), 1.0, 9.0, 50.0) for chunk, fault in enumerate(faults)))

    half, other = Fault("weight", (0,), number=0.4996), Fault("weight", (0,), number=1.5)
    assert len(said(half, half._replace(number=0.5001))) == 1
    assert "weight 0.4999 instead of 1" in said(half, half._replace(number=0.5001))[0]
    apart = said(half, other)
    assert ["weight 0.4996" in apart[0], "weight 1.5" in apart[1]] == [True, True]
    merges = said(Fault("not rescaled", unrescaled=(1,)), Fault("not rescaled", unrescaled=(2,)))
    assert ["merge 1" in merges[0], "merge 2" in merges[1]] == [True, True]
    keys = said(Fault("key lost", key=5), Fault("key lost", key=17))
    assert ["key 5 " in keys[0], "key 17 " in keys[1]] == [True, True]
