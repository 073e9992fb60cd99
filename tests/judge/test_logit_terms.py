"""Softcap, sink, ALiBi and bias: whoever computes them rightly passes, and whoever drops or bends one does not."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import examples
from torch.nn.attention.flex_attention import flex_attention

from cpjax.crosscheck import judge
from cpjax.crosscheck.exact.attention import SINK, attention_rows
from cpjax.crosscheck.exact.logits import Logits
from cpjax.crosscheck.judging.evidence import model_of
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.crosscheck.judging.range_check import rows_out_of_range
from cpjax.crosscheck.judging.sampling import chosen_rows, tiles
from cpjax.dense import dense_attention
from cpjax.errors import InputError
from cpjax.mask import Mask, Tokens
from cpjax.trial.emulators import PROFILES, SINKS, attend
from cpjax.trial.faults import LOGIT_FAULTS, Bench, changes
from cpjax.trial.other_logits import other_logits, with_freedoms
from cpjax.trial.problem import Problem, Result, places, visible

SEEDS = st.integers(0, 2**32 - 1)
INPUT = {"flash_fp16": "float16", "ring_mla_fp16": "float16", "float64": "float64"}


def cast(problem: Problem, profile: str) -> Problem:
    if profile == "flash_bf16":
        arrays = {name: getattr(problem, name).astype(ml_dtypes.bfloat16) for name in ("query", "key", "value")}
        return replace(problem, **{name: x.astype(np.float32) for name, x in arrays.items()})
    return problem.cast(INPUT.get(profile, "float32"))


def ask(problem: Problem, out, lse=None, precision="flash_fp16", **options):
    question = {**problem.judge_arguments(), "precision": precision, **options}
    return judge(problem.query, problem.key, problem.value, out, lse, **question)


def loops(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The definition, one query and one head at a time, in plain NumPy float64."""
    seen = visible(problem, np.arange(problem.key.shape[1]))
    here, there = places(problem)
    batch, length, heads, _ = problem.query.shape
    out, lse = np.zeros((batch, length, heads, problem.value.shape[3])), np.full((batch, length, heads), -np.inf)
    for b, t, n in np.ndindex(batch, length, heads):
        k = n // (heads // problem.key.shape[2])
        x = problem.scale * (problem.key[b, :, k].astype(np.float64) @ problem.query[b, t, n].astype(np.float64))
        if problem.softcap is not None:
            x = problem.softcap * np.tanh(x / problem.softcap)
        if problem.alibi is not None:
            x = x - float(problem.alibi[b, n]) * np.abs(int(here[b, t]) - there[b].astype(np.float64))
        if problem.bias is not None:
            x = x + np.broadcast_to(problem.bias, (batch, heads, length, len(x)))[b, n, t]
        e = np.where(seen[b, t], np.exp(x), 0.0)
        total = e.sum() + (0.0 if problem.sink is None else np.exp(float(problem.sink[n])))
        if total > 0:
            out[b, t, n], lse[b, t, n] = e @ problem.value[b, :, k].astype(np.float64) / total, np.log(total)
    return out, lse


def small(seed: int, **terms) -> Problem:
    """40 tokens, 4 heads of 2, values with a mean, so that a forgotten sink is felt."""
    rng = np.random.default_rng(seed)
    shapes = (1, 40, 4, 16), (1, 40, 2, 16), (1, 40, 2, 8)
    query, key, value = (rng.standard_normal(shape) for shape in shapes)
    problem = Problem(2 * query, key, value + 0.5, 0.25, is_causal=True, cp=2).cast("float16")
    return replace(problem, **terms)


ALL = {
    "softcap": 3.0,
    "sink": np.array([2.0, -1.0, 0.5, 4.0], np.float32),
    "alibi": np.array([[0.5, 0.25, 0.125, 0.0625]], np.float32),
    "bias": np.random.default_rng(9).standard_normal((1, 4, 40, 40)).astype(np.float16).astype(np.float32),
}


