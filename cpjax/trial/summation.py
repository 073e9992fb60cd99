"""float32 sums in different orders. All are correct, and they differ in the last bits; the judge must not prefer one.

blas         matrix products by BLAS, sums by NumPy: blocked, with several accumulators
sequential   one accumulator, one term after the other: the largest error that correct code makes
pairwise     halves added to halves: the smallest
cut          as matrix units do: `BLOCK` products at once to the sum so far, which is cut off toward zero (read off an
             H200, docs/fingerprint.md); sums of one array are not theirs, and are `blas`
"""

import numpy as np

ORDERS = ("blas", "sequential", "pairwise")
"""Of sums in which each addition is rounded to nearest."""

SUMMATIONS = (*ORDERS, "cut")

BLOCK = 8
"""Products that a matrix unit adds at once: 8 or 16 on that GPU."""


def product(a: np.ndarray, b: np.ndarray, how: str, start: np.ndarray | None = None, block: int = BLOCK) -> np.ndarray:
    """`a @ b` for stacks of matrices `[…, M, n] @ [..., n, P]`, summed over n in the order `how`.

    `start` is added: as a whole to the whole sum, except that matrix units go on from it block by block. `blocks` is
    `cut`, rounded to nearest.
    """
    if how in ("cut", "blocks"):
        return _of_blocks(a, b, start, block, is_cut=how == "cut")
    result = _product(a, b, how)
    return result if start is None else start + result


def _product(a: np.ndarray, b: np.ndarray, how: str) -> np.ndarray:
    if how == "blas":
        return a @ b
    if how == "sequential":
        result = a[..., :, :1] * b[..., :1, :]
        for i in range(1, b.shape[-2]):
            result = result + a[..., :, i : i + 1] * b[..., i : i + 1, :]
        return result
    return _halves(np.moveaxis(a[..., :, :, None] * b[..., None, :, :], -2, 0))


def _of_blocks(a: np.ndarray, b: np.ndarray, start: np.ndarray | None, block: int, *, is_cut: bool) -> np.ndarray:
    """Of float32 arrays: each block and the sum so far are added exactly, as far as float64 does, then cut off."""
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    result = np.zeros(shape, np.float32) if start is None else start
    a, b = a.astype(np.float64), b.astype(np.float64)
    for first in range(0, b.shape[-2], block):
        exact = result + a[..., :, first : first + block] @ b[..., first : first + block, :]
        result = exact.astype(np.float32)
        if is_cut:
            result = np.where(np.abs(result) > np.abs(exact), np.nextafter(result, np.float32(0)), result)
    return result


def total(x: np.ndarray, how: str) -> np.ndarray:
    """The sum over the last axis, in the order `how`."""
    if how in ("blas", "cut"):
        return x.sum(axis=-1)
    if how == "sequential":
        return np.add.accumulate(x, axis=-1)[..., -1]
    return _halves(np.moveaxis(x, -1, 0))


def _halves(terms: np.ndarray) -> np.ndarray:
    while len(terms) > 1:
        even = len(terms) // 2 * 2
        terms = np.concatenate([terms[0:even:2] + terms[1:even:2], terms[even:]])
    return terms[0]
