"""`cpjax bench`: who takes part, in which order, and what is made of the times. How long it took is no test's."""

import json
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from cpjax.bench import rounds
from cpjax.bench.contenders import CONTENDERS
from cpjax.bench.process import Contender, Times
from cpjax.bench.rounds import bench
from cpjax.bench.setting import Setting
from cpjax.cli import app
from cpjax.errors import InputError

SETTING = Setting(16, 2, 2, 4, 3, "float32", True, "both", 2)


@pytest.mark.process
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_contenders_run_in_processes_of_their_own(direction):
    setting = Setting(16, 2, 2, 4, 3, "float32", True, direction, 2)
    with Contender("cpjax", setting) as ours, Contender("torch_sdpa", setting) as theirs:
        assert ours._process.pid != theirs._process.pid
        for one in (ours, theirs):
            assert not one.unsupported
            assert all(np.isfinite(x) and x >= 0 for x in (*one.first, *one.run()))


@pytest.mark.process
def test_who_cannot_compute_says_why():
    with Contender("jax_dense", SETTING) as unable:
        assert "shape" in unable.unsupported.lower()  # JAX has one head dim
    with Contender("no such", SETTING) as dead:
        assert dead.unsupported == "its process ended with status 1; is there memory enough?"


def dense(q, k, v, *, causal):
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    score = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[3])
    if causal:
        score = np.where(np.tri(*score.shape[2:], dtype=bool), score, -np.inf)
    p = np.exp(score - score.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnv->btnv", p / p.sum(axis=-1, keepdims=True), v)


# Sums of 16 terms of size 1 in float32 are off by about 1e-6; another mask or another order of keys by 0.1.
same = partial(np.testing.assert_allclose, atol=1e-5)


def computed(name, setting):
    return np.asarray(CONTENDERS[name](setting).run())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_all_compute_the_same_attention(causal, kv_heads):
    """Else a ratio would compare two problems. Ours holds its tokens in zigzag: chunks 0 and 3, then 1 and 2."""
    setting = Setting(16, 4, kv_heads, 4, 4, "float32", causal, "forward", 2)  # JAX has one head dim
    q, k, v, _ = setting.arrays()
    want = dense(q, k, v, causal=causal)
    same(computed("torch_sdpa", setting).transpose(0, 2, 1, 3), want)
    same(computed("jax_dense", setting), want)
    order = np.concatenate([np.arange(0, 4), np.arange(12, 16), np.arange(4, 12)])
    inverse = np.argsort(order)
    in_text = dense(q[:, inverse], k[:, inverse], v[:, inverse], causal=causal)[:, order]
    same(computed("cpjax", setting), in_text)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_decode_the_same_token(dtype):
    setting = Setting(16, 4, 2, 4, 4, dtype, True, "decode", 2)
    want = dense(*(x.astype(np.float64) for x in setting.arrays()[:3]), causal=False)
    of_dtype = partial(same, atol=1e-5 if dtype == "float32" else 2e-3)  # a spacing of 2^-10 at 1
    of_dtype(computed("torch_sdpa", setting).transpose(0, 2, 1, 3), want)
    of_dtype(computed("cpjax", setting), want)


@pytest.mark.process
@pytest.mark.parametrize("causal", [False, True])
def test_the_ring_of_others_computes_it_too(causal):
    setting = Setting(16, 2, 2, 4, 4, "float32", causal, "forward", 2)
    prepared = CONTENDERS["ring_attention_pytorch"](setting)
    before = prepared.others()
    same(prepared.run().numpy(), dense(*setting.arrays()[:3], causal=causal))
    assert prepared.others() > before > 0


@pytest.mark.parametrize(
    "change", [{"kv_heads": 1}, {"value_dim": 3}, {"direction": "decode"}, {"dtype": "float16"}], ids=str
)
def test_the_ring_of_others_says_what_it_has_not(change):
    setting = Setting(**vars(SETTING) | {"value_dim": 4} | change)
    with pytest.raises(ValueError, match=r"it has as many key/value heads|only float32 is timed"):
        CONTENDERS["ring_attention_pytorch"](setting)


class Scripted(Contender):
    """A contender whose times are known; it writes down when it ran."""

    log: ClassVar[list[str]] = []

    def __init__(self, name, setting):
        self.name, self.unsupported, self.first = name, "no CUDA" if name == "gpu" else "", Times(9.0, 9.0)
        self.times = iter({"cpjax": [(2, 8), (4, 8), (30, 8)], "other": [(1, 4), (4, 2), (10, 8)]}.get(name, ()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.log.append(f"{self.name} ends")

    def run(self):
        self.log.append(self.name)
        return Times(*map(float, next(self.times)))


def test_rounds_turn_and_ratios_are_of_one_round(monkeypatch):
    monkeypatch.setattr(rounds, "Contender", Scripted)
    seen = []
    ours, gpu, other = bench([SETTING], ["cpjax", "gpu", "other"], 3, lambda *x: seen.append(x))
    assert Scripted.log == [
        "cpjax",
        "other",
        "other",
        "cpjax",
        "cpjax",
        "other",
        "other ends",
        "gpu ends",
        "cpjax ends",
    ]
    assert (ours.seconds, ours.cpu_seconds, ours.ratio) == (4.0, 8.0, None)
    assert (other.ratio, other.cpu_ratio) == (2.0, 2.0)  # of 2, 1, 3 and of 2, 4, 1
    assert (gpu.seconds, gpu.unsupported) == (None, "no CUDA")
    assert seen[-1] == ("rounds", 3, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 6}, "6 tokens cannot be dealt to 2 devices"),
        ({"dtype": "int8"}, "the bench knows float32 and float16"),
        ({"direction": "backward"}, "it is forward, both, decode"),
        ({"kv_heads": 3}, "2 query heads cannot share 3 key/value heads"),
    ],
)
def test_a_setting_that_nobody_computes_is_refused(change, said):
    with pytest.raises(InputError, match=said):
        Setting(**vars(SETTING) | change)


@pytest.mark.process
def test_the_command_prints_a_table_and_json():
    line = ["bench", "--tokens", "16", "--heads", "1", "--head-dim", "4", "--dtype", "float32", "--repeats", "1"]
    said = CliRunner().invoke(app, [*line, "--contenders", "gemm", "--json"])
    assert said.exit_code == 0, said.output
    rows = json.loads(said.stdout)
    assert [(row["tokens"], row["is_causal"], row["contender"]) for row in rows] == [
        (16, False, "gemm"),
        (16, True, "gemm"),
    ]
    said = CliRunner().invoke(app, [*line, "--contenders", "gemm,flash"])
    assert said.exit_code == 2
    assert "--contenders has 'flash'; known are cpjax, torch_sdpa, gemm, jax_dense, ring_att" in said.stderr
    said = CliRunner().invoke(app, [*line, "--backward", "--decode"])
    assert said.exit_code == 2
    assert "a decode step has no backward pass" in said.stderr
