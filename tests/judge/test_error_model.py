"""Laws of the error model itself, whatever it is compared with: they hold or its numbers mean nothing."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import examples

from cpjax.crosscheck import judge
from cpjax.crosscheck.error_model.model import ErrorModel
from cpjax.crosscheck.error_model.row_covariance import Roundings, Shared, by_cell, cells, excess, merged
from cpjax.crosscheck.exact.attention import attention_rows
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.precision import PROFILES
from cpjax.trial.emulators import PROFILES as ARITHMETIC
from cpjax.trial.emulators import attend
from cpjax.trial.problem import Problem

SEED = st.integers(0, 2**32 - 1)
NAMES = st.sampled_from(["flash_fp16", "ring_mla_fp16", "float32", "float64", "flash_bf16"])
ROWS, KEYS, DIM, CHUNKS = 5, 24, 8, 4


def model(seed, name, *, logits=1.0, values=1.0, mean=0.5, order=None, keys=KEYS):
    """The model of a few rows over `CHUNKS` chunks, every key seen; values have a mean."""
    rng = np.random.default_rng(seed)
    query, key, value = (rng.normal(size=(n, DIM)) for n in (ROWS, keys, keys))
    value = (value + mean).astype(np.float16).astype(np.float64) * values
    order = np.arange(keys) if order is None else order
    chunk = np.arange(keys) * CHUNKS // keys
    seen = np.ones((ROWS, keys), bool)
    rows = attention_rows(logits * query, key[order], value[order], seen, chunk[order], DIM**-0.5)
    merging = np.tile(np.arange(len(rows.chunks)), (ROWS, 1))
    return ErrorModel(rows, PROFILES[name], merging, DIM, DIM**-0.5)


@examples(0.5)
@given(SEED, NAMES, st.sampled_from([0.01, 1.0, 8.0]))
@example(2**31 - 1, "float32", 8.0)  # the heaviest key has a small value, another is lost from the row sum
def test_a_standard_deviation_is_less_than_what_is_possible(seed, name, logits):
    expected = model(seed, name, logits=logits).expected()
    assert (expected.sigma <= expected.half_width).all()
    assert (expected.lse_sigma <= expected.lse_bound).all()
    assert (expected.low <= expected.high).all()


@examples(0.1)
@given(SEED, st.integers(100, 500))
def test_terms_that_a_sum_loses_are_expected(seed, count):
    """Two heavy keys cancel; what is added between them lies below the sum's last place, each time."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate([[0.0], np.log(2.0**-25 * rng.uniform(0.5, 0.9, count)), [0.0]])
    value = np.concatenate([[10.0], np.full(count, 10.0), [-10.0]])
    chunk, seen = np.zeros(count + 2, int), np.ones((1, count + 2), bool)
    rows = attention_rows(np.ones((1, 1)), scores[:, None], value[:, None], seen, chunk, 1.0)
    total, weighted = np.float32(0), np.float32(0)
    for p, v in zip(np.exp(scores).astype(np.float32), value.astype(np.float32), strict=True):
        total, weighted = total + p, weighted + p * v
    expected = ErrorModel(rows, PROFILES["float32"], np.zeros((1, 1), int), 1, 1.0).expected()
    error = float(weighted / total) - rows.out[0, 0]
    assert 0.3 < abs(error) / expected.sigma[0, 0] < 2


@examples(0.5)
@given(SEED, NAMES, st.integers(-3, 3))
def test_values_twice_as_large_have_errors_twice_as_large(seed, name, power):
    """Values of mean 8 keep every output, and all it is made of, among the normal numbers: a power of two is exact."""
    one, other = (model(seed, name, mean=8.0, values=values).expected() for values in (1.0, 2.0**power))
    np.testing.assert_allclose(other.lse_sigma, one.lse_sigma, rtol=1e-12)
    np.testing.assert_allclose(other.sigma, one.sigma * 2.0**power, rtol=1e-12)


@examples(0.5)
@given(SEED, NAMES)
def test_the_order_of_keys_within_a_chunk_changes_nothing(seed, name):
    rng = np.random.default_rng(seed)
    size = KEYS // CHUNKS
    order = np.concatenate([c * size + rng.permutation(size) for c in range(CHUNKS)])
    one, other = model(seed, name).expected(), model(seed, name, order=order).expected()
    for field in ("sigma", "half_width", "lse_sigma", "lse_bound"):
        np.testing.assert_allclose(getattr(other, field), getattr(one, field), rtol=1e-9)


@given(SEED, st.sampled_from(["flash_fp16", "ring_mla_fp16"]))
def test_one_key_has_no_room_for_an_error(seed, name):
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(ROWS, DIM)), rng.normal(size=(1, DIM))
    value = rng.normal(size=(1, DIM)).astype(np.float16).astype(np.float64)
    rows = attention_rows(query, key, value, np.ones((ROWS, 1), bool), np.zeros(1, int), 1.0)
    expected = ErrorModel(rows, PROFILES[name], np.zeros((ROWS, 1), int), DIM, 1.0).expected()
    np.testing.assert_array_equal(expected.low, np.broadcast_to(value, (ROWS, DIM)))
    np.testing.assert_array_equal(expected.high, expected.low)


