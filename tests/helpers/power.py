"""What pins the power of the judge: constants changed for a moment, results in the regime of one term, numbers.

A pin is a number that is measured of a seeded result, and the interval in which it lies. A constant is pinned if twice
and half of its value take the number of some pin out of its interval.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from jaxtyping import config

from cpjax.crosscheck import Verdict, judge
from cpjax.crosscheck.error_model.model import ErrorModel
from cpjax.crosscheck.error_model.terms import Systematic
from cpjax.crosscheck.exact.attention import Rows
from cpjax.crosscheck.judging.evidence import model_of
from cpjax.crosscheck.judging.problem import Problem as Asked
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.crosscheck.judging.sampling import chosen_rows, tiles
from cpjax.trial.emulators import PROFILES as ARITHMETIC
from cpjax.trial.emulators import Arithmetic, attend
from cpjax.trial.problem import Problem, Result

ARITHMETIC = {name: replace(arithmetic, summation="sequential") for name, arithmetic in ARITHMETIC.items()}
"""The trial's profiles with one accumulator: the same bits on every machine, and the deepest sum that is correct."""


@contextmanager
def unchecked() -> Iterator[None]:
    """Shapes and types are not checked: other tests do that, and here it would take twice as long as the judge."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


@contextmanager
def changed(module: str, name: str, value: Any) -> Iterator[None]:
    """A constant with another value, in its module and in all that have imported it from there by name."""
    home = import_module(module)
    old = getattr(home, name)
    places = [(home, name), *_importers(module, name)]
    assert all(getattr(place, alias) is old for place, alias in places)
    for place, alias in places:
        setattr(place, alias, value)
    try:
        yield
    finally:
        for place, alias in places:
            setattr(place, alias, old)


def _importers(module: str, name: str) -> Iterator[tuple[ModuleType, str]]:
    for other in [m for n, m in sys.modules.items() if n.startswith("cpjax.") and n != module and m is not None]:
        for node in _tree(other).body:
            if isinstance(node, ast.ImportFrom) and node.module == module:
                yield from ((other, alias.asname or name) for alias in node.names if alias.name == name)


_TREES: dict[str, ast.Module] = {}


def _tree(module: ModuleType) -> ast.Module:
    if module.__name__ not in _TREES:
        _TREES[module.__name__] = ast.parse(inspect.getsource(module))
    return _TREES[module.__name__]


@contextmanager
def rewritten(module: str, old: str, new: str) -> Iterator[None]:
    """The functions of a module as if its text had `new` in place of `old`, which it has once; its constants stay."""
    home = import_module(module)
    text = inspect.getsource(home)
    assert text.count(old) == 1, f"{module} has {text.count(old)} times {old!r}"
    other = dict(_codes(compile(text.replace(old, new), str(home.__file__), "exec")))
    functions = dict(_functions(home))
    before = {name: function.__code__ for name, function in functions.items()}
    for name, function in functions.items():
        function.__code__ = other[name]
    try:
        yield
    finally:
        for name, function in functions.items():
            function.__code__ = before[name]


def _codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    """The code of a module's functions and methods, by name; functions inside functions belong to their outer one."""
    for inner in (x for x in code.co_consts if isinstance(x, CodeType)):
        yield inner.co_qualname, inner
        yield from _codes(inner)


