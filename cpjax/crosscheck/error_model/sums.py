"""What the compute format does besides (§3.7): exponentials and products, sums over the keys, weights of the merge."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.arithmetic import Arithmetic, times_few
from cpjax.crosscheck.error_model.terms import Direction, Systematic, Term, column_by_column
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.precision import KEY_TILE

OF_TERM = 4.0
"""Unit roundoffs of Σ A|v| that exponentials and products make."""

OF_ADDITION = 0.25
"""Unit roundoffs, times √n, of a sum of n terms one after the other."""

OF_MERGE, MERGE_SIZE = 2.0, 2.0
"""A merge's weight is off by so many unit roundoffs of |lse| and this."""

ABSORBED = 0.6
"""Of a small term, what a sum loses at most, in unit roundoffs of the sum."""

SMALL = 8.0
"""Unit roundoffs of its tile's sum (or of 1, for a tile's sum) below which a term may be absorbed."""


def sum_terms(a: Arithmetic) -> Iterator[Term | Systematic]:
    """Section 3.7."""
    exponentials = (OF_TERM * a.eps * a.weighted_size * (a.seen_keys > 1)[:, None]) ** 2
    yield Term(
        "exponentials and products", "3.7", exponentials, along=lambda d: iter([column_by_column(exponentials, d)])
    )
    yield _row_sums(a)
    yield _alike(a)
    yield _equal(a)
    yield _merge_weights(a)
    yield _merge_totals(a)
    yield _absorbed(a)
    if a.has_half_factors:
        yield _cut_off(a)
    yield from _underflow(a)


def _row_sums(a: Arithmetic) -> Term:
    """Numerator and row sum. The latter's error moves all outputs of a row together.

    As many additions follow one another as a chunk has keys; sums of different chunks err independently. If the largest
    term, of the share w, comes first, the sum is larger than one that grows evenly: (1 + w + w²)/3 in the mean square.
    """
    chunk_weight = a.rows.chunk_weight
    first = np.maximum.reduceat(a.rows.weight, a.rows.edges[:-1], axis=1)
    first = np.divide(first, chunk_weight, out=np.zeros_like(first), where=chunk_weight > 0)
    squares = chunk_weight**2 * a.seen_of_chunks * (1 + first + first**2)
    depth = np.sqrt(squares.sum(axis=1)) + np.sqrt(a.chunk_count)
    sigma = OF_ADDITION * a.eps * np.where(a.seen_keys > 1, depth, 0.0)
    out = 2 * (sigma[:, None] * a.rows.out) ** 2

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield (sigma * (direction.per_out * a.rows.out).sum(axis=1)) ** 2
        yield column_by_column(out / 2, direction)

    lse = (np.where(a.seen_keys > 1, OF_TERM * a.eps, 0.0) + sigma) ** 2
    return Term("row sums", "3.7", out, lse, along=along)


def _alike(a: Arithmetic) -> Systematic:
    """Terms that are nearly equal: of the row sum, in all outputs and in lse; of the products of some columns."""
    return Systematic(
        "terms that err alike", "3.7", a.product_drift + a.drift[:, None] * np.abs(a.rows.out), lse=a.drift
    )


def _equal(a: Arithmetic) -> Term:
    """Terms that come again: of the row sum, which moves all outputs together, and of the products of each column."""
    # What is known to have one sign stands beside it (`_alike`).
    row_sum = np.maximum(a.equal_terms.row_sum - a.drift**2, 0.0)
    products = np.maximum(a.equal_terms.products - a.product_drift**2, 0.0)

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield row_sum * (direction.per_out * a.rows.out).sum(axis=1) ** 2
        yield column_by_column(products, direction)

    return Term("equal terms", "3.7", products + row_sum[:, None] * a.rows.out**2, row_sum, along=along)


def _merge_weights(a: Arithmetic) -> Term:
    """exp(lse_c − lse) of a chunk; it moves all outputs of a row together."""
    sigma = OF_MERGE * a.eps * (a.lse_size + MERGE_SIZE)
    out = sigma[:, None] ** 2 * (a.chunk_pull**2).sum(axis=1)

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield (sigma[:, None] ** 2 * direction.of_chunk**2).sum(axis=1)
        yield column_by_column(out, direction)

    return Term("weights of the merge", "3.7", out, along=along)


def _merge_totals(a: Arithmetic) -> Term:
    """Weights exp(lse_c − lse) add up to 1 except for the rounding of lse, once a merge: all of what is merged errs."""
    part, spacing = _merged_parts(a)
    variance = spacing**2 / 12

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield (variance * np.einsum("rv,rcv->rc", direction.per_out, part) ** 2).sum(axis=1)

    out = np.einsum("rc,rcv->rv", variance, part**2)
    return Term("totals of the merge", "3.7", out, is_common=True, along=along)


