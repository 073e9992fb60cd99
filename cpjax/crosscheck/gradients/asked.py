"""What is asked: the inputs of attention's backward pass, checked.

A backward kernel is given `out` and `lse` of its forward pass. They are taken as they are: δ = Σᵥ dout·out and
p = exp(s − lse) are computed of the given numbers, so an error of the forward pass is no error of the backward pass.
What is not given is computed here, exactly, and then σ has what rounding may have done to it (docs/gradients.md §1).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.arrays import as_array
from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.crosscheck.judging.problem import Problem
from cpjax.errors import InputError
from cpjax.mask import PAD, Tokens, visible

KNOWN = ("float64", "float32", "flash_fp16", "flash_bf16")
"""Profiles whose backward pass is modelled."""

DS = ("plain", "of_rounded_p", "scaled")
"""How ds is made before it is rounded: p (dp − δ); the same of the p that is rounded for dv; times scale (§2)."""

OVER_RANKS = ("float32", "out")
"""In which format the parts of pairs of chunks, each rounded to the out format, are added up: float32, or that one."""

QUERY_TILE, KEY_TILE = 256, 512
"""Queries and keys that are looked at together: memory only."""


@dataclass(frozen=True)
class Asked:
    """All float64, in global token order; pads have dout 0."""

    problem: Problem
    dout: Float[np.ndarray, "B T N V"]
    out: Float[np.ndarray, "B T N V"]
    lse: Float[np.ndarray, "B T N"]
    """Finite; 0 where nothing is seen."""
    has_out: bool
    """Whether out was given; if not it is exact, and the kernel had a rounded one."""
    out_variance: Float[np.ndarray, "B T N V"] | float = 0.0
    """Of the out that the kernel had, if it was not given."""
    out_bound: Float[np.ndarray, "B T N V"] | float = 0.0
    """The most that it was off."""
    ds: str = "plain"
    """One of `DS`."""
    rounded_every: int | None = None
    """dk and dv are kept in the out format, and rounded after each so many queries of a head; None: once."""
    over_ranks: str | None = None
    """One of `OVER_RANKS`; None: no part is rounded by itself."""

    @cached_property
    def rank_of(self) -> Int[np.ndarray, " C"]:
        """The rank that holds each chunk; −1 where every rank reads it."""
        p = self.problem
        every = (p.partition.rank(chunk) for chunk in range(1 + max(p.q_chunk.max(), p.kv_chunk.max())))
        return np.array([-1 if rank is None else rank for rank in every])

    @cached_property
    def delta(self) -> Float[np.ndarray, "B T N"]:
        """Σᵥ dout·out."""
        return np.einsum("btnv,btnv->btn", self.dout, self.out)

    @property
    def fmt(self) -> Format:
        """The format of the gradients."""
        return FORMATS[self.problem.precision.out]

    @cached_property
    def keys_seen(self) -> Int[np.ndarray, "B T"]:
        """How many keys each query sees."""
        return self._counts[0]

    @cached_property
    def queries_seen(self) -> Int[np.ndarray, "B S"]:
        """How many queries see each key; each head of its group counts."""
        return self._counts[1] * self.problem.group

    @cached_property
    def _counts(self) -> tuple[np.ndarray, np.ndarray]:
        p = self.problem
        of_query, of_key = (np.zeros(x.shape[:2], np.int64) for x in (p.query, p.key))
        for b, rows, keys in places(p):
            seen = seen_in(p, b, rows, keys)
            of_query[b, rows] += seen.sum(axis=1)
            of_key[b, keys] += seen.sum(axis=0)
        return of_query, of_key


def places(problem: Problem) -> Iterator[tuple[int, slice, slice]]:
    """Batch row, queries and keys of each tile."""
    (batch, length), keys = problem.query.shape[:2], problem.key.shape[1]
    rows = [slice(i, min(i + QUERY_TILE, length)) for i in range(0, length, QUERY_TILE)]
    columns = [slice(i, min(i + KEY_TILE, keys)) for i in range(0, keys, KEY_TILE)]
    yield from product(range(batch), rows, columns)


def seen_in(problem: Problem, b: int, rows: slice, keys: slice, *, masked: bool = True) -> Bool[np.ndarray, "R S"]:
    """Who sees whom in a tile; not `masked`: segments alone."""
    q, kv = (
        Tokens(*(np.asarray(x)[b : b + 1, at] for x in t))
        for t, at in ((problem.q_tokens, rows), (problem.kv_tokens, keys))
    )
    mask = problem.mask if masked else type(problem.mask)(is_causal=False)
    return np.asarray(visible(mask, q, kv))[0]


def asked_of(
    problem: Problem,
    out: Any,
    lse: Any,
    dout: Any,
    rounded_every: int | None = None,
    ds: str = "plain",
    over_ranks: str | None = None,
) -> Asked:
    """The inputs of the backward pass, checked; out and lse may be None, the rest is of `judge_gradients`.

    Raises:
      InputError: a profile, softcap, ALiBi or bias that is not modelled; wrong shapes; NaN where it counts.
    """
    if ds not in DS:
        raise InputError(f"ds is {ds!r:.60}; it must be one of {', '.join(DS)}")
    if problem.precision.name not in KNOWN:
        raise InputError(
            f"precision {problem.precision.name!r} has no model of its backward pass; name one of {', '.join(KNOWN)}"
        )
    for name in ("softcap", "alibi", "bias"):
        if getattr(problem, name) is not None:
            raise InputError(f"{name} is given; gradients are judged without it: leave it out")
    if rounded_every is not None and not (type(rounded_every) is int and rounded_every > 0):
        raise InputError(f"rounded_every is {rounded_every!r:.60}; it must be a number of queries, at least 1, or None")
    if over_ranks not in (None, *OVER_RANKS):
        raise InputError(f"over_ranks is {over_ranks!r:.60}; it must be {' or '.join(OVER_RANKS)}, or None")
    if over_ranks is not None and problem.partition.cp < 2:
        raise InputError("over_ranks says how parts of several ranks are added up; give cp, at least 2, with it")
    batch, length, heads, _ = problem.query.shape
    shape = (batch, length, heads, problem.value.shape[3])
    real = np.asarray(problem.q_tokens.segment) != PAD
    dout = _input("dout", dout, shape, real)
    out = None if out is None else _input("out", out, shape, real)
    if lse is not None:
        lse = checked_array("lse", lse, shape[:3]).astype(np.float64)
    plain = Asked(problem, dout, np.zeros(shape), np.zeros(shape[:3]), has_out=out is not None)
    sees = (plain.keys_seen > 0)[..., None]
    if lse is not None:
        if not np.isfinite(np.where(sees, lse, 0.0)).all():
            raise InputError("lse is not finite in a row that sees a key; give the lse of the forward pass")
        lse = np.where(sees, lse, 0.0)
    how = {"ds": ds, "rounded_every": rounded_every, "over_ranks": over_ranks}
    if lse is not None and out is not None:
        return Asked(problem, dout, out, lse, has_out=True, **how)
    found, exact, variance, bound = _forward(problem, lse)
    if out is not None:
        return Asked(problem, dout, out, found, has_out=True, **how)
    return Asked(problem, dout, exact, found, False, variance, bound, **how)


def checked_array(name: str, x: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of this shape in a dtype that the judge knows, as it is.

    Raises:
      InputError: another shape or dtype.
    """
    array = as_array(x, name)
    if array.dtype.name not in FORMATS:
        raise InputError(f"{name} has dtype {array.dtype}; it must be one of {', '.join(FORMATS)}")
    if array.shape != shape:
        raise InputError(f"{name} has shape {array.shape}; it must be {shape}")
    return array


