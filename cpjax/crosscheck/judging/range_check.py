"""The cheap check of every row, judged or not: finite, and between the least and the largest value that it may see."""

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.judging.problem import Problem
from cpjax.mask import PAD

GENEROUS = 2.0
"""All that rounding may add, times this: a sieve for garbage, not a test of precision (§9)."""

OTHER = 64
"""Roundings of the compute format beside one a key."""

STORED = 4
"""Least numbers a rank: two chunks are stored and merged."""


def rows_out_of_range(problem: Problem, out: np.ndarray, lse: np.ndarray | None) -> Bool[np.ndarray, "B T N"]:
    """Rows with a NaN, an infinity, or an output that is no average of visible values, rounding allowed for.

    Under a causal mask these are the values up to the query's position, otherwise all of its segment; a window is not
    taken into account, which only makes the range wider, nor is a bias of −inf. Rows that see nothing are (0, −inf);
    with a window, or such a bias, any may be. A sink is one more value, 0, that every row sees.
    """
    result = np.zeros(out.shape[:3], bool)
    hides = problem.mask.window is not None or (problem.bias is not None and bool(np.isneginf(problem.bias).any()))
    may_be_empty = hides and problem.sink is None
    for b, n in np.ndindex(out.shape[0], out.shape[2]):
        low, high, sees = _visible_range(problem, b, n // problem.group)
        if problem.sink is not None:
            low, high, sees = np.minimum(low, 0.0), np.maximum(high, 0.0), np.ones_like(sees)
        half_width = _relative(problem) * np.maximum(np.abs(low), np.abs(high))
        half_width += STORED * problem.cp * FORMATS[problem.precision.out].tiny + _flushed(problem)
        given = out[b, :, n].astype(np.float64)
        inside = (given >= low - half_width) & (given <= high + half_width) & np.isfinite(given)
        empty = (given == 0).all(axis=1)
        right = np.where(sees, inside.all(axis=1), empty)
        if lse is not None:
            unseen = np.isneginf(lse[b, :, n])
            right &= np.where(sees, np.isfinite(lse[b, :, n]), unseen)
            empty &= unseen
        result[b, :, n] = ~(right | empty) if may_be_empty else ~right
    return result


def _relative(problem: Problem) -> float:
    """What rounding may add, relative to the largest value: weights that do not sum to one, outputs, merges."""
    p, out = FORMATS[problem.precision.probability], FORMATS[problem.precision.out]
    keys = problem.key.shape[1]
    compute = FORMATS[problem.precision.compute].u * (keys + OTHER)
    return GENEROUS * (p.u + p.tiny * keys + (2 * problem.cp + 2) * out.u + compute)


def _flushed(problem: Problem) -> float:
    """The most that becomes 0 where a processor has no numbers below the least normal one; FP16 keeps its own."""
    out, compute = FORMATS[problem.precision.out], FORMATS[problem.precision.compute]
    return out.least_normal if out.least_normal == compute.least_normal else 0.0


def _visible_range(
    problem: Problem, b: int, k: int
) -> tuple[Float[np.ndarray, "T V"], Float[np.ndarray, "T V"], Bool[np.ndarray, " T"]]:
    """Per query the least and the largest visible value, and whether it sees anything."""
    q_position, q_segment = (np.asarray(x)[b].astype(np.int64) for x in problem.q_tokens)
    kv_position, kv_segment = (np.asarray(x)[b].astype(np.int64) for x in problem.kv_tokens)
    value = problem.value[b, :, k].astype(np.float64)
    low, high = np.zeros((len(q_position), value.shape[1])), np.zeros((len(q_position), value.shape[1]))
    sees = np.zeros(len(q_position), bool)
    for segment in np.unique(q_segment[q_segment != PAD]):
        keys = np.flatnonzero(kv_segment == segment)
        queries = np.flatnonzero(q_segment == segment)
        if len(keys) == 0:
            continue
        keys = keys[np.argsort(kv_position[keys], kind="stable")]
        if problem.mask.is_causal:
            last = np.searchsorted(kv_position[keys], q_position[queries], side="right") - 1
        else:
            last = np.full(len(queries), len(keys) - 1)
        seeing = queries[last >= 0]
        last = last[last >= 0]
        low[seeing] = np.minimum.accumulate(value[keys])[last]
        high[seeing] = np.maximum.accumulate(value[keys])[last]
        sees[seeing] = True
    return low, high, sees
