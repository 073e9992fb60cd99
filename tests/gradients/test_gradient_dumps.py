"""`cpjax judge-dump --dout … --dq … --dk … --dv …`: exit status, words and JSON."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_judge_gradients import of_a_ring, posed
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.trial.emulators import PROFILES, attend
from cpjax.trial.gradient_emulators import Backward, differentiate
from cpjax.trial.problem import Problem, Result

TENSORS = ("query", "key", "value", "out", "lse", "dout", "dq", "dk", "dv")


def drawn(size: float = 1.0) -> tuple[Problem, Result, np.ndarray]:
    """A problem, its forward pass, and dout of this size."""
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal((1, 64, n, 32)) for n in (4, 2, 2))
    problem = Problem(*arrays, 0.2, is_causal=True).cast("float16")
    given = attend(problem, PROFILES["flash_fp16"])
    return problem, given, (rng.standard_normal(given.out.shape) * size).astype(np.float16)


@pytest.fixture
def dump(tmp_path) -> Path:
    """A folder of correct tensors in FP16, heads before tokens."""
    problem, given, dout = drawn()
    found = differentiate(problem, PROFILES["flash_fp16"], Backward(), given, dout)
    tensors = (problem.query, problem.key, problem.value, *given, dout, *found)
    for name, x in zip(TENSORS, tensors, strict=True):
        np.save(tmp_path / f"{name}.npy", x.swapaxes(1, 2))
    return tmp_path


def judged(dump: Path, *more: str, without: tuple[str, ...] = ()):
    files = [x for name in TENSORS if name not in without for x in (f"--{name}", str(dump / f"{name}.npy"))]
    words = ("judge-dump", *files, "--scale", "0.2", "--causal", "--layout-of", "bnsd", *more)
    return CliRunner().invoke(app, list(words))


def test_correct_gradients_exit_0_and_say_so(dump):
    run = judged(dump, "--lse-layout", "bns")
    assert run.exit_code == 0, run.output
    assert "gradients pass (flash_fp16)" in run.output
    assert "dq: as rounding explains" in run.output


def test_keys_that_are_repeated_for_the_heads_of_a_group(tmp_path):
    """As Hugging Face's repeat_kv and PyTorch's enable_gqa do: each head's dk is a tensor in the format."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    heads = (4, 2, 2)
    query, key, value = (torch.randn(2, n, 48, 32).bfloat16().requires_grad_() for n in heads)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.2, enable_gqa=True
    )
    dout = torch.randn_like(out)
    out.backward(dout)
    tensors = {"query": query, "key": key, "value": value, "out": out, "dout": dout}

    def said(dv):
        tensors.update(dq=query.grad, dk=key.grad, dv=dv)
        files = []
        for name, x in tensors.items():
            torch.save(x, tmp_path / f"{name}.pt")
            files += [f"--{name}", str(tmp_path / f"{name}.pt")]
        words = ("--scale", "0.2", "--causal", "--layout-of", "bnsd")
        return CliRunner().invoke(app, ["judge-dump", *files, *words])

    run = said(value.grad)
    assert run.exit_code == 0, run.output
    assert "rounded_every: 48 passes" in run.output
    assert said(value.grad * 0.97).exit_code == 1


def test_wrong_gradients_exit_1_with_their_cause_in_json_too(dump):
    dk = np.load(dump / "dk.npy")
    np.save(dump / "dk.npy", (dk.astype(float) * 0.2).astype(np.float16))
    run = judged(dump, "--lse-layout", "bns", "--json")
    assert run.exit_code == 1
    report = json.loads(run.stdout)
    assert report["passed"] is False
    assert report["gradients"]["passed"] is False
    assert report["results"][0]["outcome"] == "pass", "the forward pass is right"
    assert any(name.endswith("dk.npy") for name in report["results"][0]["about"]["files"])


def test_how_ds_is_made_is_found_out_and_said(dump):
    """A kernel that multiplies by the scale first, with gradients near FP16's least numbers."""
    problem, given, dout = drawn(1e-3)
    found = differentiate(problem, PROFILES["flash_fp16"], Backward(ds="scaled"), given, dout)
    for name, x in zip(("dout", "dq", "dk", "dv"), (dout, *found), strict=True):
        np.save(dump / f"{name}.npy", x.swapaxes(1, 2))
    run = judged(dump, "--lse-layout", "bns")
    assert run.exit_code == 0, run.output
    assert "ds: scaled passes, plain does not; say --ds" in run.output
    assert "gradients pass (flash_fp16, ds scaled)" in run.output
    assert judged(dump, "--lse-layout", "bns", "--ds", "plain").exit_code == 1
    refused = judged(dump, "--lse-layout", "bns", "--ds", "no")
    assert refused.exit_code == 2
    assert "ds is 'no'; it must be one of plain" in refused.output


def test_sums_in_half_precision_are_said(dump):
    """Each tile's sums stored in FP16, as PyTorch's kernel for CPUs does."""
    problem, given, dout = drawn(1.0)
    parts = [
        differentiate(problem, PROFILES["flash_fp16"], Backward(), given, np.where(here, dout, np.float16(0)))
        for here in (np.arange(64)[None, :, None, None] // 4 == i for i in range(16))
    ]
    for name in ("dk", "dv"):
        total = np.float16(0)
        for part in parts:  # NumPy rounds each sum to FP16
            total = total + getattr(part, name)
        np.save(dump / f"{name}.npy", total.swapaxes(1, 2))
    assert judged(dump, "--lse-layout", "bns", "--rounded-every", "4").exit_code == 0


def test_how_a_ring_adds_up_is_found_out_and_said(tmp_path):
    problem, given, dout = posed("flash_fp16", 192, cp=4)
    found = of_a_ring(problem, given, dout, "out")
    every = {"query": problem.query, "key": problem.key, "value": problem.value, "out": given.out, "lse": given.lse}
    words = ["judge-dump", "--scale", "0.2", "--causal", "--layout-of", "bsnd", "--cp", "4", "--partition", "zigzag"]
    for name, x in {**every, "dout": dout, **found._asdict()}.items():
        np.save(tmp_path / f"{name}.npy", x)
        words += [f"--{name}", str(tmp_path / f"{name}.npy")]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    # Its sums are kept in FP16; to be added up in float32 explains it, too, and is tried first.
    assert "over_ranks: float32 passes, as where each pair of chunks has a dq, a dk and a dv" in run.output
    said = CliRunner().invoke(app, [*words, "--over-ranks", "out"])
    assert said.exit_code == 0
    assert "over_ranks:" not in said.output
    refused = CliRunner().invoke(app, [*words, "--over-ranks", "no"])
    assert refused.exit_code == 2
    assert "over_ranks is 'no'; it must be float32 or out" in refused.output


def test_half_a_backward_pass_is_refused(dump):
    run = judged(dump, without=("dk", "dv"))
    assert run.exit_code == 2
    assert "--dk, --dv missing" in run.output


def test_another_layout_is_refused(dump):
    np.save(dump / "dq.npy", np.load(dump / "dq.npy")[0])
    run = judged(dump, "--lse-layout", "bns")
    assert run.exit_code == 2
    assert "dq.npy: has shape [4, 64, 32]; in the layout bnsd of the other files it must have 4 axes" in run.output
