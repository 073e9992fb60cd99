"""A mask that is off by another number in every row: how many keys each row saw, and the rule that gives these numbers.

Decode with several new tokens (MTP), local lengths of ranks, lengths of another request: each row sees the first keys
up to a limit of its own. The limit is looked for row by row; then a rule is looked for that gives all of them.
"""

from collections.abc import Iterator

import numpy as np

from cpjax.crosscheck.diagnosis.dictionary import FITTED, RARE, Fault
from cpjax.crosscheck.diagnosis.masks import thresholds
from cpjax.crosscheck.diagnosis.measure import MOST_Z, Measured
from cpjax.crosscheck.diagnosis.scan import row_misfit

FAMILY = "limit"
"""Keys of the row's request up to a position: the row sees the keys at positions below the number."""

SAMPLES = 8
"""Wrong query chunks that are looked at."""

MOST_RANKS = 16
"""Numbers of ranks whose local lengths are tried."""

MOST_EVERY = 128
"""The most queries after which a mask may be off by one more."""


def row_mask(wrong: list[Measured]) -> Fault | None:
    """The limits of all rows, with the rule that gives them; None where some row is explained by no limit."""
    limits: dict[tuple[int, int], int] = {}
    for one in wrong[:SAMPLES]:
        threshold = thresholds(one.sample, one.problem, FAMILY)
        for row in range(len(threshold)):
            numbers = np.unique(threshold[row][np.isfinite(threshold[row])])
            if not len(numbers):
                return None
            misfit = row_misfit(one, threshold[row], row, numbers)
            best = int(misfit.argmin())
            if not misfit[best] <= MOST_Z**2:
                return None
            place = (one.sample.batch, int(one.sample.position[row]))
            limits[place] = int(numbers[best])
    rows = [_Row(wrong[0], place, limit) for place, limit in sorted(limits.items())]
    if len({row.off for row in rows}) < 2:
        return None  # the same in every row: a shifted mask
    rule = next(_rules(rows), "")
    keys = wrong[0].problem.key.shape[1]
    cost = RARE + FITTED + 2 * np.log(keys) * (1 if rule else len(rows))
    return Fault("limits", limits=tuple(limits.items()), rule=rule or _listed(rows), cost=float(cost))


class _Row:
    """A query: its place, how many keys it should see, and how many it saw."""

    def __init__(self, one: Measured, place: tuple[int, int], limit: int):
        b, at = place
        position, segment = (np.asarray(x)[b] for x in one.problem.q_tokens)
        kv_position, kv_segment = (np.asarray(x)[b] for x in one.problem.kv_tokens)
        own = position[segment == segment[at]]
        keys = kv_position[kv_segment == segment[at]]
        self.place, self.saw, self.request = place, limit, int(segment[at])
        self.length = int(keys.max()) + 1
        self.wanted = int(position[at]) + 1 if one.problem.mask.is_causal else self.length
        self.index, self.queries = int(position[at] - own.min()), len(own)

    @property
    def off(self) -> int:
        return self.saw - self.wanted


def _rules(rows: list[_Row]) -> Iterator[str]:
    """Rules that give what every row saw, the plainest first."""
    off, index = np.array([r.off for r in rows]), np.array([r.index for r in rows])
    wanted, queries = np.array([r.wanted for r in rows]), np.array([r.queries for r in rows])
    length = np.array([r.length for r in rows])
    requests = np.array([r.request for r in rows])
    if (np.array([r.saw for r in rows]) == length).all():
        yield "each query sees all keys of its request: the causal mask is absent"
    if all(len(np.unique(off[requests == r])) == 1 for r in requests) and len(np.unique(requests)) > 1:
        said = ", ".join(f"request {r}: {off[requests == r][0]:+d}" for r in np.unique(requests))
        yield f"the limit is off by one number a request ({said})"
    for k in (-2, -1, 1, 2):
        if (off == k * index).all():
            yield f"query i of its request sees {abs(k)}·i keys too {'many' if k > 0 else 'few'}: i counts from 0"
        if (off == k * (queries - 1 - index)).all():
            yield (
                f"query i of n of its request sees {abs(k)}·(n − 1 − i) keys too {'many' if k > 0 else 'few'}: "
                f"i counts from 0"
            )
    for every in range(2, MOST_EVERY + 1):
        for k in (-1, 1):
            if (off == k * (index // every)).all():
                yield f"a query sees one key too {'many' if k > 0 else 'few'} for every {every} queries before it"
    for ranks in range(2, MOST_RANKS + 1):
        for name, count in (("⌈n / R⌉", -(-wanted // ranks)), ("⌊n / R⌋", wanted // ranks)):
            if (off == count - wanted).all():
                yield f"a query sees {name} keys of n, with R = {ranks}: as many as one of {ranks} ranks holds"


def _listed(rows: list[_Row]) -> str:
    some = ", ".join(f"position {r.place[1]} saw {r.saw} instead of {r.wanted}" for r in rows if r.off)
    return f"no rule is known that gives these limits; {some}"