def _functions(home: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    own = [x for x in vars(home).values() if getattr(x, "__module__", None) == home.__name__]
    members = [y for x in own if isinstance(x, type) for y in vars(x).values()]
    for x in (*own, *members):
        function = getattr(x, "func", None) or getattr(x, "fget", None) or x  # of a cached property, of a property
        while hasattr(function, "__wrapped__"):  # by jaxtyping's check of types
            function = function.__wrapped__
        # Dataclasses make methods of their own, which stand in no text.
        if isinstance(function, FunctionType) and function.__code__.co_filename == home.__file__:
            yield function.__qualname__, function


def constants(module: str) -> list[str]:
    """Names of the numbers that stand in a module's text as its constants, by their own assignment."""
    home = import_module(module)
    names: list[str] = []
    for node in _tree(home).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            names += [x.id for x in ast.walk(target) if isinstance(x, ast.Name)]
    return [name for name in names if isinstance(getattr(home, name), int | float)]


@dataclass(frozen=True)
class Pin:
    """A measured number and its interval."""

    measure: Callable[[], float]
    low: float
    high: float

    def holds(self) -> bool:
        """Whether the number lies in its interval; NaN never does."""
        return bool(self.low <= self.measure() <= self.high)


@dataclass(frozen=True)
class Edge:
    """A size at which the judge changes its mind: just below it says False, just above it says True."""

    says: Callable[[float], bool]
    at: float
    step: float = 1.05

    def holds(self) -> bool:
        """Whether the edge is still within `step` of its place."""
        return not self.says(self.at / self.step) and self.says(self.at * self.step)


@dataclass(frozen=True)
class Guard:
    """A constant, or a number in the text of a function, and the pins of which one breaks if it is another."""

    name: str
    twice: Callable[[], AbstractContextManager]
    half: Callable[[], AbstractContextManager]
    pins: tuple[str, ...]


def of_constant(module: str, name: str, *pins: str, twice: float | None = None, half: float | None = None) -> Guard:
    """Of a constant; `twice` and `half` where they are not meant literally."""
    value = getattr(import_module(module), name)
    one, other = (2 * value if twice is None else twice), (value / 2 if half is None else half)
    return Guard(
        f"{module.rpartition('.')[2]}.{name}",
        lambda: changed(module, name, type(value)(one)),
        lambda: changed(module, name, type(value)(other)),
        pins,
    )


def of_text(module: str, old: str, twice: str, half: str, *pins: str) -> Guard:
    """Of a number that has no name, for it is derived: text that the module has once, and what stands in its place."""
    return Guard(
        f"{module.rpartition('.')[2]}: {old}",
        lambda: rewritten(module, old, twice),
        lambda: rewritten(module, old, half),
        pins,
    )


def of_twelfth(module: str, old: str, *pins: str) -> Guard:
    """Of an error that is uniform between two neighbours, whose variance is a twelfth: a sixth, and a 24th."""
    return of_text(module, old, old.replace("12", "6"), old.replace("12", "24"), *pins)


@dataclass(frozen=True)
class Regime:
    """A correct result in data in which one term of the error model is the largest."""

    problem: Problem
    profile: str
    order: str = "ascending"
    arithmetic: Arithmetic | None = None
    """Unless the profile's own."""

    @cached_property
    def result(self) -> Result:
        """What a correct implementation hands over."""
        return attend(
            self.problem,
            self.arithmetic or ARITHMETIC[self.profile],
            self.order if self.order != "unknown" else "ascending",
        )

    def verdict(self, result: Result | None = None, *, with_lse: bool = True) -> Verdict:
        """The judge's answer about it, or about another result for the same data."""
        given = self.result if result is None else result
        p = self.problem
        asked = {**p.judge_arguments(), "precision": self.profile, "order": self.order}
        return judge(p.query, p.key, p.value, given.out, given.lse if with_lse else None, **asked)

    def z(self) -> float:
        """RMS(error/σ) of `out`."""
        return self.verdict(with_lse=False).z

    def lse_z(self) -> float:
        """RMS(error/σ) of lse."""
        return self.verdict().lse_z

    @cached_property
    def asked(self) -> Asked:
        """The problem as the judge sees it."""
        p = self.problem
        return checked_problem(p.query, p.key, p.value, **p.judge_arguments(), precision=self.profile, order=self.order)

    def models(self) -> Iterator[tuple[Rows, ErrorModel, Result]]:
        """The error model of the rows, tile after tile, and their result in float64."""
        asked = self.asked
        for tile in tiles(asked, chosen_rows(asked, 0)):
            key, value = (x[tile.batch, :, tile.kv_head].astype(np.float64) for x in (asked.key, asked.value))
            at = (tile.batch, tile.position, tile.head)
            yield *model_of(asked, key, value, tile), Result(*(x[at].astype(np.float64) for x in self.result))

    def share(self, *names: str, lse: bool = False) -> float:
        """The share of these terms in the variance."""
        part = total = 0.0
        for _, model, _ in self.models():
            for term in (*model.terms, *model.systematic):
                if isinstance(term, Systematic):
                    size = np.square(term.lse if lse else term.typical * term.most).sum()
                else:
                    size = np.sum(term.lse if lse else term.out)
                total += size
                part += size * (term.name in names)
        return float(part / total)


def one_row(scores: np.ndarray, values: np.ndarray, *, cp: int = 1, dtype: str = "float32") -> Problem:
    """Rows `[B, S]` of scores and `[B, S, V]` of values, each a problem of its own: query 1, scale 1, head dim 1.

    The product of a score and 1 is exact, so nothing is rounded before the score is.
    """
    scores = np.atleast_2d(scores)
    values = np.broadcast_to(values, (*scores.shape, values.shape[-1]))
    query = np.ones((len(scores), 1, 1, 1))
    return Problem(query, scores[:, :, None, None], values[:, :, None], 1.0, cp=cp, cuts=2 * (cp == 1)).cast(dtype)
