"""What a term of the error model is: a sort of rounding, and what it does to the result. Derivation: docs/verdict.md.

The error of `out` is, to first order, the sum of all roundings, each times its derivative. Roundings that are
independent add their variances (`Term`); those that have one sign add their sizes (`Systematic`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.row_covariance import Shared


@dataclass(frozen=True)
class Direction:
    """A sum of errors whose variance is wanted: Σ per_out · (error of out) + per_lse · (error of lse), row by row."""

    per_out: Float[np.ndarray, "R V"]
    per_lse: Float[np.ndarray, " R"]
    of_value: Float[np.ndarray, "R S"]
    """Σ_v per_out · v_j: what an error of key j's weight in the numerator does to the sum."""
    of_weight: Float[np.ndarray, "R S"]
    """Σ_v per_out · (v_j − out), and per_lse: what an error of key j's weight does, row sum and lse included."""
    of_chunk: Float[np.ndarray, "R C"]
    """Σ_v per_out · (B_c − a_c out): what an error of a chunk's weight in the merge does."""


Along = Callable[[Direction], Iterator[Shared | Float[np.ndarray, " R"]]]
"""The variance of a sum of errors; `Shared` where rows may share the roundings (§3.10)."""


def nothing_along(direction: Direction) -> Iterator[Shared | Float[np.ndarray, " R"]]:
    """Not counted."""
    yield from ()


@dataclass(frozen=True)
class Term:
    """Random roundings of one sort. R rows, V value head dim; 0.0 is "none"."""

    name: str
    section: str
    """Of docs/verdict.md."""
    out: Float[np.ndarray, "R V"] | float = 0.0
    """Variance that it gives `out`."""
    lse: Float[np.ndarray, " R"] | float = 0.0
    """Variance that it gives lse."""
    is_common: bool = False
    """Whether all outputs of a row share these roundings."""
    along: Along = nothing_along


@dataclass(frozen=True)
class Systematic:
    """Roundings that may all have the same sign: nothing averages them out, so sizes are added, not variances."""

    name: str
    section: str
    most: Float[np.ndarray, "R V"]
    """The most that they move `out`."""
    typical: float = 1.0
    """The share of this, and of what they do to lse, that stands in σ."""
    lse: Float[np.ndarray, " R"] | float = 0.0
    """The most that they move lse."""
    mean: Float[np.ndarray, "R V"] | None = None
    """Where the sign is known: the middle of how far they move `out`, which is then within most / 2 of it."""
    lse_mean: Float[np.ndarray, " R"] | float = 0.0
    """Likewise of lse, if `mean` is given."""


def column_by_column(variance: Float[np.ndarray, "R V"], direction: Direction) -> Float[np.ndarray, " R"]:
    """The variance along a direction of errors that are independent from column to column."""
    return (direction.per_out**2 * variance).sum(axis=1)
