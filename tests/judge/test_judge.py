"""The judge: what it must accept, what it must not, and that no form of a result fools or breaks it."""

import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import dense
from strategies import examples

from cpjax.crosscheck import Verdict, judge
from cpjax.crosscheck.judging.asked import sentences
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.crosscheck.judging.range_check import rows_out_of_range
from cpjax.crosscheck.judging.sampling import chosen_rows
from cpjax.trial.emulators import PROFILES, attend
from cpjax.trial.problem import Problem

FP16 = PROFILES["flash_fp16"]


def problem(seed, length=40, keys=None, heads=2, kv_heads=1, head_dim=16, value_dim=8, cp=2, is_causal=True):
    rng = np.random.default_rng(seed)
    keys = length if keys is None else keys
    shapes = ((1, length, heads, head_dim), (1, keys, kv_heads, head_dim), (1, keys, kv_heads, value_dim))
    arrays = (rng.standard_normal(shape) for shape in shapes)
    return Problem(*arrays, head_dim**-0.5, is_causal=is_causal, cp=cp).cast("float16")


def verdict(p, out, lse=None, **options) -> Verdict:
    return judge(p.query, p.key, p.value, out, lse, is_causal=p.is_causal, cp=p.cp, **options)


@pytest.fixture(scope="module")
def ordinary():
    p = problem(0, length=128)
    return p, attend(p, FP16)


def test_by_default_float16_is_judged_as_flash_fp16_merged_in_ascending_order(ordinary):
    p, (out, lse) = ordinary
    said = verdict(p, out, lse)
    assert said.passed
    assert said.reasons == []
    assert (said.precision, said.order) == ("flash_fp16", "ascending")
    assert 0.9 < said.z < 1.1
    assert said.hard_ratio <= 1
    assert said.rows == said.rows_judged == 128 * 2
    with pytest.raises(TypeError, match=r"ask \.passed"):
        bool(said)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wider_arrays_are_judged_in_their_own_precision(dtype):
    p = problem(1).cast(dtype)
    out, lse = attend(p, PROFILES[dtype])
    said = verdict(p, out, lse)
    assert said.passed, said.reasons
    assert said.precision == dtype
    assert not verdict(p, out.astype(np.float16).astype(dtype)).passed  # FP16 is too coarse for it


def test_one_key_must_come_out_exactly():
    p = problem(2, length=1)
    value = np.repeat(p.value, 2, axis=2)
    assert verdict(p, value).passed
    worse = np.nextafter(value, np.float16(np.inf))
    assert "bound" in verdict(p, worse).failed_tests


def test_rows_that_see_nothing_are_zero_and_minus_infinity():
    p = problem(3, length=4, is_causal=True)
    places = np.arange(4, dtype=np.int32)[None]
    before = {"q_positions": places - 2, "kv_positions": places}
    early, late = Problem(*_arrays(p), p.scale, True, **before, cp=2), before
    out, lse = attend(early, FP16)
    assert (out[0, :2] == 0).all()
    assert np.isneginf(lse[0, :2]).all()
    assert verdict(p, out, lse, **late).passed
    for wrong in (1e-7, np.nan):
        changed = out.copy()
        changed[0, 0, 0, 0] = wrong
        assert not verdict(p, changed, lse, **late).passed
    for wrong in (-1e30, np.inf, np.nan, 0.0):
        changed = lse.copy()
        changed[0, 0, 0] = wrong
        assert not verdict(p, out, changed, **late).passed


def _arrays(p):
    return p.query, p.key, p.value


def test_pads_are_not_judged(ordinary):
    p, (out, lse) = ordinary
    segment = np.where(np.arange(128) < 100, 0, -1)[None].astype(np.int32)
    out, lse = out.copy(), lse.copy()
    out[:, 100:], lse[:, 100:] = np.nan, np.inf
    said = verdict(p, out, lse, segment_ids=segment)
    assert said.passed, said.reasons
    assert said.rows == 200


