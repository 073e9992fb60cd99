"""Faults of the merge and of the row sum: partial results, lse, one term more in the denominator."""

from dataclasses import replace

import numpy as np

from cpjax.trial.fault_case import LN2, Case, Made, named
from cpjax.trial.plain_attention import Join, Work, attend, scores
from cpjax.trial.settings import PREFIX, TOKENS


def _in_parts(case: Case) -> Work:
    """Cut as the partition says; where it says nothing, as is usual: prefix and suffix, tokens in turn, four runs."""
    index, layout = np.arange(TOKENS), case.setting.layout
    if case.setting.cp > 1:
        return case.work
    if layout == "prefix":
        part = (index >= PREFIX).astype(int)
    else:
        part = index % 4 if layout in ("packed", "decode") else index * 4 // TOKENS
    return replace(
        case.work, part=part, order=np.broadcast_to(np.arange(part.max() + 1), (len(case.work.order), part.max() + 1))
    )


def wrong_base(case: Case, is_natural: bool) -> Made:
    """Partial results merged by the exponential of the other base; lse is the merge's or is right."""
    join = Join(np.exp2, np.log2) if is_natural else Join(factor=1 / LN2)
    result = attend(replace(_in_parts(case), join=join))
    if case.rng.random() < 0.5:
        result = result._replace(lse=case.right.lse)
    words = "is natural, the merge took exp2" if is_natural else "is in base two, the merge took exp"
    return Made(result, named(f"merged in the wrong base: their lse {words} of it"))


def not_rescaled(case: Case) -> Made | None:
    """Merges add what is new without scaling down what is there."""
    if case.setting.cp == 1:
        return None
    return Made(case.with_(join=Join(rescales=False)), named("was not rescaled at merge"))


def lse_as(case: Case, form: str, words: str) -> Made:
    """Something else is handed over as lse; `out` is right."""
    lse = case.right.lse.astype(np.float64)
    top = _maximum(case)
    with np.errstate(invalid="ignore", over="ignore"):
        wrong = {
            "log2": lse / LN2,
            "log10": lse / np.log(10),
            "negated": -lse,
            "maximum": top,
            "sum": np.exp(lse - top),
            "log of the sum": lse - top,
            "maximum + log2": top + (lse - top) / LN2,
            "zero": 0 * top,
            "+ 0.25": lse + 0.25,
        }[form]
    return Made(case.right._replace(lse=np.where(np.isneginf(lse), lse, wrong).astype(np.float32)), named(words))


def _maximum(case: Case) -> np.ndarray:
    """The row maximum that the kernel has: of the logits as it rounds them, `[B, T, N]`."""
    top = np.where(case.work.seen[:, None], scores(case.work), -np.inf).max(axis=-1).swapaxes(1, 2).astype(np.float64)
    return np.where(np.isneginf(top), 0.0, top)


def lse_nan(case: Case) -> Made:
    """lse of one row is NaN."""
    lse = case.right.lse.copy()
    lse[0, -1, 0] = np.nan
    return Made(case.right._replace(lse=lse), named("lse is NaN or infinite of 1 row"))


def sink_added(case: Case) -> Made:
    """A sink that nobody stated."""
    sink = case.rng.uniform(0, 3, case.problem.query.shape[2]).astype(np.float32)
    return Made(case.with_(sink=sink), named(r"one more term exp\(x\), of value 0"))


def page_of_zeros(case: Case) -> Made:
    """16 keys of zero with values of zero, as of a page that was never filled."""
    sink = np.full(case.problem.query.shape[2], np.log(16), np.float32)
    return Made(case.with_(sink=sink), named(r"one more term exp\(x\), of value 0"))


LSE_FORMS = {
    "log2": "lse is the logarithm to base two",
    "log10": "lse is the logarithm to base ten",
    "negated": "lse has the other sign",
    "maximum": "lse is the row maximum; the logarithm of the sum was not added",
    "sum": "lse is the sum itself",
    "log of the sum": "lse is the logarithm of the sum; the row maximum was not added",
    "maximum + log2": "lse is the row maximum plus log2 of the sum",
    "zero": "lse is zero, as if never written",
    "+ 0.25": r"lse is off by \+0.25",
}
