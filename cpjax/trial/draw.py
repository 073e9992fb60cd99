"""Shapes, cuts and masks at random: what the kinds of data have in common."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cpjax.trial.problem import Problem

Kind = Callable[[np.random.Generator], Problem]
"""A kind of data: draws a problem in float64."""

WORK = 2**19
"""Most multiplications q·k in one drawn problem, so that a hundred thousand of them take an hour."""


class Shape(NamedTuple):
    """Sizes of a problem; `heads` is a multiple of `kv_heads`."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between `low` and `high` whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def whole(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included, roughly log-uniform."""
    return min(int(log_uniform(rng, float(low), float(high + 1))), high)


def draw_shape(rng: np.random.Generator, *, keys: int | None = None, head_dim: int | None = None) -> Shape:
    """Lengths log-uniform from 1 up, median below 256; in 1 of 25 draws 8,192 keys or more, with few queries.

    Args:
      keys, head_dim: fixed instead of drawn.
    """
    head_dim = int(rng.choice([8, 16, 32, 64, 64, 128])) if head_dim is None else head_dim
    long = keys is None and rng.random() < 0.04
    if keys is None:
        keys = whole(rng, 8192, 16384) if long else whole(rng, 1, 4096)
    heads, kv_heads = (1, 1) if long else [(1, 1), (2, 2), (4, 4), (2, 1), (4, 2)][rng.integers(5)]
    batch = 1 if long else int(rng.choice([1, 1, 1, 2]))
    most = max(1, min(8 if long else max(keys, 64), WORK // (keys * heads * batch * head_dim)))
    value_dim = head_dim if rng.random() < 0.8 else int(rng.choice([1, 8, 32, 128]))
    return Shape(batch, whole(rng, 1, most), keys, heads, kv_heads, head_dim, value_dim)


def gaussians(
    rng: np.random.Generator, shape: Shape, *, logits: float = 1.0, mean: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value with normal entries; logits have standard deviation `logits`, values mean `mean`."""
    query = rng.standard_normal((shape.batch, shape.queries, shape.heads, shape.head_dim)) * logits
    key = rng.standard_normal((shape.batch, shape.keys, shape.kv_heads, shape.head_dim))
    value = rng.standard_normal((shape.batch, shape.keys, shape.kv_heads, shape.value_dim)) + mean
    return query, key, value


def pose(
    rng: np.random.Generator, query: np.ndarray, key: np.ndarray, value: np.ndarray, *, scale: float | None = None
) -> Problem:
    """The question about these arrays: causal or not, queries anywhere among the keys, cp 1 to 8."""
    batch, length, keys = query.shape[0], query.shape[1], key.shape[1]
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    problem = Problem(query, key, value, scale, cp=int(rng.choice([1, 1, 2, 4, 8])))
    if rng.random() < 0.5:
        return problem
    # Causal: the queries are some of the keys' tokens, in order; early ones see few keys, the first perhaps one.
    places = np.stack([np.sort(rng.choice(keys, length, replace=length > keys)) for _ in range(batch)])
    everywhere = np.broadcast_to(np.arange(keys), (batch, keys))
    return replace(
        problem, is_causal=True, q_positions=places.astype(np.int32), kv_positions=everywhere.astype(np.int32)
    )


def towards(rng: np.random.Generator, query: np.ndarray, key: np.ndarray, logit: float) -> np.ndarray:
    """Queries along a key of their own choice, such that this key's logit is `logit`."""
    group = query.shape[2] // key.shape[2]
    choice = rng.integers(key.shape[1], size=query.shape[1])
    chosen = np.repeat(key[:, choice], group, axis=2)
    return chosen * logit * query.shape[-1] ** 0.5 / np.square(chosen).sum(axis=-1, keepdims=True)


def chunk_of_key(problem: Problem) -> np.ndarray:
    """The number of the chunk that each key is in."""
    return np.arange(problem.key.shape[1]) // -(-problem.key.shape[1] // problem.chunk_count)
