"""Additions that err alike, because their terms are nearly equal (§3.7).

A running sum is a number of the compute format, and so a multiple of its spacing. What an addition loses is what the
term lies off a multiple of this spacing: it depends on the term, not on the sum. Terms of many sizes lose as often as
they gain. Terms within a part of a spacing of each other all lose the same, and the sum drifts.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.error_model.ties import COLUMNS, Ties
from cpjax.crosscheck.exact.attention import Rows
from cpjax.crosscheck.exact.formats import Format

HALVINGS = 4
"""Spacings that are tried: that of the whole sum, and of partial sums of half, a quarter and an eighth of it."""

CHANCE = 2.0
"""What terms of many sizes lose is random, and has a term of its own: so many standard deviations are no drift."""

RANDOM = 0.2
"""Spacings: losses of terms of many sizes deviate by 1/√12 = 0.29; of fewer, finer spacings are tried as well."""

ALIKE = 3.0
"""Spacings: products of one value with p of a larger deviation are of many sizes, and are not looked at."""

WINDOW = 16
"""Spacings within which this deviation is measured: a few terms that are far from the others change it little."""

FEW_VALUES = 0.1
"""Share of the values of a column that are one number, from which on its products are looked at."""

SAME = 2.0**30
"""Terms are equal that are equal in spacings, after multiplication with this and rounding."""

SAMPLE = 512
"""Values of a column that are compared to find whether many are one number."""


def row_sum_drift(rows: Rows, fmt: Format) -> Float[np.ndarray, "R C"]:
    """The most that each chunk's sum of p = exp(s − M_c), made in `fmt`, drifts, as a share of it."""
    share = np.zeros(rows.chunk_weight.shape)
    for chunk, (start, stop) in enumerate(pairwise(rows.edges)):
        if stop - start > 1:
            share[:, chunk] = _drift(rows.p[:, start:stop], fmt)
    return share


def product_drift(rows: Rows, fmt: Format) -> Float[np.ndarray, "R V"]:
    """By how much sums of p·v are off at most where the p are alike and many values equal; in units of the output."""
    moved = np.zeros_like(rows.out)
    for start, stop in pairwise(rows.edges):
        size = rows.size[start:stop]
        some = np.flatnonzero(_has_few_values(size))
        if not len(some):
            continue
        p, weight = rows.p[:, start:stop], rows.weight[:, start:stop]
        step = fmt.spacing(np.maximum(p.sum(axis=1), 1.0))
        at = np.flatnonzero(_lost(p, WINDOW * step)[1] < ALIKE * step)
        distinct, which = np.unique(size[:, some], axis=1, return_inverse=True)
        # Some kernels divide p by its sum before they multiply.
        factors = [p[at], weight[at] / np.maximum(weight[at].sum(axis=1, keepdims=True), np.finfo(float).tiny)]
        drift = []
        for one in distinct.T:
            most = np.max([_drift(factor[:, one > 0] * one[one > 0], fmt) for factor in factors], axis=0)
            drift.append(most * (weight[at] @ one))
        moved[np.ix_(at, some)] += np.stack(drift, axis=1)[:, which]
    return moved


class EqualTerms(NamedTuple):
    """Variances of sums in which terms are met more than once, beyond those of as many terms that all differ."""

    row_sum: Float[np.ndarray, " R"]
    """Of Σ p, as a share of it."""
    products: Float[np.ndarray, "R V"]
    """Of Σ p·v, in units of the output²."""


def equal_terms(rows: Rows, ties: Ties, fmt: Format) -> EqualTerms:
    """What sums lose besides where the keys are a few that come again and again, as those of a text of few tokens.

    Equal terms lose the same: n of them n times as much as one, which is anything up to half a spacing. Others lose
    independently.
    """
    found = EqualTerms(np.zeros_like(rows.lse), np.zeros_like(rows.out))
    # Where fewer keys come again than there are, what `row sums` has for as many different ones is enough.
    at = ties.at[ties.square_of_weights(np.ones((len(ties.at), len(rows.index)))) > 2 * rows.seen[ties.at].sum(axis=1)]
    if not len(at):
        return found
    few = _has_few_values(rows.size)
    for start, stop in pairwise(rows.edges):
        p, value = rows.p[at, start:stop], rows.value[start:stop]
        total, weight = p.sum(axis=1), rows.weight[at, start:stop].sum(axis=1)
        # A term below half a spacing is lost as a whole: that is another rounding (`absorbed terms`). 1 loses nothing.
        step = fmt.spacing(total)[:, None]
        is_rounded = (p >= step / 2) & (p != 1.0)
        number = np.rint(p / step * SAME)
        counts = np.array([_again(one[counted]) for one, counted in zip(number, is_rounded, strict=True)])
        worth = weight / np.maximum(total, 1.0)  # the largest p is 1, where a key is seen
        found.row_sum[at] += counts * (_lost_of_one(total, fmt) * worth) ** 2
        for columns in (np.flatnonzero(few), np.flatnonzero(~few)):
            if len(columns):
                sums = p @ rows.size[start:stop, columns]
                counts = _products_again(p, value[:, columns], fmt.spacing(sums))
                lost = _lost_of_one(sums, fmt) * worth[:, None]
                found.products[np.ix_(at, columns)] += counts[:, None] * lost**2
    return found