@pytest.mark.slow
@examples(5)
@given(SEEDS, st.sampled_from(sorted(PROFILES)), st.booleans())
@example(1326, "ring_mla_fp16", True)  # a sink in the end is the new maximum, and all keys are rescaled by FP16
def test_correct_results_pass(seed, profile, with_lse):
    rng = np.random.default_rng(seed)
    problem = cast(other_logits(rng), profile)
    out, lse = attend(problem, with_freedoms(PROFILES[profile], problem, rng))
    said = ask(problem, out, lse if with_lse else None, profile)
    assert said.passed or not said.judgeable, said.reasons


@pytest.mark.parametrize("how", SINKS)
@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("height", [-8.0, 0.0, 11.0])
def test_a_sink_may_enter_in_any_of_four_ways(how, profile, height):
    """Far above every logit too, where FP16 probabilities beside it are among the least numbers."""
    problem = cast(small(1, sink=np.full(4, height)), profile)
    out, lse = attend(problem, replace(PROFILES[profile], sink=how))
    for given_lse in (lse, None):
        said = ask(problem, out, given_lse, profile)
        assert said.passed, said.reasons


@pytest.mark.parametrize("profile", ["flash_fp16", "flash_bf16", "float32"])
@pytest.mark.parametrize("fault", LOGIT_FAULTS)
def test_every_fault_is_caught(fault, profile):
    problem = cast(small(2, **ALL), profile)
    bench = Bench(problem, PROFILES[profile])
    wrong = LOGIT_FAULTS[fault](bench)
    assert changes(wrong, bench.correct)
    assert ask(problem, *bench.correct, profile).passed
    for lse in (wrong.lse, None):
        said = ask(problem, wrong.out, lse, profile)
        assert said.judgeable
        assert not said.passed


@pytest.mark.parametrize("fault", LOGIT_FAULTS)
def test_a_failed_verdict_can_be_explained(fault):
    problem = small(3, **ALL)
    wrong = LOGIT_FAULTS[fault](Bench(problem, PROFILES["flash_fp16"]))
    assert ask(problem, *wrong).diagnosis


def test_the_diagnosis_knows_the_terms():
    """With all four in the logits a lost chunk is still called a lost chunk."""
    problem = small(4, **ALL)
    bench = Bench(problem, PROFILES["flash_fp16"])
    out, lse = bench.blocks.out.copy(), bench.blocks.lse.copy()
    out[1], lse[1] = 0, -np.inf
    said = ask(problem, *bench.folded(Result(out, lse)))
    assert not said.passed
    assert "key/value chunk 1" in said.diagnosis[0]
    assert "never entered" in said.diagnosis[0]


