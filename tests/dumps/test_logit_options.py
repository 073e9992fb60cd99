"""`judge-dump` is told of a sink, a softcap, slopes, a bias, a window: with it a result agrees, without it is wrong."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from cpjax.cli import app

T, N, H = 48, 4, 16
SLOPES = 2.0 ** (-2 * np.arange(1, N + 1))
SINKS = np.array([1.0, 0.5, 2.0, 3.0], np.float32)
BIAS = np.random.default_rng(5).standard_normal((1, N, T, T)).astype(np.float32)
INDEX = np.arange(T)


def attention(query, key, value, softcap=None, alibi=None, bias=None, sink=None, window=None):
    """Plain NumPy in float64; scale 1."""
    x = np.einsum("btnh,bsnh->bnts", query.astype(float), key.astype(float))
    x = x if softcap is None else softcap * np.tanh(x / softcap)
    x = x if alibi is None else x - alibi[:, None, None] * np.abs(INDEX[:, None] - INDEX)
    x = x if bias is None else x + bias
    seen = INDEX[:, None] >= INDEX
    seen = seen if window is None else seen & (INDEX[:, None] - INDEX < window)
    x = np.where(seen, x, -np.inf)
    x = x if sink is None else np.concatenate([x, np.broadcast_to(sink[:, None, None], (1, N, T, 1))], axis=-1)
    m = x.max(-1, keepdims=True)
    p = np.exp(x - m)
    out = np.einsum("bnts,bsnv->btnv", p[..., :T], value.astype(float)) / p.sum(-1).transpose(0, 2, 1)[..., None]
    return out.astype(np.float16), (m[..., 0] + np.log(p.sum(-1))).transpose(0, 2, 1).astype(np.float32)


OPTIONS = {"softcap": 5.0, "window": 7, "sink": SINKS, "alibi": SLOPES, "bias": BIAS}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_with_the_option_it_agrees_and_without_it_is_wrong(tmp_path, option):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((1, T, N, H)).astype(np.float16) for name in ("query", "key", "value")}
    given, said = OPTIONS[option], []
    if isinstance(given, np.ndarray):
        np.save(tmp_path / "option.npy", given)
    word = str(tmp_path / "option.npy" if isinstance(given, np.ndarray) else given)
    for case, computed in (("with", {option: given}), ("without", {})):
        out, lse = attention(*tensors.values(), **computed)
        np.savez(tmp_path / f"{case}.npz", out=out, lse=lse, **tensors)
        words = ["judge-dump", str(tmp_path / f"{case}.npz"), "--scale", "1", "--causal", "--layout-of", "bsnd"]
        said.append([CliRunner().invoke(app, [*words, *more, "--json"]) for more in ([], [f"--{option}", word])])
    (plain_of_with, with_of_with), (plain_of_without, with_of_without) = said
    codes = [x.exit_code for x in (with_of_with, plain_of_without, plain_of_with, with_of_without)]
    assert codes == [0, 0, 1, 1], [x.output for x in (with_of_with, plain_of_without)]
    assert option in json.dumps(json.loads(with_of_with.stdout)).lower()
