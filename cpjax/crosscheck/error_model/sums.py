"""What the compute format does besides (§3.7): exponentials and products, sums over the keys, weights of the merge."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.arithmetic import Arithmetic
from cpjax.crosscheck.error_model.terms import Direction, Systematic, Term, column_by_column
from cpjax.precision import KEY_TILE

OF_TERM = 4.0
"""Unit roundoffs of Σ A|v| that exponentials and products make."""

INDEPENDENT, EQUAL = 0.25, 0.25
"""Unit roundoffs: times √n for n additions that round independently, times n for equal terms, which round alike."""

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
    yield _merge_weights(a)
    yield _absorbed(a)


def sum_sigma(a: Arithmetic) -> Float[np.ndarray, " R"]:
    """Relative error of a sum of positive terms, one after the other in a tile, and then of the tiles."""
    n, tiles = np.minimum(a.seen_keys, KEY_TILE), a.seen_keys / KEY_TILE
    of_tile = np.where(a.ties.is_repeated, EQUAL * n, INDEPENDENT * np.sqrt(n))
    return a.eps * np.where(a.seen_keys > 1, of_tile + INDEPENDENT * np.sqrt(tiles), 0.0)


def _row_sums(a: Arithmetic) -> Term:
    """Numerator and row sum. The latter's error moves all outputs of a row together."""
    sigma = sum_sigma(a)
    size = np.where(a.ties.is_repeated[:, None], a.weighted_size, np.abs(a.rows.out))
    out = 2 * (sigma[:, None] * size) ** 2

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield (sigma * (direction.per_out * a.rows.out).sum(axis=1)) ** 2
        yield column_by_column(out, direction)

    lse = (np.where(a.seen_keys > 1, OF_TERM * a.eps, 0.0) + sigma) ** 2
    return Term("row sums", "3.7", out, lse, along=along)


def _merge_weights(a: Arithmetic) -> Term:
    """exp(lse_c − lse) of a chunk; it moves all outputs of a row together."""
    sigma = OF_MERGE * a.eps * (a.lse_size + MERGE_SIZE)
    out = sigma[:, None] ** 2 * (a.chunk_pull**2).sum(axis=1)

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield (sigma[:, None] ** 2 * direction.of_chunk**2).sum(axis=1)
        yield column_by_column(out, direction)

    return Term("weights of the merge", "3.7", out, along=along)


def _absorbed(a: Arithmetic) -> Systematic:
    """Terms that are too small for the sum that they are added to: of products, and of the row sum."""
    lost = _lost_weight(a)
    # A sum of products is as large as they are: where the heavy keys have small values it absorbs less.
    count = (lost > 0).sum(axis=1, keepdims=True)
    of_products = np.minimum(lost @ a.rows.size, count * ABSORBED * a.eps * a.weighted_size)
    lse = lost.sum(axis=1)
    return Systematic("absorbed terms", "3.7", of_products + lse[:, None] * np.abs(a.rows.out), lse=lse)


def _lost_weight(a: Arithmetic) -> Float[np.ndarray, "R S"]:
    """What may be lost of a weight that is small beside its tile's sum, or whose tile is: L_j."""
    rows, eps = a.rows, a.eps
    starts = np.concatenate([np.arange(start, stop, KEY_TILE) for start, stop in pairwise(rows.edges)])
    tile = np.add.reduceat(rows.weight, starts, axis=1)
    sizes = np.diff(np.append(starts, rows.weight.shape[1]))
    of_tile = np.where(tile < SMALL * eps, np.minimum(tile, ABSORBED * eps), 0.0)
    share = np.divide(of_tile, tile, out=np.zeros_like(tile), where=tile > 0)
    of_key = np.repeat(tile, sizes, axis=1)
    lost = np.where(rows.weight < SMALL * eps * of_key, np.minimum(rows.weight, ABSORBED * eps * of_key), 0.0)
    lost = np.maximum(lost, rows.weight * np.repeat(share, sizes, axis=1))
    return lost * (a.seen_keys > 1)[:, None]
