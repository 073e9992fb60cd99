"""What correct arithmetic gives: the exact value, and how far float32 may lead from it before the one rounding."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

EPS = 2.0**-23
"""Spacing of float32 at 1."""

LEAST_INT8, LARGEST_INT8 = -128, 127
"""Integers are clipped to these; the largest number of a token becomes 127."""

Stored = Literal["float16", "float32", "int8"]
"""Format of a result's numbers."""


@dataclass(frozen=True)
class Expected:
    """Of one tensor; `most`, `sigma` and `inward` are of the float32 arithmetic alone, before the last rounding."""

    exact: Float[np.ndarray, "..."]
    most: Float[np.ndarray, "..."]
    """No correct float32 arithmetic errs by more."""
    sigma: Float[np.ndarray, "..."]
    """At most the standard deviation of its errors."""
    inward: Float[np.ndarray, "..."] | float = 0.0
    """At most what matrix units cut off toward zero."""
    stored: Stored = "float16"


def side_by_side(parts: list[Expected]) -> Expected:
    """Columns of several, one beside the other."""
    one = parts[0]

    def join(name: str) -> np.ndarray:
        return np.concatenate([np.broadcast_to(getattr(x, name), x.exact.shape) for x in parts], axis=-1)

    return Expected(join("exact"), join("most"), join("sigma"), join("inward"), one.stored)


def known(exact: Float[np.ndarray, "..."], stored: Stored = "float16") -> Expected:
    """A number that is copied, or whose float32 arithmetic is exact."""
    return Expected(exact, np.zeros_like(exact), np.zeros_like(exact), 0.0, stored)
