"""Foreign kernels: they compute attention, the judge accepts them, and the profile says which roundings they have."""

import json
from dataclasses import replace

import numpy as np
import pytest
from oracle import dense
from typer.testing import CliRunner

from cpjax.crosscheck import judge
from cpjax.trial import __main__ as command
from cpjax.trial.emulators import PROFILES, variant
from cpjax.trial.foreign import Outcome, outcome, posed, table
from cpjax.trial.foreign_kernels import KERNELS, cases, seen_by
from cpjax.trial.problem import Problem

CASES = list(cases())
EPS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def plain(dtype: str, seed: int = 0, keys: int = 96) -> Problem:
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((1, n, 2, 32)) for n in (keys, keys, keys))
    return Problem(query, key, value, 32**-0.5, is_causal=True).cast(dtype)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_foreign_kernel_computes_attention(name, dtype):
    """By the textbook bound, which knows nothing of the judge: some roundings of Σ A |v|, of q·k 32 and a sum."""
    problem = plain(dtype)
    out, lse = KERNELS[name].compute(problem, np.random.default_rng(1))
    asked = {"scale": problem.scale, "visible": seen_by(problem)}
    exact, exact_lse = dense(problem.query, problem.key, problem.value, **asked)
    size, _ = dense(problem.query, problem.key, np.abs(problem.value), **asked)
    room = 8 * EPS[dtype] * size + 2e-6
    assert out.dtype == problem.query.dtype
    assert (np.abs(out.astype(np.float64) - exact) <= room).all()
    if lse is not None:
        assert (np.abs(lse - exact_lse) <= 4 * EPS[dtype] + 1e-5).all()


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_judge_accepts_it_and_its_profile_describes_it(name, dtype):
    one, kernel = plain(dtype, seed=2), KERNELS[name]
    out, lse = kernel.compute(one, np.random.default_rng(1))
    verdict = judge(
        one.query, one.key, one.value, out, lse, is_causal=True, layout="contiguous", precision=kernel.precision(dtype)
    )
    assert verdict.passed, verdict.reasons
    if dtype != "float32":  # σ of float32 is generous
        assert 0.5 < verdict.z < 1.2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kernel", ["jax.nn", "NumPy, normalised first"])
def test_normalised_probabilities_are_no_flash_attention(kernel, seed):
    """Two keys hold the weight, and cancel: p of the best is 1 in flash_fp16, here its share of the sum is rounded."""
    rng = np.random.default_rng(seed)
    query, first = rng.uniform(0.6, 1.3, (1, 4096, 1, 16)), rng.uniform(1, 2, (1, 1, 1, 16))
    key = np.concatenate([0 * first, 0 * first - 1], axis=1)  # scores 0 and about −0.95
    value = np.concatenate([first, -first * np.exp(0.95)], axis=1)
    one = Problem(query, key, value, 1 / 16).cast("float16")
    out, _ = KERNELS[kernel].compute(one, rng)
    asked = {**one.judge_arguments(), "layout": "contiguous"}
    said = {
        p: judge(one.query, one.key, one.value, out, precision=p, **asked).passed
        for p in ("softmax_fp16", "flash_fp16")
    }
    assert said == {"softmax_fp16": True, "flash_fp16": False}


def test_every_row_of_a_problem_sees_a_key():
    for number in range(60):
        rng = np.random.default_rng(number)
        kernel = KERNELS[list(KERNELS)[number % len(KERNELS)]]
        kind = ["windowed", "equal", "few_keys", "grouped", "gaussian"][number % 5]
        problem = posed(rng, kind, "float32", kernel)
        assert seen_by(problem).any(axis=2).all()
        assert not kernel.one_head_dim or problem.value.shape[3] == problem.query.shape[3]


def test_a_result_is_the_same_again():
    number = [name for name, _ in CASES].index("NumPy, split KV")
    assert outcome(3, number) == outcome(3, number)


