"""Reported faults are named, faults without an entry are not, and the count notices a wrong name."""

import ast
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cpjax.crosscheck.diagnosis import words
from cpjax.trial import (
    emulators,
    fault_case,
    key_faults,
    logit_faults,
    mask_faults,
    merge_faults,
    plain_attention,
    reported_faults,
    row_faults,
    unnamed_faults,
)
from cpjax.trial.__main__ import app
from cpjax.trial.emulators import PROFILES
from cpjax.trial.fault_case import case_of
from cpjax.trial.naming import REPORTED, UNNAMED, Name, Task, answer_to, in_one_head, outcome, tasks_of, verdict_on
from cpjax.trial.settings import SETTINGS, problem_of

SOME = [
    ("text", "natural lse merged by exp2", True),
    ("text", "one key too few every 8 queries", False),
    ("text", "causal mask absent", True),
    ("full", "lse: sum", True),
    ("full", "causal mask applied", False),
    ("packed", "lengths off by one a request", True),
    ("packed", "requests exchanged", False),
    ("packed", "stale block", False),
    ("packed", "axes exchanged", False),
    ("prefix", "lse in base two merged by exp", False),
    ("prefix", "top-left for bottom-right", True),
    ("decode", "drafts see alike", True),
    ("decode", "local lengths", False),
    ("GQA, batch of 3", "head h mod K", False),
    ("one head of 16", "run of keys doubled", True),
    ("float32", "lse of one row NaN", True),
    ("BF16, full", "scale off", False),
]


@pytest.mark.parametrize(("setting", "fault", "with_lse"), SOME)
def test_a_reported_fault_is_named(setting, fault, with_lse):
    answer = answer_to(Task(fault, setting, with_lse, seed=3))
    assert answer is not None
    assert answer.outcome == "alone", answer


@pytest.mark.parametrize("fault", UNNAMED)
def test_a_fault_without_an_entry_is_unknown(fault):
    answer = answer_to(Task(fault, "text", True, seed=3))
    assert answer is not None
    assert answer.outcome == "unknown", answer


def test_a_name_of_another_fault_is_counted_as_wrong(monkeypatch):
    task = Task("softcap ignored", "text", True, seed=3)
    right = answer_to(task)
    monkeypatch.setitem(words.LOGITS, "softcap ignored", words.LOGITS["bias ignored"])
    wrong = answer_to(task)
    assert right is not None
    assert wrong is not None
    assert (right.outcome, wrong.outcome) == ("alone", "wrong")


def test_the_worst_of_the_sentences_counts():
    names = [Name("key 7 was lost"), Name(r"scale is ([\d.]+) times", 1.05)]
    equals = "one of 2 that the outputs cannot tell apart: key 7 was lost; or no causal mask was applied (leaves …)."
    assert outcome(["key 7 was lost (leaves …).", "3 of 9 judged rows are wrong: head 0 only."], names) == "alone"
    assert outcome([equals], names) == "among equals"
    assert outcome([equals, "no causal mask was applied (leaves …)."], names) == "wrong"
    assert outcome(["key 7 was lost (leaves …).", words.UNKNOWN + " (query chunk 3)"], names) == "in part"
    assert outcome([words.UNKNOWN, "1 of 9 judged rows is wrong: head 0 only."], names) == "unknown"
    assert outcome(["the scale is 1.0499 times the stated one"], names) == "alone"
    assert outcome(["the scale is 1.2 times the stated one"], names) == "wrong"
    assert (
        outcome([words.UNKNOWN, "Besides: 3 rows of out are zero, as if never written: position 1."], names) == "wrong"
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_faults_are_put_into_is_right(name):
    setting, rng = SETTINGS[name], np.random.default_rng(1)
    case = case_of(setting, problem_of(setting, rng), PROFILES[setting.profile], rng)
    assert verdict_on(case, case.right, with_lse=True).passed
    other = emulators.attend(case.problem, PROFILES[setting.profile], setting.order)
    np.testing.assert_allclose(case.right.lse, other.lse, atol=0.02)
    np.testing.assert_allclose(case.right.out.astype(float), other.out.astype(float), atol=0.02)


def test_a_fault_in_one_head_leaves_the_others_alone():
    setting, rng = SETTINGS["one head of 16"], np.random.default_rng(1)
    case = case_of(setting, problem_of(setting, rng), PROFILES[setting.profile], rng)
    made = REPORTED["values of the next token"].make(case)
    assert made is not None
    wrong = in_one_head(made.result, case)
    assert [n for n in range(16) if (wrong.out[:, :, n] != case.right.out[:, :, n]).any()] == [14]


KINDS = (merge_faults, row_faults, mask_faults, key_faults, logit_faults)


@pytest.mark.parametrize("module", [plain_attention, fault_case, *KINDS, reported_faults, unnamed_faults])
def test_no_fault_is_made_by_code_of_the_judge(module):
    tree = ast.parse(Path(str(module.__file__)).read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if "crosscheck" in name]


def test_all_faults_meet_all_settings():
    tasks = tasks_of(list(REPORTED), list(SETTINGS), [0, 1])
    assert len(set(tasks)) == len(tasks) == 4 * len(REPORTED) * len(SETTINGS)


def test_the_command(tmp_path, monkeypatch):
    one = ["named", "--setting", "text", "--fault", "softcap ignored", "--workers", "1"]
    said = CliRunner().invoke(app, [*one, "--out", str(tmp_path / "found.json")])
    assert said.exit_code == 0, said.output
    assert "2 faults" in said.output
    assert '"alone": 2' in (tmp_path / "found.json").read_text()
    monkeypatch.setitem(words.LOGITS, "softcap ignored", "the weather was bad")
    assert CliRunner().invoke(app, one).exit_code == 1
