"""Which axes lse has and to which base its logarithm is: as it was said, or found by comparing with exact lse."""

import math
from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.dumps.question import BASES, LSE_AXES
from cpjax.crosscheck.judging.problem import Problem
from cpjax.errors import InputError
from cpjax.mask import Tokens, visible
from cpjax.wording import counted

ROWS = 64
"""Queries, drawn at random, in which readings are compared."""

NEAR = 0.02
"""Rounding moves no lse further than this, relative to 1 + |lse|: FP16 scores, far less; a wrong base, far more."""

MOST = 0.9
"""Of the compared numbers, so many must be near: a few rows may be wrong, and the judge shall say so."""

NAMES = {"bsn": "[B, T, N]", "bns": "[B, N, T]", "tn": "[T, N]", "nt": "[N, T]"}
LAST = {"": "", "1": " with an axis of 1 behind", "8": " with 8 equal numbers behind"}


class Reading(NamedTuple):
    """One way to read lse."""

    axes: str
    base: str
    lse: np.ndarray
    """`[B, T, N]`, natural logarithm."""

    @property
    def says(self) -> str:
        """In words."""
        axes, last = (self.axes[:-1], self.axes[-1]) if self.axes[-1] in "18" else (self.axes, "")
        return f"{NAMES[axes]}{LAST[last]}, {'natural logarithm' if self.base == 'e' else 'logarithm to base two'}"


def shaped(array: np.ndarray, shape: tuple[int, int, int], layout: str | None) -> dict[str, np.ndarray]:
    """Word of layout → the array as `[B, T, N]`, for every layout (or the one said) in which its shape is right.

    >>> list(shaped(np.zeros((1, 3, 2)), (1, 2, 3), None))
    ['bns']
    >>> list(shaped(np.zeros((4, 3, 1)), (1, 4, 3), None))
    ['tn1']
    """
    batch, length, heads = shape
    sizes = {"bsn": (batch, length, heads), "bns": (batch, heads, length)}
    if batch == 1:
        sizes |= {"tn": (length, heads), "nt": (heads, length)}
    found = {}
    for last in ("", "1", "8"):
        if last and (array.ndim < 2 or array.shape[-1] != int(last)):
            continue
        if last == "8" and not np.array_equal(array, np.broadcast_to(array[..., :1], array.shape), equal_nan=True):
            continue
        plain = array[..., 0] if last else array
        for axes in LSE_AXES:
            word = f"{axes}{last}"
            if plain.shape == sizes.get(axes) and layout in (None, word):
                whole = plain.swapaxes(-1, -2) if axes in ("bns", "nt") else plain
                found[word] = whole.reshape(shape)
    return found


def choose(
    problem: Problem, readings: dict[str, np.ndarray], base: str | None, options: dict[str, np.ndarray | float]
) -> tuple[Reading, str | None]:
    """The reading that is nearest to exact lse, and a sentence if it was not said.

    Where none is near, it is the first, with the natural logarithm: then lse is wrong, and the diagnosis says how.
    """
    bases = BASES if base is None else (base,)
    candidates = [
        Reading(axes, b, np.asarray(x, np.float64) * math.log(2) if b == "2" else x)
        for axes, x in readings.items()
        for b in bases
    ]
    if len(candidates) == 1:
        return candidates[0], None
    exact, places = exact_lse(problem, options)
    shares = [_share(one.lse[places], exact) for one in candidates]
    best = int(np.argmax(shares))
    if not shares[best] >= MOST:
        return candidates[0], f"lse: taken as {candidates[0].says}; read in no way is it near what it should be"
    others = [
        one.says for one, share in zip(candidates, shares, strict=True) if share >= MOST and one is not candidates[best]
    ]
    also = f"; {' and '.join(others)} would fit too" if others else "; no other reading fits"
    return candidates[best], f"lse: taken as {candidates[best].says}{also}; say --lse-base and --lse-layout"


