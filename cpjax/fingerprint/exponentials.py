"""Exponentials and logarithms of float32, bit for bit: what a kernel may take for exp and log.

nearest      the exact value, rounded once: what good libraries give in nearly all cases
numpy        NumPy's, of this platform
libm         the C library's, of this platform: what C++ calls for a single number
polynomial   degree 5, after reduction by ln 2: `exp_u20` of PyTorch's vectors (ATen/cpu/vec, BSD licence)
bits         the exponent's bits with a polynomial of degree 3 beside them, after Malossi, Ineichen, Bekas and Curioni,
             Fast Exponential Computation on SIMD Architectures (2015): `fexp_u20` of PyTorch's vectors
cephes       degree 5 after reduction by ln 2 in two parts, as Cephes' expf: XLA's on CPUs
sleef        degree 5 after reduction by ln 2 in two parts, as the SLEEF library's expf of one unit in the last place
"""

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Float

from cpjax.fingerprint.sums import fused

Function = Callable[[Float[np.ndarray, "..."]], Float[np.ndarray, "..."]]

_single = np.float32
LOG2_E, LN_2 = _single(np.log2(np.e)), _single(np.log(2))
LEAST, LARGEST = _single(-87.33655), _single(88.72284)
"""ln of the least normal number and of the largest one."""
POLYNOMIAL = (0.00828929059, 0.0418978221, 0.166676521, 0.499991506, 0.999999701, 1.0)
OF_BITS = (-0.079204240219773236, -0.22433836478672356, 0.30354260500649682, 0.00010703434948458272)
CEPHES = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
CEPHES_LN_2 = (0.693359375, -2.12194440e-4)
SLEEF = (0.00019852762, 0.0013930436, 0.008333361, 0.041666485, 0.16666667, 0.5)
SLEEF_LN_2 = (0.693145751953125, 1.428606765330187e-06)


def _horner(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    found = np.full_like(x, coefficients[0])
    for one in coefficients[1:]:
        found = fused(x, found, _single(one))
    return found


def polynomial(x: np.ndarray) -> np.ndarray:
    """`exp_u20`: 0 below the least normal number.

    >>> polynomial(np.float32([0, -100])).tolist()
    [1.0, 0.0]
    """
    inside = np.clip(x, LEAST, LARGEST)
    power = np.floor(fused(inside, LOG2_E, _single(0.5)))
    rest = fused(-power, LN_2, inside)
    return np.where(x < LEAST, _single(0), np.ldexp(_horner(rest, POLYNOMIAL), power.astype(int)))


def of_bits(x: np.ndarray) -> np.ndarray:
    """`fexp_u20`: the float32 whose bits are 2²³ (127 + x log2 e − a polynomial of the fraction).

    >>> of_bits(np.float32([-100])).tolist()
    [0.0]
    """
    inside = np.clip(x, LEAST, LARGEST)
    scaled = inside * LOG2_E
    bent = _horner(scaled - np.floor(scaled), OF_BITS)
    bits = fused(_single(2.0**23), scaled - bent, _single(127 * 2.0**23)).astype(np.int32)
    return np.where(x < LEAST, _single(0), bits.view(np.float32))


def cephes(x: np.ndarray) -> np.ndarray:
    """Cephes' expf with fused multiply-adds.

    >>> cephes(np.float32([0])).tolist()
    [1.0]
    """
    inside = np.clip(x, LEAST, LARGEST)
    power = np.floor(fused(inside, LOG2_E, _single(0.5)))
    rest = fused(-power, _single(CEPHES_LN_2[1]), fused(-power, _single(CEPHES_LN_2[0]), inside))
    found = fused(_horner(rest, CEPHES), rest * rest, rest) + _single(1)
    return np.where(x < LEAST, _single(0), np.ldexp(found, power.astype(int)))


def sleef(x: np.ndarray) -> np.ndarray:
    """SLEEF's expf.

    >>> sleef(np.float32([0, -105])).tolist()
    [1.0, 0.0]
    """
    inside = np.clip(x, _single(-105), LARGEST)
    power = np.rint(inside * LOG2_E)
    rest = fused(power, _single(-SLEEF_LN_2[1]), fused(power, _single(-SLEEF_LN_2[0]), inside))
    found = fused(rest * rest, _horner(rest, SLEEF), rest) + _single(1)
    return np.where(x < -104, _single(0), np.ldexp(found, power.astype(int)))


def nearest(function: Function) -> Function:
    """The function in float64, rounded to float32."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


@cache
def _of_c(name: str) -> Callable[[float], float]:
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    return function


def libm(name: str, otherwise: Function) -> Function:
    """A function of the C library, such as `logf`; where Python finds no C library, `otherwise`."""

    def compute(x: np.ndarray) -> np.ndarray:
        try:
            function = _of_c(name)
        except (AttributeError, OSError, TypeError):
            return otherwise(x)
        return np.asarray(np.frompyfunc(function, 1, 1)(np.asarray(x)), np.float32)

    return compute


EXP: dict[str, Function] = {
    "nearest": nearest(np.exp),
    "numpy": np.exp,
    "polynomial": polynomial,
    "bits": of_bits,
    "cephes": cephes,
    "sleef": sleef,
}
EXP_2: dict[str, Function] = {"nearest": nearest(np.exp2), "numpy": np.exp2}
"""Of scores that are multiplied with log2 e."""
LOG: dict[str, Function] = {
    "nearest": nearest(np.log),
    "numpy": np.log,
    "libm": libm("logf", nearest(np.log)),
}
LOG_2: dict[str, Function] = {"nearest": nearest(np.log2), "numpy": np.log2, "libm": libm("log2f", nearest(np.log2))}
BY_VECTORS = ("polynomial", "bits")
"""Of whole vectors; what is left of a row over them goes through the exp of C, in float64, and is rounded."""
SINGLE = nearest(np.exp)
