"""One more term in every row's sum: a sink that nobody stated, keys of zeros, an empty part with a finite lse.

Where a sink is stated, the term stands in its place: its logits are others.

    out'  =  out / (1 + exp(x − lse))               lse'  =  ln(exp lse + exp x)

x is one number a head, the same in every row. It is fitted.
"""

import numpy as np

from cpjax.crosscheck.diagnosis.dictionary import FITTED, Fault
from cpjax.crosscheck.diagnosis.guards import LARGEST_LOG, LEAST_SUM
from cpjax.crosscheck.diagnosis.measure import Measured
from cpjax.crosscheck.diagnosis.predict import exact_model
from cpjax.crosscheck.exact.attention import Rows

ACCURACY = 1e-9
"""Of the fitted logit."""

RANGE = 3.0
"""The logit is looked for this far to either side of its rough estimate."""


def extra_terms(wrong: list[Measured]) -> list[Fault]:
    """The terms that fit the rows of each head best: by out, and by lse, which tells them more exactly."""
    heads = sorted({int(n) for one in wrong for n in one.sample.head})
    bare = [(one, _rows(one)) for one in wrong]
    by_out = [(n, x) for n in heads if (x := _fitted(bare, n)) is not None]
    by_lse = [(n, x) for n in heads if (x := _by_lse(bare, n)) is not None]
    kind, logits = ("extra term", "") if wrong[0].problem.sink is None else ("another sink", "sink fitted")
    return [Fault(kind, logits=logits, extra=tuple(x), cost=FITTED * len(x)) for x in (by_lse, by_out) if x]


def _rows(one: Measured) -> Rows:
    """The rows without the term."""
    if one.problem.sink is None:
        return one.model.rows
    return exact_model(one.sample, one.problem, Fault("", logits="sink dropped")).rows


def _by_lse(bare: list[tuple[Measured, Rows]], head: int) -> float | None:
    """The median of ln(exp lse' − exp lse), of the rows in which it is told best."""
    found = []
    for one, rows in bare:
        if one.sample.lse is None:
            return None
        mine = (one.sample.head == head) & np.isfinite(rows.lse)
        more = one.sample.lse[mine] - rows.lse[mine]
        found += [(x, lse + np.log(np.expm1(x))) for x, lse in zip(more, rows.lse[mine], strict=True) if x > 0]
    if not found:
        return None
    found.sort(key=lambda pair: -pair[0])
    return float(np.median([x for _, x in found[: max(1, len(found) // 2)]]))


def _fitted(bare: list[tuple[Measured, Rows]], head: int) -> float | None:
    parts, rough = [], []
    for one, rows in bare:
        mine = (one.sample.head == head) & np.isfinite(rows.lse)
        if not mine.any():
            continue
        given = one.sample.out[mine]
        out, lse, sigma = rows.out[mine], rows.lse[mine], one.sigma[mine]
        square = np.maximum((out**2 / sigma**2).sum(axis=1), LEAST_SUM)
        share = (given * out / sigma**2).sum(axis=1) / square
        inside = (share > 0) & (share < 1)
        rough += list((lse + np.log(1 / np.where(inside, share, 0.5) - 1))[inside])
        parts.append((out, given, lse, sigma))
    if not rough:
        return None
    from scipy.optimize import minimize_scalar  # slow to import; only a failed verdict needs it

    def misfit(x: float) -> float:
        total = 0.0
        for out, given, lse, sigma in parts:
            share = 1 / (1 + np.exp(np.minimum(x - lse, LARGEST_LOG)))
            total += float(np.log1p(((given - out * share[:, None]) / sigma) ** 2).sum())
        return total

    middle = float(np.median(rough))
    best = minimize_scalar(
        misfit, bounds=(middle - RANGE, middle + RANGE), method="bounded", options={"xatol": ACCURACY}
    )
    return float(best.x)
