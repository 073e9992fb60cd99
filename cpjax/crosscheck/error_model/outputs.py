"""Outputs that are stored: of each chunk (§3.3), after each merge, and the last one (§3.4).

Each number is known in float64, and so is the spacing of its format. Where a number hardly moves, or lies near a number
of the format, its roundings repeat with one sign, and their sizes are added up instead.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.arithmetic import Arithmetic, Merging
from cpjax.crosscheck.error_model.row_covariance import Roundings, Shared, by_cell
from cpjax.crosscheck.error_model.terms import Direction, Systematic, Term, column_by_column
from cpjax.crosscheck.exact.formats import Format

NEAR = 4
"""Spacings. A number that moves by less, or is nearer to the best key's value, is rounded the same way again (§3.3)."""


def output_terms(a: Arithmetic) -> Iterator[Term | Systematic]:
    """Sections 3.3 and 3.4."""
    best = _best_value(a)
    chunks, repeated = _of_chunks(a, best)
    yield _stored("outputs of chunks", "3.3", chunks, a.out)
    yield Systematic("outputs of chunks, one-signed", "3.3", repeated)
    merges, repeated = _of_any_order(a) if a.merging is None else _of_either(a, best)
    yield _stored("outputs of merges", "3.4", merges, a.carry)
    yield Systematic("outputs of merges, stagnation", "3.4", repeated)
    if a.precision.carry != a.precision.out:
        last = (a.chunk_count > 1)[:, None] * a.out.spacing(a.rows.out) ** 2 / 12
        yield Term("the last rounding", "3.4", last, along=lambda direction: iter([column_by_column(last, direction)]))


def _stored(name: str, section: str, roundings: Roundings, fmt: Format) -> Term:
    def along(direction: Direction) -> Iterator[Shared]:
        moved = Roundings(roundings.value, roundings.sigma * direction.per_out[:, None])
        yield Shared(by_cell(moved, fmt), (moved.sigma**2).sum(axis=(1, 2)))

    return Term(name, section, (roundings.sigma**2).sum(axis=1), along=along)


def _of_chunks(a: Arithmetic, best: Float[np.ndarray, "R C V"]) -> tuple[Roundings, Float[np.ndarray, "R V"]]:
    """The chunks' random roundings, and the sum of those that are not.

    The value of the chunk's best key is, once rounded, a number of the format. Where the chunk's out is nearer than
    a few spacings, it is rounded back to it, always against what the other keys added.
    """
    found = [_of_weights(a, a.rows.chunk_weight, best)]
    if a.rows.has_sink:  # it may be in any chunk, as a kernel has it that begins with it
        found.append(_of_weights(a, a.rows.chunk_weight + a.rows.chunk_weight[:, -1:], best))
    sigma = np.max([random.sigma for random, _ in found], axis=0)
    return Roundings(found[0][0].value, sigma), np.max([repeated for _, repeated in found], axis=0)


def _of_weights(
    a: Arithmetic, chunk_weight: Float[np.ndarray, "R C"], best: Float[np.ndarray, "R C V"]
) -> tuple[Roundings, Float[np.ndarray, "R V"]]:
    weight = chunk_weight[..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        out = np.where(weight > 0, a.rows.chunk_part / weight, 0.0)
    moved, spacing = np.abs(out - best), a.out.spacing(out)
    is_random = moved >= NEAR * spacing
    random = Roundings(out, np.where(is_random, weight * spacing / np.sqrt(12), 0.0))
    return random, np.where(is_random, 0.0, weight * np.minimum(moved, spacing / 2)).sum(axis=1)


def _best_value(a: Arithmetic) -> Float[np.ndarray, "R C V"]:
    """The value of each chunk's best key, as a number of the out format."""
    rows = a.rows
    top = np.stack([start + rows.score[:, start:stop].argmax(axis=1) for start, stop in pairwise(rows.edges)], axis=1)
    return a.out.round(rows.value[top])


def _of_either(a: Arithmetic, best: Float[np.ndarray, "R C V"]) -> tuple[Roundings, Float[np.ndarray, "R V"]]:
    """The merges in each order in which they may be: of each output the order that rounds it most."""
    found = [_of_merges(a, merging, best) for merging in a.mergings if merging is not None]
    value, sigma = (np.stack(x) for x in zip(*(random for random, _ in found), strict=True))
    most = (sigma**2).sum(axis=2).argmax(axis=0)[None, :, None]
    random = Roundings(*(np.take_along_axis(x, most, axis=0)[0] for x in (value, sigma)))
    return random, np.max([repeated for _, repeated in found], axis=0)


def _of_merges(
    a: Arithmetic, merging: Merging, best: Float[np.ndarray, "R C V"]
) -> tuple[Roundings, Float[np.ndarray, "R V"]]:
    """The merges' independent roundings, and the sum of those that repeat.

    A merge that moves the running out by less than a few spacings rounds the same way again and again. One that
    leaves it within a few spacings of the best key's value rounds it to that, as with a chunk's out.
    """
    weight = np.take_along_axis(a.rows.chunk_weight, merging, axis=1)
    part = np.take_along_axis(a.rows.chunk_part, merging[..., None], axis=1)
    done = np.cumsum(weight, axis=1)[..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        running = np.where(done > 0, np.cumsum(part, axis=1) / done, 0.0)
    is_first = (np.cumsum(weight > 0, axis=1) == 1) & (weight > 0)
    is_merged = ((weight > 0) & ~is_first)[..., None]  # the first chunk a row sees is merged with nothing
    spacing = a.carry.spacing(running)
    moved = np.abs(np.diff(running, axis=1, prepend=0.0))
    away = np.abs(running - _best_so_far(a, merging, best))
    is_random = (moved >= NEAR * spacing) & (away >= NEAR * spacing)
    small = np.maximum(*(np.where(x < NEAR * spacing, x, 0.0) for x in (moved, away)))
    random = Roundings(running, np.where(is_merged & is_random, done * spacing / np.sqrt(12), 0.0))
    return random, np.where(is_merged, done * np.minimum(small, spacing / 2), 0.0).sum(axis=1)


def _best_so_far(a: Arithmetic, merging: Merging, best: Float[np.ndarray, "R C V"]) -> Float[np.ndarray, "R C V"]:
    """The value of the best key of all chunks merged so far, in the order of merging."""
    highest = np.take_along_axis(a.rows.chunk_max, merging, axis=1)
    is_best = highest == np.maximum.accumulate(highest, axis=1)
    latest = np.maximum.accumulate(np.where(is_best, np.arange(highest.shape[1]), 0), axis=1)
    return np.take_along_axis(best, np.take_along_axis(merging, latest, axis=1)[..., None], axis=1)


def _of_any_order(a: Arithmetic) -> tuple[Roundings, Float[np.ndarray, "R V"]]:
    """The same if the order is not known: each of C − 1 merges at its largest (§3.4, unknown order)."""
    merges = np.maximum(a.chunk_count - 1, 0)[:, None]
    # A merge's share times the spacing of its running out is less than twice the unit roundoff of the largest.
    spacing = np.maximum(2 * a.carry.u * a.largest_running, a.carry.tiny)
    moved = 2 * np.abs(a.chunk_pull)
    repeated = np.minimum(moved, spacing[:, None] / 2).sum(axis=1) * (merges > 0)
    # Where the running out was on its way is not known; rows that end alike are taken to have come alike.
    return Roundings(a.rows.out[:, None], (np.sqrt(merges / 12) * spacing)[:, None]), repeated
