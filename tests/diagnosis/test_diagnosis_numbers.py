"""Named factors on the scale beside any others, as each profile rounds them; runs of keys over borders of chunks."""

from dataclasses import replace

import numpy as np
import pytest
from regimes import normal

from cpjax.crosscheck.diagnosis.dictionary import FITTED
from cpjax.crosscheck.diagnosis.masks import thresholds
from cpjax.crosscheck.diagnosis.measure import Measured
from cpjax.crosscheck.diagnosis.predict import noisier
from cpjax.crosscheck.diagnosis.sample import MORE_ROWS, samples, with_more_rows
from cpjax.crosscheck.diagnosis.scales import LOG_SCALES, head_dims, price
from cpjax.crosscheck.diagnosis.scan import row_misfit
from cpjax.crosscheck.judging.evidence import collect
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.crosscheck.judging.sampling import chosen_rows
from cpjax.trial.emulators import PROFILES
from cpjax.trial.fault_case import Case, case_of
from cpjax.trial.localise import count_correct
from cpjax.trial.naming import Task, answer_to, verdict_on
from cpjax.trial.settings import SETTINGS, problem_of

with_and_without_lse = pytest.mark.parametrize("with_lse", [True, False], ids=["with lse", "out only"])

ROUNDED = ("scores in FP16, cp 2", "scaled queries in FP16")
PLAIN = ("text", "float32", "BF16, full", "decode")


def case_in(setting: str, seed: int = 3, **stated) -> Case:
    rng = np.random.default_rng(seed)
    problem = replace(problem_of(SETTINGS[setting], rng), **stated)
    return case_of(SETTINGS[setting], problem, PROFILES[SETTINGS[setting].profile], rng)


def said(case: Case, *, with_lse: bool, **changes) -> list[str]:
    verdict = verdict_on(case, case.with_(**changes), with_lse=with_lse)
    assert not verdict.passed
    return verdict.diagnosis


@pytest.mark.slow
@with_and_without_lse
@pytest.mark.parametrize(
    "fault", ["without mscale²", "mscale² twice", "× ln 2", "× log2(e)", "squared", "1/√64", "mscale once"]
)
def test_a_named_factor_is_named_where_the_profile_rounds_the_scale_to_fp16(fault, with_lse):
    """Of these a fitted number was told."""
    answer = answer_to(Task(f"scale {fault}", ROUNDED[0], with_lse, 0))
    assert answer is not None
    assert answer.outcome == "alone", answer.sentences


@with_and_without_lse
@pytest.mark.parametrize("fault", ["× log2(e)", "nearly without mscale²"])
def test_scaled_queries_are_rounded_with_the_scale_that_is_wrong(fault, with_lse):
    answer = answer_to(Task(f"scale {fault}", ROUNDED[1], with_lse, 0))
    assert answer is not None
    assert answer.outcome == "alone", answer.sentences


@pytest.mark.slow
@pytest.mark.parametrize("form", ["maximum", "sum", "log of the sum", "maximum + log2"])
def test_a_row_maximum_that_is_handed_over_has_its_rounding(form):
    """In lse it has none: the sum is relative to it."""
    answer = answer_to(Task(f"lse: {form}", ROUNDED[0], True, 0))
    assert answer is not None
    assert answer.outcome == "alone", answer.sentences


@with_and_without_lse
@pytest.mark.parametrize("factor", [1.037, 1.45, 0.7])
@pytest.mark.parametrize("setting", [*PLAIN, ROUNDED[0]])
def test_a_factor_without_a_name_is_told_as_a_number(setting, factor, with_lse):
    """1.45 is not log2(e) = 1.4427, and 0.7 is not ln 2 = 0.6931."""
    case = case_in(setting)
    first, *_ = said(case, with_lse=with_lse, scale=case.work.scale * factor)
    assert " times the stated one (" in first, first
    assert float(first.split()[3]) == pytest.approx(factor, rel=1e-3)


@with_and_without_lse
@pytest.mark.parametrize("setting", ["text", ROUNDED[0]])
def test_a_default_scale_in_the_place_of_the_stated_one(setting, with_lse):
    case = case_in(setting, scale=0.25)
    assert said(case, with_lse=with_lse, scale=32**-0.5)[0].startswith("the scale is 1/√32, that of a head_dim of 32")


def measured(profile: str, scale: float, size: float, *, with_lse: bool = False) -> list[Measured]:
    rng = np.random.default_rng(0)
    query, key, value = (x * rng.standard_normal((1, 64, 1, 32)) for x in (size, 1.0, 1.0))
    case = checked_problem(*(x.astype(np.float16) for x in (query, key, value)), scale=scale, precision=profile)
    out, lse = np.zeros((1, 64, 1, 32), np.float16), np.zeros((1, 64, 1), np.float32) if with_lse else None
    rows = collect(case, out, lse, chosen_rows(case, 0)).rows
    return [Measured(one, case) for one in samples(case, rows, out, lse)]


def test_a_fitted_factor_costs_more_where_it_is_known_more_precisely():
    # Errors of a float32 result are 2^-13 of those of FP16: ln(factor) is known so much better, which costs 2 ln(2^13).
    coarse, fine = (price(measured(profile, 32**-0.5, 1.0), 1.0) for profile in ("flash_fp16", "float32"))
    assert FITTED < coarse < fine - 5
    # Logits of nothing tell nothing.
    assert price(measured("flash_fp16", 32**-0.5, 1e-6), 1.0) == FITTED


def test_the_price_follows_from_the_information():
    """Twice the same chunk has twice the information."""
    one = measured("flash_fp16", 32**-0.5, 1.0)
    assert price([*one, *one], 1.0) - price(one, 1.0) == pytest.approx(np.log(2.0))


