"""After a failed verdict: the fault that explains the gradients to within rounding, or nothing.

Each suspect is a faulty backward pass whose exact gradients are computed. It is named only if the result passes all
tests when held against them, with σ and bound of that faulty pass, and if no other suspect does (docs/gradients.md §7).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Bool

from cpjax.crosscheck.gradients.asked import Asked
from cpjax.crosscheck.gradients.exact import NAMES, RIGHT, Gradients, Variant, exact_gradients
from cpjax.crosscheck.gradients.expected import expected
from cpjax.crosscheck.gradients.sums import Expected, Models
from cpjax.crosscheck.gradients.verdict import decided, row_errors
from cpjax.crosscheck.judging.statistic import LIMIT, expected_maximum, z_score
from cpjax.mask import PAD

NEARER = 0.5
"""A suspect must bring the errors down to this share before its own error model is asked."""

MOST_PAIRS = 2**25
"""Queries × keys × heads above which no suspect is looked at: each costs a pass over all of them."""

MOST_HEADS = 8
"""Heads up to which every other head's lse is tried; above, those of the neighbours only."""


@dataclass(frozen=True, eq=False)
class Suspect:
    """A faulty backward pass: the tensors that it changes, by which variant, times which factors."""

    sentence: str
    changed: tuple[str, ...]
    variant: Variant = RIGHT
    factor: float = 1.0


def causes_of(asked: Asked, given: Gradients, right: Models, rows: Gradients) -> tuple[str, ...]:
    """The one suspect that explains the result, in a sentence; none if there is none, or several.

    Args:
      given, right, rows: the gradients that failed, an `Expected` for each, and which rows of each count.
    """
    if asked.problem.query.shape[2] * asked.keys_seen.sum() > MOST_PAIRS:
        return ()
    bad = Gradients(*(_bad_rows(*one) for one in zip(given, right, rows, strict=True)))
    wrong = tuple(name for name, some in zip(NAMES, bad, strict=True) if some.any())
    found = []
    for suspects in (_everywhere(asked, right), _of_ranks(asked, bad), _of_tiles(asked, bad)):
        found = [one.sentence for one in suspects if _explains(one, asked, given, right, rows, wrong)]
        if found:
            break
    return tuple(found) if len(found) == 1 else ()


def _bad_rows(given: np.ndarray, right: Expected, rows: np.ndarray) -> Bool[np.ndarray, "B L N"]:
    errors = row_errors(given, right, rows)
    bad = np.zeros(rows.shape, bool)
    bad[(right.dof > 0) & rows] = ~(
        z_score(errors.mean_square, errors.dof) - expected_maximum(len(errors.dof)) <= LIMIT
    )
    return bad


def _explains(
    one: Suspect, asked: Asked, given: Gradients, right: Models, rows: Gradients, wrong: tuple[str, ...]
) -> bool:
    """Whether the result passes when it is held against the suspect's gradients."""
    if set(wrong) - set(one.changed):
        return False
    changed = [name in one.changed for name in NAMES]
    if one.variant is not RIGHT:
        near = exact_gradients(asked, one.variant)
        for is_changed, mine, theirs, true, counts in zip(changed, near, given, right, rows, strict=True):
            if is_changed and not _error(theirs, mine, true, counts) <= NEARER * _error(
                theirs, true.exact, true, counts
            ):
                return False
        right = Models(
            *(
                x if is_changed else y
                for is_changed, x, y in zip(changed, expected(asked, one.variant), right, strict=True)
            )
        )
    for name, is_changed, mine, theirs, counts in zip(NAMES, changed, right, given, rows, strict=True):
        model = _times(mine, one.factor) if is_changed else mine
        if not decided(name, theirs, model, counts).passed:
            return False
    return True


def _error(given: np.ndarray, exact: np.ndarray, right: Expected, rows: np.ndarray) -> float:
    used = (right.dof > 0) & rows
    with np.errstate(invalid="ignore", over="ignore"):
        return float((((given - exact)[used] / right.sigma[used]) ** 2).sum())


def _times(x: Expected, factor: float) -> Expected:
    """As if the gradient were multiplied once more."""
    if factor == 1:
        return x
    scaled = {name: factor * getattr(x, name) for name in ("exact", "sigma", "low", "high")}
    low, high = np.minimum(scaled["low"], scaled["high"]), np.maximum(scaled["low"], scaled["high"])
    # The last rounding was of the number before: at most a spacing of the new one more, on either side.
    more = abs(factor) * 2 * x.half_width
    scaled |= {"sigma": np.abs(scaled["sigma"]), "low": low - more, "high": high + more}
    return replace(x, **scaled, half_width=abs(factor) * x.half_width)