def test_what_leaves_the_format_is_not_judgeable_and_does_not_pass():
    p = problem(4, length=8)
    with np.errstate(over="ignore"):
        huge = Problem(p.query, p.key, np.full_like(p.value, 65504), p.scale, True, cp=2)
    out, lse = attend(huge, FP16)
    said = verdict(huge, out, lse)
    assert not said.passed
    assert not said.judgeable
    assert said.failed_tests == ("unjudged",)
    loud = Problem(p.query * 100, p.key * 100, p.value, p.scale, True, cp=2).cast("float16")
    out, lse = dense(*_arrays(loud), scale=p.scale, visible=np.tri(8, dtype=bool)[None])
    assert verdict(loud, out.astype(np.float16), lse).judgeable  # scores in float32 hold it, scores in FP16 do not
    said = verdict(loud, out.astype(np.float16), lse, precision="ring_mla_fp16")
    assert "unjudged" in said.failed_tests


def test_values_of_another_format_are_refused_by_name(ordinary):
    p, (out, lse) = ordinary
    assert verdict(p, out.astype(np.float32), lse).passed  # FP16 numbers in a wider dtype
    exact = np.asarray(dense(*_arrays(p), scale=p.scale, visible=np.tri(128, dtype=bool)[None])[0])
    said = verdict(p, exact.astype(np.float32), lse)
    assert said.failed_tests == ("form",)
    assert "no float16 numbers" in said.reasons[0]


FORMS = st.sampled_from(
    [
        "nan", "inf", "-inf", "zeros", "transposed", "one row short", "one head more", "empty", "int", "bool",
        "object", "string", "list", "none", "scalar", "bfloat16", "complex", "exchanged ranks", "reversed", "negated",
        "lse nan", "lse +inf", "lse zeros", "lse shape", "lse float16", "lse swapped heads",
    ]
)  # fmt: skip


@given(FORMS, st.integers(0, 2**16))
@examples(1.5)
def test_no_malformed_result_passes_or_crashes(ordinary, form, seed):
    p, (out, lse) = ordinary
    rng = np.random.default_rng(seed)
    at = tuple(int(rng.integers(n)) for n in out.shape)
    out, lse = out.copy(), lse.copy()
    changes = {
        "zeros": lambda: (np.zeros_like(out), lse),
        "transposed": lambda: (out.swapaxes(1, 2), lse),
        "one row short": lambda: (out[:, 1:], lse),
        "one head more": lambda: (np.concatenate([out, out[:, :, :1]], axis=2), lse),
        "empty": lambda: (out[:, :0], lse),
        "int": lambda: (out.view(np.int16), lse),
        "bool": lambda: (out > 0, lse),
        "object": lambda: (out.astype(object), lse),
        "string": lambda: ("out", lse),
        "list": lambda: ([[1.0], [1.0, 2.0]], lse),
        "none": lambda: (None, lse),
        "scalar": lambda: (0.0, lse),
        "bfloat16": lambda: (out.astype(ml_dtypes.bfloat16), lse),
        "complex": lambda: (out.astype(np.complex64), lse),
        "exchanged ranks": lambda: (np.roll(out, 32, axis=1), np.roll(lse, 32, axis=1)),
        "reversed": lambda: (out[:, ::-1], lse[:, ::-1]),
        "negated": lambda: (-out, lse),
        "lse zeros": lambda: (out, np.zeros_like(lse)),
        "lse shape": lambda: (out, lse.swapaxes(1, 2)),
        "lse float16": lambda: (out, lse.astype(np.float16)),
        "lse swapped heads": lambda: (out, lse[:, :, ::-1]),
    }
    if form in ("nan", "inf", "-inf"):
        out[at] = float(form)
    elif form in ("lse nan", "lse +inf"):
        lse[at[:3]] = float(form.split()[1])
    else:
        out, lse = changes[form]()
    said = verdict(p, out, lse)
    assert said.passed is False, form
    assert said.judgeable, form
    assert said.reasons
    assert all("\n" not in reason for reason in said.reasons)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["drop", "double", "mask", "scale", "log2", "merge"]))
