"""What a decoder layer needs besides attention: norms, rotary embedding, activation, quantised products.

Each CPU kernel against a NumPy twin that is written from the formulas: integers and roundings bit by bit, float32 sums,
whose order is free, within what their rounding allows.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_judge import assert_same_bits
from strategies import examples

from npu_backend import vendor
from npu_backend.emulation import arithmetic
from npu_backend.errors import InputError
from npu_backend.operators import (
    Activations,
    Angles,
    add_norm,
    dynamic_linear,
    gated,
    latent_of,
    norm,
    quantize_per_token,
    quantize_static,
    rotate,
    static_linear,
)

NPU = torch.ops.npu
SEEDS = st.integers(0, 2**32 - 1)
f16, f32, f64 = np.float16, np.float32, np.float64


def drawn(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(f16)


def exact_norm(x, weight, eps):
    x = x.astype(f64)
    return weight.astype(f64) * x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def to_int8(x):
    return np.clip(np.rint(x), -128, 127).astype(np.int8)


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]


# --- norms


@examples(0.3)
@given(SEEDS, st.integers(1, 5), st.integers(1, 300), st.sampled_from((1e-6, 1e-3)))
def test_rms_norm_rounds_once(seed, tokens, width, eps):
    x, weight = drawn(seed, tokens, width), drawn(seed + 1, width)
    y, rstd = NPU.npu_rms_norm(*tensors(x, weight), eps)
    assert rstd.shape == (tokens, 1)
    assert rstd.dtype == torch.float32
    wanted = 1 / np.sqrt((x.astype(f64) ** 2).mean(axis=-1, keepdims=True) + eps)
    np.testing.assert_allclose(rstd.numpy(), wanted, rtol=(width + 6) * 2.0**-24)
    assert_same_bits(y, (x.astype(f32) * rstd.numpy() * weight.astype(f32)).astype(f16))
    assert_same_bits(norm(*tensors(x, weight), eps), y.numpy())
    with arithmetic("exact"):
        once = NPU.npu_rms_norm(*tensors(x, weight), eps)[0]
    assert_same_bits(once, exact_norm(x, weight, eps).astype(f16))


@examples(0.3)
@given(SEEDS, st.integers(1, 5), st.integers(2, 200))
def test_add_rms_norm_rounds_the_sum_and_the_norm_before_gamma_and_after(seed, tokens, width):
    x, more, weight = drawn(seed, tokens, width), drawn(seed + 1, tokens, width, scale=100), drawn(seed + 2, width)
    y, rstd, total = NPU.npu_add_rms_norm(*tensors(x, more, weight), 1e-5)
    assert_same_bits(total, x + more)
    wanted = 1 / np.sqrt(((x + more).astype(f64) ** 2).mean(axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rstd.numpy(), wanted, rtol=(width + 6) * 2.0**-24)
    assert_same_bits(y, ((x + more).astype(f32) * rstd.numpy()).astype(f16) * weight)
    wrapped = add_norm(*tensors(x, more, weight), 1e-5)
    assert torch.equal(wrapped.total, total)
    assert torch.equal(wrapped.normed, y)
    with arithmetic("exact"):
        once = NPU.npu_add_rms_norm(*tensors(x, more, weight), 1e-5)[0]
    assert_same_bits(once, exact_norm(x + more, weight, 1e-5).astype(f16))


def test_rms_norm_over_several_dims_and_in_other_dtypes():
    x, weight = torch.randn(3, 4, 5), torch.randn(4, 5)
    y, rstd = NPU.npu_rms_norm(x, weight, 1e-6)
    assert rstd.shape == (3, 1, 1)
    wanted = weight.double() * x.double() / (x.double() ** 2).mean(dim=(1, 2), keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-6, atol=1e-7)
    x, weight = x.bfloat16(), weight.bfloat16()
    y, rstd = NPU.npu_rms_norm(x, weight, 1e-6)
    assert torch.equal(y, (x.float() * rstd * weight.float()).bfloat16())
    y, rstd, _ = NPU.npu_add_rms_norm(x, torch.zeros_like(x), weight, 1e-6)
    assert torch.equal(y, ((x.float() * rstd).bfloat16().float() * weight.float()).bfloat16())


# --- rotary embedding and the latent


def turned(x, cos, sin):
    """`[…, 64]` as halves, in float32 with one cast; cos and sin `[…, 64]`."""
    a, b = x[..., 0::2].astype(f32), x[..., 1::2].astype(f32)
    cos, sin = cos.astype(f32), sin.astype(f32)
    first = a * cos[..., :32] - b * sin[..., :32]
    second = b * cos[..., 32:] + a * sin[..., 32:]
    return np.concatenate([first, second], axis=-1).astype(f16)


@examples(0.2)
@given(SEEDS, st.integers(1, 9), st.integers(1, 4))
def test_interleave_rope_turns_neighbours_into_halves(seed, tokens, heads):
    x, cos, sin = drawn(seed, tokens, heads, 64), drawn(seed + 1, tokens, 64), drawn(seed + 2, tokens, 64)
    wanted = turned(x, cos[:, None], sin[:, None])
    got = NPU.npu_interleave_rope(*tensors(x[:, :, None], cos[:, None, None], sin[:, None, None]))
    assert_same_bits(got[:, :, 0], wanted)
    assert_same_bits(rotate(torch.from_numpy(x), Angles(*tensors(cos, sin))), wanted)
    along = NPU.npu_interleave_rope(*tensors(x.transpose(1, 0, 2)[None], cos[None, None], sin[None, None]))
    assert_same_bits(along[0].transpose(0, 1), wanted)


def test_one_angle_serves_all_positions_of_a_request():
    x, cos, sin = drawn(0, 2, 3, 5, 64), drawn(1, 2, 1, 1, 64), drawn(2, 2, 1, 1, 64)
    assert_same_bits(NPU.npu_interleave_rope(*tensors(x, cos, sin)), turned(x, cos, sin))


def kv_arguments(seed, tokens, blocks=2):
    kv, weight = drawn(seed, 1, 1, tokens, 576), drawn(seed + 1, 512)
    cos, sin = drawn(seed + 2, 1, 1, tokens, 64), drawn(seed + 3, 1, 1, tokens, 64)
    caches = [torch.full((blocks, 16, 1, width), -7.0, dtype=torch.float16) for width in (64, 512)]
    return [*tensors(kv, weight, cos, sin), torch.arange(tokens), *caches]


@examples(0.2)
@given(SEEDS, st.integers(1, 32), st.data())
def test_kv_rmsnorm_rope_cache_writes_norm_and_rotation_where_the_index_says(seed, tokens, data):
    call = kv_arguments(seed, tokens)
    kv, weight, cos, sin = (x.numpy() for x in call[:4])
    places = data.draw(st.permutations(range(32)))[:tokens]
    places = [i if data.draw(st.integers(0, 9)) else -1 for i in places]
    call[4] = torch.tensor(places)
    options = {"epsilon": 1e-6, "cache_mode": "PA_BNSD", "is_output_kv": True}
    k_cache, ckv_cache, k_rope, c_kv = NPU.npu_kv_rmsnorm_rope_cache(*call, **options)
    assert k_cache.data_ptr() == call[5].data_ptr()
    assert_same_bits(k_rope, turned(kv[..., 512:], cos, sin))
    wanted = exact_norm(kv[..., :512], weight, 1e-6)
    assert (abs(c_kv.double().numpy() - wanted) <= 2.0**-11 * 1.001 * abs(wanted) + 2.0**-25).all()  # one rounding
    for cache, rows in ((k_cache, k_rope), (ckv_cache, c_kv)):
        flat = cache.flatten(0, 2)
        for i in range(32):
            row = rows[0, 0, places.index(i)] if i in places else torch.full_like(flat[i], -7.0)
            assert torch.equal(flat[i], row)


def test_kv_rmsnorm_rope_cache_norm_mode_and_what_is_not_written():
    call = kv_arguments(0, 5)
    call[5:] = [torch.zeros(1, 1, 9, width, dtype=torch.float16) for width in (64, 512)]
    call[4] = torch.tensor([[8, 0, 3, -1, 2]])
    k_cache, _, k_rope, c_kv = NPU.npu_kv_rmsnorm_rope_cache(*call, is_output_kv=True)
    assert k_rope.isnan().all()
    assert c_kv.isnan().all()
    kv, _, cos, sin = (x.numpy() for x in call[:4])
    wanted = turned(kv[..., 512:], cos, sin)[0, 0]
    assert_same_bits(k_cache[0, 0, [8, 0, 3, 2]], wanted[[0, 1, 2, 4]])
    assert (k_cache[0, 0, [1, 4, 5, 6, 7]] == 0).all()
    with pytest.raises(RuntimeError, match="writes into the tensors it is given"):
        NPU.npu_kv_rmsnorm_rope_cache(call[0].requires_grad_(), *call[1:])


@pytest.mark.parametrize(
    ("latent", "called"),
    [(512, ["npu::npu_kv_rmsnorm_rope_cache"]), (96, ["npu::npu_rms_norm", "npu::npu_interleave_rope"])],
)
def test_latents_are_those_of_the_fused_operator_or_of_two(latent, called, monkeypatch):
    required = []
    monkeypatch.setattr(vendor, "require", lambda name, _: required.append(name))
    kv, weight = drawn(0, 7, latent + 64, scale=1e-3), drawn(1, latent)  # so small that eps counts
    cos, sin = drawn(2, 7, 64), drawn(3, 7, 64)
    got = latent_of(*tensors(kv, weight), Angles(*tensors(cos, sin)), 1e-6)
    assert required == called
    assert_same_bits(got.k_rope, turned(kv[:, latent:], cos, sin))
    wanted = exact_norm(kv[:, :latent], weight, 1e-6)
    assert (abs(got.c_kv.double().numpy() - wanted) <= 2.0**-11 * 1.001 * abs(wanted) + 2.0**-25).all()
    assert abs(got.c_kv.double().numpy() - wanted).max() > 0


# --- activation


@examples(0.2)
@given(SEEDS, st.integers(1, 50), st.sampled_from((1.0, 30.0)))
def test_swiglu_is_silu_of_the_first_half_times_the_second(seed, width, scale):
    x = drawn(seed, 3, 2 * width, scale=scale)
    gate, up = x[:, :width].astype(f64), x[:, width:].astype(f64)
    wanted = gate / (1 + np.exp(-gate)) * up
    got = gated(torch.from_numpy(x)).double().numpy()
    assert (abs(got - wanted) <= 2.0**-11 * 1.002 * abs(wanted) + 2.0**-25).all()
    across = NPU.npu_swiglu(torch.from_numpy(x.T.copy()), 0)
    np.testing.assert_array_equal(across.T.double().numpy(), got)


def test_swiglu_of_a_very_negative_gate_is_0():
    assert NPU.npu_swiglu(torch.tensor([[-1e4, 2.0]]).half()).item() == 0


# --- integers


@examples(0.3)
@given(SEEDS, st.integers(1, 40), st.sampled_from((1e-3, 0.04, 2.0)), st.integers(-128, 127))
def test_static_integers(seed, width, scale, offset):
    x, scale = drawn(seed, 3, width, scale=3), np.array([scale], f32)
    wanted = to_int8(x.astype(f32) / scale + f32(offset))
    got = quantize_static(*tensors(x, scale, np.array([offset], f32)))
    np.testing.assert_array_equal(got.integers.numpy(), wanted)
    assert got.token_scale is None
    each = np.full(width, scale[0], f32)
    zeros = torch.full((width,), offset, dtype=torch.int8)
    per_channel = NPU.npu_quantize(*tensors(x, each), zeros, torch.qint8, 1, True)
    np.testing.assert_array_equal(per_channel.numpy(), wanted)


def test_ties_go_to_even_and_large_numbers_are_clipped():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1000, -1000]]).half()
    got = NPU.npu_quantize(x, torch.tensor([1.0]), None, torch.qint8, -1, True)
    assert got.tolist() == [[0, 2, 2, 0, -2, 127, -128]]
    # vLLM-Ascend's call multiplies, by a scale in the dtype of x.
    scale, offset = torch.tensor([0.1]).half(), torch.tensor([3.0]).half()
    got = NPU.npu_quantize(x, scale, offset, torch.qint8, -1, False)
    np.testing.assert_array_equal(got.numpy(), to_int8(x.float().numpy() * f32(scale.item()) + 3))


@examples(0.3)
@given(SEEDS, st.integers(1, 60), st.sampled_from((1e-3, 1.0, 500.0)))
def test_dynamic_integers_and_scales(seed, width, size):
    x = drawn(seed, 4, width, scale=size)
    x[2] = 0
    scale = (abs(x.astype(f32)).max(axis=-1) / f32(127)).astype(f32)
    integers = to_int8(x.astype(f32) / np.where(scale > 0, scale, f32(1))[:, None])
    got = quantize_per_token(torch.from_numpy(x))
    np.testing.assert_array_equal(got.integers.numpy(), integers)
    assert_same_bits(got.token_scale, scale)
    assert abs(integers[0].astype(int)).max() == 127
    with arithmetic("exact"):
        again = quantize_per_token(torch.from_numpy(x))
    assert torch.equal(again.integers, got.integers)


# --- quantised products


def low_bits(scale):
    return scale.view(np.uint32).astype(np.int64)


def cut(scale):
    """The top 19 bits of float32 scales."""
    return (scale.view(np.uint32) & np.uint32(0xFFFFE000)).view(f32)


def product(seed, rows, k, n):
    rng = np.random.default_rng(seed)
    a, w = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((rows, k), (k, n)))
    scale = (rng.uniform(0.5, 2, n) * 1e-3).astype(f32)
    return a, w, scale, rng.integers(-(2**15), 2**15, n).astype(np.int32), a.astype(np.int64) @ w.astype(np.int64)


@examples(0.3)
@given(SEEDS, st.integers(1, 5), st.integers(1, 300), st.integers(1, 9))
def test_static_product_uses_19_bits_of_its_scale(seed, rows, k, n):
    a, w, scale, bias, sums = product(seed, rows, k, n)
    wanted = ((sums + bias).astype(f32) * cut(scale)).astype(f16)
    for stored in (low_bits(scale), low_bits(scale) | (1 << 46), scale):
        got = static_linear(Activations(torch.from_numpy(a)), *tensors(w, stored, bias))
        assert_same_bits(got, wanted)
    with arithmetic("exact"):
        got = static_linear(Activations(torch.from_numpy(a)), *tensors(w, low_bits(scale), bias))
    assert_same_bits(got, ((sums + bias) * scale.astype(f64)).astype(f16))


@examples(0.3)
@given(SEEDS, st.integers(1, 5), st.integers(1, 300), st.integers(1, 9))
def test_dynamic_product_uses_its_whole_scale_and_that_of_the_token(seed, rows, k, n):
    a, w, scale, bias, sums = product(seed, rows, k, n)
    token = np.random.default_rng(seed).uniform(0.01, 1, rows).astype(f32)
    got = dynamic_linear(Activations(*tensors(a, token)), *tensors(w, scale))
    assert_same_bits(got, (sums.astype(f32) * scale * token[:, None]).astype(f16))
    options = {"pertoken_scale": torch.from_numpy(token), "output_dtype": torch.float16}
    floating = NPU.npu_quant_matmul(*tensors(a, w, scale), bias=torch.from_numpy(bias).float(), **options)
    assert_same_bits(floating, (sums.astype(f32) * scale * token[:, None] + bias.astype(f32)).astype(f16))


def test_sums_are_exact_at_their_largest_and_given_as_int32():
    a, w = torch.full((1, 65535), -128, dtype=torch.int8), torch.full((65535, 1), -128, dtype=torch.int8)
    got = NPU.npu_quant_matmul(a, w, torch.ones(1), output_dtype=torch.int32)
    assert got.tolist() == [[65535 * 128 * 128]]
    assert got.dtype == torch.int32


def test_bfloat16_products_use_the_whole_scale():
    a, w, scale, bias, sums = product(3, 4, 30, 5)
    got = NPU.npu_quant_matmul(*tensors(a, w, scale), bias=torch.from_numpy(bias), output_dtype=torch.bfloat16)
    assert torch.equal(got, torch.from_numpy((sums + bias).astype(f32) * scale).bfloat16())


# --- what is refused


H = torch.zeros(2, 8).half()
I8 = torch.zeros(2, 8, dtype=torch.int8)
ONE = torch.ones(1)
ROPE = torch.zeros(2, 3, 1, 64).half()
KV = kv_arguments(0, 3)


def with_kv(**changes):
    names = ("kv", "gamma", "cos", "sin", "index", "k_cache", "ckv_cache")
    call = dict(zip(names, KV, strict=True)) | {"cache_mode": "PA_BNSD"} | changes
    return lambda: NPU.npu_kv_rmsnorm_rope_cache(*[call.pop(name) for name in names], **call)


def matmul(x1=I8, x2=I8.T, scale=ONE, **options):
    return lambda: NPU.npu_quant_matmul(x1, x2, scale, **({"output_dtype": torch.float16} | options))


REFUSALS = {
    "gamma .* must be the last dims": lambda: NPU.npu_rms_norm(H, H[0, :5], 1e-6),
    "gamma in torch.float32 beside": lambda: NPU.npu_rms_norm(H, torch.ones(8), 1e-6),
    "x is torch.int8, must be float16": lambda: NPU.npu_rms_norm(I8, I8[0], 1e-6),
    "must be alike": lambda: NPU.npu_add_rms_norm(H, H[:1], H[0], 1e-6),
    r"must be \[B, N, S, 64\]": lambda: NPU.npu_interleave_rope(ROPE[..., :32], ROPE[:, :1], ROPE[:, :1]),
    "cos is .*, must be one of": lambda: NPU.npu_interleave_rope(ROPE, ROPE, ROPE),
    "x must be contiguous": lambda: NPU.npu_interleave_rope(
        ROPE.transpose(0, 1).contiguous().transpose(0, 1), ROPE[:, :1], ROPE[:, :1]
    ),
    "cos is torch.float32, must be torch.float16": lambda: NPU.npu_interleave_rope(
        ROPE, ROPE[:, :1].float(), ROPE[:, :1].float()
    ),
    "4D tensor expected for input kv": with_kv(kv=KV[0][0]),
    "1D tensor expected for input gamma": with_kv(gamma=KV[1][None]),
    r"must be \[B, 1, S, 576\]": with_kv(kv=KV[0][..., :96]),
    "cache_mode is 'PB'": with_kv(cache_mode="PB"),
    "not implemented in the emulation: cache_mode PA_NZ": with_kv(cache_mode="PA_NZ"),
    "not implemented in the emulation: c_kv_scale": with_kv(c_kv_scale=torch.ones(512)),
    "index is torch.int32, must be int64": with_kv(index=KV[4].int()),
    "must be from -1 to 31": with_kv(index=KV[4] + 30),
    "unsafe: index .* names a place twice": with_kv(index=KV[4] * 0),
    "blocks of 15 tokens": with_kv(k_cache=KV[5][:, :15], ckv_cache=KV[6][:, :15]),
    "must be even": lambda: NPU.npu_swiglu(H[:, :7]),
    "dtype 13, only int8": lambda: NPU.npu_quantize(H, ONE, None, torch.quint8, -1, True),
    r"scales \(2,\) must be \[1\] or \[8\]": lambda: NPU.npu_quantize(H, torch.ones(2), None, torch.qint8, -1, True),
    "scales in torch.float32 beside input": lambda: NPU.npu_quantize(H, ONE, None, torch.qint8, -1, False),
    "zero_points are torch.float32": lambda: NPU.npu_quantize(H, ONE, ONE, torch.qint8, -1, True),
    "zero_points and scales must have": lambda: NPU.npu_quantize(
        H, ONE, torch.zeros(8, dtype=torch.int32), torch.qint8, -1, True
    ),
    "quant_mode perchannel": lambda: NPU.npu_dynamic_quant(H, quant_mode="perchannel"),
    "not implemented in the emulation: smooth_scales": lambda: NPU.npu_dynamic_quant(H, smooth_scales=H[0]),
    "input is torch.float32, must be float16": lambda: NPU.npu_dynamic_quant(H.float()),
    "dst_type 16, only int8": lambda: NPU.npu_dynamic_quant(H, dst_type=torch.quint4x2),
    "k dim of x1 and x2 need be same": matmul(x2=I8),
    "the scale dim num must be 1": matmul(scale=torch.ones(1, 1)),
    "must be 1 or x2 n dim value 2": matmul(scale=torch.ones(3)),
    "x1 dim num should be 2": matmul(x1=I8[0]),
    "only float16, bfloat16 and int32": matmul(output_dtype=None),
    "scale is torch.int64": matmul(scale=ONE.long(), pertoken_scale=torch.ones(2)),
    "pertoken_scale must be": matmul(pertoken_scale=torch.ones(3)),
    "the pertoken_scale dim num must be 1": matmul(pertoken_scale=torch.ones(2, 1)),
    "bfloat16, output_dtype must be bfloat16 or int32": matmul(scale=ONE.bfloat16()),
    "Bias dtype cannot be float16 when pertoken not given": matmul(bias=torch.zeros(2).half()),
    "bias in float32 needs pertoken_scale": matmul(bias=torch.zeros(2)),
    "not implemented in the emulation: offset": matmul(offset=ONE),
    "only int8 by int8": matmul(x1=H),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(RuntimeError, match=message):
        REFUSALS[message]()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: norm(H, H[0, :4], 1e-6), "is not of x"),
        (lambda: norm(H, H[0], 0.0), "eps is 0"),
        (lambda: add_norm(H, H[:1], H[0], 1e-6), "cannot be added"),
        (lambda: rotate(H[None], Angles(H, H)), r"takes \[T, N, 64\]"),
        (lambda: rotate(ROPE[:, :, 0], Angles(H, H)), "cos is"),
        (lambda: latent_of(H, H[0], Angles(H, H), 1e-6), r"must be \[T, C \+ 64\]"),
        (lambda: quantize_static(H, ONE, ONE * 0.5), "takes a whole number"),
        (lambda: quantize_static(H, ONE * 0, ONE), "must be positive"),
        (lambda: dynamic_linear(Activations(I8), I8.T, ONE), "no scale a token"),
    ],
)
def test_wrappers_refuse_before_the_call(call, message):
    with pytest.raises(InputError, match=message):
        call()
