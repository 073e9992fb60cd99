"""Linear layers with quantised weights, as MindIE's checkpoints have them: what is stored, and the integers.

    kind              integers of x                              result
    W8A8, static      round(x / input_scale + input_offset)      (Σ a·w + quant_bias) · deq_scale
    W8A8, per token   round(x / s), s = max |x| / 127            (Σ a·w) · weight_scale · s
    W4A8, per token   the same                                   the same, w in −8 … 7; or a scale for each group of k

Rounding is half to even, and integers are clipped to −128 … 127. Sums are int32 and exact: |a·w| is at most 2¹⁴, so k
may be up to 2¹⁷ − 1. `quantized_linear` has what follows the sums, `quantized_cut` what a rank of tp holds.

Sources: msmodelslim 3de0a3c (save/ascendv1.py, save/mindie_format.py), MindIE-LLM 8b4871a (utils/quantize), vllm-ascend
182b75e (quantization/methods).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int8, Int32

Numbers = Array | np.ndarray


class StaticW8A8(NamedTuple):
    """One scale for all activations; `deq_scale` float32, or int64 whose low 32 bits are a float32's (FP16 models)."""

    weight: Int8[Numbers, "n k"]
    input_scale: Float32[Numbers, "1"]
    input_offset: Float32[Numbers, "1"]
    deq_scale: Float32[Numbers, " n"] | Int[Numbers, " n"]
    quant_bias: Int32[Numbers, " n"]


class DynamicW8A8(NamedTuple):
    """A scale for each token, found in its activations; files have `weight_scale` as `[n, 1]`."""

    weight: Int8[Numbers, "n k"]
    weight_scale: Float32[Numbers, " n"]


class DynamicW4A8(NamedTuple):
    """As `DynamicW8A8` with 4-bit weights: byte i of a column has row 2i in its low nibble, row 2i + 1 in the high one.

    `scale_bias` comes in P sums over as many equal parts of k, for whoever holds some of the columns: P is 1, or 16 for
    down_proj and o_proj. `weight_scale_second`: a factor on `weight_scale` for each of G equal groups of k (MindIE's
    older form, groups of 256).
    """

    weight: Int8[Numbers, "n/2 k"]
    weight_scale: Float32[Numbers, " n"]
    scale_bias: Float32[Numbers, "n P"]
    weight_scale_second: Float32[Numbers, "n G"] | None = None


Quantized = StaticW8A8 | DynamicW8A8 | DynamicW4A8


# Integers ------------------------------------------------------------------------------------------------------------


def quotient(x: Float32[Array, "*B k"], by: Float32[Array, "*#B #k"] | Float32[Array, ""]) -> Float32[Array, "*B k"]:
    """x / by, rounded once, wherever it is compiled.

    XLA makes x · (1 / by) of a division by something broadcast: a third of the quotients move by a last bit, and ties
    fall to the other side. So the divisor is made to depend on x, though only where x is no number. (A barrier does not
    do: under `vmap` a divisor that is the same for all is broadcast after it.)

    >>> quotient(jnp.float32([3.0, 5.0]), jnp.float32(2.0))
    Array([1.5, 2.5], dtype=float32)
    """
    return x / jnp.where(jnp.isnan(x), x, by)


def to_int8(x: Float32[Array, "*B"]) -> Int8[Array, "*B"]:
    """To the nearest integer, of two the even one, and clipped.

    >>> to_int8(jnp.float32([0.5, 1.5, -2.5, 300.0]))
    Array([  0,   2,  -2, 127], dtype=int8)
    """
    return jnp.clip(jnp.round(x), -128, 127).astype(jnp.int8)


def quantize_static(
    x: Float[Array, "*B k"], input_scale: Float32[Array, "1"], input_offset: Float32[Array, "1"]
) -> Int8[Array, "*B k"]:
    """round(x / input_scale + input_offset), in float32 whatever x is. `x` must be finite.

    vllm-ascend multiplies by 1 / input_scale, where ties may fall to the other side.

    >>> quantize_static(jnp.array([0.5, -1.0, 99.0]), jnp.array([0.5]), jnp.array([3.0]))
    Array([  4,   1, 127], dtype=int8)
    """
    offset = input_offset.reshape((1,) * x.ndim)
    return to_int8(quotient(x.astype(jnp.float32), input_scale[0]) + offset)


class Activations(NamedTuple):
    """Tokens as integers, and the scale of each."""

    integers: Int8[Array, "*B k"]
    scale: Float32[Array, "*B 1"]


def quantize_per_token(x: Float[Array, "*B k"], axis_name: str | None = None) -> Activations:
    """s = max |x| / 127 of each token and round(x / s), in float32 whatever x is. `x` must be finite.

    With `axis_name` the maximum is also taken over that axis of a mesh: with `x` cut over it in k, as before a
    row-parallel layer, all ranks have the scale and the integers of the whole token. Without it each takes its own, as
    the vendor does, and both depend on how many ranks there are.

    A token of zeros has the scale 0 and integers 0, so every layer's result is 0. What the vendor's operator returns is
    not documented. The same holds where max |x| / 127 is too small for float32.

    >>> integers, scale = quantize_per_token(jnp.array([[1.0, -2.0], [0.0, 0.0]]))
    >>> integers.tolist(), (scale * 127).tolist()
    ([[64, -127], [0, 0]], [[2.0], [0.0]])
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    if axis_name is not None:
        largest = lax.pmax(largest, axis_name)
    scale = quotient(largest, jnp.float32(127))
    return Activations(to_int8(quotient(x, jnp.where(scale > 0, scale, jnp.float32(1)))), scale)


def unpack_int4(packed: Int8[Array, "h k"]) -> Int8[Array, "n k"]:
    """Rows 2i from the low nibbles, rows 2i + 1 from the high ones, −8 … 7.

    >>> unpack_int4(jnp.array([[0x2F]], jnp.int8)).tolist()
    [[-1], [2]]
    """
    low, high = (packed << 4) >> 4, packed >> 4  # shifts to the right repeat the sign
    return jnp.stack([low, high], axis=1).reshape(-1, packed.shape[1])


def integer_product(a: Int8[Array, "*B k"], weight: Int8[Array, "n k"]) -> Int32[Array, "*B n"]:
    """Σₖ a·w, exact.

    >>> integer_product(jnp.full((1, 9), -128, jnp.int8), jnp.full((1, 9), -128, jnp.int8))
    Array([[147456]], dtype=int32)
    """
    return lax.dot_general(a, weight, (((a.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def static_sums(weights: StaticW8A8, x: Float[Array, "*B k"]) -> Int32[Array, "*B n"]:
    """Σ a·w + quant_bias; of ranks that hold some of the columns, summands of it (`cpjax.deepseek.quantized_cut`)."""
    a = quantize_static(x, jnp.asarray(weights.input_scale), jnp.asarray(weights.input_offset))
    bias = jnp.asarray(weights.quant_bias).reshape((1,) * (x.ndim - 1) + (-1,))
    return integer_product(a, jnp.asarray(weights.weight)) + bias
