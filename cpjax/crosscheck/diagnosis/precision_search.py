"""With which precision is a result that passed consistent: which roundings explain its errors best?"""

from dataclasses import replace
from typing import Any

import numpy as np

from cpjax.crosscheck.diagnosis.dictionary import RIGHT
from cpjax.crosscheck.diagnosis.measure import Measured
from cpjax.crosscheck.diagnosis.sample import Sample, samples
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

    last = "" if out == "float32" else f", out rounded once to {out}"

    def one(words: str, score: str = "float32", probability: str = "float32", **more: Any) -> tuple[str, Precision]:
        name = f"{words}{last}"
        return name, Precision(name, "float32", score, probability, out, carry="float32", **more)

    found = [one("float32 throughout")]
    for fmt in ("float16", "bfloat16") if out == "float32" else (out,):
        found += [
            one(f"float32 scores, probabilities rounded to {fmt}", probability=fmt),
            one(f"scores and probabilities rounded to {fmt}", fmt, fmt),
            one(
                f"float32 scores, probabilities divided by their sum and rounded to {fmt}",
                probability=fmt,
                is_normalised=True,
            ),
            one(
                f"scores, and probabilities divided by their sum, rounded to {fmt}",
                fmt,
                fmt,
                scale="float32",
                distance="float32",
                is_normalised=True,
            ),
            one(f"float32 scores, sums of probabilities rounded to {fmt}", probability=fmt, total=fmt),
            one(f"queries scaled and rounded to {fmt}, probabilities rounded to {fmt}", probability=fmt, query=fmt),
        ]
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
        # By a power of two queries are scaled exactly, and there is nothing to tell apart.
        if not (precision.query and np.frexp(scale)[0] == 0.5)
    }
    # All are asked about the same rows.
    first = next(iter(named.values()))
    parts = samples(first, collect(first, out, lse, chosen).rows, out, lse)
    measured = {name: [Measured(_asked(part, one), one) for part in parts] for name, one in named.items()}
    # Likelihoods are compared of one number of independent errors, which precisions differ in: of the least.
    least = [np.min([one.dof for one in of_part], axis=0) for of_part in zip(*measured.values(), strict=True)]
    fits = []
    for name, of_parts in measured.items():
        for one, dof in zip(of_parts, least, strict=True):
            one.dof = dof
        found = [one.fit(RIGHT) for one in of_parts]
        if found and all(fit.explains for fit in found):
            fits.append((sum(fit.deviance for fit in found), name))
    return [name for deviance, name in sorted(fits) if deviance <= min(fits)[0] + EQUAL]


def _asked(part: Sample, problem: Problem) -> Sample:
    """The sample with queries and scale as the problem's precision rounds them."""
    return replace(part, scale=problem.scale, query=problem.queries(part.batch, part.position, part.head))