@examples(0.4)
def test_a_fault_in_one_chunk_is_never_accepted(seed, fault):
    """Normal data of 64 tokens: every one of these faults moves some row by far more than rounding does."""
    p = problem(seed, length=64)
    out, lse = attend(p, FP16)
    here = np.arange(64, dtype=np.int32)[None]
    if fault == "drop":
        out, lse = attend(p, FP16, (1, 2, 3))
    elif fault == "double":
        out, lse = attend(p, FP16, (0, 0, 1, 2, 3))
    elif fault == "mask":
        out, lse = attend(Problem(*_arrays(p), p.scale, True, here + 1, here, cp=2), FP16)
    elif fault == "scale":
        out, lse = attend(Problem(*_arrays(p), p.scale * 1.01, True, cp=2), FP16)
    elif fault == "log2":
        lse = lse / np.float32(np.log(2))
    else:
        out = (out.astype(np.float32) * np.where(here[0] >= 32, 0.98, 1.0)[:, None, None]).astype(np.float16)
    assert not verdict(p, out, lse).passed


def test_sampled_rows_are_one_in_128_of_each_head_and_all_rows_are_checked(monkeypatch, ordinary):
    p, (out, lse) = ordinary
    monkeypatch.setattr(sys.modules["cpjax.crosscheck.judging.sampling"], "WORK", 1)
    asked = _question(p)
    chosen = chosen_rows(asked, seed=3)
    assert chosen.sum() == 2
    assert (chosen != chosen_rows(asked, seed=4)).any()
    said = verdict(p, out, lse, seed=3)
    assert said.passed, said.reasons
    assert (said.rows, said.rows_judged) == (256, 4)  # the first tokens of two heads see one key: they are copies
    at = np.flatnonzero(~chosen[0, :, 0])[5]
    for wrong in (np.nan, np.inf, 60.0):
        changed = out.copy()
        changed[0, at, 0, 3] = wrong
        assert "range" in verdict(p, changed, lse, seed=3).failed_tests


@pytest.mark.parametrize("fault", ["zeros", "copy", "copy of a head"])
def test_rows_that_nobody_computed_are_judged_though_they_were_not_drawn(monkeypatch, ordinary, fault):
    """Each is an average of visible values, or nearly, so the range check lets it pass."""
    p, (out, lse) = ordinary
    monkeypatch.setattr(sys.modules["cpjax.crosscheck.judging.sampling"], "WORK", 1)
    chosen = chosen_rows(_question(p), seed=3)
    at = np.flatnonzero(~chosen[0].any(axis=1))[-20]
    changed, said = out.copy(), verdict(p, out, lse, seed=3)
    changed[0, at, 0] = {"zeros": 0, "copy": out[0, at - 1, 0], "copy of a head": out[0, at, 1]}[fault]
    wrong = verdict(p, changed, lse, seed=3)
    assert said.passed
    assert not wrong.passed
    assert wrong.rows_judged <= 2 * said.rows_judged


def test_equal_rows_that_are_right_pass(monkeypatch):
    """All values alike: every row is one of them, and so a copy."""
    monkeypatch.setattr(sys.modules["cpjax.crosscheck.judging.sampling"], "WORK", 1)
    p = problem(2, length=200)
    said = verdict(replace(p, value=np.full_like(p.value, 0.5)), np.full((1, 200, 2, 8), 0.5, np.float16))
    assert said.passed, said.reasons


def _question(p):
    places = {"q_positions": None, "kv_positions": None, "segment_ids": None, "window": None}
    options = {"scale": None, "is_causal": p.is_causal, "cp": p.cp, "layout": "zigzag"}
    return checked_problem(*_arrays(p), **places, **options, precision=None, order="ring")


@given(st.integers(0, 2**32 - 1), st.integers(1, 64), st.booleans())
@examples(0.5)
def test_correct_rows_are_never_out_of_range(seed, length, is_causal):
    p = problem(seed, length=length, is_causal=is_causal)
    assert not rows_out_of_range(_question(p), *attend(p, FP16)).any()


