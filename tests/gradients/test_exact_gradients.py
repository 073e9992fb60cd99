"""Exact gradients by tiles against automatic differentiation of dense attention, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cpjax.crosscheck.gradients import asked as asked_module
from cpjax.crosscheck.gradients.asked import asked_of
from cpjax.crosscheck.gradients.exact import NAMES, exact_gradients
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.errors import InputError
from cpjax.mask import Tokens, visible


def drawn(seed: int, shape: tuple[int, ...] = (2, 37, 4, 2, 8, 6)) -> list[np.ndarray]:
    """query, key, value, dout; shape is B, T, N, K, H, V."""
    batch, length, heads, kv_heads, width, value = shape
    rng = np.random.default_rng(seed)
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value), (heads, value))
    return [rng.standard_normal((batch, length, *size)) for size in sizes]


MASKS = {
    "causal": {},
    "full": {"is_causal": False},
    "window": {"window": 5},
    "segments": {"segment_ids": np.repeat([[0, 1, 2, -1], [0, 0, 1, 1]], [10, 9, 14, 4], axis=1)},
    "positions": {
        "q_positions": np.arange(74).reshape(2, 37) % 37,
        "kv_positions": np.arange(74)[::-1].reshape(2, 37) % 37,
    },
    "sink": {"sink": np.array([0.5, -1.0, 2.0, 0.0])},
}


def dense(query, key, value, seen, scale, sink, where, exp, einsum):
    """Attention as it is defined; `seen` is `[B, T, S]`."""
    group = query.shape[2] // key.shape[2]
    batch, length, heads, width = query.shape
    query = query.reshape(batch, length, heads // group, group, width)
    p = where(seen[:, None, None], exp(einsum("btkgh,bskh->bkgts", query, key) * scale), 0.0)
    total = p.sum(-1) + (0.0 if sink is None else exp(sink).reshape(1, heads // group, group, 1))
    out = einsum("bkgts,bskv->bkgtv", p / where(total == 0, 1.0, total)[..., None], value)
    return einsum("bkgtv->btkgv", out).reshape(batch, length, heads, -1)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("differentiate", ["torch", "jax"])
def test_tiles_give_what_automatic_differentiation_gives(name, differentiate, monkeypatch):
    monkeypatch.setattr(asked_module, "QUERY_TILE", 16)
    monkeypatch.setattr(asked_module, "KEY_TILE", 8)
    if differentiate == "jax" and name not in ("segments", "sink"):
        return  # one library for each mask, both for two of them: compiling is what costs
    *inputs, dout = drawn(1)
    problem = checked_problem(*inputs, scale=0.3, precision="float64", **MASKS[name])
    seen = visible(
        problem.mask, Tokens(*map(np.asarray, problem.q_tokens)), Tokens(*map(np.asarray, problem.kv_tokens))
    )
    dout = np.where(problem.is_judged[..., None, None], dout, np.nan)  # what pads hold does not count
    found = exact_gradients(asked_of(problem, None, None, dout))
    dout, sink = np.nan_to_num(dout), problem.sink
    if differentiate == "torch":
        tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
        sink = None if sink is None else torch.tensor(sink)
        out = dense(*tensors, torch.tensor(seen), 0.3, sink, torch.where, torch.exp, torch.einsum)
        out.backward(torch.tensor(dout))
        expected = [x.grad.numpy() for x in tensors]
    else:
        with jax.enable_x64(True):

            def loss(*x):
                return (dense(*x, seen, 0.3, sink, jnp.where, jnp.exp, jnp.einsum) * dout).sum()

            expected = [np.asarray(x) for x in jax.grad(loss, (0, 1, 2))(*map(jnp.asarray, inputs))]
    for label, mine, theirs in zip(NAMES, found, expected, strict=True):
        assert np.abs(mine - theirs).max() < 1e-12, label
        assert np.abs(mine).max() > 0.1


def test_given_out_and_lse_are_taken_as_they_are():
    """The map from out and lse to gradients: δ is linear in out, p scales with exp(−lse)."""
    *inputs, dout = drawn(2)
    problem = checked_problem(*inputs, scale=0.3, precision="float64")
    own = asked_of(problem, None, None, dout)
    right = exact_gradients(own)
    again = exact_gradients(asked_of(problem, own.out, own.lse, dout))
    shifted = exact_gradients(asked_of(problem, own.out, own.lse + 1.0, dout))
    for one, two, three in zip(right, again, shifted, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-13)
        np.testing.assert_allclose(three, one / np.e, rtol=0, atol=1e-13)
    moved = exact_gradients(asked_of(problem, own.out + 1.0, own.lse, dout))
    assert np.abs(moved.dq - right.dq).max() > 0.1
    np.testing.assert_array_equal(moved.dv, right.dv)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"precision": "fia_fp16"}, "precision 'fia_fp16' has no model of its backward pass; name one of"),
        ({"softcap": 3.0}, "softcap is given; gradients are judged without it: leave it out"),
        ({"dout": np.zeros((1, 2))}, r"dout has shape (1, 2); it must be (2, 37, 4, 6)"),
        ({"lse": np.full((2, 37, 4), -np.inf)}, "lse is not finite in a row that sees a key"),
        ({"dout": np.full((2, 37, 4, 6), np.nan)}, "dout holds a NaN or an infinity"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(change, says):
    *inputs, dout = drawn(3)
    words = {"dout": dout, "lse": None, "precision": "float64"} | change
    options = {name: words[name] for name in ("precision", "softcap") if name in words}
    with pytest.raises(InputError) as error:
        asked_of(checked_problem(*inputs, **options), None, words["lse"], words["dout"])
    assert str(error.value).startswith(says)
