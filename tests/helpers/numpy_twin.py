"""The staged arithmetic of attention in tiles once more, in NumPy, from docs/precision.md; imports nothing of cpjax.

IEEE 754 fixes +, −, ×, ÷ and the casts, so these are NumPy's. It does not fix exp, log and tanh: those are XLA's own,
called one by one. Two freedoms that XLA takes with float32 are variants here, and either is right: a·b + c may be
rounded once (fma), and x / l, the same l for a whole row, may be computed as x · (1 / l). It takes them element by
element: of three columns, two may share a vector that has an fma, and the third not, on some processors.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

FORMAT = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class Stages(NamedTuple):
    """The format after each stage; everything else is float32."""

    score: str
    probability: str
    out: str
    carry: str
    lse: str
    query: str = ""
    total: str = "float32"


PROFILES = {
    "flash_fp16": Stages("float32", "float16", "float16", "float16", "float32"),
    "ring_mla_fp16": Stages("float16", "float16", "float16", "float16", "float32"),
    "decode_fp16_lse": Stages("float32", "float16", "float16", "float32", "float16"),
    "flash_bf16": Stages("float32", "bfloat16", "bfloat16", "bfloat16", "float32"),
}
for short, fmt in (("fp16", "float16"), ("bf16", "bfloat16")):
    PROFILES[f"fia_{short}"] = Stages("float32", fmt, fmt, "float32", "float32")
    PROFILES[f"rounded_sum_{short}"] = Stages("float32", fmt, fmt, fmt, "float32", total=fmt)
    PROFILES[f"scaled_query_{short}"] = Stages("float32", fmt, fmt, fmt, "float32", query=fmt)


class Variant(NamedTuple):
    """`fused`: acc·r + p·v is rounded once, `summed`: l·r + Σ p. `merged`: which product of a merge is not rounded."""

    fused: bool = True
    summed: bool = True
    merged: str = "a"
    reciprocal: bool = True


VARIANTS = [Variant(*v) for v in itertools.product((True, False), (True, False), ("a", "b", ""), (True, False))]


def one_of(found, make: Callable[[Variant], Sequence[np.ndarray]]) -> bool:
    """Whether each element of each array is, bit for bit, what one of the variants makes of it."""
    found = [np.asarray(x) for x in found]
    right = [np.zeros(x.shape, bool) for x in found]
    for variant in VARIANTS:
        right = [r | _same_bits(x, y) for r, x, y in zip(right, found, make(variant), strict=True)]
        if all(r.all() for r in right):
            return True
    return False


def _same_bits(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Element by element; 0 and −0 are the same, and so are two NaN."""
    assert x.shape == y.shape, (x.shape, y.shape)
    return (x == y) | (np.isnan(x) & np.isnan(y))


def to(x: np.ndarray, fmt: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(FORMAT[fmt]).astype(np.float32)


def _elementary(function):
    compiled = jax.jit(function)
    return lambda x: np.asarray(compiled(np.asarray(x, np.float32)))


exp, log, tanh = (_elementary(f) for f in (jnp.exp, jnp.log, jnp.tanh))


def times_plus(a, b, c, fused: bool) -> np.ndarray:
    """a·b + c in float32. The product of two float32 is exact in float64."""
    if fused:
        return (np.float64(1) * a * b + c).astype(np.float32)
    return (np.float32(1) * a * b).astype(np.float32) + c


def scores(query, key, seen, scale, softcap, stages: Stages, v: Variant) -> np.ndarray:
    """`[T, S]` for one head; q·k must be exact in float32."""
    if stages.query:
        query, scale = to(query.astype(np.float32) * np.float32(scale), stages.query), 1.0
    raw = to(query.astype(np.float64) @ key.astype(np.float64).T, stages.score)
    scaled = to(raw * to(np.float32(scale), stages.score), stages.score)
    if softcap is not None:
        cap = np.float32(softcap)
        inside = scaled * (np.float32(1) / cap) if v.reciprocal else scaled / cap
        scaled = to(cap * tanh(inside), stages.score)
    return np.where(seen, scaled, np.float32(-np.inf))


def finite(m):
    return np.where(np.isneginf(m), np.float32(0), m)


def accumulate(state, score, value, stages: Stages, v: Variant):
    """(m, l, acc) after one more tile of at most two keys, whose sums have one rounding."""
    m, total, acc = state
    top = np.maximum(m, score.max(axis=-1))
    base = finite(top)
    with np.errstate(invalid="ignore"):
        p = exp(to(score - base[:, None], stages.score))
        rescale = exp(to(m - base, stages.score))
    mean = (to(p, stages.probability).astype(np.float64) @ value.astype(np.float64)).astype(np.float32)
    summed = to(p, stages.total).astype(np.float64).sum(axis=-1).astype(np.float32)
    return (
        top,
        times_plus(total, rescale, summed, v.summed),
        times_plus(acc, rescale[:, None], mean, v.fused),
    )


def finish(state, stages: Stages, v: Variant):
    """(out, lse) of a block."""
    m, total, acc = state
    out = to(divided(acc, total, v), stages.out)
    lse = np.where(total == 0, np.float32(-np.inf), finite(m) + log(np.where(total == 0, np.float32(1), total)))
    return out, to(lse, stages.lse)


def divided(x, total, v: Variant) -> np.ndarray:
    """x / l by rows, 0 where l is 0."""
    safe = np.where(total == 0, np.float32(1), total)[:, None]
    return x * (np.float32(1) / safe) if v.reciprocal else x / safe


def merge(a, b, stages: Stages, v: Variant):
    """(out, lse) of both."""
    m = finite(np.maximum(a[1], b[1]))
    wa, wb = exp(a[1] - m), exp(b[1] - m)
    total = wa + wb
    first, second = (wa[:, None], a[0]), (wb[:, None], b[0])
    if v.merged == "a":
        out = times_plus(*first, second[0] * second[1], fused=True)
    else:
        out = times_plus(*second, first[0] * first[1], fused=v.merged == "b")
    lse = np.where(total == 0, np.float32(-np.inf), m + log(np.where(total == 0, np.float32(1), total)))
    return to(divided(out, total, v), stages.carry), lse


def attend(query, key, value, seen, scale, softcap, stages: Stages, tile: int, v: Variant):
    """One head, one block, tile after tile."""
    rows = len(query)
    state = (np.full(rows, -np.inf, np.float32), np.zeros(rows, np.float32))
    state = (*state, np.zeros((rows, value.shape[1]), np.float32))
    for start in range(0, len(key), tile):
        part = slice(start, start + tile)
        score = scores(query, key[part], seen[:, part], scale, softcap, stages, v)
        state = accumulate(state, score, value[part], stages, v)
    return finish(state, stages, v)
