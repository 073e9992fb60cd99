"""What `judge` takes, and how it refuses what makes no sense: with a verdict, or with ValueError or TypeError only."""

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings

from cpjax.arrays import as_array
from cpjax.attention import Computation
from cpjax.crosscheck import judge
from cpjax.crosscheck.judging.asked import sentences
from cpjax.errors import InputError
from cpjax.mask import Mask
from cpjax.partition import Zigzag
from cpjax.precision import PROFILES

torch = pytest.importorskip("torch", reason="torch tensors are among what is taken")

ROOT = Path(__file__).parents[2]
FEWEST = 300
LENGTH = 16
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.standard_normal((1, LENGTH, 2, 8)).astype(np.float32) for _ in range(3))


def attention(query=QUERY, key=KEY, value=VALUE, *, causal=True, scale=8**-0.5):
    """out in float64."""
    score = scale * np.einsum("btnh,bsnh->bnts", query.astype(np.float64), key.astype(np.float64))
    score = np.where(np.tri(*score.shape[-2:], dtype=bool) | (not causal), score, -np.inf)
    p = np.exp(score - score.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnv->btnv", p / p.sum(axis=-1, keepdims=True), value.astype(np.float64))


OUT = {causal: attention(causal=causal).astype(np.float32) for causal in (True, False)}


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64])
def test_positions_of_every_whole_dtype_mean_the_same(dtype):
    positions = np.arange(LENGTH, dtype=dtype)[None]
    at = {"q_positions": positions, "kv_positions": positions}
    assert judge(QUERY, KEY, VALUE, OUT[True], **at).passed
    assert not judge(QUERY, KEY, VALUE, OUT[False], **at).passed
    assert judge(QUERY, KEY, VALUE, OUT[False], is_causal=False, **at).passed


def test_differences_of_positions_do_not_leave_int32():
    last, first = np.full((1, LENGTH), 2**31 - 1, np.int32), np.full((1, LENGTH), -1, np.int32)
    assert judge(QUERY, KEY, VALUE, OUT[False], q_positions=last, kv_positions=first).passed
    with pytest.raises(InputError, match=r"positions lie beyond"):
        judge(QUERY, KEY, VALUE, OUT[False], q_positions=np.full((1, LENGTH), 2**63, np.uint64), kv_positions=first)


