"""A mask that is off by another number in every row: how many keys each row saw, and the rule that gives these numbers.

Decode with several new tokens (MTP), local lengths of ranks, lengths of another request: each row sees the first keys
up to a limit of its own. The limit is looked for row by row; then a rule is looked for that gives all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.diagnosis.dictionary import FITTED, RARE, Fault
from cpjax.crosscheck.diagnosis.masks import thresholds
from cpjax.crosscheck.diagnosis.measure import Measured
from cpjax.crosscheck.diagnosis.scan import row_misfit
from cpjax.wording import counted

FAMILY = "limit"
"""Keys of the row's request up to a position: the row sees the keys at positions below the number."""

SAMPLES = 32
"""Wrong query chunks that are looked at."""

MOST_RANKS = 16
"""Numbers of ranks whose local lengths are tried."""

ROUGH = 4.0
"""z beyond which no limit explains a row, roughly, by the σ of the right result; what is found is scored exactly."""

EQUAL = 6.0
"""2 ln(likelihood) within which rules are equals."""

MOST_RULES = 2
"""Equal rules that are told."""

MOST_EVERY = 128
"""The most queries after which a mask may be off by one more."""


def row_mask(wrong: list[Measured]) -> Fault | None:
    """The limits of all rows, with the rule that gives them; None where some row is explained by no limit.

    Several limits may explain a row as well: a key with little weight more or less changes nothing. A rule must give
    each row one of them, and of the rules the best is told, and those that the outputs do not tell from it.
    """
    rows: dict[tuple[int, int], _Row] = {}
    for one in wrong[:SAMPLES]:
        threshold = thresholds(one.sample, one.problem, FAMILY)
        for row in range(len(threshold)):
            numbers = np.unique(threshold[row][np.isfinite(threshold[row])])
            if not len(numbers):
                return None
            misfit = row_misfit(one, threshold[row], row, numbers)
            if not misfit.min() <= ROUGH**2:
                return None
            place = (one.sample.batch, int(one.sample.position[row]))
            before = rows.get(place)
            rows[place] = _Row(one, place, numbers, misfit) if before is None else before.and_also(misfit)
    found = [rows[place] for place in sorted(rows)]
    wanted = np.array([row.wanted for row in found])
    best = np.array([row.best for row in found])
    shifted = min(_misfit(found, wanted + off) for off in np.unique(best - wanted))
    ruled = [(rule, saw, misfit) for rule, saw in _rules(found, best) if np.isfinite(misfit := _misfit(found, saw))]
    keys = wrong[0].problem.key.shape[1]
    is_causal = wrong[0].problem.mask.is_causal
    if is_causal and np.isfinite(shifted) and not any(misfit < shifted - EQUAL for _, _, misfit in ruled):
        return None  # the same in every row: a shifted mask
    if not ruled:
        cost = RARE + FITTED + 2 * np.log(keys) * len(found)
        limits = tuple((row.place, row.best) for row in found)
        return Fault("limits", limits=limits, rule=_listed(found), cost=float(cost))
    least = min(misfit for _, _, misfit in ruled)
    near = [(rule, saw) for rule, saw, misfit in ruled if misfit <= least + EQUAL]
    # Where two rules give the same limits here, the plainer is told.
    equals = [(rule, saw) for i, (rule, saw) in enumerate(near) if not any((saw == x).all() for _, x in near[:i])]
    limits = tuple((row.place, int(x)) for row, x in zip(found, equals[0][1], strict=True))
    cost = RARE + FITTED + 2 * float(np.log(keys))
    return Fault("limits", limits=limits, rule="; or ".join(rule for rule, _ in equals[:MOST_RULES]), cost=cost)


