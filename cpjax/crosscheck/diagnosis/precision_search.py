"""With which precision is a result that passed consistent: which roundings explain its errors best?"""

from dataclasses import replace

import numpy as np

from cpjax.crosscheck.diagnosis.measure import Measured
from cpjax.crosscheck.diagnosis.sample import samples
from cpjax.crosscheck.judging.evidence import collect
from cpjax.crosscheck.judging.problem import Problem
from cpjax.partition import Contiguous
from cpjax.precision import Precision, scale_in

EQUAL = 6.0
"""Precisions whose 2 ln(likelihood) differs by less are not told apart."""

ROWS = 48
"""Rows that are looked at, at random."""


def candidates(out: str) -> dict[str, Precision]:
    """Roundings that a kernel with this output format may have, in words; nothing stored but the last result."""

    def one(name: str, score: str = "float32", probability: str = "float32") -> tuple[str, Precision]:
        return name, Precision(name, "float32", score, probability, out, carry="float32")

    last = "" if out == "float32" else f", out rounded once to {out}"
    found = [one(f"float32 throughout{last}")]
    for fmt in ("float16", "bfloat16") if out == "float32" else (out,):
        found.append(one(f"float32 scores, probabilities rounded to {fmt}{last}", probability=fmt))
        found.append(one(f"scores and probabilities rounded to {fmt}{last}", fmt, fmt))
    return dict(found)


def consistent_with(
    problem: Problem, scale: float, out: np.ndarray, lse: np.ndarray | None, seed: int = 0
) -> list[str]:
    """The likeliest precision in words, and what cannot be told apart from it; empty where none explains the result.

    Args:
      problem: the question; its precision, partition and order do not matter.
      scale: as it was stated, not rounded.
    """
    if out.dtype.name not in ("float16", "bfloat16", "float32"):
        return []
    chosen = np.zeros(problem.query.shape[:3], bool)
    places = np.flatnonzero(problem.is_judged[0])
    chosen[0, np.random.default_rng(seed).permutation(places)[:ROWS], 0] = True
    named = {
        name: replace(problem, precision=precision, scale=scale_in(precision, scale), partition=Contiguous(1))
        for name, precision in candidates(out.dtype.name).items()
    }
    # All are asked about the same rows.
    first = next(iter(named.values()))
    parts = samples(first, collect(first, out, lse, chosen).rows, out, lse)
    fits = []
    for name, one in named.items():
        measured = [Measured(replace(part, scale=one.scale), one).right for part in parts]
        if measured and all(fit.explains for fit in measured):
            fits.append((sum(fit.deviance for fit in measured), name))
    return [name for deviance, name in sorted(fits) if deviance <= min(fits)[0] + EQUAL]
