"""Attention in plain NumPy, one array a head, in which anything may be changed: what `reported_faults` breaks.

    s_c   = scale · q·k (or (scale · q)·k), softcap, − slope · distance, + bias   rounded to `score`, of part c of keys
    out_c = Σ w e^(s − m) v / Σ w e^(s − m)                       e^… rounded to `probability`, out_c to `block`
    lse_c = m + ln Σ w e^(s − m)

and the parts are merged one after the other, rounded to `carry`. Nothing here is imported from the judge.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.trial.emulators import Arithmetic, rounded, visits
from cpjax.trial.problem import Problem, Result, places, visible

F = np.float32
Function = Callable[[np.ndarray], np.ndarray]


class Join(NamedTuple):
    """How parts are merged: by which exponential and logarithm, the factor on their lse before that, and whether what
    is there already is scaled down."""

    exp: Function = np.exp
    log: Function = np.log
    factor: float = 1.0
    rescales: bool = True


RIGHT_JOIN = Join()


@dataclass(frozen=True)
class Work:
    """What a kernel computes with. Keys and values stand once for each query head, so that each may have its own."""

    query: Float[np.ndarray, "B T N H"]
    key: Float[np.ndarray, "B S N H"]
    value: Float[np.ndarray, "B S N V"]
    seen: Bool[np.ndarray, "B T S"]
    distance: Float[np.ndarray, "B T S"]
    part: Int[np.ndarray, " S"]
    """Number of the part in which each key is."""
    order: Int[np.ndarray, "T M"]
    """The parts as each query meets them."""
    scale: float
    arithmetic: Arithmetic
    weight: Float[np.ndarray, " S"] | None = None
    """How often each key counts; None is once."""
    softcap: float | None = None
    sink: Float[np.ndarray, " N"] | None = None
    alibi: Float[np.ndarray, "B N"] | None = None
    bias: Float[np.ndarray, "B N T S"] | None = None
    join: Join = RIGHT_JOIN
    accumulator: str = "float32"
    """Format of the running sum of e^… v, which takes eight keys at a time."""


def work_of(problem: Problem, arithmetic: Arithmetic, order: str) -> Work:
    """What a correct kernel would compute with."""
    keys, heads = problem.key.shape[1], problem.query.shape[2]
    group = heads // problem.key.shape[2]
    here, there = places(problem)
    size = -(-keys // problem.chunk_count)
    bias = problem.bias
    if bias is not None:
        bias = np.broadcast_to(bias, (len(problem.key), heads, problem.query.shape[1], keys))
    return Work(
        query=problem.query.astype(F),
        key=np.repeat(problem.key.astype(F), group, axis=2),
        value=np.repeat(problem.value.astype(F), group, axis=2),
        seen=visible(problem, np.arange(keys)),
        distance=np.abs(here[:, :, None] - there[:, None]).astype(F),
        part=np.arange(keys) // size,
        order=visits(problem, order),
        scale=problem.scale,
        arithmetic=arithmetic,
        softcap=problem.softcap,
        sink=problem.sink,
        alibi=problem.alibi,
        bias=bias,
    )


def attend(work: Work) -> Result:
    """What it computes, in the dtypes in which a result is handed over."""
    parts = [partial(work, work.part == number) for number in range(int(work.part.max()) + 1)]
    order = work.order
    if work.sink is not None:
        lse = np.broadcast_to(work.sink.astype(F), parts[0].lse.shape)
        parts.append(Result(np.zeros_like(parts[0].out), lse))
        order = np.concatenate([order, np.full((len(order), 1), len(parts) - 1)], axis=1)
    outs, lses = np.stack([part.out for part in parts]), np.stack([part.lse for part in parts])
    lses, row = (lses * F(work.join.factor)).astype(F), np.arange(order.shape[0])
    so_far: Result | None = None
    for number in order.T:
        block = Result(outs[number, :, row], lses[number, :, row])  # [T, B, N, V], [T, B, N]
        so_far = block if so_far is None else merged(so_far, block, work)
    assert so_far is not None  # there is at least one part
    return handed_over(so_far.out.swapaxes(0, 1), so_far.lse.swapaxes(0, 1), work)


def handed_over(out: np.ndarray, lse: np.ndarray, work: Work) -> Result:
    """In the dtypes of a result."""
    import ml_dtypes

    dtype = ml_dtypes.bfloat16 if work.arithmetic.out == "bfloat16" else np.dtype(work.arithmetic.out)
    with np.errstate(over="ignore", invalid="ignore"):
        return Result(out.astype(dtype), lse.astype(F))


def scores(work: Work) -> Float[np.ndarray, "B N T S"]:
    """The logits, before the mask."""
    how, scale, query = work.arithmetic, np.asarray(work.scale, F), work.query
    fmt = how.score
    if how.query:  # scale · q is a tensor of its own
        scale, query = np.asarray(1, F), rounded(query * scale, how.query)
    s = rounded(np.einsum("btnh,bsnh->bnts", query, work.key), fmt)
    s = rounded(s * rounded(scale, how.scale or fmt), fmt)
    if work.softcap is not None:
        s = rounded(F(work.softcap) * np.tanh(s / F(work.softcap)), fmt)
    if work.alibi is not None:
        s = rounded(s - work.alibi.astype(F)[:, :, None, None] * work.distance[:, None], fmt)
    return s if work.bias is None else rounded(s + work.bias.astype(F), fmt)


def partial(work: Work, keys: Bool[np.ndarray, " S"]) -> Result:
    """out and lse over these keys alone, `[B, T, N, …]`; a row that sees none of them has 0 and −inf."""
    how, weight = work.arithmetic, np.ones(len(keys), F) if work.weight is None else work.weight.astype(F)
    s = np.where((work.seen & keys & (weight > 0))[:, None], scores(work), F(-np.inf))
    m = s.max(axis=-1, keepdims=True)
    m = np.where(np.isneginf(m), F(0), m)
    p = np.exp(rounded(s - m, how.score))
    total = (p * weight).sum(axis=-1)
    out = _summed(rounded(p, how.probability) * weight, work)
    out = out / np.where(total == 0, F(1), total).swapaxes(1, 2)[..., None]
    with np.errstate(divide="ignore"):  # a row that sees nothing: −inf is meant
        lse = m[..., 0] + np.log(total)
    return Result(rounded(out, how.block or how.carry), lse.swapaxes(1, 2))


def _summed(p: np.ndarray, work: Work) -> Float[np.ndarray, "B T N V"]:
    if work.accumulator == "float32":
        return np.einsum("bnts,bsnv->btnv", p, work.value)
    so_far = np.zeros((*p.shape[:1], p.shape[2], p.shape[1], work.value.shape[3]), F)
    for first in range(0, p.shape[3], 8):
        eight = slice(first, first + 8)
        so_far = rounded(so_far + np.einsum("bnts,bsnv->btnv", p[..., eight], work.value[:, eight]), work.accumulator)
    return so_far


def merged(a: Result, b: Result, work: Work) -> Result:
    """Two partial results in one."""
    top = np.maximum(a.lse, b.lse)
    top = np.where(np.isneginf(top), F(0), top)
    weights = [work.join.exp(x.lse - top) for x in (a, b)]
    total = weights[0] + weights[1]
    with np.errstate(divide="ignore"):
        lse = top + work.join.log(total)
    of_a, of_b = (weight / np.where(total == 0, F(1), total) for weight in weights)
    of_a = of_a if work.join.rescales else np.ones_like(of_a)
    return Result(rounded(of_a[..., None] * a.out + of_b[..., None] * b.out, work.arithmetic.carry), lse)
