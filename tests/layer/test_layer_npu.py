"""Layers that the other half of the project has computed: right as it is, and one stage wrong where it is broken."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import npu_backend.layer.attention
from cpjax.cli import app
from cpjax.crosscheck.layer.judge import judge_layer
from cpjax.crosscheck.layer.result import LayerResult
from cpjax.crosscheck.layer.session import read_layer_cases
from npu_backend.layer.case import read_layer
from npu_backend.layer.run import as_arrays, compute_layer


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers") / "cases"
    written = CliRunner().invoke(app, ["cases", "--preset", "layer", str(folder)])
    assert written.exit_code == 0, written.output
    return folder


@pytest.mark.process
def test_every_stage_of_every_case_agrees(cases):
    """Both commands, as they are used: the layers in a process of their own, then the verdict."""
    results = cases.parent / "results"
    command = [sys.executable, "-m", "npu_backend", "layer", str(cases), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    judged = CliRunner().invoke(app, ["judge", str(cases), str(results)])
    assert judged.exit_code == 0, judged.output
    assert "Every stage of 10 of 10 results is what correct arithmetic" in judged.output


def verdict_on(cases, name: str):
    """Of a case that the backend computes here and now."""
    (case,) = [one for one in read_layer_cases(cases) if one.name == name]
    stages = as_arrays(compute_layer(read_layer(cases / f"{name}.safetensors"), torch.device("cpu")))
    return judge_layer(case, LayerResult("npu", stages, {}))


def wrong_stages(verdict) -> list[str]:
    return [stage.stage for stage in verdict.stages if stage.outcome != "agrees"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0-dense-float", "1-moe-float", "3-dense-w8a8", "7-moe-w4a8"])
def test_a_scale_without_mscale_is_attention_alone(cases, name, monkeypatch):
    kind = type(read_layer(cases / f"{name}.safetensors").config)
    monkeypatch.setattr(kind, "softmax_scale", 192**-0.5)
    assert wrong_stages(verdict_on(cases, name)) == ["attention"]


@pytest.mark.parametrize("name", ["0-dense-float", "6-moe-w8a8-dynamic"])
def test_the_config_s_eps_in_the_latent_s_norms(cases, name, monkeypatch):
    """Far from 1e-6, as eps is far below the activations' mean square."""
    monkeypatch.setattr(npu_backend.layer.attention, "LATENT_EPS", 1e-2)
    assert wrong_stages(verdict_on(cases, name)) == ["q_a_norm", "c_kv"]


def test_rope_at_the_next_position(cases, monkeypatch):
    right = npu_backend.layer.attention.cos_sin
    monkeypatch.setattr(npu_backend.layer.attention, "cos_sin", lambda config, position: right(config, position + 1))
    assert wrong_stages(verdict_on(cases, "0-dense-float")) == ["query", "k_rope"]


def test_a_causal_mask_that_is_dropped(cases, monkeypatch):
    right = npu_backend.layer.attention.ring_mla_block
    monkeypatch.setattr(
        npu_backend.layer.attention,
        "ring_mla_block",
        lambda *x, is_causal, scale: right(*x, is_causal=False, scale=scale),
    )
    assert wrong_stages(verdict_on(cases, "1-moe-float")) == ["attention"]
