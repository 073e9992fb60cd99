"""Correct gradients pass with z near 1, faulty ones fail and are named right, zeros and NaN never pass."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cpjax.crosscheck.gradients.asked import DS, OVER_RANKS, asked_of
from cpjax.crosscheck.gradients.exact import exact_gradients
from cpjax.crosscheck.gradients.expected import expected
from cpjax.crosscheck.gradients.judge import judge_gradients
from cpjax.crosscheck.gradients.verdict import decided
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.errors import InputError
from cpjax.trial import gradients as trial
from cpjax.trial.emulators import PROFILES, attend, dtype_of
from cpjax.trial.gradient_emulators import Backward, Gradients, differentiate, drawn, stored, sums
from cpjax.trial.gradient_faults import FAULTS
from cpjax.trial.problem import Problem, Result
from cpjax.trial.summation import ORDERS


def posed(profile: str, keys: int = 96, seed: int = 1, **more) -> tuple[Problem, Result, np.ndarray]:
    """A problem of 4 heads on 2, causal, cp 2, with a forward pass and dout."""
    rng = np.random.default_rng(seed)
    shapes = [(1, keys, n, 32) for n in (4, 2, 2)]
    problem = Problem(*map(rng.standard_normal, shapes), 0.2, **({"is_causal": True, "cp": 2} | more))
    problem = problem.cast(dtype_of(profile))
    given = attend(problem, PROFILES[profile])
    return problem, given, rng.standard_normal(given.out.shape).astype(given.out.dtype)


def judged(profile: str, problem: Problem, given: Result, dout: np.ndarray, found: Gradients, **more):
    tensors = (problem.query, problem.key, problem.value, *given, dout)
    return judge_gradients(*tensors, *found, precision=profile, **trial.asked(problem), **more)


def right(profile: str, problem: Problem, given: Result, dout: np.ndarray) -> Gradients:
    return differentiate(problem, PROFILES[profile], Backward(32, 16), given, dout)


@pytest.mark.parametrize("profile", trial.JUDGED_IN)
def test_correct_gradients_have_the_errors_that_the_model_says(profile):
    verdict = judged(profile, *(some := posed(profile)), right(profile, *some))
    low, high = (0.25, 1.0) if profile == "float32" else (0.85, 1.1)  # float32 sums are done in blocks, which is better
    assert verdict.passed
    assert all(low < one.z < high and 0 < one.of_bound < 1 for one in verdict.tensors), verdict.text


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("profile", ["flash_fp16", "flash_bf16"])
@pytest.mark.parametrize("ds", DS)
def test_each_way_to_make_ds_has_the_errors_that_the_model_says(ds, profile, size):
    problem, given, dout = posed(profile, 200)
    dout = (dout.astype(np.float32) * size).astype(dout.dtype)
    found = differentiate(problem, PROFILES[profile], Backward(32, 16, ds=ds), given, dout)
    verdict = judged(profile, problem, given, dout, found, ds=ds)
    assert verdict.passed
    assert all(0.85 < one.z < 1.05 and 0 < one.of_bound < 1 for one in verdict.tensors), verdict.text


def test_ds_made_in_another_way_is_seen_where_it_makes_a_difference():
    """Of rounded p: in the bound of gradients that are small beside it; times scale: where ds is subnormal in FP16."""
    for profile, ds, size, test in (
        ("flash_bf16", "of_rounded_p", 1e-3, "bound"),
        ("flash_fp16", "scaled", 1e-3, "spread"),
    ):
        problem, given, dout = posed(profile, 200)
        dout = (dout.astype(np.float32) * size).astype(dout.dtype)
        found = differentiate(problem, PROFILES[profile], Backward(32, 16, ds=ds), given, dout)
        assert f"dq {test}" in judged(profile, problem, given, dout, found).failed_tests
    with pytest.raises(InputError, match="must be one of plain, of_rounded_p, scaled"):
        judged(profile, problem, given, dout, found, ds="of p")


@pytest.mark.slow
def test_correct_gradients_of_hostile_data_pass():
    seen = [trial.outcome(0, number) for number in range(0, 66, 2)]
    assert [one for one in seen if not one.passed and one.judgeable] == []
    assert sum(one.judgeable for one in seen) > 0.9 * len(seen)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_fails_and_is_named_or_nothing_is(name):
    profile = "flash_bf16"
    fault, says = FAULTS[name]
    some = posed(profile)
    verdict = judged(profile, *some, fault(some[0], PROFILES[profile], Backward(32, 16), *some[1:]))
    assert not verdict.passed
    assert len(verdict.causes) == (says != ""), verdict.text
    assert all(says in cause for cause in verdict.causes)


def test_what_no_suspect_explains_has_no_cause():
    """2 % too large, and a missing δ together with scale once too often: nothing is guessed."""
    some, profile = posed("flash_fp16"), "flash_fp16"
    parts = sums(some[0], PROFILES[profile], Backward(), *some[1:])
    larger = stored(some[0], PROFILES[profile], parts._replace(dk=parts.dk * np.float32(1.02)))
    without = FAULTS["δ missing"][0](some[0], PROFILES[profile], Backward(), *some[1:])
    both = without._replace(dq=(without.dq * 0.2).astype(without.dq.dtype))
    for wrong in (larger, both):
        verdict = judged(profile, *some, wrong)
        assert (verdict.passed, verdict.causes) == (False, ())


def test_zeros_and_what_is_not_finite_never_pass():
    some, profile = posed("flash_fp16"), "flash_fp16"
    good = right(profile, *some)
    for name in Gradients._fields:
        for value in (0.0, np.nan, np.inf):
            wrong = np.full_like(getattr(good, name), value)
            failed = judged(profile, *some, good._replace(**{name: wrong})).failed_tests
            assert f"{name} {'form' if value != 0 else 'zeros'}" in failed
        one = getattr(good, name).copy()
        one[0, 40, 1, 3] = np.nan
        assert f"{name} form" in judged(profile, *some, good._replace(**{name: one})).failed_tests


def test_gradients_that_vanish_in_rounding_are_not_judgeable():
    """Keys and dout so small that all of dq is 0 in FP16: what a correct kernel gives is zeros, and still no pass."""
    problem, _, dout = posed("flash_fp16")
    problem = replace(problem, key=(problem.key.astype(float) * 1e-5).astype(np.float16))
    given, dout = attend(problem, PROFILES["flash_fp16"]), (dout.astype(float) * 2e-4).astype(np.float16)
    found = right("flash_fp16", problem, given, dout)
    assert not found.dq.any()
    verdict = judged("flash_fp16", problem, given, dout, found)
    assert (verdict.passed, verdict.judgeable) == (False, False)
    assert verdict.failed_tests == ("dq unjudged",)
    assert verdict.text.startswith("gradients: not judgeable")


def test_where_the_gradient_is_zero_zeros_pass():
    some = posed("flash_fp16")
    dout = np.zeros_like(some[2])
    assert judged("flash_fp16", *some[:2], dout, right("flash_fp16", *some[:2], dout)).passed


def test_of_what_nobody_sees_gradients_are_zero():
    """Pads hold anything; a key that no query sees must have dk = dv = 0."""
    profile = "flash_fp16"
    segments = np.repeat([[0, 1, -1]], [50, 40, 6], axis=1)
    some = posed(profile, segments=segments, cp=1)
    found = Gradients(*(x.copy() for x in right(profile, *some)))
    for x in found:
        x[:, 90:] = np.nan
    assert judged(profile, *some, found).passed
    late = posed(profile, kv_positions=np.arange(96)[None] + 10, q_positions=np.arange(96)[None], cp=1)
    found = right(profile, *late)
    assert not found.dk[:, -10:].any()
    assert judged(profile, *late, found).passed
    found.dk[0, -1, 0, 0] = 6e-8
    assert "dk bound" in judged(profile, *late, found).failed_tests


def test_one_number_beyond_its_bound_fails():
    some = posed("float32")
    found = right("float32", *some)
    problem = checked_problem(some[0].query, some[0].key, some[0].value, precision="float32", **trial.asked(some[0]))
    model = expected(asked_of(problem, *some[1], some[2])).dv
    for beyond, passes in ((0.9, True), (1.3, False)):
        dv = found.dv.copy()
        dv[0, 50, 1, 7] = (model.exact + beyond * model.half_width)[0, 50, 1, 7]
        failed = judged("float32", *some, found._replace(dv=dv)).failed_tests
        assert ("dv bound" not in failed) == passes


TERMS = {
    ("flash_fp16", "probabilities"): "dv",
    ("flash_bf16", "ds"): "dq",
    ("flash_bf16", "the last rounding"): "dk",
    ("float32", "scores"): "dv",
    ("float32", "dout·v"): "dq",
    ("float32", "delta"): "dq",
    ("float32", "lse"): "dq",
    ("float32", "sums"): "dk",
    ("float32", "scale"): "dq",
}


@pytest.mark.parametrize(("profile", "name"), TERMS)
def test_every_term_is_felt(profile, name):
    """Without it σ is smaller by one part in a thousand or more, somewhere."""
    some = posed(profile)
    problem = checked_problem(some[0].query, some[0].key, some[0].value, precision=profile, **trial.asked(some[0]))
    asked = asked_of(problem, *some[1], some[2])
    tensor = TERMS[profile, name]
    whole, less = (getattr(expected(asked, without=without), tensor).sigma for without in ((), (name,)))
    assert (less <= whole).all()
    assert (less < 0.999 * whole).any()


def test_an_out_that_is_not_given_widens_what_delta_may_be():
    """The kernel had a rounded out that nobody has: its errors are in σ, and gradients of it pass."""
    profile, (problem, given, dout) = "flash_bf16", posed("flash_bf16", cp=1)
    found = right(profile, problem, given, dout)
    words = (problem.query, problem.key, problem.value)
    verdict = judge_gradients(*words, None, None, dout, *found, precision=profile, **trial.asked(problem))
    assert verdict.passed
    assert verdict.assumed == ("out", "lse")
    assert all(0.7 < one.z < 1.15 for one in verdict.tensors), verdict.text
    # Held against the exact gradient with the σ of a given out, they would be wrong.
    exact = asked_of(checked_problem(*words, precision=profile, **trial.asked(problem)), None, None, dout)
    verdict = judge_gradients(*words, exact.out, exact.lse, dout, *found, precision=profile, **trial.asked(problem))
    assert {"dq bound", "dq worst row"} <= set(verdict.failed_tests)


def test_sums_in_a_half_format_need_the_term_that_says_so():
    """PyTorch's flash kernel on a CPU keeps dk and dv in BF16 and rounds them after each 64 queries."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    problem, _, _ = posed("flash_bf16", keys=256, cp=1, is_causal=False)
    dout = np.random.default_rng(2).standard_normal((1, 256, 4, 32)).astype(problem.query.dtype)
    out, found = trial.KERNELS["torch flash"].compute(problem, dout)
    words = (problem.query, problem.key, problem.value, out, None, dout, *found)
    options = {"precision": "flash_bf16", **trial.asked(problem)}
    once, tiles = (judge_gradients(*words, **options, rounded_every=every) for every in (None, 64))
    assert {"dk spread", "dv spread"} <= set(once.failed_tests)
    assert not any(test.startswith("dq") for test in once.failed_tests)
    assert tiles.passed
    assert all(0.85 < one.z < 1.15 for one in tiles.tensors), tiles.text