def test_a_correct_result_that_a_scale_explains_better_has_no_cause():
    """It was given a scale 0.08 % off when a fitted factor cost as much as any number."""
    assert count_correct((1, 12267, 4.0, 1))["named"] == 0


def test_other_head_dims_have_no_factor_that_has_another_name():
    query, value = np.zeros((1, 4, 1, 192), np.float16), np.zeros((1, 4, 1, 128), np.float16)
    problem = checked_problem(query + 1, query + 1, value + 1, precision="flash_fp16")
    factors = head_dims(problem)
    assert factors[128] == pytest.approx(1.5**0.5)
    assert factors[256] == pytest.approx(0.75**0.5)
    assert 192 not in factors


@pytest.mark.slow
@with_and_without_lse
@pytest.mark.parametrize(
    ("setting", "start", "stop", "weight"),
    [
        ("cp 8", 21, 60, 0.0),  # the first four wrong chunks see its first 27 keys
        ("cp 8", 30, 66, 2.0),
        ("cp 4", 10, 101, 0.0),
        ("cp 2, full", 25, 70, 0.0),
        ("scores in FP16, cp 2", 25, 70, 0.0),
        ("packed", 45, 52, 2.0),
        ("prefix", 70, 90, 0.0),
        ("decode", 30, 60, 2.0),
        ("GQA, batch of 3", 60, 90, 0.0),
    ],
)
def test_a_run_is_found_whole_wherever_it_lies(setting, start, stop, weight, with_lse):
    case, index = case_in(setting), np.arange(128)
    found = said(case, with_lse=with_lse, weight=np.where((index >= start) & (index < stop), weight, 1.0))
    words = f"{stop - start} keys {start} to {stop - 1} were {'lost' if weight == 0 else 'counted twice'}"
    assert words in found[0], found
    assert not any("cannot be" in sentence for sentence in found), found


@with_and_without_lse
def test_the_last_key_of_a_run_is_found_where_few_rows_give_it_any_weight(with_lse):
    """24 to 72 was said of 24 to 73: of the twelve rows that were looked at, one saw key 73, and gave it nothing."""
    answer = answer_to(Task("run doubled across a border", "packed", with_lse, 0))
    assert answer is not None
    assert answer.outcome == "alone", answer.sentences


def test_the_worst_rows_stay_where_more_are_looked_at():
    """Of 512 rows 8 are wrong; those that are evenly spread miss them."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, 512, 1, 32)).astype(np.float16)
    case = checked_problem(query, key, value, scale=0.01)
    out = np.broadcast_to(value.astype(float).mean(axis=1, keepdims=True), value.shape).copy()
    out[:, 301:309] += 1
    rows = collect(case, out.astype(np.float16), None, chosen_rows(case, 0)).rows
    (one,) = samples(case, rows, out, None)
    more = with_more_rows(case, rows, out, one)
    assert set(range(301, 305)) & set(one.position.tolist())
    assert set(one.position.tolist()) < set(more.position.tolist())
    assert MORE_ROWS <= len(more.position) <= MORE_ROWS + len(one.position)


def test_exponentials_that_err_add_what_weights_that_err_add():
    """Held against drawn weights: the variance of out where each of them errs by 1 % at random, on its own."""
    some = np.random.default_rng(5)
    for rows, model, _ in normal("float32", keys=64).models():
        weight = rows.weight * (1 + 0.01 * some.standard_normal((4000, *rows.weight.shape)))
        drawn = np.einsum("drs,sv->drv", weight, rows.value) / weight.sum(axis=2)[:, :, None]
        added = noisier(model, np.full(rows.out.shape, 3.0), 0.01) - 3.0
        np.testing.assert_allclose(added, drawn.var(axis=0), rtol=0.15)


@with_and_without_lse
def test_the_price_is_that_of_the_derivatives(with_lse):
    """Of out: Σ A s (v − out), of lse: Σ A s, by ln(factor); in units of their standard deviations."""
    some = measured("flash_fp16", 32**-0.5, 1.0, with_lse=with_lse)
    information = 0.0
    for one in some:
        rows = one.model.rows
        moved = rows.weight * np.where(rows.seen, rows.score, 0.0)
        slope = (moved @ rows.value - moved.sum(axis=1, keepdims=True) * rows.out) / np.maximum(
            one.expected.sigma, 1e-7
        )
        information += (one.dof * (slope**2).mean(axis=1)).sum()
        if with_lse:
            information += ((moved.sum(axis=1) / one.expected.lse_sigma) ** 2).sum()
    extent = LOG_SCALES[-1] - LOG_SCALES[0]
    assert price(some, 1.0) == pytest.approx(np.log(extent**2 * information / (2 * np.pi)), rel=1e-3)


def test_the_misfit_of_a_mask_is_that_of_attention_under_it():
    """Also of one under which a row sees nothing: its output is 0."""
    (one, *_) = measured("flash_fp16", 32**-0.5, 1.0)
    sample = one.sample
    threshold = thresholds(sample, one.problem, "shift")
    numbers = np.array([-70.0, -40.0, -3.0, -1.0, 0.0, 2.0])
    for row in (0, 5, 11):
        want = []
        for number in numbers:
            p = np.where(threshold[row] <= number, np.exp(sample.score[row]), 0.0)
            out = p @ sample.value / p.sum() if p.any() else np.zeros(sample.value.shape[1])
            want.append((((out - sample.out[row]) / one.sigma[row]) ** 2).mean())
        np.testing.assert_allclose(row_misfit(one, threshold[row], row, numbers), want, rtol=1e-9)
