"""What a diagnostic case says of a result in its own words: its inputs are such that the outputs name the keys.

Only told; the verdict does not rest on it.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool

from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.files.result import Result
from cpjax.mask import PAD, Mask, visible
from cpjax.wording import counted, is_are

MOST = 8
"""Keys that a sentence names."""


def read(case: Case, result: Result) -> Iterator[str]:
    """Sentences on what is wrong, of a case whose `about` has a `reading` (docs/formats.md); none for other cases."""
    reading = READINGS.get(str(case.about.get("reading")))
    coded = case.layout == "zigzag" and len(case.query) == 1 and case.value.shape[3] >= case.key.shape[1]
    if reading is not None and coded:
        yield from reading(case, result)


def _seen(case: Case, result: Result) -> Iterator[str]:
    """q = 0 and v one-hot: of n keys that were seen each has the weight 1/n; n is S at most."""
    may = _visible(case)
    count = may.sum(axis=1)
    real = np.asarray(case.q_tokens.segment)[0] != PAD
    weights = _by_key(case, result.out)
    saw = weights > 0.5 / may.shape[1]
    wrong = (saw != may[:, None]).any(axis=2) & real[:, None]
    for t, n in np.argwhere(wrong)[:1]:
        missed, extra = (np.flatnonzero(x) for x in (may[t] & ~saw[t, n], saw[t, n] & ~may[t]))
        seen = int((saw[t, n] & may[t]).sum())
        more = f", and {len(extra)} that it may not see ({_listed(extra)})" if len(extra) else ""
        less = f" (not {_listed(missed)})" if len(missed) else ""
        yield f"out: query {t} of head {n} saw {seen} of its {counted(count[t], 'key')}{less}{more}{_alike(wrong)}"
    if result.lse is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            terms = np.exp(result.lse[0].astype(np.float64))
            off = ~(np.abs(terms - count[:, None]) < 0.5) & real[:, None]
        for t, n in np.argwhere(off)[:1]:
            visible = f"{count[t]} {is_are(count[t])} visible"
            yield f"lse: query {t} of head {n} counted {terms[t, n]:.4g} keys, {visible}{_alike(off)}"


def _one_hot(case: Case, result: Result) -> Iterator[str]:
    """Each query points at one key, and v names it."""
    group = case.query.shape[2] // case.key.shape[2]
    score = np.einsum("tnh,snh->tns", *(x[0].astype(np.float64) for x in (case.query, case.key.repeat(group, axis=2))))
    wanted = np.where(_visible(case)[:, None], score, -np.inf).argmax(axis=2)
    weights = _by_key(case, result.out)
    weights = np.where(np.isfinite(weights), weights, -np.inf)
    got, real = weights.argmax(axis=2), np.asarray(case.q_tokens.segment)[0] != PAD
    wrong = ((got != wanted) | ~(weights.max(axis=2) > 0.5)) & real[:, None]
    for t, n in np.argwhere(wrong)[:1]:
        found = f"key {got[t, n]}" if weights[t, n].max() > 0.5 else "no key"
        yield f"out: query {t} of head {n} read {found}; it points at key {wanted[t, n]}{_alike(wrong)}"


def _future(case: Case, result: Result) -> Iterator[str]:
    """Hidden values are larger than any that may be seen."""
    value = np.abs(case.value[0].astype(np.float64)).max(axis=(1, 2))
    most = np.where(_visible(case), value, 0.0).max(axis=1)
    out = np.abs(result.out[0].astype(np.float64)).max(axis=2)
    wrong = ~(out <= 1.01 * most[:, None]) & (np.asarray(case.q_tokens.segment)[0] != PAD)[:, None]
    for t, n in np.argwhere(wrong)[:1]:
        yield (
            f"out: query {t} of head {n} saw what is hidden: |out| is {out[t, n]:.4g}, visible values are at most "
            + (f"{most[t]:.4g}{_alike(wrong)}")
        )


READINGS = {"seen": _seen, "one-hot": _one_hot, "future": _future}


def _visible(case: Case) -> Bool[np.ndarray, "T S"]:
    return np.array(visible(Mask(is_causal=case.is_causal, window=case.window), case.q_tokens, case.kv_tokens))[0]


def _by_key(case: Case, out: np.ndarray) -> np.ndarray:
    """`out` with its columns in the order of the keys that they name, `[T, N, S]`."""
    group, keys, columns = case.query.shape[2] // case.key.shape[2], case.key.shape[1], case.value.shape[3]
    column = (np.arange(keys) + np.arange(out.shape[2])[:, None] // group) % columns
    return np.take_along_axis(out[0].astype(np.float64), column[None], axis=2)


def _listed(keys: np.ndarray) -> str:
    return "key " * (len(keys) == 1) + ", ".join(map(str, keys[:MOST])) + ", …" * (len(keys) > MOST)


def _alike(wrong: Bool[np.ndarray, "T N"]) -> str:
    others = int(wrong.sum()) - 1
    return f"; {others:,} other rows are wrong too" if others else ""
