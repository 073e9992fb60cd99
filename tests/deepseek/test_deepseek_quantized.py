"""Quantised layers: integers are a NumPy twin's to the bit; what each arithmetic costs; laws under tp."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_mutant import mutant
from strategies import examples

from cpjax.deepseek import quantized, quantized_cut, quantized_linear
from cpjax.deepseek.quantized import (
    DynamicW4A8,
    DynamicW8A8,
    StaticW8A8,
    integer_product,
    quantize_per_token,
    quantize_static,
    unpack_int4,
)
from cpjax.deepseek.quantizers import dynamic_w4a8, dynamic_w8a8, pack_int4, static_w8a8
from cpjax.errors import InputError

KINDS = ("static", "dynamic", "w4a8", "w4a8 in groups")
GROUP = 32
SHAPES = [(3, 8, 64), (1, 16, 128)]  # tokens, n, k
SEEDS = st.integers(0, 2**32 - 1)
KIND = st.sampled_from(KINDS)
VALUES = st.sampled_from(("normal", "ties", "wide", "zeros"))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def weights_of(kind, rng, n, k, parts=1):
    """Of float weights whose rows have sizes of their own."""
    weight = rng.normal(size=(n, k)) * 2.0 ** rng.uniform(-7, -3, (n, 1))
    if kind == "static":
        offset, bias = float(rng.integers(-20, 20)), rng.normal(size=n) * 0.1
        return static_w8a8(weight, 2.0 ** rng.uniform(-6, -4), offset, bias)
    if kind == "dynamic":
        return dynamic_w8a8(weight)
    return dynamic_w4a8(weight, GROUP if "groups" in kind else None, parts)


def tokens(rng, values, shape):
    """FP16 numbers; `ties`: halves of the scale, which is a power of two; `zeros`: the first token is nothing else."""
    x = rng.normal(size=shape)
    if values == "ties":
        x = rng.integers(-254, 255, shape) / 64
        x[:, 0] = 127 / 32
    if values == "wide":
        x = x * 2.0 ** rng.uniform(-12, 8, (shape[0], 1))
    if values == "zeros":
        x[0] = 0
    return x.astype(np.float16)


# The twin: formulas once more, in NumPy ------------------------------------------------------------------------------

F32 = np.float32


def twin_static(x, weights):
    a = np.rint(x.astype(F32) / weights.input_scale + weights.input_offset)
    return np.minimum(np.maximum(a, -128), 127).astype(np.int64)


def twin_per_token(x):
    """Integers, and the scale of each token."""
    integers, scales = [], []
    for row in x.astype(F32):
        scale = max(abs(row)) / F32(127)
        integers.append(np.rint(row / scale) if scale else row * 0)
        scales.append(scale)
    return np.array(integers).astype(np.int64), np.array(scales, F32)[:, None]


def twin_weight(weights):
    if not isinstance(weights, DynamicW4A8):
        return weights.weight.astype(np.int64)
    packed = weights.weight.astype(np.int64) % 256
    rows = [nibble - 16 * (nibble > 7) for byte in packed for nibble in (byte % 16, byte // 16)]
    return np.array(rows)


def twin_deq_scale(weights):
    """The float32 whose bits an int64 ends with, read out of its bytes."""
    if weights.deq_scale.dtype == F32:
        return weights.deq_scale
    return np.frombuffer(weights.deq_scale.astype("<i8").tobytes(), "<f4")[::2]


def twin_cut_off(scale):
    """10 bits of the fraction."""
    fraction, exponent = np.frexp(scale.astype(np.float64))
    return np.ldexp(np.trunc(fraction * 2**11), exponent - 11).astype(F32)


def twin_sums(x, weights):
    """Exact integers, over each group `[G, T, n]`; and what each is to be multiplied with, in float64 `[G, n]`."""
    w = twin_weight(weights)
    if isinstance(weights, StaticW8A8):
        sums = twin_static(x, weights) @ w.T + weights.quant_bias.astype(np.int64)
        return sums[None], twin_deq_scale(weights)[None].astype(np.float64)
    a, _ = twin_per_token(x)
    return twin_group_sums(a, weights), twin_group_scales(weights, np.float64)


def twin_group_sums(a, weights):
    second = getattr(weights, "weight_scale_second", None)
    groups = 1 if second is None else second.shape[1]
    w, size = twin_weight(weights), a.shape[1] // groups
    return np.array([a[:, j : j + size] @ w[:, j : j + size].T for j in range(0, a.shape[1], size)])


def twin_group_scales(weights, dtype):
    second = getattr(weights, "weight_scale_second", None)
    scale = weights.weight_scale.astype(dtype)
    return scale[None] if second is None else scale[None] * second.T.astype(dtype)


def twin_exact(x, weights):
    sums, scales = twin_sums(x, weights)
    token = 1.0 if isinstance(weights, StaticW8A8) else twin_per_token(x)[1].astype(np.float64)
    return np.einsum("gtn,gn->tn", sums.astype(np.float64), scales) * token


def twin_halves(x, weights):
    """HI and LO in FP16, as float32."""
    a, _ = twin_per_token(x)
    high = np.floor_divide(a, 16)
    scales = twin_cut_off(twin_group_scales(weights, F32))
    halves = []
    for half in (high, a - 16 * high - 8):
        total = np.float16(0)
        for sums, scale in zip(twin_group_sums(half, weights), scales, strict=True):
            total = total + (sums.astype(F32) * scale).astype(np.float16)
        halves.append(total.astype(F32))
    return halves


def twin_vendor(x, weights, fmt=np.float16):
    if isinstance(weights, StaticW8A8):
        return (twin_sums(x, weights)[0][0].astype(F32) * twin_cut_off(twin_deq_scale(weights))).astype(fmt)
    _, scale = twin_per_token(x)
    if isinstance(weights, DynamicW8A8):
        return (twin_sums(x, weights)[0][0].astype(F32) * weights.weight_scale * scale).astype(fmt)
    high, low = twin_halves(x, weights)
    return ((F32(16) * high + low + weights.scale_bias.sum(axis=1)) * scale).astype(fmt)


# Integers and arithmetics --------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("dtype", "arithmetic"))
def linear(x, weights, dtype="float16", arithmetic="exact"):
    return quantized_linear.quantized_linear(x, weights, dtype, arithmetic)


jitted_static, jitted_per_token = jax.jit(quantize_static), jax.jit(quantize_per_token)


def check_activations(x, weights, static=jitted_static, per_token=jitted_per_token):
    np.testing.assert_array_equal(static(x, *map(jnp.asarray, weights[1:3])), twin_static(x, weights))
    integers, scale = per_token(x)
    expected = twin_per_token(x)
    np.testing.assert_array_equal(integers, expected[0])
    np.testing.assert_array_equal(scale, expected[1])


@examples(0.5)
@given(SEEDS, st.sampled_from(SHAPES), VALUES)
def test_integers_of_activations(seed, shape, values):
    """Compiled, which is where XLA would make a multiplication of the division."""
    rng = np.random.default_rng(seed)
    weights, x = weights_of("static", rng, *shape[1:]), tokens(rng, values, (shape[0], shape[2]))
    if values == "ties":
        weights = weights._replace(input_scale=np.array([1 / 32], F32))
    check_activations(x, weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_of_weights_and_products(shape):
    """Over the whole range, −8 and −128 included."""
    tokens, n, k = shape
    rng = np.random.default_rng(0)
    packed = rng.integers(-128, 128, (n // 2, k)).astype(np.int8)
    packed[0, :16] = np.arange(-128, 128, 16) + np.arange(16)
    four_bits = twin_weight(DynamicW4A8(packed, np.ones(n, F32), np.ones((n, 1), F32)))
    np.testing.assert_array_equal(unpack_int4(jnp.asarray(packed)), four_bits)
    np.testing.assert_array_equal(pack_int4(four_bits.astype(np.int8)), packed)
    a, w = (rng.integers(-128, 128, size).astype(np.int8) for size in ((tokens, k), (n, k)))
    for weight in (w, four_bits.astype(np.int8)):
        np.testing.assert_array_equal(integer_product(jnp.asarray(a), jnp.asarray(weight)), a.astype(int) @ weight.T)


def test_the_longest_sum_is_exact():
    a = jnp.full((1, 2**17 - 1), -128, jnp.int8)
    assert integer_product(a, a).tolist() == [[(2**17 - 1) * 2**14]]


def check_exact(x, weights):
    """In float64 but for few roundings, and in FP16 up to its cast and float32's few."""
    expected = twin_exact(x, weights)
    size = np.einsum("gtn,gn->tn", *map(abs, twin_sums(x, weights)))
    if not isinstance(weights, StaticW8A8):
        size = size * twin_per_token(x)[1]
    terms = len(twin_sums(x, weights)[0])
    with jax.enable_x64(True):
        out = linear(x, weights, "float64")
        assert out.dtype == np.float64
        assert np.all(abs(out - expected) <= (terms + 3) * 2.0**-53 * size)
    out = np.asarray(linear(x, weights), np.float64)
    assert np.all(abs(out - expected) <= 2.0**-11 * abs(expected) + (terms + 4) * 2.0**-23 * size + 2.0**-25)