@examples(0.3)
@given(SEED, st.sampled_from(["flash_fp16", "ring_mla_fp16", "float32"]), st.sampled_from([0.1, 2.0, 12.0]))
def test_no_correct_result_leaves_the_bound_in_any_order_of_merging(seed, name, logits):
    rng = np.random.default_rng(seed)
    shapes = ((1, ROWS, 1, DIM), (1, KEYS, 1, DIM), (1, KEYS, 1, DIM))
    query, key, value = (rng.normal(size=shape) for shape in shapes)
    p = Problem(logits * query, key, value, DIM**-0.5, is_causal=False, cp=CHUNKS // 2).cast("float16")
    if name == "float32":
        p = p.cast("float32")
    out, lse = attend(p, ARITHMETIC[name], tuple(int(c) for c in rng.permutation(p.chunk_count)))
    chunk = np.arange(KEYS) * CHUNKS // KEYS
    arrays = (x[0, :, 0].astype(np.float64) for x in (p.query, p.key, p.value))
    rows = attention_rows(*arrays, np.ones((ROWS, KEYS), bool), chunk, p.scale)
    expected = ErrorModel(rows, PROFILES[name], None, DIM, p.scale).expected()
    assert (out[0, :, 0] >= expected.low).all()
    assert (out[0, :, 0] <= expected.high).all()
    assert (np.abs(lse[0, :, 0] - rows.lse) <= expected.lse_bound).all()


@pytest.mark.parametrize(
    ("scale", "constant"),
    [(0.1251, 24.6), (0.1251, -21.1), (1.01, 31.8), (192**-0.5 * 1.87, 30.0), (DIM**-0.5, -5.0), (DIM**-0.5, -3.0)],
)
def test_scores_that_are_rounded_alike_are_no_fault(scale, constant):
    """A constant on all logits, under a scale near a power of two: all products round the same way, and lse with them.

    With a negative one the maximum is finer than the differences from it, which then all lose the same.
    """
    lse_z = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        query, key, value = (rng.normal(size=(1, n, 1, DIM)) for n in (ROWS, 4000, 4000))
        query, key[..., 0] = query / (scale * DIM**0.5), 4.0
        query[..., 0] = constant / (4.0 * scale)
        p = Problem(query, key, value, scale, cp=CHUNKS // 2).cast("float16")
        out, lse = attend(p, ARITHMETIC["ring_mla_fp16"], "ascending")
        asked = {**p.judge_arguments(), "precision": "ring_mla_fp16", "order": "ascending"}
        verdict = judge(p.query, p.key, p.value, out, lse, **asked)
        assert verdict.passed, verdict.reasons
        lse_z.append(verdict.lse_z)
    assert max(lse_z) < 2**0.5  # what the judge allows for an imperfect model (SLACK)


@pytest.mark.parametrize("tile", [16, 64, 256, 1024])
def test_a_maximum_that_is_doubled_inside_a_chunk_is_no_fault(tile):
    """An outlier far down in a chunk: in tiles that end before it all other keys are rescaled, and by a rounded number.

    Larger tiles meet the outlier at once and rescale nothing; the judge does not know which tiles they were.
    """
    rng, rows = np.random.default_rng(0), 64
    query, key, value = (rng.normal(size=(1, n, 1, DIM)) for n in (rows, 1024, 1024))
    query, key[..., 0] = query / 4, 0.0
    query[..., 0], key[:, 400::512, :, 0] = 1.0, [[[2.2], [3.2]]]
    p = Problem(query, key, value, DIM**-0.5, cp=1).cast("float16")
    out, lse = attend(p, replace(ARITHMETIC["ring_mla_fp16"], tile=tile), "ascending")
    asked = {**p.judge_arguments(), "precision": "ring_mla_fp16", "order": "ascending"}
    verdict = judge(p.query, p.key, p.value, out, lse, **asked)
    assert verdict.passed, verdict.reasons
    assert verdict.lse_z < 2**0.5  # what the judge allows for an imperfect model (SLACK)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@given(SEED)
def test_numbers_of_one_cell_have_nearly_the_same_rounding_error(name, seed):
    rng, fmt = np.random.default_rng(seed), FORMATS[name]
    x = np.exp(rng.uniform(-20, 5, 400)) * rng.choice([-1.0, 1.0], 400)
    near = x + rng.uniform(-0.2, 0.2, 400) * fmt.spacing(x)
    together = (cells(x, fmt) == cells(near, fmt)) & (fmt.spacing(x) == fmt.spacing(near))
    assert together.any()
    apart = np.abs((x - fmt.round(x)) - (near - fmt.round(near))) / fmt.spacing(x)
    apart = np.minimum(apart, np.abs(1 - apart))  # on either side of the middle between two numbers
    assert (apart[together] <= 1 / 8 + 1e-9).all()
    assert len(np.unique(cells(np.array([1.0, -1.0, 1.0 + 2 * fmt.spacing(np.ones(1))[0]]), fmt))) == 3


@given(SEED, st.integers(1, 6))
def test_equal_rows_have_one_error_and_different_ones_have_their_own(seed, times):
    """n equal roundings have variance n², n different ones n; in however many parts they are met."""
    rng, fmt = np.random.default_rng(seed), FORMATS["float16"]
    value, c = rng.uniform(1.0, 2.0, 3), np.array([1.0, 2.0, -3.0])
    value = np.array([1.1, 1.3, 1.7]) + 1e-6 * value
    one = Shared(by_cell(Roundings(value, c), fmt), c**2)
    assert excess([one]) == 0
    all_rows: list[Shared] = []
    for _ in range(times):
        all_rows = merged(all_rows, [one])
    np.testing.assert_allclose(excess(all_rows), (times**2 - times) * (c**2).sum())
