"""The judge on a sample of the trial: it accepts what is correct, of every kind, and refuses every fault it must.

The whole trial is `python -m cpjax.trial`; docs/trial.md has its figures.
"""

import json
import os
import signal
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from cpjax.crosscheck import Verdict, judge
from cpjax.trial import __main__ as command
from cpjax.trial import activations
from cpjax.trial.detection import Setting, bench, smallest
from cpjax.trial.emulators import PROFILES
from cpjax.trial.false_alarms import SETS, is_alarm, kinds, outcome, outcomes, rate_bound, table
from cpjax.trial.faults import FAULTS, Bench, changes
from cpjax.trial.problem import Result

EACH = 7
"""Correct results of each kind; with six, all of `few_keys` happen to be of one profile."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in SETS for kind in kinds(name)])
def test_correct_results_of_every_kind_are_accepted(name, kind):
    of_set = list(kinds(name))
    profiles = set()
    for turn in range(EACH):
        number = of_set.index(kind) + turn * len(of_set)
        one = outcome(name, 2024, number)
        assert one.kind == kind
        assert not is_alarm(one), f"{name}, seed 2024, number {number}, {one.profile}: {one.failed_tests}"
        profiles.add(one.profile)
    assert len(profiles) > 1


def test_trained_activations_are_in_the_sample():
    reason = activations.missing()
    if reason is not None:
        pytest.skip(reason)
    assert "trained" in kinds("held-out")


def asked(one: Bench, result: Result, *, with_lse: bool) -> Verdict:
    problem = one.problem
    named = {**problem.judge_arguments(), "precision": profile_of(one), "order": "ascending"}
    return judge(problem.query, problem.key, problem.value, result.out, result.lse if with_lse else None, **named)


def profile_of(one: Bench) -> str:
    return next(name for name, arithmetic in PROFILES.items() if arithmetic == one.arithmetic)


def misses(one: Bench, *faults: str, with_lse: bool) -> list[str]:
    """Which of these faults the judge accepts. Each is one, and the correct result passes."""
    correct = asked(one, one.correct, with_lse=with_lse)
    assert correct.passed, correct.reasons
    wrong = {fault: FAULTS[fault](one) for fault in faults}
    assert all(changes(result, one.correct) for result in wrong.values())
    return [fault for fault, result in wrong.items() if asked(one, result, with_lse=with_lse).passed]


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["flash_fp16", "ring_mla_fp16"])
@pytest.mark.parametrize(("mean", "with_lse"), [(0.0, False), (1.0, True)])
def test_one_key_of_131_072_with_flat_logits(profile, mean, with_lse):
    """Values of mean 0: from out alone, four rows of one head; of mean 1: with lse, 16 rows."""
    one = bench(Setting(profile, 131072, "flat", mean), 0, is_causal=False)
    if not with_lse:
        p = one.problem
        some = {"query": p.query[:, ::2, :1], "q_positions": p.q_positions[:, ::2]}
        one = Bench(replace(p, key=p.key[:, :, :1], value=p.value[:, :, :1], **some), one.arithmetic)
    assert misses(one, "one key dropped", "one key doubled", with_lse=with_lse) == []


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 5, 64, 1024, 16384])
@pytest.mark.parametrize("fault", ["causal mask +1", "causal mask −1"])
@pytest.mark.parametrize("profile", ["flash_fp16", "ring_mla_fp16"])
def test_a_causal_mask_shifted_by_one_at_any_length(profile, fault, length):
    one = bench(Setting(profile, length, "flat", 1.0), 1, is_causal=True)
    assert misses(one, fault, with_lse=False) == []


ALWAYS = (
    "heads exchanged", "BF16 at the end", "lse in log2", "zeros", "plain average", "another case", "one NaN",
    "chunk dropped", "chunk doubled", "chunk × 0.9", "not rescaled", "one key dropped", "one key doubled",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("logits", ["flat", "normal"])
@pytest.mark.parametrize("profile", ["flash_fp16", "ring_mla_fp16", "float32"])
def test_faults_that_are_caught_whatever_the_data(profile, logits, mean):
    setting = Setting(profile, 1024, logits, mean)
    assert misses(bench(setting, 2, is_causal=True), "diagonal unmasked", with_lse=True) == []
    assert misses(bench(setting, 2, is_causal=False), *ALWAYS, *ONLY.get(profile, ()), with_lse=True) == []


ONLY = {
    "flash_fp16": ("lse + 1e-4", "ranks exchanged"),
    "float32": ("lse + 1e-4", "ranks exchanged", "BF16 at the start"),
}


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_a_scale_off_by_a_thousandth_with_ordinary_logits(mean):
    one = bench(Setting("flash_fp16", 1024, "normal", mean), 3, is_causal=False)
    assert misses(one, "scale +0.1 %", with_lse=mean != 0) == []


def test_the_report_counts_alarms_and_bounds_their_rate():
    seen = [outcome("tuning", 0, number) for number in range(4)]
    seen[1] = seen[1]._replace(passed=False, failed_tests=("spread",))
    seen[2] = seen[2]._replace(passed=False, judgeable=False, z=float("nan"))
    last = table(seen)[-1]
    assert (last.results, last.alarms, last.not_judgeable) == (4, 1, 1)
    assert sum(row.results for row in table(seen) if row.kind != "all") == 4
    assert rate_bound(0, 100_000) == pytest.approx(3e-5, rel=2e-3)
    assert rate_bound(3, 3) == 1.0


def test_smallest_is_the_first_of_the_sizes_that_are_caught():
    for first in range(6):
        assert smallest((1.0, 2.0, 3.0, 4.0, 5.0), lambda size, first=first: size > first) == (
            first + 1 if first < 5 else None
        )


def test_a_run_that_is_ended_reports_what_it_judged(tmp_path, monkeypatch):
    def ended_after_three(*question, workers):
        yield from outcomes(*question[:2], 3, workers)
        os.kill(os.getpid(), signal.SIGTERM)
        yield from outcomes(*question, workers)

    monkeypatch.setattr(command, "outcomes", lambda *asked: ended_after_three(*asked[:-1], workers=asked[-1]))
    report = tmp_path / "alarms.json"
    asked = ["false-alarms", "--set", "tuning", "--count", "1000000", "--workers", "1", "--out", str(report)]
    run = CliRunner().invoke(command.app, asked)
    assert run.exit_code == 0, run.output
    assert "interrupted after 3 of 1,000,000" in run.stderr
    told = json.loads(report.read_text())
    assert (told["count"], told["asked_for"], told["rows"][-1]["results"]) == (3, 1_000_000, 3)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
