"""Wrong results, made by calling the same kernel wrongly: what a broken caller or launch would hand over.

`call` gives out `[B, T, N, V]` and lse `[B, T, N]` (or None) of a problem that is causal with as many queries as keys,
or has no mask. Each fault says which words of the diagnosis name it.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cpjax.trial.problem import Problem

Given = tuple[np.ndarray, np.ndarray | None]
Call = Callable[[Problem], Given]
BLOCK = slice(256, 320)


def block_lost(call: Call, problem: Problem) -> Given:
    """64 keys never enter. Under a causal mask the queries among them see what is before the block."""
    start, stop, keys = BLOCK.start, BLOCK.stop, problem.key.shape[1]
    rest = np.r_[0:start, stop:keys]
    without = replace(problem, key=problem.key[:, rest], value=problem.value[:, rest])
    if not problem.is_causal:
        return call(without)
    outside = call(replace(without, query=problem.query[:, rest]))
    before = {name: getattr(problem, name)[:, :start] for name in ("key", "value")}
    inside = call(replace(problem, query=problem.query[:, BLOCK], is_causal=False, **before))
    order = np.argsort(np.r_[rest, start:stop])
    out, lse = (
        None if a is None or b is None else np.concatenate([a, b], axis=1)[:, order]
        for a, b in zip(outside, inside, strict=True)
    )
    assert out is not None
    return out, lse


def causal_off_by_one(call: Call, problem: Problem) -> Given:
    """Each query sees the next token: queries are one place further on than the mask takes them to be."""
    out, lse = (None if x is None else x.copy() for x in call(problem))
    late = np.roll(problem.query, 1, axis=1)
    wrong = call(replace(problem, query=late))
    assert out is not None
    out[:, :-1] = wrong[0][:, 1:]
    if lse is not None and wrong[1] is not None:
        lse[:, :-1] = wrong[1][:, 1:]
    return out, lse


def scale_off(call: Call, problem: Problem) -> Given:
    """The scale is 1 % too large."""
    return call(replace(problem, scale=problem.scale * 1.01))


def lse_in_log2(call: Call, problem: Problem) -> Given:
    """lse is left in base two."""
    out, lse = call(problem)
    return out, None if lse is None else (lse / np.log(2)).astype(lse.dtype)


def row_stale(call: Call, problem: Problem) -> Given:
    """One row of one head, out and lse, is that of an earlier call with other keys and values."""
    out, lse = (None if x is None else x.copy() for x in call(problem))
    old = call(replace(problem, key=-problem.key, value=problem.value[:, ::-1]))
    row = problem.query.shape[1] // 2
    assert out is not None
    out[0, row, 0] = old[0][0, row, 0]
    if lse is not None and old[1] is not None:
        lse[0, row, 0] = old[1][0, row, 0]
    return out, lse


class Fault(NamedTuple):
    """How to plant it, a pattern that names it, and whether it needs lse or a causal mask to be one."""

    plant: Callable[[Call, Problem], Given]
    named: str
    needs_lse: bool = False
    needs_causal: bool = False


FAULTS: dict[str, Fault] = {
    "64 keys lost": Fault(block_lost, rf"keys {BLOCK.start} to {BLOCK.stop - 1} were lost"),
    "causal mask +1": Fault(causal_off_by_one, r"causal mask is shifted by \+1", needs_causal=True),
    "scale × 1.01": Fault(scale_off, r"the scale is 1\.0(1|09|10)\d* times"),
    "lse in base two": Fault(lse_in_log2, r"logarithm to base two", needs_lse=True),
    "one row stale": Fault(row_stale, r"position 512\b"),
}
NONE = "none"
"""No fault: the correct result beside the wrong ones."""


def is_named(fault: str, diagnosis: list[str]) -> bool:
    """Whether some sentence names the fault, and where or how large it is."""
    return fault in FAULTS and any(re.search(FAULTS[fault].named, one) for one in diagnosis)