QUESTIONS = {
    "positions": ({"keys": 24}, {}, "give q_positions"),
    "cp 0": ({}, {"cp": 0}, "cp is 0"),
    "layout": ({}, {"layout": "spiral"}, "unknown partition 'spiral'"),
    "order": ({}, {"order": "random"}, "unknown merge order 'random'"),
    "precision": ({}, {"precision": "fp8"}, "unknown precision 'fp8'"),
    "scale": ({}, {"scale": float("nan")}, "scale is nan"),
    "window": ({}, {"window": 0}, "window is 0"),
    "positions shape": ({}, {"q_positions": np.zeros((1, 3), int)}, "must be"),
    "float positions": ({}, {"q_positions": np.zeros((1, 40))}, "whole numbers"),
}


@pytest.mark.parametrize(("shape", "options", "message"), QUESTIONS.values(), ids=QUESTIONS)
def test_a_question_without_sense_is_refused(shape, options, message):
    p = problem(0, **shape)
    out = np.zeros((1, 40, 2, 8), np.float16)
    options = {"cp": 2} | options
    with pytest.raises(ValueError, match=message):
        judge(p.query, p.key, p.value, out, **options)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("length", "cp"), [(1, 8), (3, 2), (17, 4)])
def test_lengths_that_no_layout_divides_are_judged(layout, length, cp):
    p = problem(5, length=length, cp=cp)
    out, lse = dense(*_arrays(p), scale=p.scale, visible=np.tri(length, dtype=bool)[None])
    for order in ("ascending", "ring", "gather", "unknown"):
        said = verdict(p, out.astype(np.float16), lse.astype(np.float32), layout=layout, order=order)
        assert said.passed, (order, said.reasons)


def test_one_wrong_row_does_not_hide_among_equal_ones():
    """1,024 equal queries give 1,024 equal rows; one of them is off by what the bound alone does not notice."""
    rng = np.random.default_rng(0)
    query = np.broadcast_to(rng.standard_normal((1, 1, 1, 16)), (1, 1024, 1, 16))
    key, value = rng.standard_normal((1, 512, 1, 16)), rng.standard_normal((1, 512, 1, 8))
    p = Problem(query, key, value, 0.25, is_causal=False, cp=2).cast("float16")
    out, lse = attend(p, FP16)
    assert verdict(p, out, lse, scale=0.25).passed
    lse = lse.copy()
    lse[0, 300, 0] += 1e-4
    assert "lse worst row" in verdict(p, out, lse, scale=0.25).failed_tests


def test_inputs_that_are_no_numbers_are_refused_unless_they_are_pads(ordinary):
    p, (out, lse) = ordinary
    key = p.key.copy()
    key[0, 120] = np.nan
    with pytest.raises(ValueError, match=r"key holds a NaN or an infinity, first at batch 0, token 120"):
        judge(p.query, key, p.value, out, lse, cp=2)
    segment = np.where(np.arange(128) < 120, 0, -1)[None].astype(np.int32)
    assert judge(p.query, key, p.value, out, lse, cp=2, segment_ids=segment).passed


def test_outputs_that_are_rounded_alike_count_once():
    """Row 127 alone sees key 127, and all its outputs lie in one spacing near 15,000: one error, 64 times."""
    p = problem(1, length=128, value_dim=64)
    value = p.value.copy()
    value[:, 64:] = 30_000
    p = replace(p, value=value)
    out, lse = dense(*_arrays(p), scale=p.scale, visible=np.tri(128, dtype=bool)[None])
    for given_lse in (None, lse.astype(np.float32)):
        said = verdict(p, out.astype(np.float16), given_lse)
        assert said.passed, said.reasons
    lost = value.copy()
    lost[:, 127] = 0
    out, _ = dense(*_arrays(replace(p, value=lost)), scale=p.scale, visible=np.tri(128, dtype=bool)[None])
    assert not verdict(p, out.astype(np.float16)).passed  # one value lost is still seen


