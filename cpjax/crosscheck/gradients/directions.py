"""How the errors of single pairs lie in a row's outputs, from which the number of independent errors follows (§5)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Directions(NamedTuple):
    """Of vectors, one a token and head."""

    size: Float[np.ndarray, "L N"]
    """Square of each vector, its components measured by their mean size."""
    alike: Float[np.ndarray, " K"]
    """Mean of cos² between two vectors that are summed together."""


def directions(x: Float[np.ndarray, "L N D"], heads: int) -> Directions:
    """Of N heads that are summed in `heads` groups.

    >>> directions(np.eye(2)[:, None], 1).alike  # half of all pairs are a vector with itself
    array([0.5])
    """
    length, count, width = x.shape
    x = x.astype(np.float64)
    grouped = x.reshape(length, heads, count // heads, width).swapaxes(0, 1).reshape(heads, -1, width)
    usual = np.sqrt((grouped**2).mean(axis=1))
    usual = np.where(usual > 0, usual, 1.0)
    size = (x**2 / np.repeat(usual, count // heads, axis=0) ** 2).sum(axis=2)
    unit = grouped / usual[:, None]
    norm = np.linalg.norm(unit, axis=2, keepdims=True)
    unit = np.divide(unit, norm, out=np.zeros_like(unit), where=norm > 0)
    used = np.maximum((norm > 0).sum(axis=(1, 2)), 1)
    gram = np.einsum("nlx,nly->nxy", unit, unit) / used[:, None, None]
    return Directions(size, (gram**2).sum(axis=(1, 2)))
