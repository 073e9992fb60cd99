"""Correct results of foreign kernels: how often does the judge say "wrong", told what an honest user would say?

That is query, key, value, out, lse if there is one, scale, mask, and that the keys are one chunk; the precision only if
the kernel's authors name one. Result `number` of a seed is always the same problem, kernel and dtype. Kinds of data are
those of the tuning set, with random streams of their own; where some row sees no key, all keys are shown to it, because
kernels disagree about such rows.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from cpjax.crosscheck import judge
from cpjax.crosscheck.run.workers import each
from cpjax.trial.foreign_kernels import KERNELS, Kernel, cases, seen_by
from cpjax.trial.kinds import TUNING
from cpjax.trial.problem import Problem

STREAM = 3
"""The number that keeps these random streams apart from those of `false_alarms.SETS`."""


class Outcome(NamedTuple):
    """What the judge said of one result."""

    number: int
    kernel: str
    dtype: str
    precision: str
    kind: str
    keys: int
    passed: bool
    judgeable: bool
    hard_ratio: float
    z: float
    lse_z: float
    scale_z_score: float
    failed_tests: tuple[str, ...]


def posed(rng: np.random.Generator, kind: str, dtype: str, kernel: Kernel) -> Problem:
    """A problem of one chunk whose rows all see a key, and that the kernel takes."""
    problem = TUNING[kind](rng)
    width, value = problem.query.shape[3], problem.value
    if kernel.one_head_dim:
        problem = replace(problem, value=value[..., np.arange(width) % value.shape[3]])
    if kernel.is_plain:
        length = min(problem.query.shape[1], problem.key.shape[1])
        group = problem.query.shape[2] // problem.key.shape[2]
        key, value = (np.repeat(x[:, :length], group, axis=2) for x in (problem.key, problem.value))
        is_causal = bool(rng.random() < 0.5)
        problem = Problem(problem.query[:, :length], key, value, width**-0.5, is_causal=is_causal)
    problem = replace(problem.cast(dtype), cp=1)
    if not seen_by(problem).any(axis=2).all():
        open_to_all = {"is_causal": False, "window": None, "segments": None, "q_positions": None, "kv_positions": None}
        problem = replace(problem, **open_to_all)
    return problem


def outcome(seed: int, number: int) -> Outcome:
    """Make one result and have it judged."""
    some = list(cases())
    name, dtype = some[number % len(some)]
    kind = list(TUNING)[number // len(some) % len(TUNING)]
    rng = np.random.default_rng([STREAM, seed, number])
    kernel = KERNELS[name]
    problem = posed(rng, kind, dtype, kernel)
    out, lse = kernel.compute(problem, rng)
    precision = kernel.precision(dtype)
    question = {**problem.judge_arguments(), "layout": "contiguous", "precision": precision}
    verdict = judge(problem.query, problem.key, problem.value, out, lse, **question)
    return Outcome(
        number=number,
        kernel=name,
        dtype=dtype,
        precision=verdict.precision,
        kind=kind,
        keys=problem.key.shape[1],
        passed=verdict.passed,
        judgeable=verdict.judgeable,
        hard_ratio=verdict.hard_ratio,
        z=verdict.z,
        lse_z=verdict.lse_z,
        scale_z_score=abs(verdict.scale_z_score),
        failed_tests=verdict.failed_tests,
    )


def outcomes(seed: int, count: int, workers: int) -> Iterator[Outcome]:
    """Results 0 … count−1, in any order; kernels and dtypes take turns."""
    return each(partial(outcome, seed), range(count), workers, chunk=16)


class Row(NamedTuple):
    """What is said of one kernel in one dtype."""

    kernel: str
    dtype: str
    precision: str
    results: int
    alarms: int
    not_judgeable: int
    median_z: float
    z: float
    """The largest, as the next three."""
    lse_z: float
    bound: float
    scale: float


def table(seen: list[Outcome]) -> list[Row]:
    """One row for each kernel and dtype."""
    groups = {(one.kernel, one.dtype, one.precision) for one in seen}
    order = {case: place for place, case in enumerate(cases())}
    rows = []
    for group in sorted(groups, key=lambda group: order[group[:2]]):
        some = [one for one in seen if (one.kernel, one.dtype, one.precision) == group]
        judged = [one for one in some if one.judgeable]
        z = np.array([one.z for one in judged if np.isfinite(one.z)] or [0.0])
        rows.append(
            Row(
                *group,
                results=len(some),
                alarms=sum(not one.passed for one in judged),
                not_judgeable=len(some) - len(judged),
                median_z=float(np.median(z)),
                z=float(z.max()),
                lse_z=max((one.lse_z for one in judged if np.isfinite(one.lse_z)), default=0.0),
                bound=max((one.hard_ratio for one in judged), default=0.0),
                scale=max((one.scale_z_score for one in judged if np.isfinite(one.scale_z_score)), default=0.0),
            )
        )
    return rows
