"""The dictionary: what may have gone wrong, as values. Nothing is computed here; `predict` does that."""

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.diagnosis.sample import Extent, Sample
from cpjax.crosscheck.question import Question


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
    scale: float = 1.0
    """Factor on the scale."""
    unrescaled: tuple[int, ...] = ()
    """Merges (in the claimed order, counted from 1) that added a part without scaling the sum so far down."""
    noise: str = ""
    lse: str = ""
    key: int = -1
    number: float = float("nan")
    """A fitted number: a weight, a factor, a size."""
    cost: float = 0.0
    """What is taken off twice the log-likelihood: 2 ln(how many such faults there are), and more for fitted numbers."""


RIGHT = Fault("right")

FITTED = 8.0
"""Cost of a fitted number; about ln n of the BIC for n = 3,000 outputs."""


def pairs_of(sample: Sample, question: Question) -> list[tuple[int, ...]]:
    """Chunks that may be wrong together: each alone, and the two chunks of one rank, which travel together."""
    seen = {int(c) for c in sample.visible_chunks}
    alone: list[tuple[int, ...]] = [(c,) for c in sorted(seen)]
    if question.layout != "zigzag":
        return alone
    last = 2 * question.cp - 1
    return alone + [(c, last - c) for c in range(question.cp) if {c, last - c} <= seen]


def chunk_faults(sample: Sample, question: Question) -> Iterator[Fault]:
    """Faults of whole key/value chunks: dropped, doubled, stale, exchanged, shown though hidden."""
    count = int(sample.chunk.max()) + 1
    sets = pairs_of(sample, question)
    few = 2 * np.log(max(len(sets), 1))
    seen = {int(c) for c in sample.visible_chunks}
    for chunks in sets:
        yield Fault("dropped", chunks, changes=tuple((c, Block(c, "visible", 0.0)) for c in chunks), cost=few)
        yield Fault("doubled", chunks, changes=tuple((c, Block(c, "visible", 2.0)) for c in chunks), cost=few)
    many = 2 * np.log(max(len(seen) * count, 1)) + 1
    for slot in sorted(seen):
        for source in set(range(count)) - {slot}:
            extents: list[Extent] = [_extent(sample, slot)]
            if source in seen and (slot == sample.q_chunk or source == sample.q_chunk):
                extents.append("visible")
            for extent in extents:
                yield Fault("stale", (slot,), (source,), ((slot, Block(source, extent)),), cost=many)
    for a, b in combinations(range(count), 2):
        if {a, b} & seen and (a == sample.q_chunk or b == sample.q_chunk) and {a, b} <= seen:
            changes = ((a, Block(b, _extent(sample, a))), (b, Block(a, _extent(sample, b))))
            yield Fault("exchanged", (a, b), (b, a), changes, cost=many)
    if question.mask.is_causal:
        for slot in set(range(count)) - (seen - {sample.q_chunk}):
            kind = "unmasked" if slot == sample.q_chunk else "shown"
            yield Fault(kind, (slot,), changes=((slot, Block(slot, "whole")),), cost=1 if kind == "unmasked" else many)


def rank_faults(sample: Sample, question: Question) -> Iterator[Fault]:
    """What one rank sent was replaced by what another sent: both of its chunks are stale."""
    if question.layout != "zigzag":
        return
    seen, last = {int(c) for c in sample.visible_chunks}, 2 * question.cp - 1
    cost = 2 * np.log(max(question.cp, 2) ** 2) + 1
    for a in range(question.cp):
        for b in set(range(question.cp)) - {a}:
            slots = tuple(c for c in (a, last - a) if c in seen)
            if len(slots) == 2 and last < int(sample.chunk.max()) + 1:
                sources = (b, last - b)
                changes = tuple((slot, Block(x, _extent(sample, slot))) for slot, x in zip(slots, sources, strict=True))
                yield Fault("stale", slots, sources, changes, cost=cost)


def _extent(sample: Sample, slot: int) -> Extent:
    """What a kernel shows of whatever data it finds in the place of this chunk."""
    inside = sample.seen[:, sample.chunk == slot]
    if inside.all():
        return "whole"
    if np.array_equal(inside, sample.triangle[:, sample.chunk == slot]):
        return "triangle"
    return "visible"


SHIFTS = (1, -1, 2, -2, 3, -3, 8, -8, 16, -16, 64, -64, 128, -128)


def whole_faults(question: Question, *, has_lse: bool, suspects: list[tuple[int, float]]) -> Iterator[Fault]:
    """Faults that touch all query chunks alike.

    Args:
      suspects: keys with the largest scores, and the weights with which they seem to enter.
    """
    segment = np.asarray(question.kv_tokens.segment)
    if question.mask.is_causal:
        yield Fault("causal mask absent", mask="no causal", cost=2)
        for k in SHIFTS:
            yield Fault("causal mask shifted", mask=f"shift {k}", number=k, cost=6)
    else:
        yield Fault("causal mask applied", mask="causal", cost=2)
    if question.mask.window is not None:
        for k in (0, 1, -1):
            yield Fault("window", mask=f"window {k}", number=k, cost=4)
    if (segment < 0).any():
        yield Fault("pads leaked", mask="pads", cost=2)
    if len(np.unique(segment[segment >= 0])) > 1:
        yield Fault("requests mixed", mask="requests", cost=2)
    if _has_prefix(question):
        yield Fault("prefix dropped", mask="no prefix", cost=2)
    names = {"not applied": 1 / (question.scale or 1.0), "applied twice": question.scale, "zero": 1e-9}
    names |= {"times log2(e)": np.log2(np.e), "times ln 2": np.log(2.0)}
    for name, factor in names.items():
        yield Fault(f"scale {name}", scale=float(factor), cost=4)
    for noise in ("probabilities in BF16", "stored results in BF16", "probabilities and stored results in BF16"):
        yield Fault(noise, noise=noise, cost=4)
    if has_lse:
        for name in ("log2", "negated", "maximum only", "without its maximum", "sum itself", "zero"):
            yield Fault(f"lse {name}", lse=name, cost=4)
    for key, weight in suspects:
        kind = "key lost" if abs(weight) < 0.5 else "key doubled"
        yield Fault(kind, key=key, number=0.0 if kind == "key lost" else 2.0, cost=2 * np.log(question.key.shape[1]))


def _has_prefix(question: Question) -> bool:
    """Keys that stand before every query of their request."""
    segment = np.asarray(question.kv_tokens.segment)
    return bool((np.asarray(question.kv_tokens.position)[segment >= 0] < first_query(question)[segment >= 0]).any())


def first_query(question: Question) -> np.ndarray:
    """For every key the least position of a query of its request, `[B, S]`."""
    q_position, q_segment = (np.asarray(x) for x in question.q_tokens)
    kv_segment = np.asarray(question.kv_tokens.segment)
    least = np.zeros(kv_segment.shape, np.int64)
    for b in range(len(kv_segment)):
        for s in np.unique(kv_segment[b]):
            mine = q_position[b][q_segment[b] == s]
            least[b][kv_segment[b] == s] = mine.min() if len(mine) else 0
    return least