class Dlpack:
    """Has nothing but DLPack's two methods."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **how):
        return self.x.__dlpack__(**how)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


WAYS = {
    "torch": torch.from_numpy,
    "torch that requires gradients": lambda x: torch.from_numpy(x.copy()).requires_grad_(),
    "torch, not contiguous": lambda x: torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2))).transpose(1, 2),
    "parameter": lambda x: torch.nn.Parameter(torch.from_numpy(x.copy())),
    "DLPack": Dlpack,
    "list": lambda x: x.astype(np.float64).tolist(),
}


@pytest.mark.parametrize("way", WAYS)
def test_arrays_are_taken_as_they_are(way):
    take = WAYS[way]
    exact = attention()
    out = exact if way == "list" else OUT[True]
    assert judge(*map(take, (QUERY, KEY, VALUE, out))).passed
    wrong = out.copy()
    wrong[0, 7, 1, 3] += 1e-3
    assert not judge(*map(take, (QUERY, KEY, VALUE, wrong))).passed


def test_a_memory_map_and_a_jax_array_are_taken(tmp_path):
    import jax.numpy as jnp

    np.save(tmp_path / "out.npy", OUT[True])
    mapped = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert judge(jnp.asarray(QUERY), jnp.asarray(KEY), VALUE, mapped).passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_formats_that_numpy_does_not_know_keep_their_bits(dtype):
    x = torch.linspace(-3, 3, 64).to(getattr(torch, dtype)).requires_grad_(dtype == "bfloat16")
    taken = as_array(x, "query")
    assert taken.dtype == np.dtype(getattr(ml_dtypes, dtype))
    np.testing.assert_array_equal(taken.astype(np.float32), x.detach().to(torch.float32).numpy())


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda: torch.empty(1, LENGTH, 2, 8, device="meta"), "meta device"),
        (lambda: torch.zeros(1, LENGTH, 2, 8).to_sparse(), "give a dense one"),
        (lambda: torch.quantize_per_tensor(torch.zeros(1, LENGTH, 2, 8), 0.1, 0, torch.qint8), "quantized"),
        (lambda: [[1.0], [2.0, 3.0]], "rows of different lengths"),
        (lambda: np.ma.masked_array(QUERY, QUERY > 0), "masked entries"),
        (lambda: {"query": QUERY}, "no array"),
        (lambda: object(), "no array"),
    ],
)
def test_what_holds_no_numbers_is_refused_as_an_input_and_fails_as_a_result(bad, says):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that quantization moves
        x = bad()
    with pytest.raises(InputError, match=says):
        judge(x, KEY, VALUE, OUT[True])
    verdict = judge(QUERY, KEY, VALUE, x)
    assert not verdict.passed
    assert says in verdict.reasons[0]
    assert verdict.failed_tests == ("form",)


def test_dtypes_may_differ_if_a_precision_is_named_and_numbers_are_taken_exactly():
    query, key, value = QUERY, KEY.astype(np.float16), VALUE.astype(ml_dtypes.bfloat16)
    out = attention(query, key, value).astype(np.float32)
    with pytest.raises(InputError, match="float32, float16, bfloat16; name a precision"):
        judge(query, key, value, out)
    assert judge(query, key, value, out, precision="float32").passed
    rounded = attention(query.astype(np.float16), key, value).astype(np.float32)
    assert not judge(query, key, value, rounded, precision="float32").passed


def test_a_precision_of_ones_own_is_taken():
    mine = replace(PROFILES["flash_bf16"], name="mine", out="float32", carry="float32")
    arrays = [x.astype(ml_dtypes.bfloat16) for x in (QUERY, KEY, VALUE)]
    score = np.einsum("btnh,bsnh->bnts", *(x.astype(np.float64) for x in arrays[:2])) * 8**-0.5
    score = np.where(np.tri(LENGTH, dtype=bool), score, -np.inf)
    p = np.exp(score - score.max(axis=-1, keepdims=True))
    weights = p.astype(ml_dtypes.bfloat16).astype(np.float64)
    total = p.sum(axis=-1).swapaxes(1, 2)[..., None]
    out = np.einsum("bnts,bsnv->btnv", weights, arrays[2].astype(np.float64)) / total
    verdict = judge(*arrays, out.astype(np.float32), precision=mine)
    assert verdict.passed, verdict.reasons
    assert not judge(*arrays, out.astype(np.float32), precision="float32").passed


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_nan_where_nobody_looks_changes_nothing(number):
    """Key 15 is the future of all queries; the last query is a pad."""
    at = {"q_positions": np.arange(LENGTH)[None] - 1, "kv_positions": np.arange(LENGTH)[None]}
    plain = judge(QUERY, KEY, VALUE, OUT[True], **at)
    key, value = KEY.copy(), VALUE.copy()
    key[0, -1], value[0, -1] = number, number
    said = judge(QUERY, key, value, OUT[True], **at)
    assert (said.passed, said.z, said.hard_ratio) == (plain.passed, plain.z, plain.hard_ratio)
    with pytest.raises(InputError, match="value holds a NaN or an infinity, first at batch 0, token 15"):
        judge(QUERY, KEY, value, OUT[True])
    query, out, segment = QUERY.copy(), OUT[True].copy(), np.zeros((1, LENGTH), int)
    query[0, -1], out[0, -1], segment[0, -1] = number, number, -1
    assert judge(query, key, value, out, segment_ids=segment).passed


def test_every_verdict_says_what_was_asked_and_assumed():
    said = judge(QUERY, KEY, VALUE, OUT[True], scale=8**-0.5, window=LENGTH, cp=2, order="ring").asked
    assert said["query"] == "float32 [1, 16, 2, 8]"
    assert (said["mask"], said["window"], said["partition"], said["cp"]) == ("causal", LENGTH, "zigzag", 2)
    assert (said["order"], said["precision"], said["positions"]) == ("ring", "float32", "natural")
    assert "window" not in said["assumed"]
    asked, assumed = sentences(judge(QUERY, KEY, VALUE, OUT[True][:, :3]).asked)  # malformed, too
    assert "mask causal" in asked
    assert assumed.startswith("assumed: no sink, no softcap, no bias")
    assert assumed.endswith("no window")


@pytest.mark.slow
def test_malformed_calls_end_in_a_verdict_or_in_an_error_of_the_caller():
    """In a process of its own: here the types of arguments are checked before the judge sees them."""
    examples = settings().max_examples
    said = subprocess.run(
        [sys.executable, "-m", "tests.helpers.malformed_calls", str(max(examples, FEWEST))],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
    refused, judged = map(int, said.stdout.split()[-2:])
    assert refused > judged > 0


def test_a_computation_says_what_keywords_say():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 32, 2, 8)).astype(np.float16) for _ in range(3))
    sink = np.array([0.5, -1.0], np.float32)
    words = {"scale": 0.5, "softcap": 3.0, "sink": sink, "precision": "flash_fp16", "order": "ring"}
    mask = Mask(is_causal=False, window=7)
    out = np.zeros_like(value)
    by_words = judge(query, key, value, out, is_causal=False, window=7, partition=Zigzag(2), **words)
    by_value = judge(query, key, value, out, computation=Computation(mask=mask, partition=Zigzag(2), **words))
    assert (by_words.z, by_words.max_error, by_words.order) == (by_value.z, by_value.max_error, by_value.order)
    for twice in ({"scale": 1.0}, {"sink": words["sink"]}, {"is_causal": False}):
        with pytest.raises(InputError, match=f"{next(iter(twice))} is said twice"):
            judge(query, key, value, out, **twice, computation=Computation(mask=mask, **words))
