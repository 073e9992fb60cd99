"""Correct results by the ten thousand: how often does the judge say "wrong"?

Result `number` of a set and a seed is always the same problem, arithmetic and order, so every alarm can be looked at
alone. Kinds take turns; profile, order of merging and the emulator's freedoms are drawn.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.stats import beta

from cpjax.crosscheck import Verdict, judge
from cpjax.crosscheck.run.workers import each
from cpjax.trial import activations
from cpjax.trial.draw import Kind
from cpjax.trial.emulators import PROFILES, Order, attend, variant
from cpjax.trial.held_out import HELD_OUT
from cpjax.trial.kinds import TUNING
from cpjax.trial.other_logits import OTHER_LOGITS, with_freedoms
from cpjax.trial.problem import Problem, Result

SETS = {"tuning": 1, "held-out": 2, "other logits": 3}
"""The sets of kinds, and the number that keeps their random streams apart."""

SHARES = {"flash_fp16": 0.45, "ring_mla_fp16": 0.4, "float32": 0.1, "float64": 0.05}


class Given(NamedTuple):
    """One correct result and everything the judge is told about it. `order` None: not told."""

    kind: str
    profile: str
    problem: Problem
    result: Result
    order: str


class Outcome(NamedTuple):
    """What the judge said of it."""

    number: int
    kind: str
    profile: str
    keys: int
    passed: bool
    judgeable: bool
    hard_ratio: float
    z: float
    lse_z: float
    z_score: float
    """Of the worst head, query chunk or rank; beyond 6 it fails."""
    scale_z_score: float
    failed_tests: tuple[str, ...]


def kinds(name: str) -> dict[str, Kind]:
    """The kinds of a set; trained activations belong to the held-out ones, where the model is installed.

    Raises:
      KeyError: for an unknown set.
    """
    trained = {} if activations.missing() else {"trained": activations.trained}
    return {"tuning": TUNING, "held-out": {**HELD_OUT, **trained}, "other logits": OTHER_LOGITS}[name]


def given(name: str, seed: int, number: int) -> Given:
    """One correct result of a set."""
    rng = np.random.default_rng([SETS[name], seed, number])
    chosen = kinds(name)
    kind = list(chosen)[number % len(chosen)]
    problem = chosen[kind](rng)
    profile = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    problem = problem.cast(PROFILES[profile].compute if profile.startswith("float") else "float16")
    arithmetic = variant(PROFILES[profile], rng, work=problem.query.size * problem.key.shape[1])
    order = str(rng.choice(["ascending", "ring", "gather", "unknown"]))
    really: Order = order
    if order == "unknown":
        really = tuple(int(chunk) for chunk in rng.permutation(problem.chunk_count))
    arithmetic = with_freedoms(arithmetic, problem, rng)
    return Given(kind, profile, problem, attend(problem, arithmetic, really), order)


def ask(given: Given, *, with_lse: bool = True) -> Verdict:
    """The judge's verdict on it."""
    problem, (out, lse) = given.problem, given.result
    question = {**problem.judge_arguments(), "precision": given.profile, "order": given.order}
    return judge(problem.query, problem.key, problem.value, out, lse if with_lse else None, **question)


def outcome(name: str, seed: int, number: int) -> Outcome:
    """Make one result and have it judged; half of the time from `out` alone."""
    one = given(name, seed, number)
    verdict = ask(one, with_lse=number // 64 % 2 == 0)
    return Outcome(
        number=number,
        kind=one.kind,
        profile=one.profile,
        keys=one.problem.key.shape[1],
        passed=verdict.passed,
        judgeable=verdict.judgeable,
        hard_ratio=verdict.hard_ratio,
        z=verdict.z,
        lse_z=verdict.lse_z,
        z_score=max((part.z_score for part in verdict.parts), default=-np.inf),
        scale_z_score=abs(verdict.scale_z_score),
        failed_tests=verdict.failed_tests,
    )


def outcomes(name: str, seed: int, count: int, workers: int) -> Iterator[Outcome]:
    """Results 0 … count−1, in any order."""
    return each(partial(outcome, name, seed), range(count), workers, chunk=16)


class Row(NamedTuple):
    """What is said of one kind under one profile: counts, and the largest of each statistic."""

    kind: str
    profile: str
    results: int
    alarms: int
    not_judgeable: int
    hard_ratio: float
    z: float
    lse_z: float
    z_score: float
    scale_z_score: float


def table(seen: list[Outcome]) -> list[Row]:
    """One row for each kind and profile, one for each profile, and a last one for everything."""
    groups = sorted({(one.kind, one.profile) for one in seen})
    rows = [_row(*group, [one for one in seen if (one.kind, one.profile) == group]) for group in groups]
    for profile in sorted({one.profile for one in seen}):
        rows.append(_row("all", profile, [one for one in seen if one.profile == profile]))
    return [*rows, _row("all", "all", seen)]


def is_alarm(one: Outcome) -> bool:
    """A correct result that was judged, and not accepted."""
    return one.judgeable and not one.passed


def rate_bound(alarms: int, results: int) -> float:
    """The false-alarm probability that is exceeded with 5 % confidence only (Clopper–Pearson, upper limit at 95 %).

    >>> round(rate_bound(0, 100_000), 6)  # "the rule of three"
    3e-05
    """
    return 1.0 if alarms >= results else float(beta.ppf(0.95, alarms + 1, results - alarms))


def _row(kind: str, profile: str, seen: list[Outcome]) -> Row:
    judged = [one for one in seen if one.judgeable]
    largest = ("hard_ratio", "z", "lse_z", "z_score", "scale_z_score")
    return Row(
        kind,
        profile,
        results=len(seen),
        alarms=sum(map(is_alarm, seen)),
        not_judgeable=len(seen) - len(judged),
        **{name: max((_size(getattr(one, name)) for one in judged), default=0.0) for name in largest},
    )


def _size(statistic: float) -> float:
    """NaN is "not measured": nothing was rounded, or no lse was given."""
    return 0.0 if np.isnan(statistic) or statistic == -np.inf else float(statistic)
