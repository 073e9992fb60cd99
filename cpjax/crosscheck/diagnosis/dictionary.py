"""The dictionary: what may have gone wrong, as values. Nothing is computed here; `predict` does that.

Here are the faults of single key/value chunks; those that touch all query chunks alike are in `everywhere`.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.diagnosis.sample import Extent, Sample
from cpjax.crosscheck.judging.problem import Problem
from cpjax.precision import Precision


class Block(NamedTuple):
    """What really entered in the place of a key/value chunk: the data of chunk `source`."""

    source: int
    extent: Extent
    weight: float = 1.0


class Fault(NamedTuple):
    """One entry. `kind` and `chunks` name it; one of the fields after them says how to compute it."""

    kind: str
    chunks: tuple[int, ...] = ()
    """The key/value chunks in whose place something else entered."""
    sources: tuple[int, ...] = ()
    """Whose data entered there."""
    changes: tuple[tuple[int, Block], ...] = ()
    mask: str = ""
    """A family of masks (`masks`); `number` says which of it."""
    scale: float = 1.0
    """Factor on the scale."""
    unrescaled: tuple[int, ...] = ()
    """Merges (in the claimed order, counted from 1) that added a part without scaling the sum so far down."""
    precision: Precision | None = None
    """Another arithmetic than the claimed one."""
    noise: str = ""
    lse: str = ""
    """What is handed over instead of lse (`predict.changed_lse`); for a merge in the wrong base, which lse it gives."""
    merge: str = ""
    """How partial results were merged: by which function, of an lse in the other base, or without weights (`parts`)."""
    cut: str = ""
    """Which parts these were."""
    extra: tuple[tuple[int, float], ...] = ()
    """For each head the logit of one more term of its sums, of value 0 (`denominator`)."""
    run: tuple[int, ...] = ()
    """Where a run of keys begins and ends (`runs`): lost or counted twice, or replaced by the run that begins at
    `number`."""
    logits: str = ""
    """What was done otherwise between scale · q·k and the softmax (`predict.changed_logits`)."""
    keys_of: int = -1
    """The key/value head whose keys were used; −1 is the right one."""
    values_of: int = -1
    value_shift: int = 0
    """Each key's value was that of the token so many places further."""
    limits: tuple[tuple[tuple[int, int], int], ...] = ()
    """For each row (batch, index in the sequence) the position below which it sees keys (`row_masks`)."""
    rule: str = ""
    """What gives these limits, in words."""
    factor: float = 1.0
    """On out: a scale of the values, or a divisor, that was forgotten."""
    key: int = -1
    number: float = float("nan")
    """Which of a family, or fitted: a weight, a factor, a size."""
    cost: float = 0.0
    """What is taken off twice the log-likelihood: 2 ln(how many such faults there are), and more for fitted numbers."""


RIGHT = Fault("right")

NARROW, USUAL, ODD, RARE, OFFSET = 1.0, 2.0, 3.0, 4.0, 6.0
"""Prior costs beside 2 ln(how many there are), for faults that explain equally well: of one place, of one mask, a mask
by another rule, another scale, lse or precision, a constant in lse. A step of 2 is a factor of e."""

FITTED = 8.0
"""Cost of a fitted number; about ln n of the BIC for n = 3,000 outputs."""


def pairs_of(sample: Sample, problem: Problem) -> list[tuple[int, ...]]:
    """Chunks that may be wrong together: each alone, and those of one rank, which travel together."""
    seen = {int(c) for c in sample.visible_chunks}
    alone: list[tuple[int, ...]] = [(c,) for c in sorted(seen)]
    return alone + [chunks for chunks in problem.partition.travel_together() if set(chunks) <= seen]


def chunk_faults(sample: Sample, problem: Problem) -> Iterator[Fault]:
    """Faults of whole key/value chunks: dropped, doubled, stale, exchanged, shown though hidden, masked though seen."""
    count = int(sample.chunk.max()) + 1
    sets = pairs_of(sample, problem)
    few = 2 * np.log(max(len(sets), 1))
    seen = {int(c) for c in sample.visible_chunks}
    # Of one chunk, a mask that is there or not is the causal mask, which `everywhere` has.
    for chunks in sets:
        yield Fault("dropped", chunks, changes=tuple((c, Block(c, "visible", 0.0)) for c in chunks), cost=few)
        yield Fault("doubled", chunks, changes=tuple((c, Block(c, "visible", 2.0)) for c in chunks), cost=few)
    for c in sorted(seen):
        if count > 1 and _extent(sample, c) == "all":
            yield Fault("masked", (c,), changes=((c, Block(c, "triangle")),), cost=few + NARROW)
    many = 2 * np.log(max(len(seen) * count, 1)) + NARROW
    for slot in sorted(seen):
        for source in set(range(count)) - {slot}:
            extents: list[Extent] = [_extent(sample, slot)]
            if source in seen and (slot == sample.own or source == sample.own):
                extents.append("visible")
            for extent in extents:
                if extent == "visible" and source not in seen:
                    continue  # nothing would enter: it is dropped
                yield Fault("stale", (slot,), (source,), ((slot, Block(source, extent)),), cost=many)
    for a, b in combinations(range(count), 2):
        if {a, b} & seen and (a == sample.own or b == sample.own) and {a, b} <= seen:
            changes = ((a, Block(b, _extent(sample, a))), (b, Block(a, _extent(sample, b))))
            yield Fault("exchanged", (a, b), (b, a), changes, cost=many)
    if problem.mask.is_causal and count > 1:
        for slot in set(range(count)) - (seen - {sample.own}):
            kind = "unmasked" if slot == sample.own else "shown"
            yield Fault(
                kind, (slot,), changes=((slot, Block(slot, "all")),), cost=NARROW if kind == "unmasked" else many
            )


def rank_faults(sample: Sample, problem: Problem) -> Iterator[Fault]:
    """What one rank sent was replaced by what another sent: all of its chunks are stale."""
    together = problem.partition.travel_together()
    seen = {int(c) for c in sample.visible_chunks}
    cost = 2 * np.log(max(problem.cp, 2) ** 2) + NARROW
    for slots in together:
        for sources in together:
            if sources != slots and set(slots) <= seen and max(sources) < int(sample.chunk.max()) + 1:
                changes = tuple((slot, Block(x, _extent(sample, slot))) for slot, x in zip(slots, sources, strict=True))
                yield Fault("stale", slots, sources, changes, cost=cost)


def _extent(sample: Sample, slot: int) -> Extent:
    """What a kernel shows of whatever data it finds in the place of this chunk."""
    inside = sample.seen[:, sample.chunk == slot]
    if inside.all():
        return "all"
    if np.array_equal(inside, sample.triangle[:, sample.chunk == slot]):
        return "triangle"
    return "visible"
