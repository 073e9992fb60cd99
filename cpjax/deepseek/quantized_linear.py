"""Linear layers with quantised weights: from integers to numbers, exactly or as the vendor's hardware does.

**exact**: sums and scales are multiplied in float64 where the result is float64, else in float32; one cast at the end.

**vendor**: the same in float32, and what the hardware loses. Of `deq_scale` the top 19 bits count
(`npu_trans_quant_param` keeps no more; that the product ignores the lower bits of an untreated scale is an inference).
W4A8 is computed with x = 16·hi + lo + 8, hi = ⌊x / 16⌋, lo = (x mod 16) − 8: two products of 4-bit integers, each
dequantised to FP16 (summed in FP16 over groups), then (16·HI + LO + scale_bias) · s in float32.
`scale_bias` = 8·Σₖ w·scale is there to undo the −8 and for nothing else: the exact arithmetic does not use it. How the
hardware converts int32 to float32 is not documented: to the nearest, here.

Sources: op-plugin 517f2e7 (tests, docs), ops-transformer c29bc10 (grouped_matmul_antiquant_a8w4_msd*.h).
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int8, Int32

from cpjax.deepseek.quantized import (
    DynamicW4A8,
    DynamicW8A8,
    Quantized,
    StaticW8A8,
    integer_product,
    quantize_per_token,
    static_sums,
    unpack_int4,
)
from cpjax.errors import InputError
from cpjax.rounding import rounded

Arithmetic = Literal["exact", "vendor"]


def float_of(deq_scale: Float32[Array, " n"] | Int[Array, " n"]) -> Float32[Array, " n"]:
    """The scales in float32. JAX without 64-bit numbers keeps of an int64 the low 32 bits: those that count.

    >>> float_of(jnp.array([0x3F800000]))
    Array([1.], dtype=float32)
    """
    if jnp.issubdtype(deq_scale.dtype, jnp.floating):
        return deq_scale
    return lax.bitcast_convert_type(deq_scale.astype(jnp.int32), jnp.float32)


def top_19_bits(scale: Float32[Array, "*B"]) -> Float32[Array, "*B"]:
    """Sign, exponent and 10 bits of the fraction; the rest is cut off, so the scale falls by at most 2⁻¹⁰ of itself.

    >>> top_19_bits(jnp.float32([1 + 2**-10 + 2**-11])) == 1 + 2**-10
    Array([ True], dtype=bool)
    """
    bits = lax.bitcast_convert_type(scale, jnp.uint32) & jnp.uint32(0xFFFFE000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def quantized_linear(
    x: Float[Array, "*B k"],
    weights: Quantized,
    dtype: str = "float16",
    arithmetic: Arithmetic = "exact",
    axis_name: str | None = None,
) -> Float[Array, "*B n"]:
    """x Wᵀ with the quantised weights, in `dtype`; of some columns a summand of it, rounded to `dtype` by itself.

    `dtype` is "float16" or "bfloat16" on the hardware. `axis_name` is `quantize_per_token`'s; `StaticW8A8`, whose scale
    is given, has no use for it.

    Raises:
      InputError: no such arithmetic.

    >>> weights = DynamicW8A8(jnp.array([[1, 2]], jnp.int8), jnp.array([0.5]))
    >>> quantized_linear(jnp.array([[127.0, 127.0]]), weights)
    Array([[190.5]], dtype=float16)
    """
    if arithmetic not in get_args(Arithmetic):
        raise InputError(f"arithmetic {arithmetic!r} is not known; give one of {', '.join(get_args(Arithmetic))}")
    wide = jnp.dtype("float64" if dtype == "float64" and arithmetic == "exact" else "float32")
    if isinstance(weights, StaticW8A8):
        scale = float_of(jnp.asarray(weights.deq_scale))
        if arithmetic == "vendor":
            scale = top_19_bits(scale)
        return times(static_sums(weights, x).astype(wide), scale).astype(dtype)
    a = quantize_per_token(x, axis_name)
    if isinstance(weights, DynamicW8A8):
        sums = integer_product(a.integers, jnp.asarray(weights.weight)).astype(wide)
        out = times(sums, jnp.asarray(weights.weight_scale))
    elif arithmetic == "exact":
        out = w4a8_exact(weights, a.integers, wide)
    else:
        out = w4a8_vendor(weights, a.integers)
    return (out * a.scale.astype(wide)).astype(dtype)


def times(x: Float[Array, "*B n"], scale: Float[Array, " n"]) -> Float[Array, "*B n"]:
    """Each column by its scale."""
    return x * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


# W4A8 ----------------------------------------------------------------------------------------------------------------


def group_products(weights: DynamicW4A8, a: Int8[Array, "*B k"]) -> list[Int32[Array, "*B n"]]:
    """Σ a·w over each group of k; one group where the weights have one scale a row."""
    weight, second = unpack_int4(jnp.asarray(weights.weight)), weights.weight_scale_second
    groups = 1 if second is None else second.shape[1]
    parts = (jnp.split(part, groups, axis=-1) for part in (a, weight))
    return [integer_product(*pair) for pair in zip(*parts, strict=True)]


def group_scales(weights: DynamicW4A8, wide: jnp.dtype) -> list[Float[Array, " n"]]:
    """The scale of each group, both levels multiplied in `wide`."""
    first, second = jnp.asarray(weights.weight_scale).astype(wide), weights.weight_scale_second
    if second is None:
        return [first]
    return [first * column for column in jnp.asarray(second).astype(wide).T]


def w4a8_exact(weights: DynamicW4A8, a: Int8[Array, "*B k"], wide: jnp.dtype) -> Float[Array, "*B n"]:
    """Σ a·w · weight_scale, groups summed in `wide`; the token's scale is not in it."""
    sums = [product.astype(wide) for product in group_products(weights, a)]
    return sum_in_order([times(*pair) for pair in zip(sums, group_scales(weights, wide), strict=True)])


def w4a8_vendor(weights: DynamicW4A8, a: Int8[Array, "*B k"]) -> Float32[Array, "*B n"]:
    """The same as the hardware computes it: two halves of x, each dequantised to FP16; float32 from there."""
    scales = [top_19_bits(scale) for scale in group_scales(weights, jnp.dtype("float32"))]

    def half(a: Array) -> Array:
        sums = [product.astype(jnp.float32) for product in group_products(weights, a)]
        dequantized = [rounded(times(*pair), "float16") for pair in zip(sums, scales, strict=True)]
        return sum_in_order(dequantized, "float16")

    high, low = a >> 4, (a & jnp.int8(15)) - jnp.int8(8)
    bias = jnp.asarray(weights.scale_bias).sum(axis=1).reshape((1,) * (a.ndim - 1) + (-1,))
    return jnp.float32(16) * half(high) + half(low) + bias


def sum_in_order(summands: list[Float[Array, "*B n"]], fmt: str | None = None) -> Float[Array, "*B n"]:
    """One added after the other, each sum rounded to `fmt`."""
    total, *rest = summands
    for summand in rest:
        total = total + summand
        total = total if fmt is None else rounded(total, fmt)
    return total
