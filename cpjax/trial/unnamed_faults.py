"""Faults that have no entry in the dictionary: the right answer is where they are, and that the cause is not known."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cpjax.trial.fault_case import Case, Made, Reported
from cpjax.trial.plain_attention import attend
from cpjax.trial.problem import Result
from cpjax.trial.settings import DIM, TOKENS


def _changed(change: Callable[[np.ndarray, np.random.Generator], None]) -> Reported:
    """`out` changed in place, in float64, and rounded again; lse is right."""

    def make(case: Case) -> Made:
        out = case.right.out.astype(np.float64)
        change(out, case.rng)
        return Made(case.right._replace(out=out.astype(case.right.out.dtype)))

    return Reported(make)


def _column(out: np.ndarray, rng: np.random.Generator) -> None:
    out[..., rng.integers(out.shape[3])] *= 1.01


def _element(out: np.ndarray, rng: np.random.Generator) -> None:
    out[0, -2, 1, rng.integers(out.shape[3])] += 0.1


def _row(out: np.ndarray, rng: np.random.Generator) -> None:
    out[0, -2, 1] *= 1.02


def _tile(out: np.ndarray, rng: np.random.Generator) -> None:
    out[0, -16:-2, 1, 8:16] = rng.standard_normal(out[0, -16:-2, 1, 8:16].shape)


def _noise(out: np.ndarray, rng: np.random.Generator) -> None:
    out[:, :, 1] += rng.choice([0.003, 0.01, 0.1]) * rng.standard_normal(out[:, :, 1].shape)


def _noise_everywhere(out: np.ndarray, rng: np.random.Generator) -> None:
    out += 0.02 * rng.standard_normal(out.shape)


def _foreign_rows(out: np.ndarray, rng: np.random.Generator) -> None:
    out[0, -20:-4] = 0.3 * rng.standard_normal(out[0, -20:-4].shape)


def _columns_exchanged(out: np.ndarray, rng: np.random.Generator) -> None:
    out[..., :16] = np.concatenate([out[..., 8:16], out[..., :8]], axis=-1)


def _one_negative(out: np.ndarray, rng: np.random.Generator) -> None:
    out[..., rng.integers(out.shape[3])] *= -1


def scale_and_run(case: Case) -> Made:
    """Two faults at once: another scale, and keys that were lost."""
    lost = np.where((np.arange(TOKENS) >= 20) & (np.arange(TOKENS) < 45), 0.0, 1.0)
    return Made(case.with_(scale=1.3 * case.work.scale, weight=lost))


def sink_and_window(case: Case) -> Made:
    """Two faults at once: a sink and a window that nobody stated."""
    sink = np.full(case.setting.heads, 1.5, np.float32)
    return Made(case.with_(sink=sink, seen=case.work.seen & (case.work.distance < 25)))


def values_and_scale(case: Case) -> Made:
    """Two faults at once: values of the next token, another scale."""
    return Made(case.with_(value=np.roll(case.work.value, -1, axis=1), scale=0.8 * case.work.scale))


def other_request(case: Case) -> Made:
    """A block of keys and values is that of a request that is not here."""
    key, value = case.work.key.copy(), case.work.value.copy()
    for x in (key, value):
        x[:, 16:48] = case.rng.standard_normal(x[:, 16:48].shape)
    return Made(case.with_(key=key, value=value))


def half_head_dim(case: Case) -> Made:
    """The second half of the head dims did not enter q·k."""
    query = case.work.query.copy()
    query[..., DIM // 2 :] = 0
    return Made(case.with_(query=query))


def rope(case: Case) -> Made:
    """Keys are turned as by a rotary embedding with another base."""
    key, half = case.work.key, DIM // 2
    rate = 10000.0 ** (-np.arange(half) / half) - 20000.0 ** (-np.arange(half) / half)
    angle = (np.arange(key.shape[1])[:, None] * rate)[None, :, None]
    a, b = key[..., :half], key[..., half:]
    turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
    return Made(case.with_(key=np.concatenate(turned, axis=-1).astype(key.dtype)))


def order_of_dims(case: Case) -> Made:
    """Keys interleave their dims, queries do not."""
    half = DIM // 2
    dims = np.arange(DIM).reshape(2, half).T.ravel()
    return Made(case.with_(key=case.work.key[..., dims]))


def random_keys_lost(case: Case) -> Made:
    """One key in eight is lost, here and there."""
    return Made(case.with_(weight=(case.rng.random(TOKENS) > 0.125).astype(float)))


def other_queries(case: Case) -> Made:
    """Each query is that of the token before."""
    return Made(case.with_(query=np.roll(case.work.query, 1, axis=1)))


def wrong_and_noisy(case: Case) -> Made:
    """A wrong scale in one half of the rows, noise in the other."""
    wrong = attend(replace(case.work, scale=1.2 * case.work.scale))
    out = wrong.out.astype(np.float64)
    out[:, ::2] += 0.05 * case.rng.standard_normal(out[:, ::2].shape)
    return Made(Result(out.astype(wrong.out.dtype), wrong.lse))


UNNAMED: dict[str, Reported] = {
    "a column × 1.01": _changed(_column),
    "one element": _changed(_element),
    "one row × 1.02": _changed(_row),
    "a garbage tile": _changed(_tile),
    "noise in one head": _changed(_noise),
    "noise everywhere": _changed(_noise_everywhere),
    "rows of something else": _changed(_foreign_rows),
    "columns exchanged": _changed(_columns_exchanged),
    "a column negated": _changed(_one_negative),
    "scale, and keys lost": Reported(scale_and_run),
    "sink, and window": Reported(sink_and_window),
    "values, and scale": Reported(values_and_scale),
    "scale, and noise": Reported(wrong_and_noisy),
    "stale block of another request": Reported(other_request),
    "half of the head dims": Reported(half_head_dim),
    "keys turned by another rope": Reported(rope),
    "dims in another order": Reported(order_of_dims),
    "keys lost here and there": Reported(random_keys_lost),
    "queries of the token before": Reported(other_queries),
}
"""By name."""