@examples(0.3)
@given(SEEDS, KIND, VALUES)
def test_exact_is_the_product_of_integers_and_scales(seed, kind, values):
    rng = np.random.default_rng(seed)
    check_exact(tokens(rng, values, (3, 64)), weights_of(kind, rng, 8, 64))


@examples(0.3)
@given(SEEDS, KIND, VALUES)
def test_vendor_is_the_twin_to_the_bit(seed, kind, values):
    rng = np.random.default_rng(seed)
    x, weights = tokens(rng, values, (3, 64)), weights_of(kind, rng, 8, 64)
    np.testing.assert_array_equal(linear(x, weights, arithmetic="vendor"), twin_vendor(x, weights))


@pytest.mark.parametrize("kind", KINDS)
def test_vendor_in_bfloat16(kind):
    rng = np.random.default_rng(1)
    x, weights = tokens(rng, "normal", (3, 64)), weights_of(kind, rng, 8, 64)
    if kind == "static":
        weights = weights._replace(deq_scale=twin_deq_scale(weights))  # float32, as in a BF16 model's file
    expected = twin_vendor(x, weights, jnp.bfloat16)
    np.testing.assert_array_equal(linear(x, weights, "bfloat16", "vendor"), expected)


@pytest.mark.parametrize("x64", [False, True])
def test_of_an_int64_scale_the_low_half_counts(x64):
    weights = weights_of("static", np.random.default_rng(2), 8, 64)
    x = tokens(np.random.default_rng(3), "normal", (3, 64))
    marked = weights._replace(deq_scale=weights.deq_scale | (1 << 46))
    as_float = weights._replace(deq_scale=twin_deq_scale(weights))
    with jax.enable_x64(x64):
        for arithmetic in ("exact", "vendor"):
            one, two, three = (linear(x, each, "float32", arithmetic) for each in (weights, marked, as_float))
            np.testing.assert_array_equal(one, three)
            np.testing.assert_array_equal(two, three)


