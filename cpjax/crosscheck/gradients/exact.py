"""Exact gradients in float64, by tiles: nothing as large as queries × keys is ever kept.

s = scale q·k        p = exp(s − lse)        δ = Σᵥ dout·out        ds = p (dout·v − δ)      (arXiv 2307.08691, alg. 2)
dq = scale ds k      dk = scale dsᵀ q        dv = pᵀ dout           dk and dv summed over the heads of a group

`Variant` says what is left out or changed: exact results of faulty kernels, against which a wrong result is held.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.gradients.asked import Asked, places, seen_in


class Gradients(NamedTuple):
    """dq `[B, T, N, H]`, dk `[B, S, K, H]`, dv `[B, S, K, V]`."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


NAMES = Gradients._fields


@dataclass(frozen=True, eq=False)
class Variant:
    """What a faulty kernel does; as it stands, nothing is wrong."""

    has_delta: bool = True
    lse_shift: int = 0
    """Head n takes the lse of head n + lse_shift, around the end."""
    is_masked: bool = True
    heads: tuple[int, ...] | None = None
    """Only these are in the sums; None is all."""
    lost_queries: Bool[np.ndarray, " T"] | None = None
    """Pairs of these queries, the lost keys and the lost heads are left out."""
    lost_keys: Bool[np.ndarray, " S"] | None = None
    lost_heads: tuple[int, ...] = ()


RIGHT = Variant()


class Tile(NamedTuple):
    """Some queries and keys of one head; hidden pairs have p = ds = 0."""

    batch: int
    head: int
    kv_head: int
    rows: slice
    keys: slice
    query: Float[np.ndarray, "R H"]
    key: Float[np.ndarray, "S H"]
    value: Float[np.ndarray, "S V"]
    dout: Float[np.ndarray, "R V"]
    seen: Bool[np.ndarray, "R S"]
    score: Float[np.ndarray, "R S"]
    below: Float[np.ndarray, "R S"]
    """s − lse; 0 where hidden."""
    p: Float[np.ndarray, "R S"]
    per_p: Float[np.ndarray, "R S"]
    """dp − δ: ds is p times this."""
    ds: Float[np.ndarray, "R S"]


def tiles(asked: Asked, variant: Variant = RIGHT) -> Iterator[Tile]:
    """Every tile in which somebody sees something, head after head."""
    problem = asked.problem
    heads = range(problem.query.shape[2])
    for b, rows, keys in places(problem):
        seen = seen_in(problem, b, rows, keys, masked=variant.is_masked)
        if not seen.any():
            continue
        everything = seen
        for n in heads if variant.heads is None else variant.heads:
            seen = everything
            if n in variant.lost_heads:
                assert variant.lost_queries is not None
                assert variant.lost_keys is not None
                seen = seen & ~(variant.lost_queries[rows, None] & variant.lost_keys[keys])
            k = n // problem.group
            query, dout = problem.query[b, rows, n].astype(np.float64), asked.dout[b, rows, n]
            key, value = (x[b, keys, k].astype(np.float64) for x in (problem.key, problem.value))
            score = np.where(seen, problem.scale * (query @ key.T), 0.0)
            lse = asked.lse[b, rows, (n + variant.lse_shift) % len(heads)]
            below = np.where(seen, score - lse[:, None], 0.0)
            with np.errstate(over="ignore"):  # of faulty variants only
                p = np.where(seen, np.exp(below), 0.0)
            delta = asked.delta[b, rows, n][:, None] if variant.has_delta else 0.0
            per_p = dout @ value.T - delta
            yield Tile(b, n, k, rows, keys, query, key, value, dout, seen, score, below, p, per_p, p * per_p)


def exact_gradients(asked: Asked, variant: Variant = RIGHT) -> Gradients:
    """The gradients of the given out and lse, or of a variant."""
    problem = asked.problem
    dq, dk, dv = (np.zeros(x.shape) for x in (problem.query, problem.key, problem.value))
    with np.errstate(invalid="ignore", over="ignore"):
        for t in tiles(asked, variant):
            dq[t.batch, t.rows, t.head] += problem.scale * (t.ds @ t.key)
            dk[t.batch, t.keys, t.kv_head] += problem.scale * (t.ds.T @ t.query)
            dv[t.batch, t.keys, t.kv_head] += t.p.T @ t.dout
    return Gradients(dq, dk, dv)
