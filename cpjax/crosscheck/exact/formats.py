"""Floating-point formats as the error model sees them: unit roundoff, spacing, range (IEEE 754-2019, table 3.5)."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Format:
    """A binary format with `digits` significand bits (the hidden one included) and least normal exponent `emin`."""

    name: str
    digits: int
    emin: int
    largest: float

    @property
    def u(self) -> float:
        """Unit roundoff: |round(x) − x| <= u·|x| for normal x."""
        return 2.0**-self.digits

    @property
    def tiny(self) -> float:
        """The least positive number, which is the spacing everywhere near zero."""
        return 2.0 ** (self.emin - self.digits + 1)

    @property
    def least_normal(self) -> float:
        """The least positive number with all its digits."""
        return 2.0**self.emin

    @property
    def dtype(self) -> np.dtype:
        """The format's dtype; NumPy knows BF16 by way of ml_dtypes, which JAX brings."""
        return np.dtype(ml_dtypes.bfloat16 if self.name == "bfloat16" else self.name)

    def spacing(self, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """The distance between neighbours at |x|, as float64; `tiny` for zero and subnormals.

        Infinity and NaN count as ½.

        >>> FORMATS["float16"].spacing(np.array([1.0, 0.999, 0.0])) == np.array([2**-10, 2**-11, 2**-24])
        array([ True,  True,  True])
        >>> FORMATS["float16"].spacing(np.array([-np.inf, np.nan])) == 2**-11
        array([ True,  True])
        """
        # The bits of a float64's exponent alone are the power of two at or below |x|.
        binade = (np.asarray(x, np.float64).view(np.int64) & (0x7FF << 52)).view(np.float64)
        spacing = np.maximum(binade, self.least_normal) * 2.0 ** (1 - self.digits)
        is_infinite = spacing == np.inf
        return np.where(is_infinite, self.u, spacing) if is_infinite.any() else spacing

    def round(self, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """`x` rounded to nearest, ties to even, and back in float64; beyond the range it is infinite."""
        with np.errstate(over="ignore"):
            return x.astype(self.dtype).astype(np.float64)


FORMATS = {
    f.name: f
    for f in (
        Format("float16", 11, -14, 65504.0),
        Format("bfloat16", 8, -126, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
        Format("float32", 24, -126, float(np.finfo(np.float32).max)),
        Format("float64", 53, -1022, float(np.finfo(np.float64).max)),
    )
}


def doublings(x: Float[np.ndarray, "..."], of: float) -> Int[np.ndarray, "..."]:
    """How often `of` must be doubled to be x; both are powers of two, and normal numbers of float64.

    >>> doublings(np.array([0.5, 1.0, 4.0]), 0.5)
    array([0, 1, 3])
    """
    return (x.view(np.int64) - np.float64(of).view(np.int64)) >> 52
