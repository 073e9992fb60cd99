"""By which formula two results are weighted, bit for bit; by which their lse is added; in which range both work.

Chunk 0 has the score 0 and the value a, chunk 1, of another rank, the score d < 0 and the value b, and all other keys
have no weight. a + exp(d) b is 2^-16 of a, so that the last bits of the weights, of the products and of their sum are
seen in out. No exponential is assumed: one or two factors near the exact ones are sought with which a formula gives all
numbers of a question, 64 pairs (a, b) with one d. A product and a sum may be rounded together or apart in each number.

The lse of two has the same form: log(1 + e) of the rounded 1 + e is on a lattice, log1p(e) is not.
"""

from itertools import product

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint.probe import HEAD_DIM, UNTOLD, Answer, Answers, Line, Probe, missing, settled, untold
from cpjax.fingerprint.ranks import chunks, lse_of, of_chunks, out_of, over_ranks, rank_of
from cpjax.fingerprint.sums import fused

WEIGHTS, LOG, RANGE = "weights of a merge", "lse of a merge", "range of a merge"
QUESTIONS, NEAR, ENOUGH = 24, 3, 0.97
"""Different d; how many neighbours of an exact factor are tried on either side; share of the questions."""
LOGS = 64
"""Different d of the line of lse."""
single = np.float32


def probes(cp: int) -> dict[str, Probe]:
    """One for each line."""
    return {"merge-weights": _of_weights(cp), "merge-log": _of_log(cp), "merge-range": _of_range(cp)}


def _of_weights(cp: int) -> Probe:
    scores, values = np.full((QUESTIONS, chunks(cp)), -np.inf), np.zeros((QUESTIONS, chunks(cp), 1, HEAD_DIM))
    half = FORMATS["float16"]
    # In numbers of BF16, so that an lse that is rounded to a half format stays what it is.
    scores[:, 0], scores[:, 1] = 0, FORMATS["bfloat16"].round(-np.linspace(0.11, 2.6, QUESTIONS))
    a = np.arange(1024.0, 2048)
    for question, d in enumerate(scores[:, 1]):
        b = -half.round(a * np.exp(-d))
        best = np.argsort(np.abs(a + np.exp(d) * b) / a)[:HEAD_DIM]
        values[question, 0, 0], values[question, 1, 0] = a[best], b[best]
    return over_ranks(scores, values)


def _of_log(cp: int) -> Probe:
    scores = np.full((LOGS, chunks(cp)), -np.inf)
    scores[:, 0], scores[:, 1] = 0, FORMATS["float16"].round(-np.linspace(8.0, 18.5, LOGS))
    return over_ranks(scores, np.zeros((*scores.shape, 1, 1)))


HIGH, STEP = 120.0, 100.0
RANGES = "the first rank high", "the last rank high", "all high", "all low"
"""What is asked; float32's exp ends at 88 and at −103."""


def _ranges(cp: int) -> np.ndarray:
    """The scores of each of them, `[4, C]`. Whatever the order, in one of the first two lse rises at some rank."""
    rank = np.array([rank_of(chunk, cp) for chunk in range(chunks(cp))])
    steps = [np.where(rank == one, STEP, -STEP) for one in (0, cp - 1)]
    return np.array([*steps, np.full(len(rank), HIGH), np.full(len(rank), -HIGH)])


def _of_range(cp: int) -> Probe:
    scores = _ranges(cp)
    value = np.ones((*scores.shape, 1, 1))
    value[:2, :, 0, 0] = np.where(scores[:2] > 0, 3, 1)
    return over_ranks(scores, value)


def read(cp: int, asked: dict[str, Probe], answers: Answers, carried: str, carried_lse: str) -> list[Line]:
    """Three lines.

    Args:
      carried, carried_lse: the codes of the lines in `merge_carry`.
    """
    return [
        _weights(asked["merge-weights"], answers.get("merge-weights"), carried),
        _log(asked["merge-log"], answers.get("merge-log"), carried_lse),
        _range(cp, answers.get("merge-range")),
    ]


Columns = Float[np.ndarray, " V"]
"""What a question has: a, b or out."""
Factors = Float[np.ndarray, "n 1"]
"""Float32 numbers that a weight may be. A formula gives for each of them what out may be, `[n, V]` in float32, once for
each way in which products and sums are rounded together or apart."""


def _sums(x: Factors, a: Columns, y: Factors, b: Columns) -> list[np.ndarray]:
    """x a + y b."""
    return [x * a + y * b, fused(x, a, y * b), fused(y, b, x * a)]


def _divided(e: Factors, a: Columns, b: Columns) -> list[np.ndarray]:
    total = single(1) + e
    return [part for x in (a + e * b, fused(e, b, a)) for part in (x / total, x * (single(1) / total))]


def _quotients(e: Factors, a: Columns, b: Columns) -> list[np.ndarray]:
    total = single(1) + e
    return _sums(single(1) / total, a, e / total, b)


def _gate(first: Columns, second: Columns, gate: Factors) -> list[np.ndarray]:
    """`second` is merged into `first`."""
    return [first - gate * (first - second), fused(-gate, first - second, first)]


def _mixed(first: Columns, second: Columns, gate: Factors) -> list[np.ndarray]:
    return _sums(single(1) - gate, first, gate, second)


FORMULAS = {
    "max": "exp(lse − max of both), the sum divided by both weights",
    "quotient": "exp(lse − max of both) / their sum, before out is multiplied",
    "sigmoid": "out − σ(lse' − lse) (out − out')",
    "mix": "(1 − σ(lse' − lse)) out + σ(lse' − lse) out'",
    "lse": "exp(lse − lse of both)",
}
"""Code → words. The last one has two free factors, and explains what the ones before it but the first and third do."""