@pytest.mark.parametrize("kind", KINDS)
def test_leading_axes_are_tokens(kind):
    rng = np.random.default_rng(4)
    x, weights = tokens(rng, "normal", (3, 64)), weights_of(kind, rng, 8, 64)
    flat, folded = (linear(each, weights, arithmetic="vendor") for each in (x, x[:, None]))
    np.testing.assert_array_equal(folded, flat[:, None])
    np.testing.assert_array_equal(linear(x[0], weights, arithmetic="vendor"), flat[0])


def test_a_word_that_is_no_arithmetic_is_refused():
    inner = quantized_linear.quantized_linear.__wrapped__  # beartype would refuse it first
    with pytest.raises(InputError, match="give one of exact, vendor"):
        inner(jnp.ones((1, 64)), weights_of("dynamic", np.random.default_rng(0), 8, 64), "float16", "vendors")


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 1e-36])
def test_tokens_without_a_scale_give_zeros(tiny):
    """0 is decided, not the vendor's word; and what float32 can hardly hold is a number still."""
    x = jnp.zeros((2, 64)).at[0, 3].set(tiny).at[1].set(1.0)
    with jax.debug_nans(True):  # what a NaN becomes as an integer is the device's to say
        integers, scale = quantize_per_token(x)
    assert (integers[0, :3] == 0).all()
    assert (integers[1] == 127).all()
    assert np.isfinite(scale).all()
    for kind in ("dynamic", "w4a8"):
        weights = weights_of(kind, np.random.default_rng(5), 8, 64)
        for arithmetic in ("exact", "vendor"):
            out = np.asarray(linear(x, weights, arithmetic=arithmetic))
            assert (out[0] == 0).all()
            assert (out[1] != 0).any()
            assert np.isfinite(out).all()


