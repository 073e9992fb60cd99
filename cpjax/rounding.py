"""Numbers rounded to a format, in JAX and in NumPy.

Rounding is written as a cast to the format and back after the operation, because XLA on a CPU keeps float32 inside a
fused loop whatever the dtype says, while it never removes a cast that loses bits (tests/spec/test_precision.py).
"""

from functools import partial
from typing import TypeVar

import jax
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)


def rounded(x: Array, fmt: str) -> Array:
    """`x` rounded to the format `fmt`, in the dtype it came in. Derivatives pass through it as if it were not there.

    >>> float(rounded(np.float32([1 + 2**-12])[0:1], "float16")[0])
    1.0
    """
    if x.dtype == fmt:
        return x
    if isinstance(x, np.ndarray):
        return x.astype(fmt).astype(x.dtype)
    return _there_and_back(x, fmt)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _there_and_back(x, fmt):
    return x.astype(fmt).astype(x.dtype)


@_there_and_back.defjvp
def _unchanged(fmt, primals, tangents):
    return _there_and_back(*primals, fmt), tangents[0]
