"""Probabilities: their format as the factor of v and in the row sum, what becomes of tiny ones, how exact exp is."""

from collections.abc import Callable

import numpy as np

from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.fingerprint.probe import (
    HALF,
    HEAD_DIM,
    NONE,
    ROWS,
    UNTOLD,
    Answer,
    Answers,
    Line,
    Probe,
    finite,
    missing,
    scored,
    scores_of,
    settled,
    toward_zero,
)

KEYS = 64
ANCHORS = np.unique([*range(0, KEYS, 8), KEYS - 1])
"""Keys of score 0, so that every tile of 8 keys and more has the maximum 0."""
REST = np.setdiff1d(np.arange(KEYS), ANCHORS)
PAIRS = REST[: len(REST) // 2 * 2].reshape(-1, 2)
"""Two keys whose values are 1 and −1: out is the difference of their probabilities."""
TINY = 2.0**15
"""Value of a key whose probability is near the least FP16 numbers."""


def probes(fmt: Format) -> dict[str, Probe]:
    """Differences of two probabilities; sums of equal ones; tiny ones; single ones.

    Scores are numbers of the format (of FP16 for float32), so that a kernel that rounds scores does not change them.
    """
    rng = np.random.default_rng(2)
    plain = fmt if fmt.digits <= 11 else FORMATS["float16"]
    differences = np.zeros((ROWS, KEYS))
    first = plain.round(rng.uniform(0.3, 4, (ROWS, len(PAIRS))))
    differences[:, PAIRS[:, 0]] = -first
    differences[:, PAIRS[:, 1]] = -plain.round(first + plain.spacing(first) * rng.integers(1, 4, first.shape))
    values = np.zeros((KEYS, HEAD_DIM))
    values[PAIRS[:, 0], np.arange(len(PAIRS))], values[PAIRS[:, 1], np.arange(len(PAIRS))] = 1, -1
    values[0, -1] = 1

    sums = np.zeros((ROWS, KEYS))
    sums[:, REST] = _rounded_down(plain)[:, None]

    tiny = np.zeros((ROWS, KEYS))
    tiny[:, REST] = -plain.round(rng.uniform(10.5, 16.6, (ROWS, len(REST))))
    of_tiny = np.zeros((KEYS, HEAD_DIM))
    of_tiny[REST, np.arange(len(REST))] = TINY
    of_tiny[0, -1] = 1

    single = np.zeros((ROWS, KEYS))
    single[:, REST] = -plain.round(np.append(np.linspace(0.01, 3, ROWS // 2), np.linspace(3.2, 16, ROWS // 2)))[:, None]
    single[-1, REST] = NONE
    return {
        "differences": scored(differences[None], values[None], fmt),
        "sums": scored(sums[None], np.ones((1, KEYS, HEAD_DIM)), fmt),
        "tiny": scored(tiny[None], of_tiny[None], fmt),
        "exponentials": scored(single[None], np.eye(KEYS)[None], fmt),
    }


def _rounded_down(plain: Format) -> np.ndarray:
    """Scores whose probabilities lie just above 1/2 and lose nearly a whole unit of 2^-digits by rounding."""
    some = -np.unique(plain.round(np.linspace(0.5, np.log(2), 20_000)))
    p = np.exp(some)
    best = np.argsort((plain.round(p) - p) / p)[:4]
    return np.resize(some[best], ROWS)


ROUNDINGS = {
    ("float32", "not rounded below float32"): lambda p: p,
    **{(name, f"rounded to {name}, to nearest"): fmt.round for name, fmt in HALF.items()},
    **{
        (f"{name} toward zero", f"cut off to {name}, toward zero"): lambda p, fmt=fmt: toward_zero(p, fmt)
        for name, fmt in HALF.items()
    },
}
"""What may be done to p as the factor of v."""
ERRORS = 2.0 ** -np.arange(22, 9, -1)
"""Relative errors of exp that are tried: a p near the middle of two numbers may be rounded to either."""
ENOUGH, CLEAR = 0.99, 4.0
"""The share of the measurements that is explained; how many times less error of exp than others need this takes."""


def read(fmt: Format, asked: dict[str, Probe], answers: Answers) -> list[Line]:
    """Four lines."""
    factor, error = _factor(fmt, asked["differences"], answers.get("differences"))
    return [
        factor,
        _sum(fmt, factor, asked["sums"], answers.get("sums")),
        _tiny(fmt, asked["tiny"], answers.get("tiny")),
        _exponential(fmt, error, asked["exponentials"], answers.get("exponentials")),
    ]


def _factor(fmt: Format, asked: Probe, answer: Answer | None) -> tuple[Line, float]:
    """The line, and the error of exp with which it holds: infinite if it is not told."""
    name = "p as the factor of v"
    if answer is None or not finite(answer):
        return missing(name), np.inf
    p = np.exp(scores_of(asked))
    total = p.sum(axis=1, keepdims=True)
    out = answer.out[0, :, 0, : len(PAIRS)]
    needed = {}
    for (code, words), rounding in ROUNDINGS.items():
        needed[code, words] = _error_needed(fmt, out, lambda p, r=rounding: r(p) / total, p)
        if code != "float32":
            normalised = f"normalised {code}", f"p / Σ p is {words}"
            needed[normalised] = _error_needed(fmt, out, lambda p, r=rounding: r(p / total), p)
    ranked = sorted(needed.items(), key=lambda item: item[1])
    told = "; ".join(f"{words}: {_power(error)}" for (_, words), error in ranked[:3])
    evidence = f"{out.size:,} differences of two probabilities; the error of exp with which all are explained: {told}"
    (best, error), (second, other) = ranked[:2]
    if not np.isfinite(error):
        return Line(name, f"{UNTOLD}: no arithmetic that this probe knows explains it", evidence), np.inf
    if other < CLEAR * error:
        return Line(name, f"{UNTOLD}: {best[1]} or {second[1]}", evidence), np.inf
    return Line(name, best[1], evidence, best[0]), error


def _power(error: float) -> str:
    return f"2^{np.log2(error):.0f} of its value" if np.isfinite(error) else "none is enough"


def _error_needed(fmt: Format, out: np.ndarray, weight: Callable[[np.ndarray], np.ndarray], p: np.ndarray) -> float:
    """The least of `ERRORS` that exp must have, so that `weight` explains the differences; infinite if none does."""
    one, other = PAIRS[:, 0], PAIRS[:, 1]
    for error in ERRORS:
        low, high = weight(p * (1 - error)), weight(p * (1 + error))
        least, most = (low[:, one] - high[:, other]), (high[:, one] - low[:, other])
        # out is rounded, and so are the sums.
        room = 3 * fmt.u * np.maximum(np.abs(least), np.abs(most)) + 1.5 * fmt.tiny + 1e-7
        if ((out >= least - room) & (out <= most + room)).mean() >= ENOUGH:
            return float(error)
    return np.inf


def _sum(fmt: Format, factor: Line, asked: Probe, answer: Answer | None) -> Line:
    name = "p in the row sum"
    if answer is None or not finite(answer):
        return missing(name)
    if not factor.code:
        return Line(name, f"{UNTOLD}: the format of p is not told", "")
    if factor.code.startswith("normalised"):
        return Line(name, "the sum divides p before it is rounded", "", "float32")
    rows = answer.out[0, :, 0].mean(axis=1)
    if factor.code == "float32":
        near = bool((np.abs(rows - 1) <= KEYS * FORMATS["float32"].u + fmt.u).all())
        said = ("p, not rounded either", "float32") if near else (f"{UNTOLD}: another p than the factor of v", "")
        return Line(name, said[0], f"all values are 1: out lies between {rows.min():.7f} and {rows.max():.7f}", said[1])
    p = np.exp(scores_of(asked))
    rounded = FORMATS[factor.code.split()[0]].round(p)
    lost = 1 - float((rounded.sum(axis=1) / p.sum(axis=1)).mean())
    below = 1 - float(rows.mean())
    evidence = f"all values are 1 and p is rounded down: out is {below:.2e} below 1; {lost:.2e} if Σ p is not rounded"
    if (rows == 1).all():
        return Line(name, "the rounded p", evidence, "rounded")
    if 0.5 * lost < below < 1.6 * lost:
        return Line(name, "p as it was before it was rounded", evidence, "float32")
    return Line(name, f"{UNTOLD}: neither the rounded p nor p itself", evidence)


def _tiny(fmt: Format, asked: Probe, answer: Answer | None) -> Line:
    name = "p below 2^-14"
    if answer is None or not finite(answer):
        return missing(name)
    p = np.exp(scores_of(asked))
    total, half = p.sum(axis=1, keepdims=True), FORMATS["float16"]
    ways = {
        ("kept", "kept, with all digits of larger ones"): p,
        ("subnormal", "kept, as FP16 subnormal numbers"): half.round(p),
        ("flushed", "becomes 0"): np.where(p < half.least_normal, 0.0, p),
    }
    columns, out = slice(0, len(REST)), answer.out[0, :, 0]
    shares = {}
    for names, weight in ways.items():
        expected = weight[:, REST] * TINY / total
        room = 5 * fmt.u * expected + 1.5 * fmt.tiny + 2.0**-18 * expected
        shares[names] = float((np.abs(out[:, columns] - expected) <= room).mean())
    return settled(name, shares, f"{ROWS * len(REST):,} probabilities from 2^-24 to 2^-15")


def _exponential(fmt: Format, seen: float, asked: Probe, answer: Answer | None) -> Line:
    """Read off out, if that has the digits; off lse, where the sum is float32; off the rounding of p."""
    name = "error of exp"
    score = scores_of(asked)[:-1, REST[0]]
    p = np.exp(score)
    if answer is not None and finite(answer) and fmt.digits > 11:
        out = answer.out[0, :-1, 0]
        error = out[:, REST[0]] / out[:, 0] / p - 1
        rows, source = np.ones(len(error), bool), "out"
    elif answer is not None and answer.lse is not None and np.isfinite(answer.lse).all():
        lse = answer.lse[0, :, 0]
        # In the last row the anchors are alone: exp(0) may err, too.
        unit = 1.0 if abs(lse[-1] - np.log(len(ANCHORS))) < 0.1 else np.log(2.0)
        error = (np.exp(lse[:-1] * unit) - np.exp(lse[-1] * unit)) / (len(REST) * p) - 1
        # lse has 24 digits: where the others' sum is small beside the anchors', that says little about it.
        rows, source = 2.0**-22 * (len(ANCHORS) / (len(REST) * p) + 1) < 2.0**-20, "lse"
    elif np.isfinite(seen):
        said = "at most" if seen == ERRORS[0] else "up to"
        return Line(
            name, f"{said} {_power(seen)}", "probabilities near the middle of two numbers are rounded", f"{seen:.3g}"
        )
    else:
        return Line(name, f"{UNTOLD}: out has too few digits, and there is no lse", "")
    worst = int(np.argmax(np.where(rows, np.abs(error), -1.0)))
    size = max(abs(float(error[worst])), 2.0**-24)
    least = score[rows].min()
    evidence = f"largest at exp({score[worst]:.2f}), of {int(rows.sum())} from {least:.1f} to 0, read off {source}"
    return Line(name, f"at most 2^{np.log2(size):.1f} of its value", evidence, f"{size:.3g}")