def _everywhere(asked: Asked, right: Models) -> Iterator[Suspect]:
    """Faults that are the same for all rows."""
    p = asked.problem
    yield Suspect("dq and dk: δ = Σ dout·out was not taken off dout·v", ("dq", "dk"), Variant(has_delta=False))
    if abs(p.scale) not in (0.0, 1.0):
        for changed in (("dq",), ("dk",), ("dq", "dk")):
            names = " and ".join(changed)
            yield Suspect(f"{names}: scale is missing", changed, factor=1 / p.scale)
            yield Suspect(f"{names}: multiplied by scale once too often", changed, factor=p.scale)
    heads = p.query.shape[2]
    shifts = range(1, heads) if heads <= MOST_HEADS else (1, heads - 1, p.group)
    for shift in shifts:
        sentence = f"p was recomputed from the lse of another head: head n took that of head n + {shift} (of {heads})"
        yield Suspect(sentence, NAMES, Variant(lse_shift=shift))
    if p.mask.is_causal or p.mask.window is not None:
        unmasked = Variant(is_masked=False)
        yield Suspect("dv: probabilities of hidden keys entered; the mask was not applied", ("dv",), unmasked)
        yield Suspect("hidden keys entered all gradients: the mask was not applied", NAMES, unmasked)
    if p.group > 1:
        yield Suspect(
            f"dk and dv: the mean over the {p.group} heads of a group, not their sum", NAMES[1:], factor=1 / p.group
        )
        for member in range(p.group):
            only = Variant(heads=tuple(range(member, heads, p.group)))
            sentence = f"dk and dv: not summed over the group; of {p.group} heads only number {member} entered"
            yield Suspect(sentence, NAMES[1:], only)


def _of_ranks(asked: Asked, bad: Gradients) -> Iterator[Suspect]:
    """What a rank or a chunk gave, and nobody added."""
    p = asked.problem
    if p.cp == 1:
        return
    heads = tuple(range(p.query.shape[2]))
    q_rank, kv_rank = (_ranks(asked, chunk) for chunk in (p.q_chunk, p.kv_chunk))
    bad_q = np.isin(p.q_chunk, p.q_chunk[bad.dq.any(axis=(0, 2))])
    bad_kv = np.isin(p.kv_chunk, p.kv_chunk[(bad.dk.any(axis=2) | bad.dv.any(axis=2)).any(axis=0)])
    for word, of_query, of_key in (("rank", q_rank, kv_rank), ("chunk", p.q_chunk, p.kv_chunk)):
        for number in np.unique(of_query):
            lost = Variant(lost_queries=of_query == number, lost_keys=bad_kv, lost_heads=heads)
            sentence = (
                f"dk and dv of keys {_spans(bad_kv)} lack the queries of {word} {number}: its part never came home"
            )
            yield Suspect(sentence, ("dk", "dv"), lost)
        for number in np.unique(of_key):
            lost = Variant(lost_queries=bad_q, lost_keys=of_key == number, lost_heads=heads)
            sentence = f"dq of queries {_spans(bad_q)} lacks the keys of {word} {number}: that step was not added"
            yield Suspect(sentence, ("dq",), lost)
    owners = np.unique(kv_rank[bad_kv])
    if len(owners) == 1 and len(np.unique(q_rank)) > 2:
        lost = Variant(lost_queries=q_rank != owners[0], lost_keys=bad_kv, lost_heads=heads)
        sentence = f"dk and dv of rank {owners[0]} have its own queries only: nothing came home from other ranks"
        yield Suspect(sentence, ("dk", "dv"), lost)


def _of_tiles(asked: Asked, bad: Gradients) -> Iterator[Suspect]:
    """A rectangle of queries and keys that was skipped, in some heads."""
    p = asked.problem
    bad_kv = bad.dk | bad.dv
    heads = tuple(int(n) for n in np.flatnonzero(bad.dq.any(axis=(0, 1))))
    queries, keys = (_hull(np.asarray(x.any(axis=(0, 2)))) for x in (bad.dq, bad_kv))
    if not heads or not queries.any() or not keys.any():
        return
    every = f"in head {', '.join(map(str, heads))}" if len(heads) < p.query.shape[2] else "in all heads"
    lost = Variant(lost_queries=queries, lost_keys=keys, lost_heads=heads)
    sentence = f"queries {_spans(queries)} never met keys {_spans(keys)} {every}: a tile was skipped"
    yield Suspect(sentence, NAMES, lost)


def _ranks(asked: Asked, chunk: np.ndarray) -> np.ndarray:
    """The rank of each token; pads and what belongs to no rank have their chunk."""
    rank = {int(c): asked.problem.partition.rank(int(c)) for c in np.unique(chunk) if c != PAD}
    return np.array([c if rank.get(int(c)) is None else rank[int(c)] for c in chunk])


def _hull(some: Bool[np.ndarray, " L"]) -> Bool[np.ndarray, " L"]:
    at = np.flatnonzero(some)
    inside = np.zeros_like(some)
    if len(at):
        inside[at[0] : at[-1] + 1] = True
    return inside


def _spans(some: Bool[np.ndarray, " L"]) -> str:
    """Runs of true places, as "0-63, 128-191"."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], some, [False]]).astype(int)))
    return ", ".join(f"{a}-{b - 1}" for a, b in list(pairwise(edges))[::2])
