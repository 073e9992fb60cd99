"""`cpjax.testing.assert_attention`, as another project's tests call it; and the table of docs/testing.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cpjax.crosscheck import judge
from cpjax.errors import InputError
from cpjax.testing import assert_attention

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text()


def inputs(tokens=96, heads=2, head_dim=32, std=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return [(std * rng.standard_normal((1, tokens, heads, head_dim))).astype(np.float16) for _ in range(3)]


def attention(query, key, value, seen, scale=None, out=np.float16):
    """A kernel: float32 scores, exponentials rounded to float16 before they meet the values, `out` rounded once."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    score = np.einsum("btnh,bsnh->bnts", query.astype(np.float32), key.astype(np.float32)) * np.float32(scale)
    score = np.where(seen, score, -np.inf)
    p = np.exp(score - score.max(axis=3, keepdims=True))
    total = p.sum(axis=3, dtype=np.float32)
    p = p.astype(np.float16).astype(np.float32)
    result = np.einsum("bnts,bsnv->btnv", p, value.astype(np.float32)) / total.swapaxes(1, 2)[..., None]
    lse = (score.max(axis=3) + np.log(total)).swapaxes(1, 2)
    return result.astype(out).astype(np.float16), lse


def causal(tokens, shift=0):
    return np.tri(tokens, k=shift, dtype=bool)


def lost(key, tokens=96, rows=slice(None)):
    """Causal, and these rows lose a key; the row that sees only this one keeps it."""
    seen = causal(tokens)
    seen[rows, key] = False
    seen[key, key] = True
    return seen


def refused(*arguments, **keywords) -> str:
    with pytest.raises(AssertionError) as error:
        assert_attention(*arguments, **keywords)
    return " ".join(str(error.value).split())


def test_a_correct_kernel_passes_with_and_without_lse():
    arrays = inputs()
    out, lse = attention(*arrays, causal(96))
    assert assert_attention(*arrays, out) is None
    assert_attention(*arrays, out, lse)
    out, lse = attention(*arrays, np.ones((96, 96), bool))
    assert_attention(*arrays, out, lse, is_causal=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorch_passes_as_tensors(dtype):
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_() for x in inputs()]
    heads_first = [x.transpose(1, 2) for x in tensors]
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    assert_attention(*tensors, out)
    assert "WRONG" in refused(*tensors, out, is_causal=False)


def test_jax_arrays_pass():
    arrays = inputs()
    out, lse = attention(*arrays, causal(96))
    assert_attention(*map(jnp.asarray, (*arrays, out, lse)))


# What is done to a correct result, and what the message must name.
FAULTS = {
    "a key was lost": (lambda a: attention(*a, lost(5))[0], "diagnosis: key 5 was lost"),
    "mask +1": (lambda a: attention(*a, causal(96, 1))[0], "the causal mask is shifted by +1"),
    "zeros": (lambda a: np.zeros_like(a[2]), "192 rows of out are zero, as if never written"),
    "one row of zeros": (lambda a: _with(a, 0.0), "1 row of out is zero"),
    "NaN everywhere": (lambda a: np.full_like(a[2], np.nan), "no finite number"),
    "one NaN": (lambda a: _with(a, np.nan, one=True), "position 3, head 1, is no finite number"),
    "one infinity": (lambda a: _with(a, np.inf, one=True), "position 3, head 1, is no finite number"),
    "one token less": (lambda a: a[2][:, 1:], "out has shape (1, 95, 2, 32); it must be (1, 96, 2, 32)"),
    "whole numbers": (lambda a: a[2].astype(int), "out has dtype int64"),
    "nothing": (lambda a: None, "out is no array"),
}


def _with(arrays, number, *, one=False):
    out, _ = attention(*arrays, causal(96))
    out[0, 3, 1, 5 if one else slice(None)] = number
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_result_fails_with_verdict_reason_and_question(name):
    broken, says = FAULTS[name]
    arrays = inputs()
    message = refused(*arrays, broken(arrays))
    assert message.startswith("attention is WRONG: not what correct flash_fp16 arithmetic gives - ")
    assert says in message
    assert "asked: query float16 [1, 96, 2, 32], " in message
    assert "scale 0.176776695, mask causal" in message
    assert "assumed: no sink, no softcap, no bias, no alibi, no window" in message


def test_a_wrong_lse_fails_though_out_is_right():
    arrays = inputs()
    out, lse = attention(*arrays, causal(96))
    assert "lse" in refused(*arrays, out, lse / np.log(2))
    lse[0, 7, 0] = np.nan
    assert "position 7, head 0, is no finite number" in refused(*arrays, out, lse)


def test_what_cannot_be_judged_fails_and_says_so():
    query, key, value = inputs()
    query = (query * np.float16(3000)).astype(np.float16)
    out, _ = attention(query, key, value, causal(96))
    message = refused(query, key, value, out, precision="ring_mla_fp16")
    assert message.startswith("attention is NOT JUDGEABLE in ring_mla_fp16: no fault found, and not all could be ")
    assert "192 of 192 rows are not judgeable: scores or outputs leave what the format can hold" in message
    assert "judged: 0 of 192 rows" in message