# Weights from floats -------------------------------------------------------------------------------------------------


@examples(0.3)
@given(SEEDS, KIND, st.sampled_from(SHAPES))
def test_weights_made_are_near(seed, kind, shape):
    """Half a step of each scale from the float weight; the layer's bias and offset come out right."""
    _, n, k = shape
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(n, k)) * 2.0 ** rng.uniform(-7, -3, (n, 1))
    weight[0] = 0
    if kind == "static":
        bias = rng.normal(size=n)
        made = static_w8a8(weight, 0.03, -5.0, bias)
        x = tokens(rng, "normal", (3, k))
        deq = twin_deq_scale(made).astype(np.float64)
        steps = twin_static(x, made) + 5
        out, size = twin_exact(x, made), abs(steps) @ abs(twin_weight(made)).T * deq
        expected = steps @ twin_weight(made).T * deq + bias
        assert np.all(abs(out - expected) <= deq / 2 + 2.0**-50 * (size + abs(bias)))
        scales = deq[:, None] / F32(0.03)
    else:
        made = dynamic_w8a8(weight) if kind == "dynamic" else dynamic_w4a8(weight, GROUP if "groups" in kind else None)
        scales = np.repeat(twin_group_scales(made, np.float64).T, k // len(twin_group_scales(made, F32)), axis=1)
    step = scales
    if "groups" in kind:
        step = scales + made.weight_scale[:, None]  # two roundings, one of each level
    dequantized = twin_weight(made) * scales
    assert np.all(abs(dequantized - weight) <= 0.5001 * step)
    assert np.all(dequantized[0] == 0)
    if isinstance(made, DynamicW4A8):
        np.testing.assert_allclose(made.scale_bias[:, 0], 8 * dequantized.sum(axis=1), rtol=0, atol=1e-5)


def test_weights_that_do_not_come_out_even_are_refused():
    with pytest.raises(InputError, match="3 rows cannot be packed"):
        dynamic_w4a8(np.ones((3, 4)))
    with pytest.raises(InputError, match="groups of 3"):
        dynamic_w4a8(np.ones((2, 4)), 3)
    with pytest.raises(InputError, match="16 parts"):
        dynamic_w4a8(np.ones((2, 4)), None, 16)


# What the vendor's arithmetic costs ----------------------------------------------------------------------------------


def spacing(x):
    """The step of FP16 at x."""
    return np.spacing(abs(x).astype(np.float16)).astype(np.float64)


def error_model(x, weights):
    """Expected squares of vendor − exact: what the scale lost, which is known; a uniform error at each FP16 cast."""
    out = twin_exact(x, weights)
    if isinstance(weights, StaticW8A8):
        lost = 1 - twin_cut_off(twin_deq_scale(weights)) / twin_deq_scale(weights).astype(np.float64)
        return (lost * out) ** 2 + spacing(out) ** 2 / 12
    scale = twin_group_scales(weights, np.float64)[0]
    lost = 1 - twin_cut_off(scale.astype(F32)) / scale
    high, low = twin_halves(x, weights)
    square = (lost * (16.0 * high + low)) ** 2 + (16 * spacing(high)) ** 2 / 12 + spacing(low) ** 2 / 12
    return square * twin_per_token(x)[1].astype(np.float64) ** 2 + spacing(out) ** 2 / 12


@pytest.mark.parametrize("kind", ["static", "w4a8"])
def test_vendor_costs_what_its_roundings_cost(kind):
    """Within 5 % in the root mean square."""
    rng = np.random.default_rng(6)
    weights, x = weights_of(kind, rng, 512, 512), tokens(rng, "normal", (64, 512))
    expected = twin_exact(x, weights)
    error = np.asarray(linear(x, weights, arithmetic="vendor"), np.float64) - expected
    assert np.sqrt((error**2).mean() / error_model(x, weights).mean()) == pytest.approx(1, abs=0.05)


def test_the_19_bit_scale_costs_twice_the_cast():
    """Fractions m are spread evenly in their logarithm: E[1/m²] = 3 / (8 ln 2); a cast errs by 2⁻¹¹ / (m √3), a cut by
    2⁻¹⁰ / (m √3): 2.1e-4 and 4.2e-4, together 4.6e-4.
    """
    rng = np.random.default_rng(7)
    weights, x = weights_of("static", rng, 512, 512), tokens(rng, "normal", (64, 512))
    expected = twin_exact(x, weights)
    spread = 3 / (8 * np.log(2))
    cast, cut = 2.0**-11 * np.sqrt(spread / 3), 2.0**-10 * np.sqrt(spread / 3)
    for arithmetic, cost in (("exact", cast), ("vendor", np.hypot(cast, cut))):
        error = np.asarray(linear(x, weights, arithmetic=arithmetic)) / expected - 1
        assert np.sqrt((error[abs(expected) > 2.0**-10] ** 2).mean()) == pytest.approx(cost, rel=0.07)


def vendor_bound(x, weights):
    """How far vendor may be from exact in W4A8, element by element: the scale, two FP16 halves, float32, the cast."""
    a, token = twin_per_token(x)
    high = np.floor_divide(a, 16)
    scales, total = twin_group_scales(weights, np.float64), 0.0
    for half, times in ((high, 16), (a - 16 * high - 8, 1)):
        size = np.einsum("gtn,gn->tn", abs(twin_group_sums(half, weights)).astype(float), scales)
        total = total + times * ((2.0**-10 + 2.0**-11 * len(scales)) * size + 2.0**-25)
    total = total + 2.0**-21 * abs(weights.scale_bias).sum(axis=1)
    return 1.01 * total * token + 2.0**-11 * abs(twin_exact(x, weights)) + 2.0**-25


def check_scale_bias(x, weights, linear=linear):
    """It undoes the −8: vendor is near exact; and exact does not read it."""
    out = np.asarray(linear(x, weights, arithmetic="vendor"), np.float64)
    assert np.all(abs(out - twin_exact(x, weights)) <= vendor_bound(x, weights))
    other = weights._replace(scale_bias=weights.scale_bias + 1)
    np.testing.assert_array_equal(linear(x, other), linear(x, weights))


@examples(0.2)
@given(SEEDS, st.sampled_from(KINDS[2:]), VALUES)
def test_scale_bias_undoes_the_minus_8(seed, kind, values):
    rng = np.random.default_rng(seed)
    check_scale_bias(tokens(rng, values, (3, 64)), weights_of(kind, rng, 8, 64))


# Ranks of tp ---------------------------------------------------------------------------------------------------------


def stacked(weights, cut, tp):
    parts = [quantized_cut.quantized_part(weights, cut, rank, tp) for rank in range(tp)]
    return jax.tree.map(lambda *x: np.stack(x), *parts)


def slices(x, tp):
    """Each rank's columns of x, `[tp, T, k / tp]`."""
    return np.stack(np.split(x, tp, axis=1))


def on_ranks(x, weights, cut, tp, axis_name=None, dtype="float64", arithmetic="exact"):
    """Each rank's result, `[tp, T, n or n / tp]`."""
    one = partial(quantized_linear.quantized_linear, dtype=dtype, arithmetic=arithmetic, axis_name=axis_name)
    x, axis = (slices(x, tp), 0) if cut == "columns" else (x, None)
    return jax.jit(jax.vmap(one, in_axes=(axis, 0), axis_name="tp"))(x, stacked(weights, cut, tp))


def check_static_sums(tp):
    rng = np.random.default_rng(tp)
    x, weights = tokens(rng, "normal", (3, 128)), weights_of("static", rng, 16, 128)
    whole = twin_sums(x, weights)[0][0]
    sums = jax.jit(jax.vmap(quantized.static_sums))(stacked(weights, "columns", tp), slices(x, tp))
    np.testing.assert_array_equal(sums.sum(axis=0), whole)
    sums = jax.jit(jax.vmap(quantized.static_sums, in_axes=(0, None)))(stacked(weights, "rows", tp), x)
    np.testing.assert_array_equal(np.concatenate(list(sums), axis=1), whole)


@pytest.mark.parametrize("tp", [1, 4])
def test_static_sums_are_the_same_under_any_tp(tp):
    check_static_sums(tp)


@pytest.mark.parametrize(("kind", "arithmetic"), [*((kind, "vendor") for kind in KINDS), ("w4a8", "exact")])
def test_rows_are_the_same_under_any_tp(kind, arithmetic):
    """Column-parallel: to the bit, for every rank sees the whole token."""
    rng = np.random.default_rng(8)
    x, weights = tokens(rng, "normal", (3, 128)), weights_of(kind, rng, 16, 128)
    whole = linear(x, weights, arithmetic=arithmetic)
    parts = on_ranks(x, weights, "rows", 4, dtype="float16", arithmetic=arithmetic)
    np.testing.assert_array_equal(np.concatenate(list(parts), axis=1), whole)


@partial(jax.jit, static_argnames="axis_name")
def ranks_activations(x, axis_name):
    return jax.vmap(partial(quantized.quantize_per_token, axis_name=axis_name), axis_name="tp")(x)


def per_rank(x, tp, axis_name, activations=ranks_activations):
    """Integers and scales as ranks make them that hold some of the columns."""
    integers, scale = map(np.asarray, activations(slices(x, tp), axis_name))
    return np.concatenate(integers, axis=1), scale


def check_maximum_over_tp(x, tp, activations=ranks_activations):
    integers, scale = per_rank(x, tp, "tp", activations)
    expected = twin_per_token(x)
    np.testing.assert_array_equal(integers, expected[0])
    np.testing.assert_array_equal(scale, np.broadcast_to(expected[1], scale.shape))


@examples(0.2)
@given(SEEDS, VALUES, st.sampled_from([2, 4]))
def test_with_the_maximum_over_tp_integers_are_the_same(seed, values, tp):
    check_maximum_over_tp(tokens(np.random.default_rng(seed), values, (3, 128)), tp)


def test_without_it_they_are_not():
    """The vendor's row-parallel layers: the rank without the largest number has a finer scale."""
    x = np.array([[127.0, 10.0, 1.0, -2.0]], np.float16)
    assert per_rank(x, 2, "tp")[0].tolist() == [[127, 10, 1, -2]]
    integers, scale = per_rank(x, 2, None)
    assert integers.tolist() == [[127, 10, 64, -127]]  # 63.5 to the even
    assert scale[:, 0, 0].tolist() == [1.0, float(F32(2) / F32(127))]
    normal = tokens(np.random.default_rng(9), "normal", (64, 128))
    assert (per_rank(normal, 2, None)[0] != twin_per_token(normal)[0]).mean() > 0.1


@pytest.mark.parametrize(("kind", "tp"), [("dynamic", 2), ("w4a8", 4), ("w4a8 in groups", 2)])
def test_columns_with_the_maximum_over_tp_are_one_device(float64, kind, tp):
    rng = np.random.default_rng(10)
    x, weights = tokens(rng, "normal", (3, 128)), weights_of(kind, rng, 16, 128, parts=4)
    expected = twin_exact(x, weights)
    atol = 1e-13 * abs(expected).max()
    out = on_ranks(x, weights, "columns", tp, axis_name="tp").sum(axis=0)
    np.testing.assert_allclose(out, expected, rtol=0, atol=atol)
    own = on_ranks(x, weights, "columns", tp).sum(axis=0)
    assert abs(own - expected).max() > 1e6 * atol
    if kind != "dynamic":
        out = np.asarray(on_ranks(x, weights, "columns", tp, "tp", "float32", "vendor")).sum(axis=0)
        assert np.all(abs(out - expected) <= vendor_bound(x, weights) + 2.0**-20 * abs(expected).max())


def test_on_a_mesh():
    rng = np.random.default_rng(11)
    x, weights = tokens(rng, "normal", (3, 128)), weights_of("w4a8", rng, 16, 128, parts=2)
    spec = jax.sharding.PartitionSpec

    def summand(x, weights):
        part = jax.tree.map(lambda x: x[0], weights)
        return jax.lax.psum(quantized_linear.quantized_linear(x, part, "float32", axis_name="tp"), "tp")

    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    program = jax.jit(jax.shard_map(summand, mesh=mesh, in_specs=(spec(None, "tp"), spec("tp")), out_specs=spec()))
    np.testing.assert_allclose(program(x, stacked(weights, "columns", 2)), twin_exact(x, weights), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "cut", "tp", "reason"),
    [
        ("static", "columns", 3, "128 columns"),
        ("dynamic", "rows", 3, "16 rows"),
        ("w4a8", "rows", 16, "8 rows of bytes"),
        ("w4a8", "columns", 8, "4 parts of scale_bias"),
    ],
)
def test_cuts_that_do_not_come_out_even_are_refused(kind, cut, tp, reason):
    with pytest.raises(InputError, match=reason):
        quantized_cut.quantized_part(weights_of(kind, np.random.default_rng(0), 16, 128, parts=4), cut, 0, tp)