def _share(lse: np.ndarray, exact: np.ndarray) -> float:
    seen = np.isfinite(exact)
    if not seen.any():
        return 1.0
    return float(np.mean(np.abs(lse[seen] - exact[seen]) <= NEAR * (1 + np.abs(exact[seen]))))


def exact_lse(
    problem: Problem, options: dict[str, np.ndarray | float], seed: int = 0
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """lse in float64 of some queries, all heads, `[R, N]`, and which these are (batch, token).

    Args:
      options: softcap, sink, bias, alibi, as `cpjax.crosscheck.judge` takes them.
    """
    places = np.argwhere(problem.is_judged)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(places))[:ROWS])
    batch, token = places[chosen].T
    softcap, sink, bias, alibi = (options.get(name) for name in ("softcap", "sink", "bias", "alibi"))
    shape = (*problem.query.shape[:1], problem.query.shape[2], problem.query.shape[1], problem.key.shape[1])
    rows = []
    for b, t in zip(batch, token, strict=True):
        q, kv = (
            Tokens(*(np.asarray(x)[b : b + 1] for x in places)) for places in (problem.q_tokens, problem.kv_tokens)
        )
        one = Tokens(*(x[:, t : t + 1] for x in q))
        key = np.repeat(problem.key[b].astype(np.float64), problem.group, axis=1)
        score = problem.scale * np.einsum("nh,snh->ns", problem.query[b, t].astype(np.float64), key)
        if softcap is not None:
            score = float(softcap) * np.tanh(score / float(softcap))
        if alibi is not None:
            slopes = np.broadcast_to(np.asarray(alibi, np.float64), shape[:2])[b]
            score = score - slopes[:, None] * np.abs(one.position - kv.position)
        if bias is not None:
            score = score + np.broadcast_to(np.asarray(bias), shape)[b, :, t].astype(np.float64)
        score = np.where(visible(problem.mask, one, kv)[0], score, -np.inf)
        if sink is not None:
            score = np.concatenate([score, np.asarray(sink, np.float64)[:, None]], axis=1)
        rows.append(np.logaddexp.reduce(score, axis=1))
    return np.array(rows), (batch, token)


def without_infinity(problem: Problem, lse: np.ndarray) -> tuple[np.ndarray, str | None]:
    """−inf for +inf in rows that see no key, as FlashAttention-2 writes it; and a sentence if there was any."""
    if not np.isposinf(lse).any():
        return lse, None
    blind = np.zeros(lse.shape, bool)
    for b, t in np.argwhere(np.isposinf(lse).all(axis=2)):
        one = Tokens(*(np.asarray(x)[b : b + 1, t : t + 1] for x in problem.q_tokens))
        blind[b, t] = not visible(
            problem.mask, one, Tokens(*(np.asarray(x)[b : b + 1] for x in problem.kv_tokens))
        ).any()
    count = int(blind[..., 0].sum())
    if not count:
        return lse, None
    says = (
        f"lse: +inf in {counted(count, 'query', 'queries')} that {'sees' if count == 1 else 'see'} no key is "
        "taken for −inf"
    )
    return np.where(blind, -np.inf, lse), says


def read_lse(parts: list[np.ndarray], shapes: list[tuple[int, int, int]], layout: str | None, path: str) -> dict:
    """Word of layout → lse `[B, T, N]` of each rank, in every layout that fits all ranks.

    Raises:
      InputError: none fits.
    """
    each = [shaped(part, shape, layout) for part, shape in zip(parts, shapes, strict=True)]
    words = [word for word in each[0] if all(word in one for one in each)]
    if not words:
        b, t, n = shapes[0]
        said = "" if layout is None else f" as --lse-layout {layout}"
        raise InputError(
            f"--lse {path}: has shape {list(parts[0].shape)}{said}; with batch {b}, {counted(t, 'token')} and "
            f"{counted(n, 'head')} it must be [B, T, N], [B, N, T], [T, N] or [N, T], with an axis of 1 or 8 "
            "equal numbers behind or not"
        )
    return {word: [one[word] for one in each] for word in words}