@dataclass(frozen=True)
class _Row:
    """A query: how many keys it should see, and how well each number of keys explains what it gave."""

    one: Measured
    place: tuple[int, int]
    numbers: Float[np.ndarray, " n"]
    misfit: Float[np.ndarray, " n"]
    heads: int = 1

    def and_also(self, misfit: Float[np.ndarray, " n"]) -> "_Row":
        """Another head of the same query: it has the same mask."""
        return replace(self, misfit=self.misfit + misfit, heads=self.heads + 1)

    def misfit_of(self, limit: int) -> float:
        """Of this many keys, times the columns; infinite where they do not explain the row."""
        at = int(np.searchsorted(self.numbers, limit, side="right")) - 1
        misfit = float(self.misfit[at]) if at >= 0 else np.inf
        return misfit * self.one.sample.value.shape[1] if misfit <= ROUGH**2 * self.heads else np.inf

    @property
    def best(self) -> int:
        return int(self.numbers[self.misfit.argmin()])

    @cached_property
    def _own(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Positions of the queries and of the keys of its request, and the request."""
        b, at = self.place
        position, segment = (np.asarray(x)[b] for x in self.one.problem.q_tokens)
        kv_position, kv_segment = (np.asarray(x)[b] for x in self.one.problem.kv_tokens)
        return position[segment == segment[at]], kv_position[kv_segment == segment[at]], int(segment[at])

    @property
    def request(self) -> int:
        return self._own[2]

    @property
    def length(self) -> int:
        return int(self._own[1].max()) + 1

    @property
    def position(self) -> int:
        return int(np.asarray(self.one.problem.q_tokens.position)[self.place])

    @property
    def wanted(self) -> int:
        return self.position + 1 if self.one.problem.mask.is_causal else self.length

    @property
    def index(self) -> int:
        return self.position - int(self._own[0].min())

    @property
    def queries(self) -> int:
        return len(self._own[0])


def _misfit(rows: list[_Row], limits: np.ndarray) -> float:
    return sum(row.misfit_of(int(limit)) for row, limit in zip(rows, limits, strict=True))


def _rules(rows: list[_Row], best: Int[np.ndarray, " n"]) -> Iterator[tuple[str, Int[np.ndarray, " n"]]]:
    """Rules, and how many keys each gives every row, the plainest first."""
    index, queries, wanted, length, requests = (
        np.array([getattr(row, name) for row in rows]) for name in ("index", "queries", "wanted", "length", "request")
    )
    causal = rows[0].one.problem.mask.is_causal
    if causal:
        yield "each query sees all keys of its request: the causal mask is absent", length
    else:
        few = int(np.median(wanted - best))
        if few > 0:
            lost = counted(few, "key")
            yield f"each query misses the last {lost} of its request: its length is taken {few} too small", wanted - few
    if len(np.unique(requests)) > 1:
        off = np.array([np.median((best - wanted)[requests == r]) for r in requests]).astype(int)
        said = ", ".join(f"request {r}: {off[requests == r][0]:+d}" for r in np.unique(requests))
        yield f"the limit is off by one number a request ({said})", wanted + off
    for k in (-2, -1, 1, 2):
        more = "many" if k > 0 else "few"
        yield f"query i of its request sees {abs(k)}·i keys too {more}: i counts from 0", wanted + k * index
        yield (
            f"query i of n of its request sees {abs(k)}·(n − 1 − i) keys too {more}: i counts from 0",
            wanted + k * (queries - 1 - index),
        )
    for every in range(2, min(MOST_EVERY, int(index.max())) + 1):
        for k in (-1, 1):
            more = "many" if k > 0 else "few"
            yield f"a query sees one key too {more} for every {every} queries before it", wanted + k * (index // every)
    for ranks in range(2, MOST_RANKS + 1):
        for name, count in (("⌈n / R⌉", -(-wanted // ranks)), ("⌊n / R⌋", wanted // ranks)):
            yield f"a query sees {name} keys of n, with R = {ranks}: as many as one of {ranks} ranks holds", count


def _listed(rows: list[_Row]) -> str:
    some = ", ".join(f"position {r.place[1]} saw {r.best} instead of {r.wanted}" for r in rows if r.best != r.wanted)
    return f"no rule is known that gives these limits; {some}"
