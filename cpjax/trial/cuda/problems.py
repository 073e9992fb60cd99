"""What is asked: drawn problems cut to what a kernel takes, few shapes with many kinds of data, long ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cpjax.trial.cuda.kernels import Kernel
from cpjax.trial.draw import log_uniform, towards
from cpjax.trial.foreign_kernels import seen_by
from cpjax.trial.kinds import TUNING
from cpjax.trial.problem import Problem

OPEN = {"is_causal": False, "window": None, "segments": None, "q_positions": None, "kv_positions": None}
MULTIPLE = 8
"""Head dims that the fused kernels take are multiples of this."""


def drawn(rng: np.random.Generator, kind: str, dtype: str, kernel: Kernel) -> Problem:
    """A problem of the tuning kinds, one chunk, whose rows all see a key, cut to what the kernel takes."""
    problem = TUNING[kind](rng)
    width = -(-problem.query.shape[3] // MULTIPLE) * MULTIPLE
    room = ((0, 0), (0, 0), (0, 0), (0, width - problem.query.shape[3]))
    values = problem.value.shape[3]
    wide = width if kernel.one_head_dim else -(-values // MULTIPLE) * MULTIPLE
    problem = replace(
        problem,
        query=np.pad(problem.query, room),  # zeros, which change no score
        key=np.pad(problem.key, room),
        value=problem.value[..., np.arange(wide) % values],
    )
    if kernel.takes == "square" and seen_by(problem).all():
        problem = replace(problem, **OPEN)
    elif kernel.takes == "square":
        length = min(problem.query.shape[1], problem.key.shape[1])
        cut = {name: getattr(problem, name)[:, :length] for name in ("query", "key", "value")}
        problem = replace(problem, **OPEN, **cut)
        problem = replace(problem, is_causal=True)
    elif kernel.takes == "positions":
        problem = replace(problem, window=None, segments=None)
        there, keys = problem.kv_positions, np.arange(problem.key.shape[1])
        if there is not None and not (there == keys).all():
            problem = replace(problem, **OPEN)
    problem = replace(problem.cast(dtype), cp=1, cuts=0)
    if not seen_by(problem).any(axis=2).all():
        problem = replace(problem, **OPEN)
    return problem


# Few shapes, many kinds of data --------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of a problem with as many queries as keys."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


def normal(rng: np.random.Generator, sizes: Sizes, logits: float = 1.0) -> list[np.ndarray]:
    """query, key, value, float64, `[1, length, heads, dim]`; logits have standard deviation `logits`."""
    shapes = ((sizes.heads, sizes.head_dim), (sizes.kv_heads, sizes.head_dim), (sizes.kv_heads, sizes.value_dim))
    query, key, value = (rng.standard_normal((1, sizes.length, *shape)) for shape in shapes)
    return [query * logits, key, value]


def _any_logits(rng: np.random.Generator, sizes: Sizes) -> list[np.ndarray]:
    return normal(rng, sizes, log_uniform(rng, 0.01, 20.0))


def _mean(rng: np.random.Generator, sizes: Sizes) -> list[np.ndarray]:
    query, key, value = normal(rng, sizes)
    return [query, key, (value + rng.choice([1.0, -3.0, 100.0])) * log_uniform(rng, 1e-3, 1e2)]


def _needle(rng: np.random.Generator, sizes: Sizes) -> list[np.ndarray]:
    query, key, value = normal(rng, sizes)
    return [towards(rng, query, key, rng.uniform(5.0, 30.0)), key, value]


def _heavy_tails(rng: np.random.Generator, sizes: Sizes) -> list[np.ndarray]:
    query, key, value = (x / np.sqrt(rng.chisquare(2, x.shape) / 2) for x in normal(rng, sizes))
    return [query * log_uniform(rng, 0.03, 1.0), np.clip(key, -20, 20), value]


def _first_key(rng: np.random.Generator, sizes: Sizes) -> list[np.ndarray]:
    query, key, value = normal(rng, sizes, 0.5)
    root = np.sqrt(rng.uniform(8.0, 18.0) * sizes.head_dim**0.5)
    query[..., -1], key[..., -1] = root, -root
    key[:, 0] = 0
    return [query, key, value]


def _tiny_values(rng: np.random.Generator, sizes: Sizes) -> list[np.ndarray]:
    query, key, value = normal(rng, sizes, log_uniform(rng, 0.1, 4.0))
    return [query, key, value * log_uniform(rng, 1e-7, 1e-4)]


DATA: dict[str, Callable[[np.random.Generator, Sizes], list[np.ndarray]]] = {
    "normal": normal,
    "any logits": _any_logits,
    "values with a mean": _mean,
    "needle": _needle,
    "heavy tails": _heavy_tails,
    "first key": _first_key,
    "tiny values": _tiny_values,
    "sharp": lambda rng, sizes: normal(rng, sizes, rng.uniform(10.0, 20.0)),
}

FIXED = Sizes(512, 4, 2, 64, 64)
"""Of kernels that are compiled for each shape, and of planted faults twice as long."""


def fixed(rng: np.random.Generator, data: str, dtype: str, sizes: Sizes, is_causal: bool) -> Problem:
    """One kind of data in a given shape; scale H^−1/2."""
    query, key, value = DATA[data](rng, sizes)
    return Problem(query, key, value, float(sizes.head_dim**-0.5), is_causal=is_causal).cast(dtype)


# Long ones -----------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A causal problem of a size that is used; every `step`-th row is shown to the judge, from a random one on."""

    sizes: Sizes
    data: str
    step: int


SETTINGS: dict[str, Setting] = {
    "4,096 tokens, 16 heads of 128, all rows": Setting(Sizes(4096, 16, 16, 128, 128), "normal", 1),
    "4,096 tokens, 16 heads of 128": Setting(Sizes(4096, 16, 16, 128, 128), "normal", 16),
    "4,096 tokens, 16 heads of 128, sharp": Setting(Sizes(4096, 16, 16, 128, 128), "sharp", 16),
    "4,096 tokens, 32 heads on 8": Setting(Sizes(4096, 32, 8, 128, 128), "normal", 32),
    "16,384 tokens, 2 heads on 1": Setting(Sizes(16384, 2, 1, 128, 128), "normal", 32),
    "16,384 tokens, 2 heads on 1, sharp": Setting(Sizes(16384, 2, 1, 128, 128), "sharp", 32),
    "4,096 tokens, 8 heads of 192 / 128": Setting(Sizes(4096, 8, 8, 192, 128), "normal", 8),
    "4,096 tokens, 8 heads of 192 / 128, sharp": Setting(Sizes(4096, 8, 8, 192, 128), "sharp", 8),
}


def some_rows(problem: Problem, step: int, start: int) -> tuple[Problem, np.ndarray]:
    """The same question about every `step`-th query only, and which these are."""
    rows = np.arange(start, problem.query.shape[1], step)
    keys = np.arange(problem.key.shape[1], dtype=np.int32)
    return replace(
        problem,
        query=problem.query[:, rows],
        q_positions=rows[None].astype(np.int32),
        kv_positions=keys[None],
    ), rows
