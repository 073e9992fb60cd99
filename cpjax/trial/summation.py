"""float32 sums in different orders. All are correct, and they differ in the last bits; the judge must not prefer one.

blas         matrix products by BLAS, sums by NumPy: blocked, with several accumulators
sequential   one accumulator, one term after the other: the largest error that correct code makes
pairwise     halves added to halves: the smallest
"""

import numpy as np

SUMMATIONS = ("blas", "sequential", "pairwise")


def product(a: np.ndarray, b: np.ndarray, how: str) -> np.ndarray:
    """`a @ b` for stacks of matrices `[…, M, n] @ [..., n, P]`, summed over n in the order `how`."""
    if how == "blas":
        return a @ b
    if how == "sequential":
        result = a[..., :, :1] * b[..., :1, :]
        for i in range(1, b.shape[-2]):
            result = result + a[..., :, i : i + 1] * b[..., i : i + 1, :]
        return result
    return _halves(np.moveaxis(a[..., :, :, None] * b[..., None, :, :], -2, 0))


def total(x: np.ndarray, how: str) -> np.ndarray:
    """The sum over the last axis, in the order `how`."""
    if how == "blas":
        return x.sum(axis=-1)
    if how == "sequential":
        return np.add.accumulate(x, axis=-1)[..., -1]
    return _halves(np.moveaxis(x, -1, 0))


def _halves(terms: np.ndarray) -> np.ndarray:
    while len(terms) > 1:
        even = len(terms) // 2 * 2
        terms = np.concatenate([terms[0:even:2] + terms[1:even:2], terms[even:]])
    return terms[0]
