"""Sums of squares in which equal rounding errors add up before they are squared.

Two keys with the same score are rounded alike, so their errors are one error, counted twice: (a + b)², not a² + b².
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from cpjax.crosscheck.attention64 import Rows

CELLS = 2.0**14
"""Scores that agree after multiplication with this and rounding count as equal. In FP16 the spacing of p in (1/2, 1) is
2^-11, so p's rounding error changes by less than an eighth of a spacing inside one cell."""


def tied_rows(rows: Rows) -> Bool[np.ndarray, " R"]:
    """Rows in which more than one key in ten shares its cell with another: only there grouping matters."""
    cells = np.sort(np.where(rows.seen, _cells(rows), np.iinfo(np.int64).max), axis=1)
    repeats = ((np.diff(cells, axis=1) == 0) & (cells[:, 1:] != np.iinfo(np.int64).max)).sum(axis=1)
    return repeats > 0.1 * rows.seen.sum(axis=1)


def group_ids(rows: Rows, at: Int[np.ndarray, " r"]) -> Int[np.ndarray, "r S"]:
    """A number for each (row, chunk, cell), for the rows `at`; hidden keys have weight 0 and may be anywhere."""
    chunk = np.repeat(np.arange(len(rows.edges) - 1), rows.chunk_sizes)
    return _cells(rows)[at] + chunk * np.int64(2**40) + np.arange(len(at))[:, None] * np.int64(2**50)


def sum_of_squares(
    weight: Float[np.ndarray, "r S"], value: Float[np.ndarray, "S V"], center: Float[np.ndarray, "r V"] | None = None
) -> Float[np.ndarray, "r V"]:
    """Σ_j w_j² (v_j − center)²: independent errors."""
    w2 = weight**2
    total = w2 @ value**2
    if center is not None:
        total = np.maximum(total - 2 * center * (w2 @ value) + center**2 * w2.sum(axis=1, keepdims=True), 0.0)
    return total


def grouped_sum_of_squares(
    weight: Float[np.ndarray, "r S"],
    value: Float[np.ndarray, "S V"],
    ids: Int[np.ndarray, "r S"],
    center: Float[np.ndarray, "r V"] | None = None,
) -> Float[np.ndarray, "r V"]:
    """Σ_G (Σ_{j∈G} w_j (v_j − center))²: errors equal within a group, independent between groups.

    `ids` are such that no group spans two rows.
    """
    total = np.zeros((len(weight), value.shape[1]))
    at, keys = np.nonzero(weight)
    if len(at) == 0:
        return total
    _, first, group = np.unique(ids[at, keys], return_index=True, return_inverse=True)
    row_of = at[first]
    matrix = sparse.csr_array((weight[at, keys], (group, keys)), shape=(len(first), value.shape[0]))
    sums = matrix @ value
    if center is not None:
        sums = sums - matrix.sum(axis=1)[:, None] * center[row_of]
    np.add.at(total, row_of, sums**2)
    return total


def _cells(rows: Rows) -> Int[np.ndarray, "R S"]:
    return np.round(np.maximum(rows.below, -(2.0**20)) * CELLS).astype(np.int64)
