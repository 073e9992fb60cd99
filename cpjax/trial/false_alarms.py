"""Correct results by the ten thousand: how often does the judge say "wrong"?

Result `index` of a set and a seed is always the same problem, arithmetic and order, so every alarm can be looked at
alone. Kinds take turns; profile, order of merging and the emulator's freedoms are drawn.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cpjax.trial import activations
from cpjax.trial.draw import Kind
from cpjax.trial.emulators import PROFILES, Order, attend, variant
from cpjax.trial.held_out import HELD_OUT
from cpjax.trial.kinds import TUNING
from cpjax.trial.problem import Problem, Result

SETS = {"tuning": 1, "held-out": 2}
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
    reasons: tuple[str, ...]


def kinds(name: str) -> dict[str, Kind]:
    """The kinds of a set; trained activations belong to the held-out ones, where the model is installed.

    Raises:
      KeyError: for an unknown set.
    """
    trained = {} if activations.missing() else {"trained": activations.trained}
    return {"tuning": TUNING, "held-out": {**HELD_OUT, **trained}}[name]


def given(name: str, seed: int, index: int) -> Given:
    """Result number `index` of a set."""
    rng = np.random.default_rng([SETS[name], seed, index])
    chosen = kinds(name)
    kind = list(chosen)[index % len(chosen)]
    problem = chosen[kind](rng)
    profile = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    problem = problem.cast(PROFILES[profile].compute if profile.startswith("float") else "float16")
    arithmetic = variant(PROFILES[profile], rng, work=problem.query.size * problem.key.shape[1])
    order = str(rng.choice(["ascending", "ring", "gather", "unknown"]))
    really: Order = order
    if order == "unknown":
        really = tuple(int(chunk) for chunk in rng.permutation(problem.chunk_count))
    return Given(kind, profile, problem, attend(problem, arithmetic, really), order)


def ask(given: Given, *, with_lse: bool = True) -> Any:
    """The judge's verdict on it."""
    from cpjax.crosscheck import judge  # here, so that workers start without it until they need it

    problem, (out, lse) = given.problem, given.result
    question = {**problem.question(), "precision": given.profile, "order": given.order}
    return judge(problem.query, problem.key, problem.value, out, lse if with_lse else None, **question)


def outcome(name: str, seed: int, index: int) -> Outcome:
    """Make result `index` and have it judged; half of the time from `out` alone."""
    one = given(name, seed, index)
    verdict = ask(one, with_lse=index // 64 % 2 == 0)
    return Outcome(
        index, one.kind, one.profile, one.problem.key.shape[1], bool(verdict.passed), bool(verdict.judgeable),
        float(verdict.hard_ratio), float(verdict.z), tuple(verdict.reasons),
    )  # fmt: skip


def outcomes(name: str, seed: int, count: int, workers: int) -> Iterator[Outcome]:
    """Results 0 … count−1, in any order, from `workers` processes of one BLAS thread each.

    Closing the iterator ends the workers.
    """
    if workers == 1:
        yield from (outcome(name, seed, index) for index in range(count))
        return
    before = {variable: os.environ.get(variable) for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    os.environ.update(dict.fromkeys(before, "1"))  # read by NumPy's BLAS when a worker imports it
    try:
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            yield from pool.imap_unordered(partial(outcome, name, seed), range(count), chunksize=16)
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable)
            else:
                os.environ[variable] = value


class Row(NamedTuple):
    """What is said of one kind under one profile."""

    kind: str
    profile: str
    results: int
    alarms: int
    not_judgeable: int
    hard_ratio: float
    z: float


def table(seen: list[Outcome]) -> list[Row]:
    """One row for each kind and profile, and a last one for everything; a non-finite statistic counts as infinite."""
    groups = sorted({(one.kind, one.profile) for one in seen})
    rows = [_row(*group, [one for one in seen if (one.kind, one.profile) == group]) for group in groups]
    return [*rows, _row("all", "all", seen)]


def is_alarm(one: Outcome) -> bool:
    """A correct result that was judged, and not accepted."""
    return one.judgeable and not one.passed


def rate_bound(alarms: int, results: int) -> float:
    """The false-alarm probability that is exceeded with 5 % confidence only (Clopper–Pearson, upper limit at 95 %).

    >>> round(rate_bound(0, 100_000), 6)  # "the rule of three"
    3e-05
    """
    from scipy.stats import beta

    return 1.0 if alarms >= results else float(beta.ppf(0.95, alarms + 1, results - alarms))


def _row(kind: str, profile: str, seen: list[Outcome]) -> Row:
    judged = [one for one in seen if one.judgeable]
    return Row(
        kind,
        profile,
        len(seen),
        sum(map(is_alarm, seen)),
        len(seen) - len(judged),
        max((_size(one.hard_ratio) for one in judged), default=0.0),
        max((_size(one.z) for one in judged), default=0.0),
    )


def _size(statistic: float) -> float:
    return statistic if np.isfinite(statistic) else float("inf")
