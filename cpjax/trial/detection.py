"""Wrong results: which does the judge catch, with which test, down to which size, and what would others have said?

A setting is a profile, a number of keys and a kind of data. In each, every fault is put into a correct result of a few
query rows. That is less than the judge sees of a real result, where it looks at thousands of rows.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import product
from typing import NamedTuple

import numpy as np

from cpjax.crosscheck import judge
from cpjax.crosscheck.run.workers import each
from cpjax.trial.emulators import PROFILES, dtype_of
from cpjax.trial.faults import FAULTS, SIZED, Bench, Fault, changes
from cpjax.trial.problem import Problem, Result
from cpjax.trial.rivals import RULES, References, accepted_by, references

KEYS = (1024, 16384, 131072)
ROWS = {1024: 32, 16384: 16, 131072: 8}
"""Query rows of each of two heads, for each number of keys; other numbers take `FEWEST`."""
FEWEST = 8
LOGITS = {"flat": 0.1, "normal": 1.0}
MEANS = (0.0, 1.0)
CAUSAL = ("causal mask +1", "causal mask −1", "causal mask +1, late", "causal mask −1, late", "diagonal unmasked")
WITH_SIZES = (
    "one key dropped", "scale +0.03 %", "scale +0.1 %", "scale +1 %", "chunk × 0.9", "chunk × 0.99", "lse + 1e-4",
    "one row + 1 %",
)  # fmt: skip
"""Left out here, because `SIZED` has them in more sizes."""
OF_OUT = {"form", "range", "bound", "spread", "worst row", "bfloat16"}
"""Tests that look at `out` only; what fails them is caught without lse too."""


class Setting(NamedTuple):
    """Profile and data of one bench."""

    profile: str
    keys: int
    logits: str
    mean: float


class Caught(NamedTuple):
    """What is said of one fault in one setting.

    `smallest`: the smallest size that is caught, all larger ones too; None if none is. 1.0 for a fault without sizes.
    `tests` are those that fail then. `rules` has the same for each rule of others; a rule that refuses the correct
    result as well has NaN.
    """

    setting: Setting
    fault: str
    sizes: tuple[float, ...]
    """That were tried, ascending; empty for a fault without sizes."""
    applies: bool
    """False: the fault changes nothing here."""
    from_out: float | None
    out_tests: tuple[str, ...]
    with_lse: float | None
    lse_tests: tuple[str, ...]
    rules: dict[str, float | None]


def settings(profiles: tuple[str, ...], keys: tuple[int, ...]) -> list[Setting]:
    """All kinds of data for these profiles and lengths, the longest first."""
    return [
        Setting(*one) for one in product(profiles, sorted(keys, reverse=True), LOGITS, MEANS)
    ]  # fmt: skip


def bench(setting: Setting, seed: int, *, is_causal: bool) -> Bench:
    """Normal data: two heads of 64 with keys and values of their own, four chunks; causal queries all over the text."""
    rng = np.random.default_rng([3, seed, setting.keys])
    rows = ROWS.get(setting.keys, FEWEST)
    problem = Problem(
        rng.standard_normal((1, rows, 2, 64)) * LOGITS[setting.logits],
        rng.standard_normal((1, setting.keys, 2, 64)),
        rng.standard_normal((1, setting.keys, 2, 64)) + setting.mean,
        scale=0.125,
        is_causal=is_causal,
        q_positions=np.linspace(0, setting.keys - 1, rows).astype(np.int32)[None],
        kv_positions=np.arange(setting.keys, dtype=np.int32)[None],
        cp=2,
    )
    return Bench(problem.cast(dtype_of(setting.profile)), PROFILES[setting.profile])


def caught_in(seed: int, setting: Setting) -> list[Caught]:
    """Every fault in one setting."""
    full, causal = (_Trial(setting, bench(setting, seed, is_causal=x)) for x in (False, True))
    single = [name for name in FAULTS if name not in WITH_SIZES]
    return [
        *(full.caught(name, {size: _with_size(make, size) for size in sizes}) for name, (make, sizes) in SIZED.items()),
        *((causal if name in CAUSAL else full).caught(name, {1.0: FAULTS[name]}) for name in single),
    ]


def _with_size(make: Callable[[Bench, float], Result], size: float) -> Fault:
    return lambda bench: make(bench, size)


def detections(profiles: tuple[str, ...], keys: tuple[int, ...], seed: int, workers: int) -> Iterator[list[Caught]]:
    """All faults in all settings, setting by setting, in any order."""
    return each(partial(caught_in, seed), settings(profiles, keys), workers)


@dataclass(frozen=True)
class _Trial:
    """One bench, what rules compare with, and verdicts that were given."""

    setting: Setting
    bench: Bench

    @cached_property
    def references(self) -> References:
        return references(self.bench.problem, self.bench.arithmetic, self.bench.correct)

    def caught(self, name: str, faults: Mapping[float, Fault]) -> Caught:
        """What is said of a fault; `faults` by size."""
        wrong = {size: fault(self.bench) for size, fault in faults.items()}
        sizes = tuple(wrong)
        failed = cache(lambda size, with_lse: self._failed_tests(wrong[size], with_lse=with_lse))

        def out_tests(size: float) -> tuple[str, ...]:
            """Without lse: known from the verdict with it, if a test of `out` alone fails there."""
            if np.array_equal(wrong[size].out, self.bench.correct.out):
                return ()
            return tuple(test for test in failed(size, True) if test in OF_OUT) or failed(size, False)

        def all_tests(size: float) -> tuple[str, ...]:
            return failed(size, True)

        applies = changes(wrong[sizes[-1]], self.bench.correct)
        found = [_Smallest(None, ())] * 2
        if applies:
            found = [_smallest_with_tests(sizes, tests) for tests in (out_tests, all_tests)]
        rules = {rule: self._refused(rule, wrong) for rule in RULES}
        return Caught(self.setting, name, sizes if len(sizes) > 1 else (), applies, *found[0], *found[1], rules)

    def _failed_tests(self, result: Result, *, with_lse: bool) -> tuple[str, ...]:
        problem = self.bench.problem
        asked = {**problem.judge_arguments(), "precision": self.setting.profile, "order": self.bench.order}
        lse = result.lse if with_lse else None
        return judge(problem.query, problem.key, problem.value, result.out, lse, **asked).failed_tests

    def _refused(self, rule: str, wrong: Mapping[float, Result]) -> float | None:
        def accepts(result: Result) -> bool:
            return accepted_by(RULES[rule], self.bench.problem, result, self.references, with_lse=True)

        if not accepts(self.bench.correct):
            return float("nan")
        return smallest(tuple(wrong), lambda size: not accepts(wrong[size]))


class _Smallest(NamedTuple):
    size: float | None
    tests: tuple[str, ...]


def _smallest_with_tests(sizes: tuple[float, ...], tests: Callable[[float], tuple[str, ...]]) -> _Smallest:
    size = smallest(sizes, lambda size: bool(tests(size)))
    return _Smallest(size, () if size is None else tests(size))


def smallest(sizes: tuple[float, ...], is_caught: Callable[[float], bool]) -> float | None:
    """The smallest of the ascending sizes that is caught, by bisection: larger faults are taken to be caught too."""
    low, high = -1, len(sizes)  # sizes[low] is missed, sizes[high] is caught
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_caught(sizes[middle]) else (middle, high)
    return sizes[high] if high < len(sizes) else None
