"""Problems for attention in which every key matters, and what each query may see, written once more in plain Python.

Data, places and poison are drawn freely: they are arguments of a compiled program. Shapes, masks and softcaps are its
constants, so they come from small grids: a new one costs a compilation.
"""

from typing import NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from cpjax.mask import Mask, Tokens

SCALE = 0.5
KINDS = ("normal", "mean", "needle", "equal", "sharp")


class Rule(NamedTuple):
    """The constants of a problem that are not shapes."""

    is_causal: bool
    window: int | None = None
    softcap: float | None = None

    @property
    def mask(self) -> Mask:
        return Mask(self.is_causal, self.window)


RULES = (Rule(True), Rule(False), Rule(True, 3), Rule(False, 2), Rule(True, None, 5.0))


class Problem(NamedTuple):
    """Inputs `[B, T or S, heads, dim]` in float64, the places of their tokens, a sink a head (−inf: none)."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    q_tokens: Tokens
    kv_tokens: Tokens
    sink: np.ndarray
    rule: Rule

    @property
    def arrays(self):
        return self[:5]


def examples(share: float) -> settings:
    """This share of the examples that the profile gives to a property."""
    return settings(max_examples=max(5, round(settings().max_examples * share)))


def seen(q: Tokens, kv: Tokens, rule: Rule) -> np.ndarray:
    """Which key each query may see, `[B, T, S]`; pair by pair."""
    batch, length = q.position.shape
    out = np.zeros((batch, length, kv.position.shape[1]), bool)
    for b, i, j in np.ndindex(out.shape):
        same = q.segment[b, i] == kv.segment[b, j] and q.segment[b, i] >= 0
        distance = int(q.position[b, i]) - int(kv.position[b, j])
        near = rule.window is None or abs(distance) < rule.window
        out[b, i, j] = same and near and (distance >= 0 or not rule.is_causal)
    return out


@st.composite
def places(draw, batch: int, length: int, kv_length: int) -> tuple[Tokens, Tokens]:
    """Where queries and keys are: one request and pads, a prefix before the queries, packed requests, or anywhere."""
    kind = draw(st.sampled_from(("request", "prefix", "packed", "anywhere")))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "request":
        real = draw(st.integers(0, max(length, kv_length)))
        return tuple(_request(batch, n, 0, min(real, n)) for n in (length, kv_length))
    if kind == "prefix":
        real = draw(st.integers(0, kv_length))
        start = draw(st.integers(0, real))
        return _request(batch, length, start, min(real - start, length)), _request(batch, kv_length, 0, real)
    if kind == "packed":
        return tuple(_packed(rng, batch, n) for n in (length, kv_length))
    return tuple(
        Tokens(
            rng.integers(0, n + 2, (batch, n)).astype(np.int32),
            rng.integers(-1, 2, (batch, n)).astype(np.int32),
        )
        for n in (length, kv_length)
    )


@st.composite
def problems(
    draw,
    length: int,
    kv_length: int,
    heads: tuple[int, int] = (4, 2),
    rules: tuple[Rule, ...] = RULES,
    batch: int = 1,
    dims: tuple[int, int] = (4, 3),
) -> Problem:
    """A problem of the given shape."""
    q_tokens, kv_tokens = draw(places(batch, length, kv_length))
    seed, kind = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(KINDS))
    rule, has_sink = draw(st.sampled_from(rules)), draw(st.booleans())
    return problem(seed, kind, q_tokens, kv_tokens, rule, heads, dims, has_sink)


def problem(seed, kind, q_tokens, kv_tokens, rule, heads=(4, 2), dims=(4, 3), has_sink=False) -> Problem:
    """Inputs of a kind.

    normal: logits of standard deviation about 1. mean: values of mean 3. needle: every query wants one key, any. equal:
    all logits are 0, so the result is the plain mean. sharp: logits in the hundreds.
    """
    rng = np.random.default_rng(seed)
    (n, k), (h, v) = heads, dims
    (batch, length), kv_length = q_tokens.position.shape, kv_tokens.position.shape[1]
    query, key, value = (
        rng.normal(size=(batch, t, *tail)) for t, tail in ((length, (n, h)), (kv_length, (k, h)), (kv_length, (k, v)))
    )
    sink = rng.normal(size=n) if has_sink else np.full(n, -np.inf)
    if kind == "mean":
        value += 3
    if kind == "equal":
        query[:] = 0
    if kind == "sharp":
        query *= 200
    if kind == "needle" and kv_length:
        wanted = rng.integers(0, kv_length, (batch, length))
        unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
        key = unit
        for b, i, head in np.ndindex(batch, length, n):
            query[b, i, head] = 100 * unit[b, wanted[b, i], head // (n // k)]
    return Problem(query, key, value, q_tokens, kv_tokens, sink, rule)


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0.0))


def largest_logit(p: Problem) -> float:
    """max |scale · q·k| over all pairs."""
    key = np.repeat(p.key, p.query.shape[2] // p.key.shape[2], axis=2)
    return largest(SCALE * np.einsum("btnh,bsnh->btns", p.query, key)) if p.key.shape[1] else 0.0


def _request(batch: int, length: int, start: int, real: int) -> Tokens:
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    return Tokens(index + np.int32(start), np.where(index < real, 0, -1).astype(np.int32))


def _packed(rng: np.random.Generator, batch: int, length: int) -> Tokens:
    """Up to four requests one after the other in each row, the last of which may be pads."""
    position, segment = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for b in range(batch):
        cuts = np.sort(rng.integers(0, length + 1, 3))
        for number, run in enumerate(np.split(np.arange(length), cuts)):
            position[b, run] = np.arange(len(run))
            segment[b, run] = number if number < 3 else -1
    return Tokens(position, segment)