def test_a_question_that_makes_no_sense_is_not_a_failed_result():
    query, key, value = inputs()
    out, _ = attention(query, key, value, causal(96))
    for words in ({"precision": "fp17"}, {"scale": np.nan}, {"window": -1}, {"order": "sideways"}):
        with pytest.raises(ValueError):  # noqa: PT011
            assert_attention(query, key, value, out, **words)
    with pytest.raises(InputError, match="query holds a NaN or an infinity, first at batch 0, token 0"):
        assert_attention(np.full_like(query, np.nan), key, value, out)
    with pytest.raises(TypeError, match="tolerance"):
        assert_attention(query, key, value, out, tolerance=1e-2)  # pyright: ignore[reportCallIssue]


IN_ANOTHER_PROJECT = """
import numpy as np
from cpjax.testing import assert_attention

def test_kernel():
    x = np.random.default_rng(0).standard_normal((1, 16, 1, 8)).astype(np.float32)
    assert_attention(x, x, x, np.zeros_like(x))
"""


BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
MY_KERNELS = """
import torch

def flash_attention(q, k, v, *, causal, scale):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    score = q.double() @ k.double().repeat_interleave(2, dim=1).transpose(2, 3) * scale
    if causal:
        score = score.masked_fill(torch.ones(score.shape[2:]).triu(1).bool(), float("-inf"))
    return out, score.logsumexp(-1).float()
"""


@pytest.mark.process
@pytest.mark.parametrize("block", BLOCKS, ids=["NumPy", "Triton"])
def test_the_examples_of_the_page_pass(tmp_path, block):
    """As test files of another project; a kernel stands in for theirs."""
    (tmp_path / "my_kernels.py").write_text(MY_KERNELS)
    run = pytest_in(tmp_path, block)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.process
def test_the_message_on_the_page_is_what_pytest_shows(tmp_path):
    broken = BLOCKS[0].replace("np.tri(query.shape[1], ", "np.tri(query.shape[1], k=1, ")
    run = pytest_in(tmp_path, broken)
    shown = "\n".join(line[4:] for line in PAGE.splitlines() if line.startswith(("    >", "    E")))
    # How large the errors are depends in the third digit on the machine's float32 products.
    assert re.sub(r"\d\S*", "#", shown) in re.sub(r"\d\S*", "#", run.stdout), run.stdout


def pytest_in(folder, code):
    """pytest in a folder that has this test file and nothing of ours, as at a terminal: under CI it folds no line."""
    ours = "CI", "BUILD_NUMBER", "PYTEST_ADDOPTS"
    (folder / "test_kernel.py").write_text(code)
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    terminal = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(line, cwd=ROOT, env=terminal, capture_output=True, text=True, check=False)


@pytest.mark.process
def test_pytest_shows_the_line_of_the_test_and_the_message(tmp_path):
    run = pytest_in(tmp_path, IN_ANOTHER_PROJECT)
    assert run.returncode == 1, run.stdout + run.stderr
    assert ">       assert_attention(x, x, x, np.zeros_like(x))\nE   " in run.stdout
    assert "AssertionError: attention is WRONG: not what correct float32 arithmetic gives\nE  " in run.stdout
    assert "raise AssertionError" not in run.stdout, "our own frame is shown"
    assert max(map(len, run.stdout.splitlines())) < 130
    assert len(run.stdout.splitlines()) < 40


# docs/testing.md -----------------------------------------------------------------------------------------------------

TOKENS = 1024
BENCH = {
    "nothing": {},
    "a key is lost to all queries after it": {"seen": lost(700, TOKENS)},
    "a key is lost to the last 64 queries": {"seen": lost(700, TOKENS, slice(960, None))},
    "a key is lost to the last 8 queries": {"seen": lost(5, TOKENS, slice(1016, None))},
    "the scale is 0.3 % too large": {"scale": 0.5 * 1.003},
    "the scale is 0.1 % too large": {"scale": 0.5 * 1.001},
    "the result passes through BF16": {"out": ml_dtypes.bfloat16},
}


@pytest.mark.slow
def test_the_table_beside_three_public_test_suites_is_what_they_say():
    """On the inputs of Triton's own test: each suite's rule with its own reference, and the judge."""
    torch = pytest.importorskip("torch")
    arrays = inputs(TOKENS, 2, 64, std=0.5, seed=0)
    heads_first = [torch.from_numpy(x).transpose(1, 2) for x in arrays]
    hidden = ~torch.from_numpy(causal(TOKENS))

    def reference(dtype, softmax=None):
        q, k, v = (x.to(dtype) for x in heads_first)
        score = (q @ k.transpose(2, 3) * 0.5).masked_fill(hidden, float("-inf"))
        return (torch.softmax(score, -1, dtype=softmax).to(dtype) @ v).transpose(1, 2).float()

    exact, half, mixed = reference(torch.float32), reference(torch.float16), reference(torch.float16, torch.float32)
    rows = []
    for fault, words in BENCH.items():
        out, _ = attention(*arrays, **{"seen": causal(TOKENS), "scale": 0.5} | words)
        ours = torch.from_numpy(out).float()
        passed = (
            bool((ours - exact).abs().max() <= 2 * (half - exact).abs().max()),
            torch.allclose(ours, exact, atol=4e-3, rtol=4e-4),
            torch.allclose(mixed, ours, atol=1e-2, rtol=0),
            judge(*arrays, out, scale=0.5).passed,
        )
        error = f"{float((ours - exact).abs().max()):.1e}"
        rows.append(f"| {fault} | {error} | " + " | ".join("passes" if one else "fails" for one in passed) + " |")
    page = PAGE.partition("| fault | largest error |")[2].splitlines()[2:]
    assert page[: len(rows)] == rows
    assert page[len(rows)] == ""
