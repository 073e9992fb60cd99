"""A wrong scale: the factors that have a name, and the one that fits best, each as the profile rounds the scale.

A kernel that is given the scale in FP16 rounds the wrong scale, too: what it multiplies with is up to 2⁻¹¹ off the
named one, and a fitted factor would explain that better than any name. So a named factor is compared as it is rounded,
and what a fitted one costs follows from how precisely it is known.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cpjax.crosscheck.diagnosis.dictionary import FITTED, RARE, Fault
from cpjax.crosscheck.diagnosis.measure import LEAST_LSE_SIGMA, Measured
from cpjax.crosscheck.diagnosis.predict import glance
from cpjax.crosscheck.judging.problem import Problem
from cpjax.precision import scale_in

LOG_SCALES = np.sort(np.concatenate([np.linspace(-4, 4, 33), [-0.02, -2e-3, 2e-3, 0.02]]))
"""ln of the factors on the scale between which the best one is looked for."""

SCALE_ACCURACY = 1e-10
"""Of ln of the factor."""

CHUNKS = 4
"""Wrong query chunks that a fitted factor looks at."""

LEAST_SIGMA = 1e-7
"""σ of `out` is taken to be at least this where only the scale is fitted."""

ROUNDED_STEPS = tuple(10.0**-n for n in range(2, 10))
"""Of ln of the factor: how far from the best one it is looked for again, where scale · q is rounded."""

ROUNDED_TRIALS = 21
"""Factors that are tried each time."""

TIE = 1e-9
"""Misfits that differ by less, relative to themselves, are alike."""

STEP = 1e-4
"""Of ln of the factor: for the slope of out and lse; roundings of the scale that differ by less are alike."""

MSCALE = float(0.1 * np.log(40) + 1)
"""DeepSeek's YaRN raises the softmax scale by its square (mscale_all_dim 1, factor 40; modeling_deepseek.py)."""

NO_SCALE = 1e-9
"""A scale of 0, by which nothing can be divided."""

HEAD_DIMS = (64, 80, 96, 128, 160, 192, 256, 512, 576)
"""Head dims of published models and of kernels that pad to them."""

NEAR = 0.01
"""The name of another head_dim is looked at only if its factor is as near to the fitted one."""


def scale_faults(problem: Problem, wrong: list[Measured]) -> Iterator[Fault]:
    """The scale with each named factor, and with the factor that fits best, if any row sees more than one key."""
    some = [one for one in wrong if (one.sample.seen.sum(axis=1) > 1).any()][:CHUNKS]
    fitted = _fitted(some) if some else None
    for name, factor in named_factors(problem).items():
        yield _rounded(Fault(f"scale {name}", scale=factor, cost=RARE), problem, some)
    dims = head_dims(problem)
    if fitted is None:
        return
    for dim, factor in dims.items():
        if abs(factor / fitted - 1) < NEAR:
            cost = RARE + 2 * float(np.log(len(dims)))  # many are tried
            yield _rounded(Fault("scale of a head_dim", scale=factor, number=float(dim), cost=cost), problem, some)
    number = fitted * problem.scale / (problem.stated_scale or 1.0)
    yield Fault("scale", scale=fitted, number=number, cost=price(some, fitted))


def named_factors(problem: Problem) -> dict[str, float]:
    """By which a scale is wrong as a rule. Of a scale of 1, what was not applied is not told from what was."""
    scale = problem.stated_scale or 1.0
    return {
        "not applied": 1 / scale,
        "applied twice": scale,
        "zero": NO_SCALE,
        "negated": -1.0,
        "inverted": scale**-2,
        "without its root": abs(scale) ** -0.5,
        "without mscale": MSCALE**-2,
        "with mscale twice": MSCALE**2,
        "with mscale once": 1 / MSCALE,
        "with mscale too often": MSCALE,
        "times log2(e)": float(np.log2(np.e)),
        "times ln 2": float(np.log(2.0)),
        "log2(e)": float(np.log2(np.e)) / scale,
        "ln 2": float(np.log(2.0)) / scale,
    }