def _merged_parts(a: Arithmetic) -> tuple[Float[np.ndarray, "R C V"], Float[np.ndarray, "R C"]]:
    """What has been merged after each chunk, as a part of the output, and the spacing of its lse; 0 for the first.

    Keys of one chunk may be merged too, or be weighed by exp(s − lse). If the order is not known, the largest of
    either, as often as there are merges.
    """
    rows, fmt = a.rows, FORMATS[a.precision.compute]
    lse = np.where(a.seen_keys > 0, rows.lse, 0.0)[:, None]
    if a.merging is None:
        merges = (np.maximum(a.chunk_count - 1, 1) * (a.seen_keys > 1))[:, None]
        lowest = np.where(rows.chunk_weight > 0, rows.chunk_weight, np.inf).min(axis=1, keepdims=True)
        size = np.maximum(np.abs(lse), np.abs(lse + np.log(np.where(np.isfinite(lowest), lowest, 1.0))))
        return a.largest_running[:, None], np.sqrt(merges) * fmt.spacing(size)
    weight = np.take_along_axis(rows.chunk_weight, a.merging, axis=1)
    done = np.cumsum(weight, axis=1)
    is_first = np.cumsum(weight > 0, axis=1) <= np.where(a.chunk_count > 1, 1, 0)[:, None]
    is_merged = (weight > 0) & ~is_first & (a.seen_keys > 1)[:, None]
    spacing = fmt.spacing(lse + np.log(np.where(done > 0, done, 1.0)))
    part = np.cumsum(np.take_along_axis(rows.chunk_part, a.merging[..., None], axis=1), axis=1)
    return part, np.where(is_merged, spacing, 0.0)


def _absorbed(a: Arithmetic) -> Systematic:
    """Terms that are too small for the sum that they are added to: of products, and of the row sum."""
    lost = _lost_weight(a)
    # A sum of products is as large as they are: where the heavy keys have small values it absorbs less.
    count = (lost > 0).sum(axis=1, keepdims=True)
    of_products = np.minimum(times_few(lost, a.rows.size), count * ABSORBED * a.eps * a.weighted_size)
    lse = lost.sum(axis=1)
    return Systematic("absorbed terms", "3.7", of_products + lse[:, None] * np.abs(a.rows.out), lse=lse)


def _cut_off(a: Arithmetic) -> Systematic:
    """p·v of each chunk, added by matrix units, is too small by up to so much; a product alone is exact."""
    share = np.where(a.seen_of_chunks > 1, a.cut_off(a.seen_of_chunks), 0.0)
    part = share[..., None] * a.rows.chunk_part
    # As likely to be anywhere in its range; lse has no part in it.
    most, mean = np.abs(part).sum(axis=1), -part.sum(axis=1) / 2
    return Systematic("values cut off", "3.7", most, typical=1 / np.sqrt(3), mean=mean)


def _lost_weight(a: Arithmetic) -> Float[np.ndarray, "R S"]:
    """What may be lost of a weight that is small beside its tile's sum, or whose tile is: L_j."""
    rows, eps = a.rows, a.eps
    starts = np.concatenate([np.arange(start, stop, KEY_TILE) for start, stop in pairwise(rows.edges)])
    tile = np.add.reduceat(rows.weight, starts, axis=1)
    of_tile = np.where(tile < SMALL * eps, np.minimum(tile, ABSORBED * eps), 0.0)
    share = np.divide(of_tile, tile, out=np.zeros_like(tile), where=tile > 0)
    lost = np.zeros_like(rows.weight)
    for n, (start, stop) in enumerate(pairwise([*starts, rows.weight.shape[1]])):
        weight, of_sum = rows.weight[:, start:stop], eps * tile[:, n : n + 1]
        least = np.minimum(weight, ABSORBED * of_sum)
        np.copyto(lost[:, start:stop], least, where=weight < SMALL * of_sum)
        if share[:, n].any():
            np.maximum(lost[:, start:stop], weight * share[:, n : n + 1], out=lost[:, start:stop])
    lost[a.seen_keys <= 1] = 0.0
    return lost


def _underflow(a: Arithmetic) -> Iterator[Term | Systematic]:
    """Numbers below the least normal one of the compute format, which processors may take for 0.

    They are met at most where a kernel divides p by its sum before it multiplies: the products are A v, not p v.
    """
    least, count = a.least_normal, a.seen_keys[:, None]
    lost = a.lost_to_zero.copy()
    # Where products are as large as a rounding of their sum, none is so small that it would be felt.
    for v in np.flatnonzero((count * least > a.eps * a.weighted_size).any(axis=0)):
        product = a.rows.weight * a.rows.size[:, v]
        lost[:, v] += np.where(product < least, product, 0.0).sum(axis=1)
    yield Systematic("underflow", "3.7", lost, lse=a.flushed.sum(axis=1))
    # A sum whose terms have random signs passes so near 0 about so often, and each time loses less than the least. Once
    # it may always happen: where that is too seldom to be met, the least number is no more than a rounding.
    near = np.divide(count * least, a.weighted_size, out=np.zeros_like(a.rows.out), where=a.weighted_size > 0)
    times = np.minimum(count, np.maximum(2 * np.sqrt(2 * count / np.pi) * near, 1))
    times = np.where((count > 1) & (a.weighted_size > 0), times, 0.0)
    variance = times * least**2 / 3
    yield Term("sums that pass 0", "3.7", variance, along=lambda d: iter([column_by_column(variance, d)]))