# Broken on purpose ---------------------------------------------------------------------------------------------------


def newly_compiled():
    return jax.jit(lambda *x, **how: quantized_linear.quantized_linear(*x, **how), static_argnames=("arithmetic",))


def see_activations():
    """Halves of a scale, and scales of which the reciprocal is not exact."""
    rng = np.random.default_rng(12)
    weights = weights_of("static", rng, 8, 64)
    each = (jax.jit(lambda *x: quantized.quantize_static(*x)), jax.jit(lambda x: quantized.quantize_per_token(x)))
    ties = weights._replace(input_scale=np.array([1 / 32], F32))
    check_activations(tokens(rng, "ties", (3, 64)), ties, *each)
    check_activations(tokens(rng, "normal", (300, 64)), weights, *each)


def see_vendor(kind):
    rng = np.random.default_rng(13)
    x, weights = tokens(rng, "normal", (3, 64)), weights_of(kind, rng, 8, 64)
    np.testing.assert_array_equal(newly_compiled()(x, weights, arithmetic="vendor"), twin_vendor(x, weights))


def see_maximum():
    x = tokens(np.random.default_rng(14), "normal", (3, 128))
    check_maximum_over_tp(x, 2, ranks_activations.__wrapped__)


def see_scale_bias():
    rng = np.random.default_rng(15)
    x, weights = tokens(rng, "normal", (3, 64)), weights_of("w4a8", rng, 8, 64)
    check_scale_bias(x, weights, newly_compiled())