def _input(name: str, x: Any, shape: tuple[int, ...], real: Bool[np.ndarray, "B T"]) -> np.ndarray:
    array = np.where(real[..., None, None], checked_array(name, x, shape).astype(np.float64), 0.0)
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds a NaN or an infinity in a token that is no pad; the gradient is then none")
    return array


RELATIVE = 0.18
"""Mean of ulp² / 12 over a binade, in units of (u x)²: 2.16 / 12 for logarithmically uniform significands (§2)."""


def _forward(
    p: Problem, lse: Float[np.ndarray, "B T N"] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """lse if it is None, out, and of the out that a kernel rounds its variance and the most that it is off."""
    shape = (*p.query.shape[:3], p.value.shape[3])
    if lse is None:
        lse = np.full(shape[:3], -np.inf if p.sink is None else p.sink, np.float64)
        for b, rows, keys in places(p):
            seen = seen_in(p, b, rows, keys)
            if not seen.any():
                continue
            for n in range(shape[2]):
                s = np.where(seen, p.scale * _rows(p, b, rows, n) @ _keys(p.key, b, keys, n // p.group).T, -np.inf)
                lse[b, rows, n] = np.logaddexp(lse[b, rows, n], np.logaddexp.reduce(s, axis=1))
        lse = np.where(np.isneginf(lse), 0.0, lse)
    out, square, size = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for b, rows, keys in places(p):
        seen = seen_in(p, b, rows, keys)
        if not seen.any():
            continue
        for n in range(shape[2]):
            s = p.scale * _rows(p, b, rows, n) @ _keys(p.key, b, keys, n // p.group).T
            weight = np.exp(np.where(seen, s - lse[b, rows, n][:, None], -np.inf))
            value = _keys(p.value, b, keys, n // p.group)
            out[b, rows, n] += weight @ value
            square[b, rows, n] += weight**2 @ value**2
            size[b, rows, n] += weight @ np.abs(value)
    stored, weights = FORMATS[p.precision.out], FORMATS[p.precision.probability]
    spacing = stored.spacing(out)
    variance = spacing**2 / 12 + RELATIVE * weights.u**2 * square
    return lse, out, variance, spacing + 2 * (weights.u + FORMATS[p.precision.compute].u * p.key.shape[1]) * size


def _rows(p: Problem, b: int, rows: slice, n: int) -> Float[np.ndarray, "R H"]:
    return p.query[b, rows, n].astype(np.float64)


def _keys(x: np.ndarray, b: int, keys: slice, k: int) -> Float[np.ndarray, "S D"]:
    return x[b, keys, k].astype(np.float64)