def head_dims(problem: Problem) -> dict[int, float]:
    """Other head_dims d, and the factor 1/√d / scale: that of the values, half, twice, padded, and what is usual.

    Without those whose factor has another name.
    The head_dim itself where another scale than 1/√head_dim is stated: a kernel took its default.
    """
    own = problem.query.shape[3]
    padded = 1 << (own - 1).bit_length()
    dims = sorted({own, own // 2 or 1, 2 * own, padded, problem.value.shape[3], *HEAD_DIMS})
    factors = {dim: dim**-0.5 / (problem.stated_scale or 1.0) for dim in dims}
    named = np.array(list(named_factors(problem).values()))
    return {
        dim: factor
        for dim, factor in factors.items()
        if abs(factor - 1) > NEAR and (np.abs(factor / named - 1) > NEAR**2).all()
    }


def _rounded(fault: Fault, problem: Problem, some: list[Measured]) -> Fault:
    """With the scale as the profile rounds it: the product, or one factor after the other, whichever fits best."""
    factor, precision, rounded = fault.scale, problem.precision, problem.scale or 1.0
    with np.errstate(over="ignore"):  # what the format does not hold is no way
        products = (scale_in(precision, scale * factor) for scale in (problem.stated_scale, problem.scale))
        ways = (*(product / rounded for product in products), scale_in(precision, factor), factor)
    ways = tuple(dict.fromkeys(way for way in ways if way != 0 and np.isfinite(way)))
    if not some or max(ways) - min(ways) < STEP * abs(fault.scale):
        return fault._replace(scale=ways[0])
    best = min(ways, key=lambda way: sum(_misfit(one, way) for one in some))
    return fault._replace(scale=best, cost=fault.cost + 2 * float(np.log(len(ways))))


def price(some: list[Measured], factor: float) -> float:
    """What a fitted factor costs: of the range of LOG_SCALES, all of it alike likely, it takes σ of ln(factor).

    −2 ln ∫ L(x) p(x) dx ≈ −2 ln L(x̂) + 2 ln(range / (√(2π) σ)), Laplace; 1/σ² is the information Σ (∂/∂x)² / σ².
    """
    information = 0.0
    for one in some:
        (low, _, low_lse), (high, _, high_lse) = (
            glance(one.sample, one.problem, Fault("scale", scale=factor * float(np.exp(step))))
            for step in (-STEP, STEP)
        )
        slope = (high - low) / (2 * STEP) / np.maximum(one.expected.sigma, LEAST_SIGMA)
        information += float((one.dof * (slope**2).mean(axis=1)).sum())
        if one.sample.lse is not None:
            with np.errstate(invalid="ignore"):
                of_lse = (high_lse - low_lse) / (2 * STEP) / np.maximum(one.expected.lse_sigma, LEAST_LSE_SIGMA)
            information += float((np.nan_to_num(of_lse, posinf=0.0, neginf=0.0) ** 2).sum())
    extent = float(LOG_SCALES[-1] - LOG_SCALES[0])
    return max(FITTED, float(np.log(max(extent**2 * information / (2 * np.pi), 1.0))))


def _fitted(some: list[Measured]) -> float:
    """The factor on the scale that makes the outputs of these chunks likeliest."""

    def misfit(log_factor: float) -> float:
        return sum(_misfit(one, float(np.exp(log_factor))) for one in some)

    values = [misfit(x) for x in LOG_SCALES]
    i = int(np.argmin(values))
    low, high = LOG_SCALES[max(i - 1, 0)], LOG_SCALES[min(i + 1, len(LOG_SCALES) - 1)]
    from scipy.optimize import minimize_scalar  # slow to import; only a failed verdict needs it

    best: Any = minimize_scalar(misfit, bounds=(low, high), method="bounded", options={"xatol": SCALE_ACCURACY})
    found = float(best.x)
    # Where scale · q is rounded, the misfit has steps: it is looked for again around what was found, ever more closely.
    for width in ROUNDED_STEPS if some[0].problem.precision.query else ():
        near = found + width * np.linspace(-1, 1, ROUNDED_TRIALS)
        values = np.array([misfit(x) for x in near])
        found = float(np.median(near[values <= values.min() * (1 + TIE)]))
    return float(np.exp(found))


def _misfit(one: Measured, factor: float) -> float:
    """Mean squares of out and of lse, in σ."""
    out, _, lse = glance(one.sample, one.problem, Fault("scale", scale=factor))
    total = float(((one.sample.out - out) ** 2 / np.maximum(one.expected.sigma, LEAST_SIGMA) ** 2).mean())
    if one.sample.lse is not None:
        with np.errstate(invalid="ignore"):
            off = np.where(np.isfinite(lse), one.sample.lse - lse, 0.0)
        total += float((off**2 / np.maximum(one.expected.lse_sigma, LEAST_LSE_SIGMA) ** 2).mean())
    return total
