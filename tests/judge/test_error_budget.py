"""What explains the error of one row: shares add up, a term can be switched off, the command shows it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from test_error_model import NAMES, SEED, model

from cpjax.crosscheck.error_model.model import ErrorModel
from cpjax.crosscheck.judging.error_budget import error_budget
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.trial.emulators import PROFILES, attend
from cpjax.trial.problem import Problem


def problem_and_result(seed, profile, *, logits=1.0, window=None):
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((2, 40, heads, 16)) for heads in (4, 2, 2))
    p = Problem(query * logits, key, value, 0.25, is_causal=True, window=window, cp=2).cast(
        PROFILES[profile].compute if profile.startswith("float") else "float16"
    )
    out, lse = attend(p, PROFILES[profile], "ring")
    problem = checked_problem(p.query, p.key, p.value, **p.judge_arguments(), precision=profile, order="ring")
    return problem, out, lse


@examples(0.1)
@given(SEED, st.sampled_from(list(PROFILES)), st.integers(0, 1), st.integers(0, 39), st.integers(0, 3))
def test_the_shares_of_a_row_add_up_to_all_of_it(seed, profile, batch, position, head):
    problem, out, lse = problem_and_result(seed, profile)
    budget = error_budget(problem, out, lse, batch=batch, position=position, head=head)
    assert budget.visible_keys == position + 1
    assert sum(share.out_share for share in budget.terms) == pytest.approx(1.0 if budget.sigma else 0.0, abs=1e-9)
    assert sum(share.lse_share for share in budget.terms) == pytest.approx(1.0, abs=1e-9)
    inside = sum(share.out_share for share in budget.bound)
    assert inside == pytest.approx(1.0, abs=1e-9)
    if not position:  # one key: only what may be lost below the least numbers
        assert {share.name for share in budget.bound} <= {"underflow", "second order"}
    # Variances add: Σ ± σ_term² = σ².
    squares = sum(np.sign(share.out) * share.out**2 for share in budget.terms)
    assert squares == pytest.approx(budget.sigma**2, rel=1e-6)
    assert budget.worst_ratio <= 1.0
    assert budget.is_judgeable


def test_the_error_is_the_results_own():
    problem, out, lse = problem_and_result(0, "flash_fp16")
    right = error_budget(problem, out, lse, batch=1, position=30, head=2)
    wrong, off = out.copy(), lse.copy()
    wrong[1, 30, 2, 5] += np.float16(0.5)
    off[1, 30, 2] += np.float32(0.25)
    changed = error_budget(problem, wrong, off, batch=1, position=30, head=2)
    assert changed.worst_column == 5
    assert changed.worst_ratio > 100
    assert changed.lse_error == pytest.approx(right.lse_error + 0.25, abs=1e-5)
    assert changed.terms == right.terms  # what rounding explains does not depend on the result
    elsewhere = error_budget(problem, wrong, off, batch=1, position=29, head=2)
    assert elsewhere == error_budget(problem, out, lse, batch=1, position=29, head=2)
    assert np.isnan(error_budget(problem, out, None, batch=0, position=3, head=0).lse_error)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((2, 0, 0), "batch is 2"),
        ((0, 40, 0), "position is 40"),
        ((0, 0, 4), "head is 4"),
        ((0, -1, 0), "position is -1"),
    ],
)
def test_a_row_that_is_not_there_is_refused(place, message):
    problem, out, lse = problem_and_result(0, "flash_fp16")
    batch, position, head = place
    with pytest.raises(ValueError, match=message):
        error_budget(problem, out, lse, batch=batch, position=position, head=head)


def test_a_pad_has_no_budget():
    problem, out, lse = problem_and_result(0, "flash_fp16")
    segment = np.where(np.arange(40) < 38, 0, -1)[None].repeat(2, axis=0)
    padded = replace(problem, q_tokens=problem.q_tokens._replace(segment=segment))
    with pytest.raises(ValueError, match="is a pad"):
        error_budget(padded, out, lse, batch=0, position=39, head=0)


@examples(0.1)
@given(SEED, NAMES, st.sampled_from([0.3, 8.0]))
def test_a_term_that_is_switched_off_leaves_the_others(seed, name, logits):
    whole = model(seed, name, logits=logits)
    a = whole.arithmetic
    names = [term.name for term in [*whole.terms, *whole.systematic]]
    assert len(set(names)) == len(names)
    for name in names:
        without = ErrorModel(a.rows, a.precision, a.merging, a.head_dim, a.scale, without=[name])
        left = [term.name for term in [*without.terms, *without.systematic]]
        assert sorted([*left, name]) == sorted(names)
        gone = [term for term in whole.terms if term.name == name]
        if gone:
            variance = whole.expected().sigma ** 2 - gone[0].out
            assert without.expected().sigma ** 2 == pytest.approx(variance, rel=1e-9, abs=1e-9 * variance.max())
    none = ErrorModel(a.rows, a.precision, a.merging, a.head_dim, a.scale, without=names).expected()
    assert not none.sigma.any()
    assert not none.lse_sigma.any()


def test_the_command_explains_a_row(tmp_path, capsys):
    from typer.testing import CliRunner

    from cpjax.cli import app
    from cpjax.crosscheck.conformance.cases import conformance_cases
    from cpjax.crosscheck.files.case import write_case
    from cpjax.crosscheck.files.result import Result, write_result

    case = next(case for case in conformance_cases() if case.name == "21-causal-gqa-cp2")
    case = write_case(tmp_path / "cases", case)
    p = Problem(case.query, case.key, case.value, case.scale, is_causal=True, cp=2)
    out, lse = attend(p, PROFILES["flash_fp16"], "ring")
    write_result(tmp_path / "results", case, Result("mine", "flash_fp16", "ring", out, lse, {}))
    line = ["judge", str(tmp_path / "cases"), str(tmp_path / "results"), "--explain", f"{case.name},0,100,1"]
    said = CliRunner().invoke(app, line)
    assert said.exit_code == 0, said.output
    for words in ("position 100, head 1 sees 101 keys", "outputs of merges", "§3.4", "bound: probabilities"):
        assert words in " ".join(said.output.split())
    said = CliRunner().invoke(app, [*line, "--json"])
    (budget,) = json.loads(said.stdout)["explained"]
    assert (budget["case"], budget["backend"], budget["position"]) == (case.name, "mine", 100)
    assert sum(share["out_share"] for share in budget["terms"]) == pytest.approx(1.0)
    for wrong, message in (
        (f"{case.name},0,192,1", "must be from 0 to 191"),
        ("x,0,0,0", "there is no case"),
        ("x", "is not"),
    ):
        said = CliRunner().invoke(app, [*line[:-1], wrong])
        assert said.exit_code == 2
        assert message in said.stderr