@examples(10)
@given(SEEDS)
def test_dense_and_the_judges_rows_are_the_definition(seed):
    problem = other_logits(np.random.default_rng(seed))
    if problem.query.shape[1] * problem.key.shape[1] > 2**16:
        problem = replace(problem, query=problem.query[:, :8], bias=None, q_positions=None, kv_positions=None)
        problem = replace(problem, is_causal=False)
    out, lse = loops(problem)
    here, there = places(problem)
    q_tokens, kv_tokens = (Tokens(x.astype(np.int32), np.zeros_like(x, np.int32)) for x in (here, there))
    terms = {name: getattr(problem, name) for name in ("softcap", "sink", "alibi", "bias")}
    mask = Mask(is_causal=problem.is_causal)
    arrays = (problem.query, problem.key, problem.value)
    dense = dense_attention(*arrays, q_tokens, kv_tokens, mask=mask, scale=problem.scale, **terms)
    for mine, theirs in ((dense.out, out), (dense.lse, lse)):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)
    asked = checked_problem(*arrays, **{**problem.judge_arguments(), "precision": "float64"})
    for tile in tiles(asked, chosen_rows(asked, 0)):
        rows, _ = model_of(
            asked, asked.key[tile.batch, :, tile.kv_head], asked.value[tile.batch, :, tile.kv_head], tile
        )
        np.testing.assert_allclose(rows.out, out[tile.batch, tile.position, tile.head], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(rows.lse, lse[tile.batch, tile.position, tile.head], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("dtype", "profile"),
    [(torch.float32, "float32"), (torch.bfloat16, "flash_bf16"), (torch.float16, "flash_fp16")],
    ids=str,
)
def test_pytorch_with_a_float_mask_passes(dtype, profile, seed):
    rng = np.random.default_rng(seed)
    query, key, value = (torch.tensor(rng.standard_normal((2, 3, length, 32))).to(dtype) for length in (20, 130, 130))
    bias = torch.tensor(rng.standard_normal((1, 3, 20, 130)) * rng.uniform(0.1, 6.0))
    bias[torch.tensor(rng.random(bias.shape) < 0.3)] = -torch.inf
    bias = bias.to(dtype)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    q, k, v, out = (x.float().numpy().swapaxes(1, 2) for x in (query, key, value, out))
    bias = bias.float().numpy()
    said = judge(q, k, v, out, is_causal=False, precision=profile, bias=bias)
    assert said.passed, said.reasons
    assert not judge(q, k, v, out, is_causal=False, precision=profile, bias=np.roll(bias, 1, axis=-1)).passed


@pytest.mark.filterwarnings("ignore")  # eager flex_attention says that it is slow
@pytest.mark.parametrize("seed", range(4))
def test_flex_attention_with_softcap_and_alibi_passes(seed):
    rng = np.random.default_rng(seed)
    query, key, value = (torch.tensor(rng.standard_normal((1, 2, n, 16)), dtype=torch.float32) for n in (30, 90, 90))
    slopes = torch.tensor([0.25, 0.0625])

    def changed(score, _b, head, i, j):
        return 5.0 * torch.tanh(score / 5.0) - slopes[head] * (i - j).abs()

    out, lse = flex_attention(3 * query, key, value, score_mod=changed, return_lse=True)
    q, k, v, out = (x.numpy().swapaxes(1, 2) for x in (3 * query, key, value, out))
    arguments = {"is_causal": False, "precision": "float32", "softcap": 5.0, "alibi": slopes.numpy()}
    said = judge(q, k, v, out, lse.numpy().swapaxes(1, 2), **arguments)
    assert said.passed, said.reasons
    for name in ("softcap", "alibi"):
        assert not judge(q, k, v, out, **{**arguments, name: None}).passed


def test_a_row_without_keys_has_the_sink_alone():
    """out 0, lse the sink; without a sink (0, −inf)."""
    bias = np.zeros((1, 1, 40, 1))
    bias[0, 0, 7] = -np.inf
    for sink, lse_there in ((np.arange(4.0), np.arange(4.0)), (None, np.full(4, -np.inf))):
        problem = small(5, sink=sink, bias=np.broadcast_to(bias, (1, 1, 40, 40)))
        out, lse = attend(problem, PROFILES["flash_fp16"])
        assert (out[0, 7] == 0).all()
        assert np.array_equal(lse[0, 7], lse_there)
        said = ask(problem, out, lse, bias=bias)
        assert said.passed, said.reasons
        asked = checked_problem(
            problem.query, problem.key, problem.value, **{**problem.judge_arguments(), "bias": bias}
        )
        assert not rows_out_of_range(asked, out, lse).any()
        for wrong_out, wrong_lse in ((1e-3, 0.0), (0.0, 1e-3)):
            other_out, other_lse = out.copy(), lse.copy()
            other_out[0, 7] += np.float16(wrong_out)
            other_lse[0, 7] = np.where(np.isinf(lse[0, 7]), 0.0, lse[0, 7]) + wrong_lse if wrong_lse else lse[0, 7]
            assert not ask(problem, other_out, other_lse).passed


def test_the_range_has_the_zero_of_the_sink():
    """Values between 1 and 2, a sink with most of the weight: out is near 0, and no average of values alone."""
    problem = small(6, sink=np.full(4, 20.0))
    problem = replace(problem, value=np.abs(problem.value) % 1 + np.float16(1))
    out, lse = attend(problem, PROFILES["flash_fp16"])
    arguments = problem.judge_arguments()
    asked = checked_problem(problem.query, problem.key, problem.value, **arguments)
    assert out.max() < 0.5
    assert not rows_out_of_range(asked, out, lse).any()
    assert rows_out_of_range(asked, out - np.float16(1), lse).all()
    assert rows_out_of_range(replace(asked, sink=None), out, lse).all()


@pytest.mark.parametrize("name", ["softcap", "alibi", "bias", "sink"])
def test_a_scale_that_is_off_is_measured_through_the_terms(name):
    problem = small(7, **{name: ALL[name]})
    wrong = attend(replace(problem, scale=problem.scale * 1.01), PROFILES["flash_fp16"])
    said = ask(problem, *wrong)
    assert "scale" in said.failed_tests
    assert said.scale_error == pytest.approx(0.01, abs=0.001)


def test_a_sink_is_a_key_of_value_zero():
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 8)), rng.standard_normal((5, 8)), rng.standard_normal((5, 4))
    seen, chunk = np.ones((3, 5), bool), np.array([0, 0, 1, 1, 1])
    rows = attention_rows(query, key, value, seen, chunk, 1.0, Logits(sink=np.array([0.0, 1.0, 2.0])))
    assert rows.index[-1] == rows.chunks[-1] == SINK
    assert rows.key_count == 5
    assert np.array_equal(rows.key_chunks, [0, 1])
    np.testing.assert_allclose(rows.weight.sum(axis=1), 1.0)
    np.testing.assert_allclose(rows.weight[:, -1], np.exp(np.array([0.0, 1.0, 2.0]) - rows.lse))
    np.testing.assert_allclose(rows.out, rows.weight[:, :5] @ value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"softcap": 0.0}, {"softcap": -1.0}, {"softcap": np.nan}, {"softcap": np.inf}, {"softcap": True},
        {"softcap": "50"}, {"sink": np.zeros(3)}, {"sink": np.zeros((1, 4))}, {"sink": [0, 1, np.nan, 2]},
        {"sink": [0, 1, -np.inf, 2]}, {"sink": np.zeros(4, bool)}, {"sink": list("abcd")}, {"alibi": np.zeros(2)},
        {"alibi": np.zeros((2, 4))}, {"alibi": np.full(4, np.inf)}, {"alibi": np.zeros(4, complex)},
        {"bias": np.zeros((40, 39))}, {"bias": np.zeros((1, 2, 40, 40))}, {"bias": np.zeros((1, 1, 1, 40, 40))},
        {"bias": np.full((40, 40), np.nan)}, {"bias": np.full((40, 40), np.inf)}, {"bias": np.zeros((40, 40), bool)},
    ],
)  # fmt: skip
def test_bad_terms_are_refused_by_name(wrong):
    problem = small(8)
    (name,) = wrong
    with pytest.raises(InputError, match=name):
        ask(problem, np.zeros_like(problem.query[..., :8]), **wrong)


@pytest.mark.parametrize("shape", [(), (40,), (40, 40), (4, 1, 40), (1, 4, 40, 1), (1, 1, 1, 40)])
def test_a_bias_broadcasts(shape):
    bias = np.random.default_rng(1).standard_normal(shape).astype(np.float16).astype(np.float32)
    problem = small(9, bias=np.broadcast_to(bias, (1, 4, 40, 40)))
    out, lse = attend(problem, PROFILES["flash_fp16"])
    assert ask(problem, out, lse, bias=bias).passed
    assert checked_problem(problem.query, problem.key, problem.value, bias=bias).bias.ndim == 4