def of_a_ring(problem: Problem, given: Result, dout: np.ndarray, over: str) -> Gradients:
    """A plain loop over pairs of chunks: each has a dq, dk and dv in FP16, which are added up in ring order."""
    fmt, cp, count = np.float16, problem.cp, 2 * problem.cp
    query, key, value, dout, out = (
        x[0].astype(np.float32) for x in (problem.query, problem.key, problem.value, dout, given.out)
    )
    chunk = np.arange(len(query)) * count // len(query)
    sums = np.float32 if over == "float32" else fmt
    dq, dk, dv = (np.zeros(x.shape, sums) for x in (query, key, value))
    pairs = [(i, j) for i in range(count) for j in range(count) if j <= i or not problem.is_causal]
    rank = np.minimum(np.arange(count), count - 1 - np.arange(count))
    for i, j in sorted(pairs, key=lambda pair: ((rank[pair[0]] - rank[pair[1]]) % cp, pair)):
        rows, keys = np.flatnonzero(chunk == i), np.flatnonzero(chunk == j)
        of_k, of_v = np.zeros((len(keys), *key.shape[1:])), np.zeros((len(keys), *value.shape[1:]))
        for n in range(query.shape[1]):
            q, k, v, d = query[rows, n], key[keys, n // 2], value[keys, n // 2], dout[rows, n]
            p = np.exp(problem.scale * q @ k.T - given.lse[0, rows, n, None])
            p = np.where(rows[:, None] >= keys, p, 0) if problem.is_causal else p
            ds = p * (d @ v.T - (d * out[rows, n]).sum(1, keepdims=True))
            p, ds = p.astype(fmt).astype(np.float32), ds.astype(fmt).astype(np.float32)
            dq[rows, n] += (problem.scale * ds @ k).astype(fmt).astype(sums)
            of_k[:, n // 2] += problem.scale * ds.T @ q
            of_v[:, n // 2] += p.T @ d
        dk[keys] += of_k.astype(fmt).astype(sums)
        dv[keys] += of_v.astype(fmt).astype(sums)
    return Gradients(*(x[None].astype(fmt) for x in (dq, dk, dv)))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("over", OVER_RANKS)
def test_parts_of_a_ring_need_the_term_that_says_so(over, is_causal):
    problem, given, dout = posed("flash_fp16", 192, cp=4, is_causal=is_causal)
    found = of_a_ring(problem, given, dout, over)
    options = {"partition": "zigzag"}
    without, with_it = (
        judged("flash_fp16", problem, given, dout, found, **options, over_ranks=how) for how in (None, over)
    )
    assert with_it.passed, with_it.text
    assert all(0.9 < one.z < 1.1 for one in with_it.tensors), with_it.text
    assert all(one.z > 1.1 for one in without.tensors), without.text
    assert without.passed == (over == "float32")  # z is below √2 there
    # The last chunk of queries is missing in what the first keys get.
    early = np.where(np.arange(192)[:, None, None] < 168, dout, np.float16(0))
    found.dk[:, :24] = right("flash_fp16", problem, given, early).dk[:, :24]
    assert not judged("flash_fp16", problem, given, dout, found, **options, over_ranks=over).passed


def test_on_one_device_there_are_no_parts():
    some = posed("flash_fp16", cp=1)
    with pytest.raises(InputError, match="over_ranks says how parts of several ranks are added up; give cp"):
        judged("flash_fp16", *some, right("flash_fp16", *some), over_ranks="out")
    some = posed("flash_fp16")
    with pytest.raises(InputError, match="over_ranks is 'float16'; it must be float32 or out, or None"):
        judged("flash_fp16", *some, right("flash_fp16", *some), over_ranks="float16")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dq": np.zeros((1, 2))}, "dq has shape (1, 2); it must be (1, 96, 4, 32)"),
        ({"dk": np.zeros((1, 96, 2, 32), int)}, "dk has dtype int64; it must be one of"),
        ({"dv": np.full((1, 96, 2, 32), 0.1)}, "dv (float64) holds 6,144 numbers that are no float16"),
    ],
)
def test_no_gradients_at_all_are_refused(change, says):
    some = posed("flash_fp16")
    with pytest.raises(InputError) as error:
        judged("flash_fp16", *some, right("flash_fp16", *some)._replace(**change))
    assert str(error.value).startswith(says)


def test_the_verdict_speaks_and_is_no_boolean():
    some = posed("flash_fp16")
    verdict = judged("flash_fp16", *some, FAULTS["zeros"][0](some[0], PROFILES["flash_fp16"], Backward(), *some[1:]))
    assert verdict.text.splitlines()[0] == "gradients are WRONG (flash_fp16)"
    assert "dq: fails bound, spread, worst row, zeros (z " in verdict.text
    plain = json.loads(json.dumps(verdict.as_json(), allow_nan=False))
    assert plain["tensors"][0]["name"] == "dq"
    assert not plain["passed"]
    with pytest.raises(TypeError, match=r"ask \.passed"):
        bool(verdict)


def test_exact_gradients_of_everything_but_a_part_are_the_rest():
    """Which the diagnosis rests on: gradients are sums over pairs."""
    from cpjax.crosscheck.gradients.exact import Variant

    some = posed("float32")
    problem = checked_problem(some[0].query, some[0].key, some[0].value, precision="float32", **trial.asked(some[0]))
    asked = asked_of(problem, *some[1], some[2])
    half = np.arange(96) < 40
    rest = [
        exact_gradients(asked, Variant(lost_queries=one, lost_keys=np.ones(96, bool), lost_heads=(0, 1, 2, 3)))
        for one in (half, ~half)
    ]
    for a, b, whole in zip(*rest, exact_gradients(asked), strict=True):
        np.testing.assert_allclose(a + b, whole, atol=1e-12)


def test_backward_passes_that_are_drawn_add_in_every_order_that_rounds_to_nearest():
    some = [drawn(np.random.default_rng(seed)) for seed in range(100)]
    assert {one.summation for one in some} == set(ORDERS)


@pytest.mark.parametrize("number", [2776, 5926])
def test_gradients_beyond_the_range_of_their_format_are_not_judgeable(number):
    """dk of 66,721 is infinite in FP16: of 10,000 correct gradients of the emulators these were called wrong."""
    with np.errstate(over="ignore"):
        found = trial.outcome(0, number)
    assert not found.passed
    assert not found.judgeable
    assert found.failed_tests == ("dk unjudged",)


@pytest.mark.parametrize("wrong", [np.nan, 1.0])
def test_what_cannot_be_judged_hides_nothing_beside_it(wrong):
    """One number without bounds: the rest is judged, and NaN in the very number is wrong."""
    problem, given, dout = posed("flash_fp16")
    found = right("flash_fp16", problem, given, dout)
    asked = asked_of(
        checked_problem(problem.query, problem.key, problem.value, precision="flash_fp16", **trial.asked(problem)),
        *given,
        dout,
    )
    model = expected(asked).dk
    low, high = model.low.copy(), model.high.copy()
    low[0, 3, 0, 5], high[0, 3, 0, 5] = -np.inf, np.inf
    model = replace(model, low=low, high=high)
    rows = np.ones(model.dof.shape, bool)
    dk = found.dk.astype(np.float64)
    assert decided("dk", dk, model, rows).failed_tests == ("unjudged",)
    dk[0, 3, 0, 5] = np.inf
    assert decided("dk", dk, model, rows).failed_tests == ("unjudged",)
    if np.isnan(wrong):
        dk[0, 3, 0, 5] = wrong
        assert "form" in decided("dk", dk, model, rows).failed_tests
    else:
        dk[0, 4, 0, 5] += wrong
        assert "bound" in decided("dk", dk, model, rows).failed_tests