BROKEN = {
    "scale_bias forgotten": (quantized_linear, "w4a8_vendor", "+ bias", "", see_scale_bias),
    "nibbles exchanged": (quantized_linear, "unpack_int4", "[low, high]", "[high, low]", partial(see_vendor, "w4a8")),
    "quant_bias on every rank": (quantized_cut, "quantized_part", "rank == 0", "True", partial(check_static_sums, 2)),
    "half away from zero": (
        *(quantized, "to_int8", "jnp.round(x)", "jnp.trunc(x + jnp.copysign(jnp.float32(0.5), x))"),
        see_activations,
    ),
    "multiplied by the reciprocal": (
        *(quantized, "quotient", "jnp.where(jnp.isnan(x), x, by)", "by"),
        see_activations,
    ),
    "all bits of the scale": (
        *(quantized_linear, "top_19_bits", "0xFFFFE000", "0xFFFFFFFF"),
        partial(see_vendor, "static"),
    ),
    "halves in float32": (
        *(quantized_linear, "w4a8_vendor", 'rounded(times(*pair), "float16")', "times(*pair)"),
        partial(see_vendor, "w4a8"),
    ),
    "groups summed in float32": (
        *(quantized_linear, "w4a8_vendor", '(dequantized, "float16")', "(dequantized)"),
        partial(see_vendor, "w4a8 in groups"),
    ),
    "no maximum over tp": (quantized, "quantize_per_token", "axis_name is not None", "not axis_name", see_maximum),
    "the upper half of int64": (
        *(quantized_linear, "float_of", "astype(jnp.int32)", "astype(jnp.int32) >> 1"),
        partial(see_vendor, "static"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_on_purpose_it_is_seen(monkeypatch, name):
    where, function, old, new, seen_by = BROKEN[name]
    seen_by()
    mutant(monkeypatch, where, function, old, new)
    with pytest.raises(AssertionError):
        seen_by()
