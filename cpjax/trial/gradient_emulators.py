"""Correct gradients: FlashAttention-2's backward pass with what an implementation is free to choose drawn at random.

With the out and lse of a correct forward pass (`emulators.attend`), for each tile of queries and keys
(arXiv 2307.08691, alg. 2)

    p  = exp(s − lse)        rounded to `probability` as the factor of dout        δ = Σ dout·out
    ds = p (dout·v − δ)      rounded to `probability` as the factor of k and q; of the rounded p, or times scale
    dq += ds k, dk += dsᵀ q, dv += pᵀ dout in float32, times scale at the end, rounded once to `out`

Free are the tiles, their order (a ring's steps are such an order), the order of each sum, the base of exp.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.gradients.asked import DS
from cpjax.trial.emulators import PROFILES, Arithmetic, dtype_of, rounded
from cpjax.trial.problem import Problem, Result, visible
from cpjax.trial.summation import ORDERS, product


class Gradients(NamedTuple):
    """dq, dk and dv in global token order."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


@dataclass(frozen=True)
class Backward:
    """What a correct backward pass is free to choose."""

    query_tile: int = 64
    key_tile: int = 64
    seed: int = 0
    """Of the order of the tiles; 0 is ascending."""
    summation: str = "blas"
    base_two: bool = False
    ds: str = "plain"
    """As of `judge_gradients`."""


def drawn(rng: np.random.Generator) -> Backward:
    """Some backward pass."""
    rows, keys = (int(rng.choice([16, 32, 64, 128, 512])) for _ in range(2))
    summation = str(rng.choice(ORDERS, p=(0.8, 0.1, 0.1)))
    return Backward(rows, keys, int(rng.integers(4)), summation, bool(rng.random() < 0.5), str(rng.choice(DS)))


def differentiate(
    problem: Problem, arithmetic: Arithmetic, backward: Backward, given: Result, dout: Float[np.ndarray, "B T N V"]
) -> Gradients:
    """The gradients of the given out and lse, in the out format."""
    return stored(problem, arithmetic, sums(problem, arithmetic, backward, given, dout))


def stored(problem: Problem, arithmetic: Arithmetic, parts: Gradients) -> Gradients:
    """Multiplied with scale and rounded once."""
    scale = parts.dq.dtype.type(problem.scale)
    every = parts.dq * scale, parts.dk * scale, parts.dv
    return Gradients(*(x.astype(dtype_of(_name(arithmetic))) for x in every))


def sums(
    problem: Problem,
    arithmetic: Arithmetic,
    backward: Backward,
    given: Result,
    dout: Float[np.ndarray, "B T N V"],
    entering: Bool[np.ndarray, "N T S"] | None = None,
    *,
    is_masked: bool = True,
) -> Gradients:
    """What is added up, in the compute format, without scale.

    Args:
      entering: pairs that are computed at all; of a correct backward pass every one, None.
      is_masked: False is a fault: all keys are seen.
    """
    compute = np.dtype(arithmetic.compute)
    batch, length, heads, _ = problem.query.shape
    kv_heads, keys = problem.key.shape[2], problem.key.shape[1]
    grouped = (batch, length, kv_heads, heads // kv_heads)
    query, dout, out = (
        x.astype(compute).reshape(*grouped, -1).transpose(0, 2, 3, 1, 4) for x in (problem.query, dout, given.out)
    )
    key, value = (x.astype(compute).transpose(0, 2, 1, 3)[:, :, None] for x in (problem.key, problem.value))
    lse = np.where(np.isneginf(given.lse), 0, given.lse).astype(compute).reshape(grouped).transpose(0, 2, 3, 1)
    delta = (dout * out).sum(axis=-1)
    scale = compute.type(problem.scale)
    if entering is not None:
        entering = entering.reshape(kv_heads, heads // kv_heads, length, keys)
    dq = np.zeros_like(query)
    dk, dv = (np.zeros((batch, kv_heads, keys, x.shape[-1]), compute) for x in (key, value))
    rows = [slice(i, i + backward.query_tile) for i in range(0, length, backward.query_tile)]
    columns = [slice(i, i + backward.key_tile) for i in range(0, keys, backward.key_tile)]
    if backward.seed:
        order = np.random.default_rng(backward.seed)
        rows, columns = ([some[i] for i in order.permutation(len(some))] for some in (rows, columns))
    how = backward.summation
    for there in columns:
        seen = visible(problem, np.arange(keys)[there])[:, None, None]
        k, v = key[:, :, :, there], value[:, :, :, there]
        for here in rows:
            q, g = query[:, :, :, here], dout[:, :, :, here]
            raw = product(q, np.broadcast_to(k.swapaxes(-1, -2), (*q.shape[:3], k.shape[-1], k.shape[-2])), how)
            p = _exp(raw, scale, lse[:, :, :, here, None], backward.base_two)
            if is_masked:
                p = np.where(seen[:, :, :, here], p, 0).astype(compute)
            if entering is not None:
                p = np.where(entering[None, :, :, here, there], p, 0).astype(compute)
            dp = product(g, np.broadcast_to(v.swapaxes(-1, -2), (*g.shape[:3], v.shape[-1], v.shape[-2])), how)
            stored_p = rounded(p, arithmetic.probability)
            ds = (stored_p if backward.ds == "of_rounded_p" else p) * (dp - delta[:, :, :, here, None])
            if backward.ds == "scaled":
                # Not multiplied again by `stored`: a division by scale, in float32, is taken back there.
                ds = rounded(ds * scale, arithmetic.probability) / scale
            else:
                ds = rounded(ds, arithmetic.probability)
            p = stored_p
            dq[:, :, :, here] += product(ds, np.broadcast_to(k, (*ds.shape[:3], *k.shape[-2:])), how)
            for i in range(ds.shape[2]):
                dk[:, :, there] += product(ds[:, :, i].swapaxes(-1, -2), q[:, :, i], how)
                dv[:, :, there] += product(p[:, :, i].swapaxes(-1, -2), g[:, :, i], how)
    dq = dq.transpose(0, 3, 1, 2, 4).reshape(problem.query.shape)
    return Gradients(dq, *(x.transpose(0, 2, 1, 3) for x in (dk, dv)))


def _exp(raw: np.ndarray, scale: np.floating, lse: np.ndarray, base_two: bool) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        if base_two:
            two = raw.dtype.type(np.log2(np.e))
            return np.exp2(raw * (scale * two) - lse * two)
        return np.exp(raw * scale - lse)


def _name(arithmetic: Arithmetic) -> str:
    return next(name for name, one in PROFILES.items() if one.out == arithmetic.out)
