"""The trial of a GPU as far as it runs without one: who takes what, faults, the split of work, the report."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cpjax.crosscheck import judge
from cpjax.trial import __main__ as command
from cpjax.trial.cuda import card, fused, planted, report
from cpjax.trial.cuda.compute import computed, forward
from cpjax.trial.cuda.judging import answer, keep
from cpjax.trial.cuda.kernels import KERNELS, missing
from cpjax.trial.cuda.problems import DATA, SETTINGS, Sizes, drawn, fixed, some_rows
from cpjax.trial.cuda.run import run
from cpjax.trial.cuda.tasks import BENCH, STAGES, Task, compiled, drawn_ones, gradients, long, problem_of, tasks
from cpjax.trial.cuda.tasks import planted as planted_ones
from cpjax.trial.foreign_kernels import seen_by, tiled
from cpjax.trial.kinds import TUNING

MATH = "SDPA math"


def first(some, count):
    return [task for task, _ in zip(some, range(count), strict=False)]


# The table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn", "math", "eager", "eager_without_half_sums"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_fused_kernels_have_the_arguments_that_pytorch_takes(name, is_masked):
    """On the meta device, which knows shapes and no numbers; the backward pass, too."""
    query, key, value = (
        torch.empty(2, 37, 4, 64, device="meta", dtype=torch.float16).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    seen = torch.ones(2, 1, 37, 37, device="meta", dtype=torch.bool) if is_masked else None
    if is_masked and name in ("flash", "cudnn"):
        with pytest.raises(ValueError, match="no mask"):
            getattr(fused, name)(query, key, value, seen, False, 0.1)
        return
    out, lse = getattr(fused, name)(query, key, value, seen, not is_masked, 0.1)
    assert out.shape == query.shape
    assert lse is None or (lse.shape == query.shape[:3] and lse.dtype == torch.float32)
    grads = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert [x.shape for x in grads] == [query.shape] * 3


def test_logsumexp_is_cut_from_whatever_layout_a_kernel_has():
    query = torch.zeros(2, 4, 37, 64)
    padded = torch.arange(2 * 4 * 64.0).reshape(2, 4, 64)
    assert fused._lse(padded, query).shape == (2, 4, 37)
    assert (fused._lse(padded[:, :, :37, None], query) == padded[:, :, :37]).all()
    for wrong in (padded[:, :, :32], padded[:1], padded.reshape(8, 64)):
        with pytest.raises(ValueError, match="logsumexp has shape"):
            fused._lse(wrong, query)


def test_the_bias_of_the_efficient_kernel_is_aligned_and_hides_what_is_not_seen():
    seen = torch.rand(2, 1, 5, 37) < 0.5
    bias = fused._bias(torch.zeros(2, 3, 5, 8, dtype=torch.float16), seen)
    assert bias.shape == (2, 3, 5, 37)
    assert bias.stride(2) % fused.ALIGNED == 0
    assert ((bias == 0) == seen).all()
    assert (bias[~seen.expand_as(bias)] == -torch.inf).all()


@pytest.mark.parametrize("name", ["SDPA flash", "SDPA efficient", "Triton"])
@pytest.mark.parametrize("kind", TUNING)
def test_a_drawn_problem_is_one_that_the_kernel_takes(name, kind):
    kernel = KERNELS[name]
    problem = drawn(np.random.default_rng(3), kind, kernel.dtypes[0], kernel)
    assert seen_by(problem).any(axis=2).all()
    assert problem.query.shape[3] % 8 == problem.value.shape[3] % 8 == 0
    assert not kernel.one_head_dim or problem.query.shape[3] == problem.value.shape[3]
    is_masked = problem.window is not None or problem.segments is not None
    if kernel.takes == "square":
        assert not is_masked
        assert problem.q_positions is None
        assert not problem.is_causal or problem.query.shape[1] == problem.key.shape[1]
    if kernel.takes == "positions":
        assert not is_masked
        assert problem.kv_positions is None or (problem.kv_positions == np.arange(problem.key.shape[1])).all()


@pytest.mark.parametrize("data", DATA)
def test_data_of_a_given_shape(data):
    sizes = Sizes(32, 4, 2, 16, 8)
    problem = fixed(np.random.default_rng(0), data, "float16", sizes, True)
    assert (problem.query.shape, problem.key.shape, problem.value.shape) == (
        (1, 32, 4, 16),
        (1, 32, 2, 16),
        (1, 32, 2, 8),
    )
    assert np.isfinite(problem.query).all()


def test_without_a_gpu_those_kernels_are_left_out_by_name():
    assert missing("cpu")["SDPA cuDNN"] == "it needs a CUDA device"
    assert MATH not in missing("cpu")


# Tasks -------------------------------------------------------------------------------------------------------------


def test_every_task_has_a_number_of_its_own_and_is_the_same_again():
    names = list(KERNELS)
    for some in (long, planted_ones, compiled, drawn_ones, gradients):
        found = first(some(names), 400)
        assert len({task.number for task in found}) == len(found)
        assert found == first(some(names), 400)
        fewer = first(some([MATH]), 5)
        assert not fewer or set(fewer) <= set(first(some(names), 2000))
    assert {task.stage for task in first(tasks(names), 600)} == set(STAGES)
    assert not first(tasks([]), 1)


@pytest.mark.parametrize("stage", [drawn_ones, gradients, planted_ones])
def test_a_problem_follows_from_seed_and_task(stage):
    task = first(stage([MATH]), 4)[-1]
    (a, dout), (b, again) = problem_of(1, task), problem_of(1, task)
    assert (a.query == b.query).all()
    assert (dout is None) == (task.stage != "gradients")
    assert dout is None or (dout == again).all()
    assert not np.array_equal(a.query, problem_of(2, task)[0].query)


def test_some_rows_are_the_same_question():
    problem = fixed(np.random.default_rng(0), "normal", "float16", Sizes(64, 2, 1, 16, 16), True)
    out, lse = tiled(problem, np.random.default_rng(0))
    some, rows = some_rows(problem, 8, 3)
    asked = {**some.judge_arguments(), "layout": "contiguous"}
    assert judge(some.query, some.key, some.value, out[:, rows], lse[:, rows], **asked).passed
    assert not judge(some.query, some.key, some.value, out[:, rows - 1], lse[:, rows - 1], **asked).passed


def test_long_settings_are_small_enough_for_the_judge():
    """But for one, which is there to be judged in all rows: 2^25 pairs of query and key take about ten seconds."""
    for name, setting in SETTINGS.items():
        pairs = setting.sizes.length**2 * setting.sizes.heads // setting.step
        assert pairs <= 2**25 or name.endswith("all rows")


# Results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_kernel_that_runs_here_is_judged_forward_and_backward(dtype):
    forward_task = next(task for task in drawn_ones([MATH]) if task.dtype == dtype)
    backward_task = next(task for task in gradients([MATH]) if task.dtype == dtype)
    for task in (forward_task, backward_task):
        job = computed(0, task, "cpu")
        one = answer(job)
        assert one.passed, one.sentences
        assert not one.is_alarm


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("fault", planted.FAULTS)
def test_a_planted_fault_is_caught_and_named(fault, is_causal):
    """In what NumPy loops compute, which give lse as the fused kernels do."""
    if planted.FAULTS[fault].needs_causal and not is_causal:
        return
    problem = fixed(np.random.default_rng(0), "normal", "float16", BENCH._replace(heads=1), is_causal)
    out, lse = planted.FAULTS[fault].plant(lambda p: tiled(p, np.random.default_rng(0)), problem)
    asked = {**problem.judge_arguments(), "layout": "contiguous"}
    verdict = judge(problem.query, problem.key, problem.value, out, lse, **asked)
    assert not verdict.passed
    assert planted.is_named(fault, verdict.diagnosis), verdict.diagnosis


def test_a_judge_that_fails_is_an_alarm_and_leaves_the_arrays(tmp_path):
    job = computed(0, next(drawn_ones([MATH])), "cpu")
    broken = replace(job, precision="no such profile")
    one = answer(broken, tmp_path)
    assert one.is_alarm
    assert "no such profile" in one.error
    with np.load(tmp_path / f"drawn-{job.task.number}.npz") as arrays:
        assert np.array_equal(arrays["out"], job.out)
        assert np.array_equal(arrays["query"], job.problem.query)


def test_bf16_is_kept_as_its_bits(tmp_path):
    job = computed(0, next(task for task in drawn_ones([MATH]) if task.dtype == "bfloat16"), "cpu")
    keep(job, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as arrays:
        assert np.array_equal(arrays["out:bfloat16"].view(job.out.dtype), job.out)


# The run -----------------------------------------------------------------------------------------------------------


def few(*names):
    return [task for name in names for task in first(drawn_ones([name]), 2)]


def test_a_kernel_that_refuses_does_not_stop_the_others(tmp_path):
    """flash has no CUDA device here, so the first two are refused."""
    lines = []
    given = few("SDPA flash", MATH)
    found = run(tmp_path, seconds=60.0, workers=0, device="cpu", given=given, say=lines.append)
    said = json.loads((tmp_path / "report.json").read_text())
    assert found.ended == said["ended"] == "all tasks were done"
    assert [one["kernel"] for one in said["refused"]] == ["SDPA flash", "SDPA flash"]
    assert said["judged"] == {"drawn": 2}
    assert any(line.startswith("refused: drawn 0, SDPA flash") for line in lines)
    table = (tmp_path / "table.md").read_text()
    assert "refused" in table.lower()
    assert "| drawn" in table


def test_what_is_stopped_early_leaves_its_report(tmp_path):
    def given():
        yield from few(MATH)
        raise KeyboardInterrupt

    found = run(tmp_path, seconds=60.0, workers=0, device="cpu", given=given(), say=lambda line: None)
    assert found.ended == "interrupted"
    assert json.loads((tmp_path / "report.json").read_text())["judged"] == {"drawn": 2}


def test_the_clock_ends_it(tmp_path):
    found = run(tmp_path, seconds=0.0, workers=0, device="cpu", given=few(MATH), say=lambda line: None)
    assert found.ended == "ended by the clock"
    assert not found.answers


@pytest.mark.process
def test_processes_judge(tmp_path):
    found = run(tmp_path, seconds=120.0, workers=1, device="cpu", given=few(MATH), say=lambda line: None)
    assert len(found.answers) == 2
    assert found.ended == "all tasks were done"


def test_alarms_are_told_with_arrays_at_most_five_and_faults_are_no_alarms(tmp_path):
    job = computed(0, next(drawn_ones([MATH])), "cpu")
    right = answer(job)
    (tmp_path / "spool").mkdir()
    (tmp_path / "out").mkdir()
    found = report.Findings(0, 1.0, {}, {})
    for number in range(8):
        wrong = right._replace(task=right.task._replace(number=number), passed=False, failed_tests=("spread",))
        keep(replace(job, task=wrong.task), tmp_path / "spool" / f"drawn-{number}.npz")
        found.answers.append(wrong)
    fault = Task("planted", 0, MATH, "float16", "normal", True, "one row stale")
    found.answers.append(right._replace(task=fault, passed=False, named=True))
    for _ in range(2):
        report.write(found, tmp_path / "out", tmp_path / "spool")
    assert len(found.alarms) == 8
    assert len(list((tmp_path / "out").glob("*.npz"))) == report.MOST_ARRAYS
    (row,) = report.rows(found.correct)
    assert (row["results"], row["alarms"]) == (8, 8)
    said = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(said["alarms"]) == 8
    assert said["faults"][0]["named"]
    assert "NaN" not in (tmp_path / "out" / "report.json").read_text()


def test_the_command_says_why_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "missing", lambda: "no card in this machine")
    said = CliRunner().invoke(command.app, ["cuda", "--folder", str(tmp_path)])
    assert said.exit_code == 0
    assert "left out, no CUDA device: no card in this machine" in said.stdout
    assert not list(tmp_path.iterdir())


def test_masks_reach_the_kernel():
    """The math kernel takes any: a window is not seen through."""
    problem = drawn(np.random.default_rng(1), "windowed", "float32", KERNELS[MATH])
    assert problem.window is not None
    out, _ = forward(KERNELS[MATH], problem, "cpu")
    asked = {**problem.judge_arguments(), "layout": "contiguous"}
    assert judge(problem.query, problem.key, problem.value, out, **asked).passed
