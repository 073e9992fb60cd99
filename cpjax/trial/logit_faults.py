"""Faults between scale · q·k and the softmax, and of the format in which a step is done."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cpjax.trial.fault_case import LN2, Case, Made, Name, named
from cpjax.trial.problem import Problem, Result
from cpjax.trial.settings import DIM

MSCALE_SQUARED = (0.1 * np.log(40) + 1) ** 2
"""DeepSeek's YaRN."""


def scaled(case: Case, factor: float, words: str) -> Made:
    """The scale times a factor."""
    return Made(case.with_(scale=case.work.scale * factor), named(words))


def scaled_near(case: Case, factor: float) -> Made:
    """The scale times a factor near to one that has a name, and none of that name."""
    number = factor * float(np.exp(case.rng.choice([-1, 1]) * case.rng.uniform(0.005, 0.02)))
    words = r"the scale is ([\d.e+-]+) times the stated one"
    return Made(case.with_(scale=case.work.scale * number), (Name(words, number, 0.003),))


def scaled_by_any(case: Case) -> Made:
    """The scale off by 3 to 100 per cent."""
    factor = float(np.exp(case.rng.choice([-1, 1]) * case.rng.uniform(0.03, 0.7)))
    return Made(
        case.with_(scale=case.work.scale * factor), (Name(r"the scale is ([\d.e+-]+) times the stated one", factor),)
    )


def averaged(case: Case) -> Made:
    """Queries and keys are ignored."""
    return Made(case.with_(query=0 * case.work.query), named("queries and keys were ignored"))


def softcap_applied(case: Case) -> Made:
    """A usual softcap that nobody stated."""
    softcap = float(case.rng.choice([50.0, 30.0, 20.0, 15.0, 10.0]))
    return Made(case.with_(softcap=softcap), named(f"a softcap of {softcap:g} was applied that was not stated"))


def slopes(heads: int) -> np.ndarray:
    """ALiBi's, for a power of two of heads."""
    return 2.0 ** (-8 / heads * np.arange(1, heads + 1))


def slopes_of(problem: Problem) -> np.ndarray:
    """`[B, N]` of the problem."""
    return np.broadcast_to(
        slopes(problem.query.shape[2]).astype(np.float32), (len(problem.query), problem.query.shape[2])
    )


def alibi_applied(case: Case) -> Made:
    """ALiBi that nobody stated."""
    return Made(case.with_(alibi=slopes_of(case.problem)), named("ALiBi was applied, with the slopes of the paper"))


def without(case: Case, term: str, words: str) -> Made:
    """A stated term of the logits is left away."""
    return Made(case.with_(**{term: None}), named(words))


def alibi_negated(case: Case) -> Made:
    """Far keys are preferred."""
    assert case.work.alibi is not None
    return Made(case.with_(alibi=-case.work.alibi), named("the ALiBi slopes were applied with the other sign"))


def overflow(case: Case) -> Made | None:
    """q·k in FP16: rows in which it exceeds 65,504 are NaN."""
    if case.setting.profile != "flash_fp16":
        return None
    raw = np.einsum("btnh,bsnh->btns", case.work.query, case.work.key)
    over = (np.where(case.work.seen[:, :, None], np.abs(raw), 0) > 65504).any(axis=-1)
    out = case.right.out.copy()
    out[over] = np.nan
    lse = case.right.lse.copy()
    lse[over] = np.nan
    return Made(Result(out, lse), named("q·k, before it is scaled, exceeds 65,504"))


def rounded_to(case: Case, step: str, words: str, fmt: str) -> Made | None:
    """A step is rounded to another format."""
    changes = {step: fmt, "block": fmt} if step == "carry" else {step: fmt}
    arithmetic = replace(case.work.arithmetic, **changes)
    return Made(case.with_(arithmetic=arithmetic), named(words))


def fp16_accumulator(case: Case) -> Made:
    """The sum of e^… v is kept in FP16; what is told is the size of errors, or what rounds as much."""
    return Made(case.with_(accumulator="float16"), named("consistent with"))


def named_scales() -> Iterator[tuple[str, float, str]]:
    """Of each name the factor on the scale, and the words that are right."""
    scale = DIM**-0.5
    yield "inverted", scale**-2, "the scale is the inverse of the stated one"
    yield "not applied", 1 / scale, "the scale was not applied"
    yield "squared", scale, "the scale was applied twice"
    yield "negated", -1.0, "the scale has the other sign"
    yield "without mscale²", 1 / MSCALE_SQUARED, "the scale lacks YaRN's factor mscale²"
    yield "mscale² twice", MSCALE_SQUARED, "the scale has YaRN's factor mscale² twice"
    yield "× log2(e)", 1 / LN2, r"scale times log2\(e\)"
    yield "× ln 2", LN2, "scale times ln 2"
    yield "log2(e)", 1 / LN2 / scale, r"the scale is log2\(e\): only"
    yield "without its root", scale**-0.5, "the scale was applied by its root only"
    yield "mscale once", MSCALE_SQUARED**-0.5, "the scale lacks one of YaRN's two factors mscale"
    yield "mscale³", MSCALE_SQUARED**0.5, "the scale has YaRN's factor mscale once more"
    for dim in (DIM // 2, 2 * DIM, 192, 576):
        yield f"1/√{dim}", (DIM / dim) ** 0.5, f"the scale is 1/√{dim}, that of a head_dim of {dim}"
