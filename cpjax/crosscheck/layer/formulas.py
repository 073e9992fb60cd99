"""Every stage in float64 with NumPy, from its formula, with the error of its float32 arithmetic (docs/verdict.md, §12).

The keywords are the faults that are known: their defaults are what is right. Numbers of FP16 and float32 are exact in
float64, whose own errors, 10⁻¹⁶, are left out.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.layer.expected import EPS, LARGEST_INT8, Expected, Stored
from cpjax.crosscheck.layer.weights import Linear, top_19_bits
from cpjax.deepseek.config import DeepseekConfig, Yarn

BLOCK = 8
"""Products that a matrix unit adds at once before it cuts off, at least."""

OF_SUM = 6.0
"""Standard deviations of the roundings of a sum that its bound allows."""

OF_PARTIAL = 3.0
"""Root sums of squares by which partial sums of terms in random order exceed their line at most: six deviations."""

BRIDGE = 0.3
"""√(1/12): deviation of the mean of such partial sums, in root sums of squares."""

OF_MOVED = 2.0
"""Deviations from a middle within which a rounding on the way may well go to the other side."""

NORM_STEPS, NORM_SIGMA = 4.0, 2.0
"""Of a norm, in spacings of float32: mean, eps, rsqrt and two products at most; their deviation."""

NORM_MOST, NORM_SUM = 0.25, 0.125
"""The sum of squares in a norm: at most ε/2 an addition, half of which is left by the root; half of 0.25 √K."""

EXP_STEPS, EXP_SIGMA = 8.0, 2.0
"""Of silu and sigmoid, in spacings of float32: exp and what follows, at most; their deviation."""

ROPE_STEPS, ROPE_SIGMA = 3.0, 0.7
"""Of a rotation, in spacings: cosine, product and sum at most; their deviation. That of an angle is beside them."""

SCALE_STEPS, SCALE_SIGMA = 1.0, 0.4
"""Spacings that each product with a scale, a conversion or an addition costs: at most, and their deviation."""

NIBBLE, HALF_NIBBLE = 16, 8
"""W4A8: x = 16·high + low + 8."""

NO_WIDTH = 1e-3
"""DeepSeek's own width of YaRN's ramp where its ends are equal."""

EXACT_INTEGERS = 2**24
"""Integers below this are float32 numbers."""


def linear(x: Float[np.ndarray, "*B k"], weight: Float[np.ndarray, "n k"], stored: Stored = "float16") -> Expected:
    """x Wᵀ, accumulated in float32 in any order, by vector or matrix units.

    >>> linear(np.ones((1, 4)), np.ones((2, 4))).exact
    array([[4., 4.]])
    """
    k = weight.shape[1]
    exact = x @ weight.T
    squares = np.sqrt((x * x) @ (weight * weight).T)
    total = np.abs(x) @ np.abs(weight).T
    largest = np.minimum(total, np.abs(exact) + OF_PARTIAL * squares)
    blocks = math.ceil(k / BLOCK)
    most = EPS * np.minimum(largest * (OF_SUM * math.sqrt(k / 12) + 2 * blocks), k * total)
    sigma = EPS * np.sqrt(k / 12 * (exact**2 + squares**2) + (BRIDGE * blocks * squares) ** 2)
    if stored == "float32":  # of FP16 numbers products are exact; of these each is rounded, and the sum is the result
        most = most + EPS * (OF_SUM / math.sqrt(12) * squares + np.abs(exact))
        sigma = np.sqrt(sigma**2 + EPS**2 / 12 * (squares**2 + exact**2))
    return Expected(exact, most, sigma, (blocks + 1) * EPS * np.abs(exact), stored)


def norm(
    x: Float[np.ndarray, "T k"], weight: Float[np.ndarray, " k"], eps: float, *, rounded_first: bool = False
) -> Expected:
    """w · x / √(mean x² + eps); `rounded_first`: x / √… is rounded to FP16 before it is multiplied by w."""
    k = x.shape[-1]
    y = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    size = EPS * np.abs(y)
    most, sigma = (NORM_MOST * k + NORM_STEPS) * size, math.hypot(NORM_SIGMA, NORM_SUM * math.sqrt(k)) * size
    if rounded_first:  # the product of two FP16 numbers is exact in float32
        y, most, sigma = rounded_fp16(y, most, sigma)
    return Expected(y * weight, most * np.abs(weight), sigma * np.abs(weight))


class Rounded(NamedTuple):
    """A number that was rounded to FP16 on the way."""

    exact: Float[np.ndarray, "..."]
    most: Float[np.ndarray, "..."]
    """By how much the rounding may differ, as what is rounded is not known exactly: nearly always 0."""
    sigma: Float[np.ndarray, "..."]
    """The same where it may well differ."""


def rounded_fp16(
    x: Float[np.ndarray, "..."], most: Float[np.ndarray, "..."], sigma: Float[np.ndarray, "..."]
) -> Rounded:
    """x rounded to FP16, if x is off by at most `most` and by `sigma` in the root mean square."""
    fmt = FORMATS["float16"]

    def moved(by: np.ndarray) -> np.ndarray:
        return fmt.round(x + by) - fmt.round(x - by)

    return Rounded(fmt.round(x), moved(most), moved(OF_MOVED * sigma))


# Rope ----------------------------------------------------------------------------------------------------------------


def frequencies(config: DeepseekConfig, yarn: Yarn | None) -> Float[np.ndarray, " r"]:
    """ω of the R/2 pairs, in radians a token; YaRN: slow pairs are slowed by its factor (arXiv 2309.00071, §3.2)."""
    size, base = config.qk_rope_head_dim, config.rope_theta
    plain = np.array([base ** (-2 * i / size) for i in range(size // 2)])
    if yarn is None:
        return plain

    def pair(turns: float) -> float:
        """The pair, as a real number, that turns so often over the length of the training."""
        return size / 2 * math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(base)

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low if high != low else NO_WIDTH
    slowed = np.clip((np.arange(size // 2) - low) / width, 0, 1)
    return plain * (1 - slowed) + plain / yarn.factor * slowed


class Turn(NamedTuple):
    """How a rotation is computed; the defaults are what is right."""

    is_fp16: bool = False
    """Cosines and sines are given to the operator as FP16."""
    pairs: str = ""
    """"halves" or "interleaved": which numbers are a pair; what the config says if empty."""
    out: str = "halves"
    """"interleaved": pairs stay side by side."""
    is_yarn: bool = True
    factor: float | None = None
    """On cosine and sine; None: the config's."""
    shift: int = 0
    """Added to positions."""
    sign: int = 1
    is_turned: bool = True


