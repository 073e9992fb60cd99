"""Which problem goes to which kernel: tasks, each a number of a stage, always the same for a seed."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, count, islice, product
from typing import NamedTuple

import numpy as np

from cpjax.trial.cuda.kernels import HALF, KERNELS
from cpjax.trial.cuda.planted import FAULTS, NONE
from cpjax.trial.cuda.problems import DATA, FIXED, SETTINGS, Sizes, drawn, fixed, normal
from cpjax.trial.draw import log_uniform
from cpjax.trial.kinds import TUNING
from cpjax.trial.problem import Problem

STREAM = 5
"""The number that keeps these random streams apart from those of `false_alarms.SETS`, `foreign` and `gradients`."""

STAGES = ("long", "planted", "compiled", "drawn", "gradients")
LONG = ("SDPA flash", "SDPA cuDNN", "SDPA efficient", "Triton", "SDPA math")
ALL_ROWS = (("SDPA flash", "bfloat16"), ("SDPA cuDNN", "float16"), ("Triton", "bfloat16"))
"""Whose results are judged in all rows: minutes each."""

BENCH = Sizes(1024, 2, 1, 64, 64)
"""Of planted faults."""

PLANNED, ONE_OF = "SDPA cuDNN", 3
"""cuDNN makes a plan for each new shape, which takes longer than judging: it is asked in one of so many rounds."""

EACH = 16
"""Results of each kernel that is compiled for each shape, dtype and mask."""


class Task(NamedTuple):
    """One result."""

    stage: str
    number: int
    kernel: str
    dtype: str
    data: str
    is_causal: bool = True
    fault: str = ""


def long(names: list[str]) -> Iterator[Task]:
    """Long problems; those of which all rows are judged first."""
    number = count()
    for data, setting in SETTINGS.items():
        for dtype, name in product(HALF, LONG):
            if setting.step == 1 and (name, dtype) not in ALL_ROWS:
                continue
            if KERNELS[name].one_head_dim and setting.sizes.head_dim != setting.sizes.value_dim:
                continue
            task = Task("long", next(number), name, dtype, data)
            if name in names:
                yield task


def planted(names: list[str]) -> Iterator[Task]:
    """Faults, and the correct result beside them, in results of the kernels that hand over lse."""
    number = count()
    for name, dtype, is_causal in product(LONG, HALF, (True, False)):
        if not is_causal and name not in ("SDPA flash", "SDPA math"):
            continue
        for fault in (NONE, *FAULTS):
            if fault in FAULTS and FAULTS[fault].needs_causal and not is_causal:
                continue
            if fault in FAULTS and FAULTS[fault].needs_lse and name == "SDPA math":
                continue
            task = Task("planted", next(number), name, dtype, "normal", is_causal, fault)
            if name in names:
                yield task


def compiled(names: list[str]) -> Iterator[Task]:
    """Kernels that are compiled for each shape: one shape, causal or not, all kinds of data."""
    number = count()
    every = [name for name, kernel in KERNELS.items() if kernel.is_compiled]
    for is_causal, name in product((True, False), every):
        for dtype, i in product(KERNELS[name].dtypes, range(EACH)):
            task = Task("compiled", next(number), name, dtype, list(DATA)[i % len(DATA)], is_causal)
            if name in names and (is_causal or dtype == "bfloat16"):
                yield task


def drawn_ones(names: list[str]) -> Iterator[Task]:
    """Without end, if any kernel is there: kernels and dtypes take turns, then kinds of data."""
    cases = [(name, dtype) for name, kernel in KERNELS.items() if not kernel.is_compiled for dtype in kernel.dtypes]
    for number in count() if {name for name, _ in cases} & set(names) else ():
        name, dtype = cases[number % len(cases)]
        if name in names and (name != PLANNED or number // len(cases) % ONE_OF == 0):
            yield Task("drawn", number, name, dtype, list(TUNING)[number // len(cases) % len(TUNING)])


def gradients(names: list[str]) -> Iterator[Task]:
    """Without end: kernels and dtypes take turns, causal or not."""
    cases = [(name, dtype) for name, kernel in KERNELS.items() if kernel.has_backward for dtype in kernel.dtypes]
    for number in count() if {name for name, _ in cases} & set(names) else ():
        name, dtype = cases[number % len(cases)]
        if name in names and (name != PLANNED or number // len(cases) % ONE_OF == 0):
            data = "sharp" if number // len(cases) % 4 == 3 else "normal"
            yield Task("gradients", number, name, dtype, data, is_causal=number // len(cases) % 2 == 0)


def tasks(names: list[str], *, with_long: bool = True) -> Iterator[Task]:
    """All: what takes long first, then without end four drawn ones and a backward pass by turns."""
    yield from chain(long(names) if with_long else (), planted(names), compiled(names))
    forward, backward = drawn_ones(names), gradients(names)
    while True:
        some = [*islice(forward, 4), *islice(backward, 1)]
        if not some:
            return
        yield from some


def problem_of(seed: int, task: Task) -> tuple[Problem, np.ndarray | None]:
    """The whole problem in the task's dtype, and dout `[B, T, N, V]` of a backward pass."""
    if task.stage == "long":
        return _long(seed, task.data, task.dtype), None
    rng = np.random.default_rng([STREAM, seed, STAGES.index(task.stage), task.number])
    if task.stage == "planted":
        return fixed(rng, task.data, task.dtype, BENCH, task.is_causal), None
    if task.stage == "compiled":
        return fixed(rng, task.data, task.dtype, FIXED, task.is_causal), None
    if task.stage == "drawn":
        return drawn(rng, task.data, task.dtype, KERNELS[task.kernel]), None
    heads, kv_heads = [(1, 1), (2, 2), (4, 2)][rng.integers(3)]
    width = int(rng.choice([16, 64, 128]))
    sizes = Sizes(int(rng.integers(2, 500)), heads, kv_heads, width, width)
    problem = fixed(rng, task.data, task.dtype, sizes, task.is_causal)
    dout = normal(rng, sizes)[0] * log_uniform(rng, 1e-3, 10.0)
    return problem, dout.astype(problem.query.dtype)


@lru_cache(maxsize=1)
def _long(seed: int, data: str, dtype: str) -> Problem:
    return _wide(seed, data).cast(dtype)


@lru_cache(maxsize=1)
def _wide(seed: int, data: str) -> Problem:
    """A long problem in float64: the kernels and dtypes have it one after the other."""
    place = list(SETTINGS).index(data)
    rng = np.random.default_rng([STREAM, seed, STAGES.index("long"), place])
    return fixed(rng, SETTINGS[data].data, "float64", SETTINGS[data].sizes, True)
