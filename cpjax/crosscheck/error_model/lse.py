"""lse: its logarithm, and what it does to the merge where it is stored in a narrow format (§3.8)."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.error_model.arithmetic import Arithmetic
from cpjax.crosscheck.error_model.terms import Direction, Term

LOG_SIZE = 2.0
"""A logarithm and the merges after it round numbers as large as |lse| and this."""


def lse_terms(a: Arithmetic) -> Iterator[Term]:
    """Section 3.8."""
    # One rounding a chunk, and one of the sum that lse is: independent, so that variances add.
    logarithm = (a.eps * (a.lse_size + LOG_SIZE) * np.sqrt(a.chunk_count + 1)) ** 2
    yield Term("logarithm and merges", "3.8", lse=logarithm)
    if a.precision.lse != a.precision.compute:
        yield _stored(a)


def _stored(a: Arithmetic) -> Term:
    """Each chunk's lse rounded: the chunk weighs too much or too little in the merge."""
    variance = a.chunk_lse_spacing**2 / 12

    def along(direction: Direction) -> Iterator[Float[np.ndarray, " R"]]:
        yield (variance * direction.of_chunk**2).sum(axis=1)

    out = (a.chunk_pull**2 * variance[..., None]).sum(axis=1)
    return Term("stored lse", "3.8", out, (a.rows.chunk_weight**2 * variance).sum(axis=1), is_common=True, along=along)