def rope(
    x: Float[np.ndarray, "T *N R"], position: Int[np.ndarray, " T"], config: DeepseekConfig, turn: Turn | None = None
) -> Expected:
    """Each pair (a, b) becomes (a cos − b sin, b cos + a sin); first numbers of all pairs come first."""
    how = Turn() if turn is None else turn
    yarn = config.yarn if how.is_yarn else None
    usual = 1.0 if yarn is None else yarn.cos_factor
    factor = usual if how.factor is None else how.factor
    angle = (position + how.shift)[:, None] * frequencies(config, yarn)[None] * how.sign * how.is_turned
    if x.ndim > 2:
        angle = angle[:, None]
    cos, sin = factor * np.cos(angle), factor * np.sin(angle)
    off_cos, off_sin = EPS * np.abs(angle * sin), EPS * np.abs(angle * cos)
    none = np.zeros_like(cos)
    rounded_cos, rounded_sin = Rounded(cos, none, none), Rounded(sin, none, none)
    if how.is_fp16:
        errors = (off_cos + EPS * np.abs(cos), off_sin + EPS * np.abs(sin))
        rounded_cos = rounded_fp16(cos, errors[0], ROPE_SIGMA * errors[0])
        rounded_sin = rounded_fp16(sin, errors[1], ROPE_SIGMA * errors[1])
        off_cos = off_sin = none
    cos, sin = rounded_cos.exact, rounded_sin.exact
    is_pairwise = how.pairs == "interleaved" or (not how.pairs and config.rope_interleave)
    a, b = (x[..., 0::2], x[..., 1::2]) if is_pairwise else np.split(x, 2, axis=-1)

    def one(a: np.ndarray, b: np.ndarray, sign: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = np.abs(a * cos) + np.abs(b * sin)
        turned = np.abs(a) * off_cos + np.abs(b) * off_sin
        most = ROPE_STEPS * EPS * size + turned + np.abs(a) * rounded_cos.most + np.abs(b) * rounded_sin.most
        moved = np.abs(a) * rounded_cos.sigma + np.abs(b) * rounded_sin.sigma
        return a * cos + sign * b * sin, most, ROPE_SIGMA * (EPS * size + turned) + moved

    first, second = one(a, b, -1), one(b, a, 1)
    if how.out == "interleaved":
        exact, most, sigma = (np.stack(both, axis=-1).reshape(x.shape) for both in zip(first, second, strict=True))
    else:
        exact, most, sigma = (np.concatenate(both, axis=-1) for both in zip(first, second, strict=True))
    return Expected(exact, most, sigma)


# Sums and activations ------------------------------------------------------------------------------------------------


def total(parts: list[Float[np.ndarray, "T M"]], *, rounded_at: int = 0) -> Expected:
    """The sum in float32; `rounded_at` n: the sum of the last n is rounded to FP16 before the rest is added."""
    none = np.zeros_like(parts[0])
    moved = Rounded(none, none, none)
    if rounded_at:
        last = total(parts[-rounded_at:])
        moved = rounded_fp16(last.exact, last.most, last.sigma)
        parts = [*parts[:-rounded_at], moved.exact]
    exact = sum(parts[1:], parts[0])
    size = sum(np.abs(x) for x in parts)
    # Where every sum of some of them is a float32, in whatever order they are added nothing is lost.
    sums = [sum(parts[i] for i in range(len(parts)) if mask >> i & 1) for mask in range(1, 2 ** len(parts))]
    is_exact = np.all([_is_float32(np.asarray(x)) for x in sums], axis=0)
    steps = np.where(is_exact, 0.0, EPS * (len(parts) - 1)) * size
    return Expected(exact, SCALE_STEPS * steps + moved.most, SCALE_SIGMA * steps + moved.sigma)


def weighted(x: Float[np.ndarray, "T k M"], weight: Float[np.ndarray, "T k"]) -> Expected:
    """Σ weight · x over the experts of a token, in float32."""
    size = np.einsum("tkm,tk->tm", np.abs(x), np.abs(weight))
    steps = EPS * x.shape[1] * size
    return Expected(np.einsum("tkm,tk->tm", x, weight), SCALE_STEPS * steps, SCALE_SIGMA * steps)


def sigmoid(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """1 / (1 + exp(−x)), without overflow.

    >>> sigmoid(np.array([0.0, -2000.0]))
    array([0.5, 0. ])
    """
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1 + small)


def swiglu(
    gate: Float[np.ndarray, "*B F"], up: Float[np.ndarray, "*B F"], *, rounded_first: bool = False, bare: bool = False
) -> Expected:
    """silu(gate) · up; `rounded_first`: silu is rounded to FP16 before the product; `bare`: gate · up."""
    silu = gate if bare else gate * sigmoid(gate)
    size = EPS * np.abs(silu)
    most, sigma = EXP_STEPS * size, EXP_SIGMA * size
    if rounded_first:
        silu, most, sigma = rounded_fp16(silu, most, sigma)
    return Expected(silu * up, most * np.abs(up), sigma * np.abs(up))


# Quantised products --------------------------------------------------------------------------------------------------


def quantised_static(
    x: Float[np.ndarray, "*B k"],
    scale: float,
    offset: float,
    *,
    fp16_reciprocal: bool = False,
    truncated: bool = False,
) -> Expected:
    """x / input_scale + input_offset, which becomes an integer: half to even, clipped to −128 … 127.

    A kernel may multiply by 1 / input_scale in float32. `fp16_reciprocal`: by one in FP16; `truncated`: toward zero.
    """
    with np.errstate(invalid="ignore"):  # a scale may have no reciprocal in FP16; then nothing equals this
        quotient = x * FORMATS["float16"].round(np.array(1 / scale)) if fp16_reciprocal else x / scale
    exact = quotient + offset
    most = SCALE_STEPS * EPS * (np.abs(quotient) + np.abs(exact))
    return Expected(_before_truncation(exact) if truncated else exact, most, SCALE_SIGMA * most, 0.0, "int8")


def quantised_token(
    x: Float[np.ndarray, "*B k"], token_scale: Float[np.ndarray, "*B"], *, truncated: bool = False
) -> Expected:
    """x / token_scale, likewise; a token of zeros has the scale 0 and integers 0."""
    exact = x / np.where(token_scale > 0, token_scale, 1.0)[..., None]
    most = 2 * SCALE_STEPS * EPS * np.abs(exact)
    return Expected(_before_truncation(exact) if truncated else exact, most, SCALE_SIGMA * most, 0.0, "int8")


def _before_truncation(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """What is rounded to the integer to which x is truncated."""
    return np.trunc(x)


def token_scale(x: Float[np.ndarray, "*B k"], largest: int = LARGEST_INT8) -> Expected:
    """max |x| / 127 of each token."""
    exact = np.abs(x).max(axis=-1) / largest
    return Expected(exact, 2 * SCALE_STEPS * EPS * exact, 2 * SCALE_SIGMA * EPS * exact, 0.0, "float32")


class Scaling(NamedTuple):
    """How a quantised product is computed; the defaults are what is right."""

    bias: float = 1.0
    """Times of quant_bias."""
    has_scale_bias: bool = True
    has_second: bool = True
    has_token_scale: bool = True
    swapped: bool = False
    """Nibbles are exchanged: of rows 2i and 2i + 1 each is the other."""


def quantised(
    a: Float[np.ndarray, "*B k"],
    scale: Float[np.ndarray, "*B"] | None,
    weights: Linear,
    arithmetic: str,
    how: Scaling | None = None,
) -> Expected:
    """Integers by quantised weights: exact integer sums, times the scales in float32, or as the vendor's hardware does.

    Args:
      scale: of each token; None in the static kind.
    """
    how, is_vendor = how or Scaling(), arithmetic == "vendor"
    weight = weights.weight
    if how.swapped:
        weight = weight.reshape(-1, 2, weight.shape[1])[:, ::-1].reshape(weight.shape)
    if weights.deq_scale is not None:
        assert weights.quant_bias is not None
        factor = top_19_bits(weights.deq_scale) if is_vendor else weights.deq_scale
        sums = a @ weight.T + how.bias * weights.quant_bias
        exact = sums * factor
        is_exact = (np.abs(sums) < EXACT_INTEGERS) & _is_float32(exact)
        return _scaled(exact, np.where(is_exact, 0.0, np.abs(exact)), 2)
    assert weights.weight_scale is not None
    by = np.ones(a.shape[:-1]) if scale is None or not how.has_token_scale else scale
    second = weights.second if weights.second is not None and how.has_second else None
    scales = weights.weight_scale[:, None] * (1.0 if second is None else second)
    columns = np.split(np.arange(weights.weight.shape[1]), scales.shape[-1])
    most: np.ndarray | float = 0.0
    sigma: np.ndarray | float = 0.0
    if weights.scale_bias is not None and is_vendor:
        high = np.floor(a / NIBBLE)
        halves = [(high, NIBBLE), (a - NIBBLE * high - HALF_NIBBLE, 1)]
        inner, size = np.zeros((*a.shape[:-1], len(weight))), 0.0
        for half, factor in halves:
            # Both levels are multiplied in float32, before bits are cut off.
            part = _half(half, weight, top_19_bits(scales), columns)
            inner, size = inner + factor * part.exact, size + factor * np.abs(part.exact)
            most, sigma = most + factor * part.most, sigma + factor * part.sigma
        if how.has_scale_bias:
            inner, size = inner + weights.scale_bias, size + np.abs(weights.scale_bias)
        steps = 3
    else:
        parts = [(a[..., at] @ weight[:, at].T) * scales[:, g] for g, at in enumerate(columns)]
        inner, size = sum(parts), sum(np.abs(part) for part in parts)
        steps = 2 + len(parts) + (second is not None)
    found = _scaled(inner * by[..., None], size * np.abs(by)[..., None], steps)
    more = np.abs(by)[..., None]
    return Expected(found.exact, found.most + most * more, found.sigma + sigma * more)


def _scaled(exact: np.ndarray, size: np.ndarray, steps: int) -> Expected:
    error = EPS * steps * size
    return Expected(exact, SCALE_STEPS * error, SCALE_SIGMA * error)


def _half(a: np.ndarray, weight: np.ndarray, scales: np.ndarray, columns: list[np.ndarray]) -> Rounded:
    """Σ a·w · scale in FP16, summed over groups in FP16."""
    total: Rounded | None = None
    for group, at in enumerate(columns):
        one = _to_fp16((a[..., at] @ weight[:, at].T) * scales[:, group])
        total = one if total is None else _to_fp16(total.exact + one.exact, total, one)
    assert total is not None
    return total


def _to_fp16(x: np.ndarray, *made_of: Rounded) -> Rounded:
    """What one float32 operation gave, rounded to FP16."""
    error = np.where(_is_float32(x), 0.0, EPS * np.abs(x))
    most, sigma = error, SCALE_SIGMA * error
    for part in made_of:
        most, sigma = most + part.most, sigma + part.sigma
    return rounded_fp16(x, most, sigma)


def _is_float32(x: np.ndarray) -> np.ndarray:
    """Whether float32 has this number: then the operation that gave it has lost nothing."""
    return x == x.astype(np.float32)
