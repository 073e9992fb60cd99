"""Scores: is q·k rounded, where is the scale multiplied, how large may a score be."""

import numpy as np

from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.fingerprint.probe import (
    HALF,
    HEAD_DIM,
    ROWS,
    Answers,
    Line,
    Probe,
    digits_of,
    finite,
    missing,
    probe,
    scored,
    settled,
)

SCALE = 0.125 * (1 + 2**-8 - 1.02 * 2**-11)
"""Far from the numbers of both half formats: FP16 loses 2^-11 of it, BF16 nearly 2^-8."""
SIZE, SPREAD = 24.0, 8.0
"""Scores lie between SIZE − SPREAD and SIZE: one rounding to a half format moves them by more than out is rounded."""


def probes(fmt: Format) -> dict[str, Probe]:
    """Scores of 16 to 24, each of one product with a query number of its own; and scores of 100,000."""
    rng = np.random.default_rng(1)
    key = fmt.round(rng.uniform(1, 2, HEAD_DIM)) * 16
    wanted = SIZE - SPREAD * rng.random((ROWS, HEAD_DIM))
    query = fmt.round(wanted / SCALE / key)
    large = np.zeros((1, ROWS, HEAD_DIM))
    large[:, :, 0], large[:, :, 1] = 2**17, 2**17 + (1 if fmt.digits * 2 > 17 else 4)
    # A quarter of the scores in the keys, and queries of 4: single products stay below the largest FP16 number.
    quarter = scored(large / 4, np.eye(HEAD_DIM)[None], fmt)
    return {
        "scores": probe(query[:, None], np.diag(key)[:, None], np.eye(HEAD_DIM)[:, None], scale=SCALE),
        "large-scores": quarter._replace(query=quarter.query * 4),
    }


def read(fmt: Format, asked: dict[str, Probe], answers: Answers) -> list[Line]:
    """Two lines on rounding and one on range."""
    return [*_rounding(fmt, asked["scores"], answers), _range(answers)]


def candidates(fmt: Format) -> dict[tuple[str, str], tuple[str, str]]:
    """(scale, score) codes → their words."""
    scales = {
        "score": "multiplies q·k, in float32",
        "rounded": f"is rounded to {fmt.name}, then multiplies q·k",
        "query": f"multiplies q, rounded to {fmt.name}",
        "root": f"its square root multiplies q and k, each rounded to {fmt.name}",
    }
    formats = {"float32": "not rounded below float32"}
    # Of BF16 numbers: FP16 scores could not be told from float32 ones, for out has too few digits.
    for name in ("bfloat16",) if fmt.name == "bfloat16" else HALF:
        formats |= {
            name: f"rounded to {name} after q·k and after the scale",
            f"{name} once": f"rounded to {name} after the scale",
            f"{name} distance": f"s − m is rounded to {name}",
        }
    if fmt.digits > 11:
        formats["tf32"] = "q and k are rounded to 11 digits (TF32)"
        scales = {"score": "multiplies q or q·k, in float32"}
    return {(a, b): (scales[a], formats[b]) for a in scales for b in formats}


def scores_as(fmt: Format, asked: Probe, scale: str, score: str) -> np.ndarray:
    """The scores less their maximum, `[T, S]`, under one candidate of `candidates`."""
    query, key = asked.query[0, :, 0].astype(np.float64), asked.key[0, :, 0].astype(np.float64)
    single = FORMATS["float32"].round
    factor = single(np.array(asked.scale))
    if scale == "rounded":
        factor = fmt.round(factor)
    if scale == "query":
        query, factor = fmt.round(query * factor), np.array(1.0)
    if scale == "root":
        root = single(np.asarray(np.sqrt(factor)))
        query, key, factor = fmt.round(query * root), fmt.round(key * root), np.array(1.0)
    if score == "tf32":
        query, key = digits_of(query, 11), digits_of(key, 11)
    raw = query @ key.T
    half = HALF.get(score.split()[0])
    if half is not None and score == half.name:
        raw = half.round(raw)
    raw = raw * factor
    if half is not None and not score.endswith("distance"):
        raw = half.round(raw)
    below = raw - raw.max(axis=1, keepdims=True)
    return half.round(below) if half is not None and score.endswith("distance") else below


def _rounding(fmt: Format, asked: Probe, answers: Answers) -> list[Line]:
    names = "scale", "scores"
    answer = answers.get("scores")
    if answer is None or not finite(answer):
        return [missing(name) for name in names]
    out = answer.out[0, :, 0]
    known, shares = candidates(fmt), {}
    for codes in known:
        p = np.exp(scores_as(fmt, asked, *codes))
        expected = p / p.sum(axis=1, keepdims=True)
        # Probabilities and out are rounded as well, to the inputs' format; where they are tiny, to its least number.
        room = 2.5 * fmt.u * expected + 2 * fmt.tiny + 2e-5 * expected
        shares[codes] = float((np.abs(out - expected) <= room).mean())
    measured = f"{out.size:,} probabilities of scores from {SIZE - SPREAD:.0f} to {SIZE:.0f}"
    lines = []
    for place, name in enumerate(names):
        best: dict[tuple[str, str], float] = {}
        for codes, share in shares.items():
            words = known[codes][place]
            best[codes[place], words] = max(best.get((codes[place], words), 0.0), share)
        lines.append(settled(name, best, measured))
    return lines


def _range(answers: Answers) -> Line:
    name, answer = "scores beyond 65,504", answers.get("large-scores")
    if answer is None:
        return missing(name)
    out = answer.out[0, :, 0, :2]
    share = float(out[0, 1] / out[0].sum()) if np.isfinite(out).all() and out[0].sum() else np.nan
    evidence = f"two keys with scores of 131,072 and a little more; the second has a share of {share:.3f}"
    if not np.isfinite(out).all():
        return Line(name, "overflow: out is NaN or infinite", "two keys with scores of 131,072 and a little more", "no")
    if abs(share - 0.5) < 0.01:
        return Line(name, "cut off: two different scores count alike", evidence, "clamped")
    return Line(name, "as smaller ones", evidence, "yes")
