"""What a reported fault is made of, and the words that name it.

Nothing is imported from the diagnosis: a fault changes what `plain_attention` computes with, or what it hands over.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from cpjax.trial.emulators import Arithmetic
from cpjax.trial.plain_attention import Work, attend, work_of
from cpjax.trial.problem import Problem, Result
from cpjax.trial.settings import Setting

LN2 = float(np.log(2.0))


class Name(NamedTuple):
    """Words of a right answer: a regular expression, and the number that its first group must be near to."""

    pattern: str
    number: float | None = None
    tolerance: float = 0.01


class Made(NamedTuple):
    """A wrong result, and the names of which each is right."""

    result: Result
    names: tuple[Name, ...] = ()


@dataclass(frozen=True)
class Case:
    """What a fault is made of."""

    setting: Setting
    problem: Problem
    work: Work
    right: Result
    rng: np.random.Generator

    def with_(self, **changes: Any) -> Result:
        """What is computed with these changes."""
        return attend(replace(self.work, **changes))


Maker = Callable[[Case], Made | None]
"""None where the setting has nothing that could go wrong so."""


@dataclass(frozen=True)
class Reported:
    """A fault, and what the problem must have for it: a softcap, a sink, a window, …"""

    make: Maker
    states: Callable[[Problem, np.random.Generator], Problem] = lambda problem, rng: problem


def case_of(setting: Setting, problem: Problem, arithmetic: Arithmetic, rng: np.random.Generator) -> Case:
    """With the right result."""
    work = work_of(problem, arithmetic, setting.order)
    return Case(setting, problem, work, attend(work), rng)


def named(pattern: str) -> tuple[Name, ...]:
    """Right where these words are said."""
    return (Name(pattern),)


def requests_of(case: Case) -> np.ndarray:
    """`[B, T]`: the request of each query; all 0 where nothing is packed."""
    batch, length = case.problem.query.shape[:2]
    return np.zeros((batch, length), int) if case.problem.segments is None else case.problem.segments