def _again(number: Float[np.ndarray, " s"]) -> float:
    """Σ n² − n over the sets of equal numbers."""
    counts = np.unique(number, return_counts=True)[1].astype(float)
    return float((counts**2 - counts).sum())


def _products_again(
    p: Float[np.ndarray, "r s"], value: Float[np.ndarray, "s V"], step: Float[np.ndarray, "r V"]
) -> Float[np.ndarray, " r"]:
    """Σ n² − n over the sets of equal products p·v that are rounded, of some columns the most."""
    most = np.zeros(len(p))
    for column in np.linspace(0, value.shape[1] - 1, min(COLUMNS, value.shape[1])).astype(int):
        product = p * value[:, column]
        is_rounded = np.abs(product) >= step[:, column, None] / 2
        number = np.rint(product / step[:, column, None] * SAME)
        each = [_again(one[counted]) for one, counted in zip(number, is_rounded, strict=True)]
        most = np.maximum(most, each)
    return most


def _lost_of_one(total: Float[np.ndarray, "..."], fmt: Format) -> Float[np.ndarray, "..."]:
    """Standard deviation of what one term loses in a sum that grows evenly to `total`."""
    return fmt.spacing(total) * _share_of_additions(total) / np.sqrt(12)


def _share_of_additions(total: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Of a sum that grows evenly: √Σ (share of the additions · spacing / last spacing)² over its binades."""
    size = np.where(total > 0, total, 1.0)
    below = 2.0 ** np.floor(np.log2(size)) / size
    squares = (1 - below) ** 2
    for halving in range(1, HALVINGS):
        squares = squares + (below / 2**halving / 2**halving) ** 2
    return np.sqrt(squares)


def _drift(term: Float[np.ndarray, "r s"], fmt: Format) -> Float[np.ndarray, " r"]:
    """The most that a sum of these terms, one after the other, drifts, as a share of it.

    If the largest term comes first, all additions are made to a sum of the final size. If the sum grows evenly, each
    binade has its share of them, and its own spacing.
    """
    total = term.sum(axis=1)
    total = np.where(total > 0, total, 1.0)
    step, binade = fmt.spacing(total), 2.0 ** np.floor(np.log2(total))
    drift, deviation = _lost(term, step)
    # Terms of many sizes are of as many, and more, in finer spacings.
    at = np.flatnonzero((drift > 0) | (deviation < RANDOM * step))
    grown = (1 - binade / total) * drift
    for halving in range(1, HALVINGS):
        grown[at] += (binade / total)[at] / 2**halving * _lost(term[at], step[at] / 2**halving)[0]
    return np.where((term > 0).sum(axis=1) > 1, np.maximum(drift, grown), 0.0) / total


def _lost(
    term: Float[np.ndarray, "r s"], step: Float[np.ndarray, " r"]
) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, " r"]]:
    """What the terms lose together beyond chance, added to sums of this spacing; the deviation of what one loses."""
    count = np.maximum((term > 0).sum(axis=1), 1)
    loss = term / step[:, None]
    loss -= np.rint(loss)
    lost = loss.sum(axis=1)
    deviation = np.sqrt(np.maximum(np.einsum("rs,rs->r", loss, loss) / count - (lost / count) ** 2, 0.0))
    return np.maximum(np.abs(lost) - CHANCE * np.sqrt(count) * deviation, 0.0) * step, deviation * step


def _has_few_values(size: Float[np.ndarray, "s V"]) -> Bool[np.ndarray, " V"]:
    """Of each column, whether many of the numbers that are not 0 are one number."""
    some = np.sort(size[:: max(len(size) // SAMPLE, 1)].T, axis=1)
    place = np.arange(some.shape[1])
    is_first = np.diff(some, axis=1, prepend=-1.0) != 0
    length = place - np.maximum.accumulate(np.where(is_first, place, 0), axis=1) + 1
    most = np.where(some > 0, length, 0).max(axis=1)
    return most > np.maximum(FEW_VALUES * (some > 0).sum(axis=1), 1)