@pytest.mark.parametrize("profile", ["float64", "float32", "flash_fp16", "ring_mla_fp16"])
def test_rows_that_see_nothing_and_columns_of_zeros_pass_in_every_format(profile):
    """Half the spacing of float64 beside 0 is 0; an error of 0 divided by it is no number, and no fault."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 12, 2, 8)) for _ in range(3))
    value[..., 2] = 0
    positions = np.arange(12, dtype=np.int32)[None]
    p = Problem(
        query, key, value, 8**-0.5, is_causal=True, q_positions=positions, kv_positions=positions + np.int32(3), cp=2
    ).cast(profile if profile.startswith("float") else "float16")
    out, lse = attend(p, PROFILES[profile], "ring")
    assert np.isneginf(lse[:, :3]).all()
    verdict = judge(*_arrays(p), out, lse, **p.judge_arguments(), precision=profile, order="ring")
    assert verdict.passed, verdict.reasons
    assert 0 <= verdict.hard_ratio <= 1
    for wrong in (np.float64(1e-300) if profile == "float64" else 2.0**-14, np.nan):
        changed = out.copy()
        changed[0, 1, 0, 2] = wrong
        assert not judge(*_arrays(p), changed, lse, **p.judge_arguments(), precision=profile, order="ring").passed


@pytest.mark.parametrize("seed", range(3))
def test_what_chunks_that_cancel_leave_did_not_go_through_bf16(seed):
    """Outputs of ±100 are multiples of 1/16, and so is what is left of them: numbers of few digits."""
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((1, 256, 4, 64)) for _ in range(3))
    value[:, :128], value[:, 128:] = value[:, :128] + 100, value[:, 128:] - 100
    p = Problem(query * 0, key, value, 0.125, cp=1).cast("float16")
    out, lse = attend(p, PROFILES["flash_fp16"])
    verdict = judge(p.query, p.key, p.value, out, lse, **p.judge_arguments())
    assert verdict.passed, verdict.reasons


def test_the_largest_error_is_told_where_another_row_is_worse_beside_its_bound():
    """Early rows average few values, so an error is many times their bound; a later row has the larger error."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 256, 1, 16)).astype(np.float32) for _ in range(3))
    score = (query[0, :, 0] @ key[0, :, 0].T).astype(float) / 4
    p = np.exp(np.where(np.tri(256, dtype=bool), score, -np.inf))
    out = ((p / p.sum(axis=1, keepdims=True)) @ value[0, :, 0])[None, :, None].astype(np.float32)
    out[0, 0, 0, 3] += 0.5  # of one key, which is exact
    out[0, 200, 0, 5] += 0.7
    reason = judge(query, key, value, out, is_causal=True).reasons[0]
    assert "the largest error, 0.7, is at batch 0, position 200, head 0" in reason
    assert "beside its bound the worst, at batch 0, position 0, head 0, is" in reason
    out[0, 200, 0, 5] -= 0.7
    assert "the worst, at batch 0, position 0, head 0, is off by 0.5," in judge(query, key, value, out).reasons[0]


@pytest.mark.parametrize(("precision", "is_rounded"), [("ring_mla_fp16", True), ("flash_fp16", False)])
def test_the_scale_is_told_as_it_was_stated_and_as_the_profile_rounds_it(precision, is_rounded):
    x = np.ones((1, 4, 1, 192), np.float16)
    asked = judge(x, x, x, x, precision=precision).asked
    assert asked["scale"] == 192**-0.5
    assert asked.get("rounded_scale") == (float(np.float16(192**-0.5)) if is_rounded else None)
    said = sentences(asked)[0]
    assert (
        "scale 0.0721687836, rounded scale 0.0721435547, mask" if is_rounded else "scale 0.0721687836, mask"
    ) in said


@pytest.mark.parametrize(("wrong", "says"), [([1], ": 1 (of 3)"), ([0, 2], ": 0, 2 (of 3)"), ([0, 1, 2], None)])
def test_heads_that_are_wrong_are_told_unless_all_are(wrong, says):
    rng = np.random.default_rng(7)
    query, key, value = (rng.standard_normal((1, 64, 3, 16)).astype(np.float32) for _ in range(3))
    out, lse = attend(Problem(query, key, value, 0.25, is_causal=True), PROFILES["float32"])
    out[:, :, wrong] *= 1 + 1e-4
    found = judge(query, key, value, out, lse, precision="float32")
    assert "heads" in found.failed_tests
    told = [reason for reason in found.reasons if "heads that are wrong by themselves" in reason]
    assert [says in reason for reason in told] == [True] if says else not told
