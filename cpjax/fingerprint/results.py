"""What is handed over: rounding of out, subnormal numbers, lse and its base."""

import numpy as np

from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.fingerprint.probe import (
    HEAD_DIM,
    NONE,
    ROWS,
    UNTOLD,
    Answer,
    Answers,
    Line,
    Probe,
    digits_of,
    finite,
    missing,
    scored,
    scores_of,
)

KEYS = 64
LIVE = np.array([0, 1, 2, 3])
"""Four keys count, all others have the score `NONE`: the row sum is 4, and out is exact but for its own rounding."""


def probes(fmt: Format) -> dict[str, Probe]:
    """Means of four values; values and results below the least normal number; one key with any score."""
    rng = np.random.default_rng(3)
    score = np.full((1, ROWS, KEYS), NONE)
    score[:, :, LIVE] = 0
    means = np.zeros((1, KEYS, HEAD_DIM))
    means[0, LIVE] = 1 + 2 * fmt.u * rng.integers(0, 16, (4, HEAD_DIM))
    small = np.zeros((1, KEYS, HEAD_DIM))
    small[0, LIVE[0]] = fmt.least_normal / 2
    single = np.full((1, ROWS, KEYS), NONE)
    sizes = rng.uniform(1, 2000, (1, ROWS)) * np.where(np.arange(ROWS) % 2, 1, -1)
    single[:, :, 5] = digits_of(sizes, 2 * min(fmt.digits, 11))
    several = np.zeros((1, ROWS, KEYS))
    eye = np.eye(KEYS, HEAD_DIM)[None]
    return {
        "means": scored(score, means, fmt),
        "small": scored(score, small, fmt),
        "one-key": scored(single, eye, fmt),
        "equal-keys": scored(several, eye, fmt),
    }


def read(fmt: Format, asked: dict[str, Probe], answers: Answers) -> list[Line]:
    """Lines on out and on lse."""
    return [
        _out(fmt, asked["means"], answers.get("means")),
        _small(fmt, answers.get("small")),
        *_lse(asked["one-key"], answers.get("one-key"), answers.get("equal-keys")),
    ]


def _out(fmt: Format, asked: Probe, answer: Answer | None) -> Line:
    name = "rounding of out"
    if answer is None or not finite(answer):
        return missing(name)
    if fmt.digits > 11:
        return Line(name, f"{UNTOLD}: out is float32, as the arithmetic is", "")
    exact = asked.value[0, LIVE, 0].astype(np.float64).mean(axis=0)
    out, nearest = answer.out[0, :, 0], fmt.round(exact)
    below = np.floor(exact / (2 * fmt.u)) * 2 * fmt.u
    is_tie = exact - below == fmt.u
    evidence = (
        f"means of four values near 1, {out.size:,} of them, {int(is_tie.sum()) * ROWS} half way between two numbers"
    )
    if (out == below).all():
        return Line(name, "toward zero", evidence, "toward zero")
    if not (out == nearest)[:, ~is_tie].all():
        return Line(name, f"{UNTOLD}: neither to nearest nor toward zero", evidence)
    if (out == nearest).all():
        return Line(name, "to nearest, ties to even", evidence, "nearest even")
    return Line(name, "to nearest; ties not to even, or exp(0) or 1/4 is not exact", evidence, "nearest")


def _small(fmt: Format, answer: Answer | None) -> Line:
    name = "subnormal numbers"
    if answer is None or not finite(answer):
        return missing(name)
    given = answer.out[0, :, 0]
    kept = bool((given == fmt.least_normal / 8).all())
    lost = bool((given == 0).all())
    evidence = f"a value of half the least normal number, with the weight 1/4: out is {given.flat[0]:.3g}"
    if kept or lost:
        words = "kept, in values and in out" if kept else "a subnormal value, or a subnormal out, becomes 0"
        return Line(name, words, evidence, "kept" if kept else "flushed")
    return Line(name, f"{UNTOLD}: out is neither 0 nor right", evidence)


def _lse(asked: Probe, one: Answer | None, several: Answer | None) -> list[Line]:
    names = "lse", "base of exp"
    if one is None or several is None:
        return [missing(name) for name in names]
    if one.lse is None or several.lse is None:
        return [Line("lse", "none is handed over", "", "none"), Line(names[1], f"{UNTOLD}: there is no lse", "")]
    lse, count = one.lse[0, :, 0], several.lse[0, :, 0]
    score = scores_of(asked)[:, 5]
    size = float(np.median(lse / score))
    more = float(np.median(count))
    evidence = f"one key counts: lse / score is {size:.5f}; {KEYS} equal keys of score 0: lse is {more:.5f}"
    log = np.log(KEYS)
    kinds = {
        "natural logarithm": (1.0, log),
        "base two": (1 / np.log(2), log / np.log(2)),
        "max + log2 Σ: the maximum is natural, the logarithm is not": (1.0, log / np.log(2)),
        "log2 of the maximum's part, natural of the sum's": (1 / np.log(2), log),
        "the row sum, without the maximum": (0.0, KEYS),
        "the maximum alone": (1.0, 0.0),
    }
    fits = [w for w, (a, b) in kinds.items() if abs(size - a) < 5e-3 and abs(more - b) < 2e-2 * (1 + abs(b))]
    if len(fits) != 1:
        return [Line("lse", f"{UNTOLD}: no convention that this probe knows", evidence), missing(names[1])]
    lines = [Line("lse", _format_of(np.concatenate([lse, count]), fits[0]), evidence, fits[0].split()[0])]
    if fits[0] != "natural logarithm":
        return [*lines, Line(names[1], f"{UNTOLD}: asked of a natural lse", "")]
    single = np.float32
    exact = score.astype(single)
    same = float((lse.astype(single) == exact).mean())
    through = (exact * single(np.log2(np.e))) * single(np.log(2))
    by_two = float((lse.astype(single) == through).mean())
    evidence = f"lse of one key: the score itself in {same:.0%} of the rows, ln 2 · (log2 e · score) in {by_two:.0%}"
    if same == 1.0:
        return [*lines, Line(names[1], "e, or the maximum is kept as the score is", evidence, "e")]
    if by_two > max(0.5, same):
        return [*lines, Line(names[1], "two: scores are multiplied with log2 e, lse with ln 2", evidence, "two")]
    return [*lines, Line(names[1], f"{UNTOLD}: neither explains most rows", evidence)]


def _format_of(lse: np.ndarray, convention: str) -> str:
    for name in ("bfloat16", "float16"):
        if (FORMATS[name].round(lse) == lse).all():
            return f"{convention}, in numbers of {name}"
    return f"{convention}, in float32"