def test_the_table_counts_alarms_and_what_is_not_judgeable():
    name, dtype = CASES[0]
    ok = Outcome(0, name, dtype, "float32", "flat", 8, True, True, 0.1, 0.5, float("nan"), 0.2, ())
    wrong = ok._replace(number=1, passed=False, z=3.0, failed_tests=("spread",))
    unjudged = ok._replace(number=2, passed=False, judgeable=False, z=9.0)
    (row,) = table([ok, wrong, unjudged])
    assert (row.results, row.alarms, row.not_judgeable, row.z, row.lse_z) == (3, 1, 1, 3.0, 0.0)


def test_the_command_prints_json():
    said = CliRunner().invoke(command.app, ["foreign", "--count", "3", "--workers", "1", "--json"])
    report = json.loads(said.stdout)
    assert sum(row["results"] for row in report["rows"]) == 3
    assert said.exit_code == (1 if report["alarms"] else 0)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "head_dim"), [("float16", 128), ("float16", 192), ("bfloat16", 128)])
def test_matrix_units_that_cut_sums_off_are_right(dtype, head_dim):
    """Called wrong before the judge knew of it: z-scores of 8 to 52 on an H200, 14 and 15 of this loop in FP16."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 1024, 1, head_dim)) for _ in range(3))
    problem = Problem(query, key, value, head_dim**-0.5, is_causal=True).cast(dtype)
    out, lse = KERNELS["NumPy, matrix units"].compute(problem, rng)
    question = problem.judge_arguments() | {"layout": "contiguous"}
    verdict = judge(problem.query, problem.key, problem.value, out, lse, **question)
    assert verdict.passed, (verdict.failed_tests, verdict.scale_z_score)
    assert abs(verdict.scale_z_score) < 3.5
    # A scale that is off by ten times as much is seen.
    off = replace(problem, scale=problem.scale * (1 + 1e-5))
    out, lse = KERNELS["NumPy, matrix units"].compute(off, rng)
    assert not judge(problem.query, problem.key, problem.value, out, lse, **question).passed


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_matrix_units_that_cut_sums_of_values_off_are_right(mean):
    """Many keys, judged by `out` alone, for lse would drown it. Before §3.7 had it the scale test called it wrong."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, n, 1, 16)) for n in (64, 65536, 65536))
    problem = Problem(query, key, value + mean, 0.25).cast("float16")
    out, _ = KERNELS["NumPy, matrix units"].compute(problem, rng)
    verdict = judge(problem.query, problem.key, problem.value, out, None, **problem.judge_arguments())
    assert verdict.passed, (verdict.failed_tests, verdict.z, verdict.scale_z_score)
    assert abs(verdict.scale_z_score) < 3.5
    # Four times the most that it can be is seen.
    off = out * out.dtype.type(1 + 2.0**-9)
    assert not judge(problem.query, problem.key, problem.value, off, None, **problem.judge_arguments()).passed


@pytest.mark.slow
def test_a_scale_that_is_off_is_seen_beside_values_that_are_cut_off():
    """By a tenth of what rounding it to FP16 may do. Seen because it is known that values are cut off toward zero."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, n, 1, 64)) for n in (256, 16384, 16384))
    problem = Problem(query, key, value, 0.125).cast("float16")
    for error, is_seen in ((0.0, False), (5e-5, True), (-1e-4, True)):
        given = replace(problem, scale=problem.scale * (1 + error))
        out, _ = KERNELS["NumPy, matrix units"].compute(given, np.random.default_rng(0))
        verdict = judge(problem.query, problem.key, problem.value, out, None, **problem.judge_arguments())
        assert set(verdict.failed_tests) <= {"scale"}
        # A scale so little off is a remark, for an approximate exp would look the same.
        assert bool(verdict.remarks or verdict.failed_tests) is is_seen, (error, verdict.scale_z_score)


def test_half_profiles_are_drawn_with_matrix_units_and_others_are_not():
    drawn = {
        profile: {variant(one, np.random.default_rng(seed), 1).summation for seed in range(60)}
        for profile, one in PROFILES.items()
    }
    for profile, found in drawn.items():
        assert ("cut" in found) == (not profile.startswith("float")), profile
