"""Two results of one case: correct ones agree, whatever their precision and order; a fault in one is noticed."""

from dataclasses import replace

import numpy as np
import pytest

from cpjax.crosscheck.backends.spec import Spec
from cpjax.crosscheck.files.case import gaussian_case
from cpjax.crosscheck.files.result import Result
from cpjax.crosscheck.judging.pairwise import agreement
from cpjax.crosscheck.judging.statistic import SLACK
from cpjax.crosscheck.run.compare import compare
from cpjax.dense import dense_attention
from cpjax.mask import Mask
from cpjax.partial import Partial

CASE = gaussian_case("c", (61, 2, 1, 16, 32), cp=2, precision={}, seed=3, about={})
CHUNK = 16


@pytest.fixture(scope="module")
def results():
    """What the specification gives by exchange and profile."""
    wanted = [("ring", "flash_fp16"), ("gather", "flash_fp16"), ("ring", "ring_mla_fp16")]
    return {key: Spec(key[0]).run(replace(CASE, precision={"spec": key[1]})) for key in wanted}


def exact(visible_chunks=(0, 1, 2, 3), **options) -> Partial:
    """float64 attention over some chunks of the keys."""
    segment = np.where(np.isin(np.arange(64) // CHUNK, visible_chunks), CASE.kv_tokens.segment, -1)
    options = {"mask": Mask(), "scale": CASE.scale} | options
    return dense_attention(
        CASE.query, CASE.key, CASE.value, CASE.q_tokens, CASE.kv_tokens._replace(segment=segment), **options
    )


def rounded(out, lse, profile="flash_fp16") -> Result:
    return Result("x", profile, "ring", np.asarray(out).astype(np.float16), np.asarray(lse).astype(np.float32), {})


def test_orders_and_precisions_agree(results):
    ring = results["ring", "flash_fp16"]
    for key, other in results.items():
        found = compare(CASE, ring, other)
        assert found.agrees, (key, found.reasons)
        assert found.rows == 61 * 2
        assert 0 <= found.z < np.sqrt(SLACK)
        assert 0 <= found.ratio <= 1
        back = compare(CASE, other, ring)
        assert (back.z, back.ratio, back.lse_z) == pytest.approx((found.z, found.ratio, found.lse_z))
    assert compare(CASE, ring, ring).z == 0.0
    once = compare(CASE, ring, rounded(*exact()))
    assert once.agrees  # exact, rounded once: σ of both is more than it needs
    assert 0.3 < once.z < 1


def test_the_scale_that_a_profile_rounds_is_no_difference(results):
    """192^-1/2 is 3.5e-4 less in FP16. It would be seen if it were taken for one: logits of 40 and more are moved."""
    case = replace(CASE, scale=192**-0.5 * 16)
    one, two = (Spec().run(replace(case, precision={"spec": name})) for name in ("float32", "ring_mla_fp16"))
    assert compare(case, replace(one, precision="flash_fp16"), two).agrees


def no_rescale():
    """The chunks' results as if all had the same weight."""
    parts = [exact((c,)) for c in range(4)]
    seen = np.array([~np.isneginf(p.lse) for p in parts])
    out = sum(np.asarray(p.out) for p in parts) / np.maximum(seen.sum(axis=0), 1)[..., None]
    return rounded(out, exact().lse)


def swapped_ranks():
    """Chunks of rank 0 and rank 1 exchanged in the output."""
    order = np.arange(64).reshape(4, CHUNK)[[1, 0, 3, 2]].ravel()
    out, lse = exact()
    return rounded(np.asarray(out)[:, order], np.asarray(lse)[:, order])


def one_nan():
    out, lse = (np.array(x) for x in exact())
    out[0, 30, 1, 5] = np.nan
    return rounded(out, lse)


def one_output():
    out, lse = (np.array(x) for x in exact())
    out[0, 50, 1, 5] += 0.01
    return rounded(out, lse)


FAULTS = {
    "a chunk dropped": lambda: rounded(*exact((0, 1, 3))),
    "a chunk dropped, lse right": lambda: rounded(exact((0, 1, 3)).out, exact().lse),
    "no rescale": no_rescale,
    "ranks swapped": swapped_ranks,
    "no mask": lambda: rounded(*exact(mask=Mask(is_causal=False))),
    "scale 2 % off": lambda: rounded(*exact(scale=1.02 * CASE.scale)),
    "lse in base 2": lambda: rounded(exact().out, np.asarray(exact().lse) / np.log(2)),
    "lse NaN": lambda: rounded(exact().out, np.full_like(exact().lse, np.nan)),
    "a NaN": one_nan,
    "one output": one_output,
    "zeros": lambda: rounded(np.zeros_like(exact().out), exact().lse),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_either_is_noticed(results, fault):
    right, wrong = results["ring", "flash_fp16"], FAULTS[fault]()
    for pair in ((right, wrong), (wrong, right)):
        found = compare(CASE, *pair)
        assert not found.agrees
        assert found.reasons


def test_a_fault_that_both_have_is_for_the_verdict_against_dense(results):
    wrong = FAULTS["a chunk dropped"]()
    assert compare(CASE, wrong, wrong).agrees


def test_without_lse_only_out_is_compared(results):
    right = results["ring", "flash_fp16"]
    found = compare(CASE, right, replace(right, lse=None))
    assert found.agrees
    assert np.isnan([found.lse_z, found.lse_ratio]).all()
    assert not compare(CASE, replace(right, lse=None), FAULTS["zeros"]()).agrees


def test_where_nothing_can_be_judged_nothing_agrees(results):
    """Weights of scores of 60,000 and more are off by more than half: any result would do."""
    case = replace(CASE, scale=6e4)
    right = results["ring", "ring_mla_fp16"]
    found = compare(case, right, right)
    assert not found.agrees
    assert found.reasons == ("no row can be judged, so none can be compared",)


def test_questions_about_other_arrays_are_refused(results):
    from cpjax.crosscheck.run.session import problem_of

    right = results["ring", "flash_fp16"]
    one, outputs = problem_of(CASE, right), ((right.out, right.lse), (right.out, right.lse))
    one_more = {name: getattr(CASE, name) + np.float16(1) for name in ("query", "key")}
    for changed in (replace(CASE, query=one_more["query"]), replace(CASE, key=one_more["key"])):
        with pytest.raises(ValueError, match="about the same query, key and value"):
            agreement(one, problem_of(changed, right), *outputs)
    assert agreement(one, problem_of(replace(CASE, key=CASE.key.copy()), right), *outputs, own_keys=True).agrees
    narrow = problem_of(replace(CASE, value=CASE.value[..., :16]), right)
    with pytest.raises(ValueError, match="about the same query, key and value"):
        agreement(one, narrow, *outputs, own_keys=True)