def explained(code: str, d: float, a: Columns, b: Columns, out: Columns, carried: str = "") -> bool:
    """Whether factors near the exact ones give all numbers of out: rounded to the format `carried`, then to FP16."""
    exact = np.exp(np.float64(d))
    one, other = 1 / (1 + exact), exact / (1 + exact)  # σ(−d) and σ(d)
    if code == "max":
        return _any_gives(_divided(near(exact), a, b), out, carried)
    if code == "quotient":
        return _any_gives(_quotients(near(exact), a, b), out, carried)
    if code in ("sigmoid", "mix"):
        formula = _gate if code == "sigmoid" else _mixed
        return _any_gives(formula(a, b, near(other)), out, carried) or _any_gives(
            formula(b, a, near(one)), out, carried
        )
    x, y = (np.array(w, single)[:, None] for w in zip(*product(near(one)[:, 0], near(other)[:, 0]), strict=True))
    return _any_gives(_sums(x, a, y, b), out, carried)


def near(exact: float) -> Factors:
    """The float32 numbers next to it."""
    middle = single(exact)
    return (middle + np.spacing(middle) * np.arange(-NEAR, NEAR + 1, dtype=single))[:, None].astype(single)


def _any_gives(ways: list[np.ndarray], out: Columns, carried: str) -> bool:
    half, between = FORMATS["float16"], FORMATS[carried or "float32"]
    fits = np.any([half.round(between.round(way.astype(np.float64))) == out for way in ways], axis=0)  # [n, V]
    return bool(fits.all(axis=1).any())


def _weights(asked: Probe, answer: Answer | None, carried: str) -> Line:
    if answer is None or not np.isfinite(answer.out).all():
        return missing(WEIGHTS)
    out = out_of(answer, QUESTIONS)[:, :, 0]  # [questions, C, V]
    a, b = (of_chunks(asked.value, QUESTIONS)[:, chunk, 0].astype(single) for chunk in (0, 1))
    scores = of_chunks(asked.key, QUESTIONS)[:, 1, 0, 0]
    shares = {}
    for code, said in FORMULAS.items():
        fits = []
        for question in range(QUESTIONS):
            # The queries of most chunks are given the same numbers.
            asked_with = float(scores[question]), a[question], b[question]
            given, times = np.unique(out[question], axis=0, return_counts=True)
            fits += [
                n * explained(code, *asked_with, one, carried) for one, n in zip(given, times.tolist(), strict=True)
            ]
        shares[code, said] = sum(fits) / (QUESTIONS * out.shape[1])
    # Two free factors explain what one with a division explains.
    if max(share for (code, _), share in shares.items() if code != "lse") >= ENOUGH:
        shares["lse", FORMULAS["lse"]] = 0.0
    what = f"{out[:, :, 0].size} merges of two results, of each {HEAD_DIM} numbers of which 2^-16 is left"
    return settled(WEIGHTS, shares, what, enough=ENOUGH)


def _log(asked: Probe, answer: Answer | None, carried_lse: str) -> Line:
    if answer is None:
        return missing(LOG)
    lse = lse_of(answer, LOGS)
    if lse is None:
        return untold(LOG, "there is no lse, or not all of it are numbers")
    if carried_lse in ("float16", "bfloat16"):
        return untold(LOG, f"lse is rounded to {carried_lse}")
    exact = np.exp(of_chunks(asked.key, LOGS)[:, 1, 0, 0].astype(np.float64))[:, None]
    sums = np.round(exact * 2.0**23) * 2.0**-23
    ways = {
        ("log", "m + log(Σ exp(lse − m)): the logarithm of a rounded sum"): np.log1p(sums),
        ("log1p", "log1p, as in logaddexp, softplus and logsigmoid"): np.log1p(exact),
    }
    shares = {
        names: float((np.abs(lse[..., 0] - expected) <= 2.0**-8 * expected + 1e-12).mean())
        for names, expected in ways.items()
    }
    return settled(LOG, shares, f"{lse[..., 0].size} lses of a weight of 1 and one of 2^-12 to 2^-27", enough=ENOUGH)


def _range(cp: int, answer: Answer | None) -> Line:
    if answer is None:
        return missing(RANGE)
    out = out_of(answer, len(RANGES))[..., 0]
    # Weights that take an lse in BF16 are off by e^(1/4) at each merge; what overflows gives no number, or 1 for 3.
    exact, factor = np.array([3.0, 3.0, 1.0, 1.0])[:, None, None], np.array([1.7, 1.7, 6.0, 6.0])[:, None, None]
    is_right = np.all((out >= exact / factor) & (out <= exact * factor), axis=(1, 2))
    lse = lse_of(answer, len(RANGES), must_be_finite=False)
    if lse is not None:
        exact = np.logaddexp.reduce(_ranges(cp), axis=1)[:, None, None]
        is_right &= np.all(np.abs(lse - exact) <= 4, axis=(1, 2))
    right = dict(zip(RANGES, is_right.tolist(), strict=True))
    evidence = "; ".join(f"{name}: {'right' if fine else 'wrong, or no number'}" for name, fine in right.items())
    if all(right.values()):
        return Line(RANGE, "lses from −120 to 120, and steps of 200: a maximum is taken off", evidence, "all")
    if not right["all high"] and not right["all low"]:
        return Line(RANGE, "exp is taken of lse itself, which overflows beyond 88 and is 0 below −103", evidence, "lse")
    if right["all high"] and right["all low"]:
        return Line(RANGE, "not where lse rises by 200: exp is taken of a difference, and overflows", evidence, "rise")
    return Line(RANGE, f"{UNTOLD}: wrong in a way that this probe does not know", evidence)
