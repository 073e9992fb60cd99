"""Gradients of family 3: npu_fusion_attention_grad, and what PyTorch's autograd does with every operator."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_judge import assert_same_bits
from npu_strategies import exp
from strategies import examples

import npu_backend  # noqa: F401 (declares the operators)
from npu_backend.emulation import KERNELS, arithmetic
from npu_backend.emulation.flash import EXACT
from npu_backend.emulation.flash_backward import Forward, attend_backward

OPS, ATB = torch.ops.npu, torch.ops.atb
FUSION, GRAD = OPS.npu_fusion_attention, OPS.npu_fusion_attention_grad
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
LOWEST = torch.finfo(torch.float32).min
SEEDS = st.integers(0, 2**32 - 1)
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def drawn(seed, b, t, s, n=2, k=1, h=16, v=16, dtype=torch.float64):
    """query, key, value, dy: `[B, t, N, H]`, `[B, s, K, H]`, `[B, s, K, V]`, `[B, t, N, V]`."""
    rng = torch.Generator().manual_seed(seed)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, v), (b, t, n, v))
    return [torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


def dense_out(query, key, value, hidden, scale):
    """Attention in float64 by PyTorch's own means; `hidden` is bool `[B, 1 or N, t, s]`; 0 where all is hidden."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    score = scale * torch.einsum("btnh,bsnh->bnts", query, key)
    weight = torch.softmax(score.masked_fill(hidden, -torch.inf), dim=-1).masked_fill(hidden.all(-1, keepdim=True), 0)
    return torch.einsum("bnts,bsnv->btnv", weight, value)


def dense_gradients(query, key, value, dy, hidden, scale):
    """By PyTorch's derivative of `dense_out`, in float64."""
    leaves = [x.double().clone().requires_grad_() for x in (query, key, value)]
    return torch.autograd.grad((dense_out(*leaves, hidden, scale) * dy.double()).sum(), leaves)


# --- the algorithm, in float64


def exact_gradients(query, key, value, dy, hidden, scale):
    """`attend_backward` in float64 for one request, from statistics in float64."""
    q, k, v, g = (x[0].transpose(0, 1) for x in (query, key, value, dy))
    group = q.shape[0] // k.shape[0]
    score = scale * q @ k.repeat_interleave(group, dim=0).transpose(1, 2)
    score = score.masked_fill(hidden[0], -torch.inf)
    maximum = score.amax(-1, keepdim=True)
    total = (score - maximum).exp().sum(-1, keepdim=True)
    out = dense_out(query, key, value, hidden, scale)[0].transpose(0, 1)
    found = attend_backward(
        (q, k, v), g, Forward(out, maximum, total), scale, EXACT, lambda _: (0, k.shape[1]),
        lambda s, rows, columns: s.masked_fill_(hidden[0, ..., rows, columns], -torch.inf),
    )  # fmt: skip
    return [x.transpose(0, 1)[None] for x in found]


@examples(0.15)
@given(SEEDS, st.integers(1, 150), st.integers(1, 1100), st.sampled_from(((1, 1), (2, 1), (4, 2))), st.booleans())
def test_the_algorithm_is_exact_to_1e_12(seed, t, s, heads, is_causal):
    t = min(t, s)
    tensors = drawn(seed, 1, t, s, *heads, h=8, v=4)
    hidden = torch.ones(t, s, dtype=torch.bool).triu(1 + s - t)[None, None] & is_causal
    found = exact_gradients(*tensors, hidden, 0.3)
    for a, b in zip(found, dense_gradients(*tensors, hidden, 0.3), strict=True):
        assert (abs(a - b) <= 1e-12 * (1 + abs(b).max())).all()


@examples(0.03)
@given(SEEDS)
def test_the_algorithm_is_what_finite_differences_say(seed):
    tensors = drawn(seed, 1, 3, 4, 2, 1, h=4, v=3)
    hidden = torch.ones(3, 4, dtype=torch.bool).triu(2)[None, None]
    found = exact_gradients(*tensors, hidden, 0.4)
    dy, step = tensors[3], 1e-5
    for i, gradient in enumerate(found):
        for place in np.ndindex(*gradient.shape):
            sides = []
            for sign in (1, -1):
                moved = [x.clone() for x in tensors[:3]]
                moved[i][place] += sign * step
                sides.append((dense_out(*moved, hidden, 0.4) * dy).sum())
            assert abs((sides[0] - sides[1]) / (2 * step) - gradient[place]) < 1e-8


# --- the operator: every layout, mask and dtype


LAY = {
    "BSND": lambda x: x,
    "BNSD": lambda x: x.transpose(1, 2).contiguous(),
    "BSH": lambda x: x.flatten(2),
    "SBH": lambda x: x.transpose(0, 1).flatten(2),
}
BACK = {
    "BSND": lambda x, n: x,
    "BNSD": lambda x, n: x.transpose(1, 2),
    "BSH": lambda x, n: x.unflatten(2, (n, -1)),
    "SBH": lambda x, n: x.transpose(0, 1).unflatten(2, (n, -1)),
}


def error_bounds(tensors, hidden, scale, unit):
    """How far correct staged gradients may be from the exact ones, per element.

    The forward's out is off by at most (3 unit + f) Σ p|v|, so delta by Σ |dy| of that; p is off by f p, and rounded;
    ds is off by p times the error of delta and f of what is in dp and delta, and rounded; sums of float32 count as f of
    what is summed.
    """
    q, k, v, dy = (x.double() for x in tensors)
    group = q.shape[2] // k.shape[2]
    kk, vv = (x.repeat_interleave(group, dim=2) for x in (k, v))
    size = torch.einsum("btnh,bsnh->bnts", abs(q), abs(kk)) * abs(scale)
    score = torch.einsum("btnh,bsnh->bnts", q, kk) * scale
    p = torch.softmax(score.masked_fill(hidden, -torch.inf), dim=-1).masked_fill(hidden.all(-1, keepdim=True), 0)
    f = (q.shape[3] + v.shape[3] + k.shape[1] + 64) * 2.0**-23 * (2 + size.amax((-1, -2), keepdim=True))
    out_size = torch.einsum("bnts,bsnv->btnv", p, abs(vv))
    delta = torch.einsum("btnv,btnv->bnt", abs(dy), out_size)[..., None]
    dp = torch.einsum("btnv,bsnv->bnts", abs(dy), abs(vv))
    ds_size = p * (dp + delta)
    ds_error = p * (3 * unit + f) * delta + (f + unit) * ds_size + 2.0**-24
    p_error = (f + unit) * p + 2.0**-24 * (p > 0)
    floor = 2.0**-24
    dq = scale * (torch.einsum("bnts,bsnh->btnh", ds_error, abs(kk)))
    dk = scale * torch.einsum("bnts,btnh->bsnh", ds_error, abs(q))
    dv = torch.einsum("bnts,btnv->bsnv", p_error, abs(dy))
    shared = [x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv)]
    exact = dense_gradients(*tensors, hidden, scale)
    return exact, [e + (unit + 2.0**-23 * 64) * (abs(x) + e) + floor for e, x in zip((dq, *shared), exact, strict=True)]


def assert_near(found, tensors, hidden, scale):
    unit = UNIT[tensors[0].dtype]
    exact, bounds = error_bounds(tensors, hidden, scale, unit)
    for got, want, bound, like in zip(found, exact, bounds, tensors, strict=False):
        assert (got.shape, got.dtype) == (like.shape, like.dtype)
        assert (abs(got.double() - want) <= bound).all()


def masks(seed, b, n, t, s):
    """Seven pairs: options of the operator, and what they hide `[B, 1 or N, t, s]`."""
    i, j = torch.arange(t)[:, None], torch.arange(s)[None]
    rng = torch.Generator().manual_seed(seed)
    full = torch.rand(b, 1, t, s, generator=rng) < 0.4
    by_head = torch.rand(b, n, t, s, generator=rng) < 0.4
    full[..., 0] = by_head[..., 0] = False
    nothing = torch.zeros(1, 1, t, s, dtype=torch.bool)
    end = s - t
    return (
        ({}, nothing),
        ({"sparse_mode": 3}, nothing),  # without a mask the mode counts for nothing
        ({"sparse_mode": 2, "atten_mask": TRIANGLE}, (j > i)[None, None]),
        ({"sparse_mode": 3, "atten_mask": TRIANGLE}, (j > i + end)[None, None]),
        ({"sparse_mode": 4, "atten_mask": TRIANGLE, "pre_tockens": 3, "next_tockens": 2},
         ((j > i + end + 2) | (j < i + end - 3))[None, None]),
        ({"sparse_mode": 1, "atten_mask": full}, full),
        ({"sparse_mode": 0, "atten_mask": by_head.to(torch.uint8)}, by_head),
    )  # fmt: skip


@examples(0.4)
@given(
    SEEDS, st.integers(0, 6), st.integers(1, 2), st.integers(1, 20), st.integers(1, 40),
    st.sampled_from(((1, 1), (2, 1), (4, 2))), st.sampled_from(((16, 16), (24, 8), (192, 128))),
    st.sampled_from(sorted(LAY)), st.sampled_from(sorted(UNIT, key=str)),
)  # fmt: skip
def test_gradients_are_those_of_dense_attention(seed, mask, b, t, s, heads, dims, layout, dtype):
    tensors = drawn(seed, b, t, s, *heads, *dims, dtype=dtype)
    n, k = heads
    q, key, value, dy = (LAY[layout](x) for x in tensors)
    scale = dims[0] ** -0.5
    options, hidden = masks(seed, b, n, t, s)[mask]
    hidden = hidden.expand(b, -1, t, s)
    out, maximum, total, *_ = FUSION(q, key, value, n, layout, scale=scale, **options)
    found = GRAD(
        q, key, value, dy, n, layout, scale_value=scale, softmax_max=maximum, softmax_sum=total, attention_in=out,
        seed=3, offset=5, numels=7, **options,
    )  # fmt: skip
    assert found[3] is None
    assert found[4].shape == (0,)
    gradients = [BACK[layout](x, m) for x, m in zip(found[:3], (n, k, k), strict=True)]
    assert_near(gradients, tensors, hidden, scale)


@examples(0.15)
@given(SEEDS, st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.booleans(),
       st.booleans())  # fmt: skip
def test_a_packs_gradients_are_those_of_its_requests(seed, lengths, is_causal, is_natural):
    q_lengths, kv_lengths = zip(*lengths, strict=True)
    packed = [x[0] for x in drawn(seed, 1, sum(q_lengths), sum(kv_lengths), 4, 2, dtype=torch.float32)]
    q, key, value, dy = packed
    options = {"actual_seq_qlen": list(np.cumsum(q_lengths)), "actual_seq_kvlen": list(np.cumsum(kv_lengths))}
    options |= {"softmax_layout": "TND"} if is_natural else {}
    mask = {"sparse_mode": 3, "atten_mask": TRIANGLE} if is_causal else {}
    out, maximum, total, *_ = FUSION(q, key, value, 4, "TND", scale=0.3, **options, **mask)
    statistics = {"softmax_max": maximum, "softmax_sum": total, "attention_in": out}
    found = GRAD(q, key, value, dy, 4, "TND", scale_value=0.3, **statistics, **options, **mask)[:3]
    a = b = 0
    for m, n in lengths:
        rows = [slice(a, a + m), slice(b, b + n), slice(b, b + n), slice(a, a + m)]
        one = [x[None, some] for x, some in zip(packed, rows, strict=True)]
        hidden = torch.ones(m, n, dtype=torch.bool).triu(1 + n - m)[None, None] & is_causal
        assert_near([x[None, some] for x, some in zip(found, rows, strict=False)], one, hidden, 0.3)
        a, b = a + m, b + n


def test_what_no_request_computes_is_poisoned():
    q, key, value, dy = (x[0] for x in drawn(0, 1, 5, 6, dtype=torch.float32))
    ends = {"actual_seq_qlen": [2, 4, 0], "actual_seq_kvlen": [0, 5, 0]}
    out, maximum, total, *_ = FUSION(q, key, value, 2, "TND", **ends)
    dq, dk, dv, *_ = GRAD(q, key, value, dy, 2, "TND", softmax_max=maximum, softmax_sum=total, attention_in=out, **ends)
    assert dq[:2].isnan().all()
    assert dq[2:4].isfinite().all()
    assert dq[4:].isnan().all()
    for x in (dk, dv):
        assert x[:5].isfinite().all()
        assert x[5:].isnan().all()


def test_without_keys_or_queries_there_is_nothing_but_zeros():
    q, key, value, dy = drawn(0, 1, 3, 4, dtype=torch.float32)
    for some in ((q, key[:, :0], value[:, :0], dy), (q[:, :0], key, value, dy[:, :0])):
        out, maximum, total, *_ = FUSION(*some[:3], 2, "BSND")
        found = GRAD(*some, 2, "BSND", softmax_max=maximum, softmax_sum=total, attention_in=out)
        for x, like in zip(found[:3], some[:3], strict=True):
            assert x.shape == like.shape
            assert (x == 0).all()


# --- the roundings, bit by bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bits_are_those_of_the_naive_staged_twin(dtype):
    """Two queries, two keys, two columns of dy: float32 sums have two terms at most, and do not depend on an order."""
    b, n, h, v = 30, 2, 16, 16
    rng = np.random.default_rng(1)
    q, key = (torch.from_numpy(rng.integers(-24, 25, size=(b, 2, n, h)) / 8).to(dtype) for _ in range(2))
    value = torch.from_numpy(rng.integers(-24, 25, size=(b, 2, n, v)) / 8).to(dtype)
    dy = torch.zeros(b, 2, n, v, dtype=dtype)
    dy[..., 3], dy[..., 9] = (torch.from_numpy(rng.integers(-15, 16, size=(b, 2, n)) / 8).to(dtype) for _ in range(2))
    scale = 0.17
    out, maximum, total, *_ = FUSION(q, key, value, n, "BSND", scale=scale)
    found = GRAD(q, key, value, dy, n, "BSND", scale_value=scale, softmax_max=maximum, softmax_sum=total,
                 attention_in=out)  # fmt: skip
    arrays = [x.float().numpy() for x in (q, key, value, dy, out)]
    for request, head in np.ndindex(b, n):
        x, y, z, g, o = (array[request, :, head] for array in arrays)
        m, total_of = (stat[request, head, :, :1].numpy() for stat in (maximum, total))
        p = exp((x @ y.T) * np.float32(scale) - m) / total_of
        delta = (g * o)[:, [3]] + (g * o)[:, [9]]
        ds = p * (g @ z.T - delta)
        p, ds = (torch.from_numpy(array).to(dtype).float().numpy() for array in (p, ds))
        want = ((ds @ y) * np.float32(scale), (ds.T @ x) * np.float32(scale), p.T @ g)
        for got, array in zip(found, want, strict=False):
            rounded = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
            assert_same_bits(got[request, :, head].float(), rounded.float().numpy())


# --- autograd


@pytest.mark.parametrize("layout", [*LAY, "TND"])
@pytest.mark.parametrize("version", ["", "_v2", "_v3"])
def test_autograd_calls_the_vendors_gradient(layout, version):
    tensors = drawn(3, 2, 5, 7, 4, 2, 16, 8, dtype=torch.float16)
    is_packed = layout == "TND"
    q, key, value, dy = (x.flatten(0, 1) if is_packed else LAY[layout](x) for x in tensors)
    lengths = {"actual_seq_qlen": [5, 10], "actual_seq_kvlen": [7, 14]} if is_packed else {}
    options = {"scale": 0.2, "sparse_mode": 3, "atten_mask": TRIANGLE, **lengths}
    leaves = [x.clone().requires_grad_() for x in (q, key, value)]
    given = options
    if version == "_v3":
        given = options | {name: torch.tensor(x) for name, x in lengths.items()}
    results = getattr(OPS, f"npu_fusion_attention{version}")(*leaves, 4, layout, **given)
    results[0].backward(dy)
    assert not any(x.requires_grad for x in results[1:] if isinstance(x, torch.Tensor))
    out, maximum, total, *_ = FUSION(q, key, value, 4, layout, **options)
    want = GRAD(
        q, key, value, dy, 4, layout, scale_value=options.pop("scale"), softmax_max=maximum, softmax_sum=total,
        attention_in=out, **options,
    )  # fmt: skip
    assert torch.equal(results[0], out)
    for leaf, gradient in zip(leaves, want, strict=False):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)
        assert leaf.grad.abs().max() > 0.01


def test_v2_and_v3_return_seed_and_offset_as_their_schemas_say():
    tensors = drawn(0, 1, 2, 3, dtype=torch.float16)[:3]
    assert OPS.npu_fusion_attention_v2(*tensors, 2, "BSND", seed=5, offset=6)[4:] == (5, 6, 0)
    for x in OPS.npu_fusion_attention_v3(*tensors, 2, "BSND")[4:]:
        assert torch.equal(x, torch.zeros(1, dtype=torch.int64))


def test_autograd_in_exact_arithmetic_is_the_derivative_to_float32():
    tensors = drawn(1, 2, 6, 9, 4, 2, 16, 8, dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    with arithmetic("exact"):
        out = FUSION(*leaves, 4, "BSND", scale=0.3)[0]
    out.backward(tensors[3])  # outside of the block, yet as exact
    hidden = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    for leaf, want in zip(leaves, dense_gradients(*tensors, hidden, 0.3), strict=True):
        assert leaf.grad is not None
        assert (abs(leaf.grad - want) <= 2e-6 * (1 + abs(want).max())).all()


def test_only_some_need_a_gradient_and_none_in_no_grad():
    q, key, value, dy = drawn(0, 1, 4, 5, dtype=torch.float32)
    key.requires_grad_()
    FUSION(q, key, value, 2, "BSND")[0].backward(dy)
    assert q.grad is None
    assert key.grad is not None
    with torch.no_grad():
        assert not FUSION(q, key, value, 2, "BSND")[0].requires_grad


def test_a_gradient_of_a_mean_of_all_values_is_refused_and_of_zeros_is_zero():
    q, key, value, dy = drawn(0, 1, 4, 5, dtype=torch.float32)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[2] = True
    for leaf in (q, key, value):
        leaf.requires_grad_()
    options = {"atten_mask": mask, "sparse_mode": 1, "scale": 0.3}
    with pytest.raises(RuntimeError, match=r"a query saw no key.*inner_precise=2"):
        FUSION(q, key, value, 2, "BSND", **options)[0].backward(dy)
    FUSION(q, key, value, 2, "BSND", inner_precise=2, **options)[0].backward(dy)
    hidden = mask[None, None]
    for leaf, want in zip((q, key, value), dense_gradients(q, key, value, dy, hidden, 0.3), strict=True):
        torch.testing.assert_close(leaf.grad.double(), want, rtol=0, atol=1e-5)
    assert (abs(q.grad[:, 2]) < 1e-37).all()  # the operator's sum of such a row is 3.4e38, and 1 over it is not quite 0
    for leaf in (q, key, value):
        leaf.grad = None
    FUSION(q, key[:, :2], value[:, :2], 2, "BSND", scale=0.3, sparse_mode=3, atten_mask=TRIANGLE)[0].backward(dy)
    assert (abs(q.grad[:, :2]) < 1e-37).all()  # more queries than keys: the operator finds these rows by itself
    assert (q.grad[:, 3] != 0).any()


def half(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).half()


def ring_mla():
    parts = [half(2, 2, x) for x in (128, 64, 128, 64, 128)]
    return [*parts, torch.zeros(0).half(), torch.tensor([2], dtype=torch.int32), 2, 2]


def latent(*more):
    table = torch.zeros(1, 1, dtype=torch.int32)
    return [half(1, 8, 512), half(1, 8, 64), half(1, 4, 1, 512), half(1, 4, 1, 64), table, [3], 8, 0.1, 1, *more]


def pages():
    return [half(2, 4, 1, 16), half(2, 4, 1, 16), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3]).int()]


def fia():
    return [half(1, 2, 16), half(1, 3, 16), half(1, 3, 16)]


def gradient():
    q = half(1, 2, 1, 16)
    out, maximum, total, *_ = FUSION(q, q, q, 1, "BSND")
    return [q, q, q, out, 1, "BSND"], {"softmax_max": maximum, "softmax_sum": total, "attention_in": out}


def latent_rows():
    angle = half(1, 1, 3, 64)
    return [half(1, 1, 3, 576), half(512), angle, angle, torch.arange(3), half(1, 16, 1, 64), half(1, 16, 1, 512)]


INTEGERS = torch.zeros(2, 8, dtype=torch.int8)
GROUPED = {"group_list": torch.tensor([1, 3]), "split_item": 2, "group_type": 0}
RING = {"output": torch.zeros(2, 2, 128).half(), "softmax_lse": torch.zeros(2, 2)}
FILLED = {"key": torch.zeros(3, 1, 16).half(), "value": torch.zeros(3, 1, 16).half()}
OUT = {"out": [torch.zeros(1, 2, 16).half(), torch.zeros(0)]}
SUMS = torch.ones(1, 1, 2, 8)
CALLS = {  # name: arguments, options; each tensor of the arguments is made to require a gradient in turn
    "atb::npu_ring_mla": (ring_mla(), {}),
    "atb::npu_ring_mla.out": (ring_mla(), RING),
    "atb::npu_paged_cache_load": (pages(), {}),
    "atb::npu_paged_cache_load.out": (pages(), FILLED),
    "atb::npu_multi_head_latent_attention": (latent(), {}),
    "atb::npu_multi_head_latent_attention.out": (latent(), {"output": torch.zeros(1, 8, 512).half()}),
    "atb::npu_multi_head_latent_attention.lse": (latent(True), {"calc_type": "calc_type_ring"}),
    "atb::npu_multi_head_latent_attention.lse_out": (
        latent(True), {"output": torch.zeros(1, 8, 512).half(), "lse": torch.zeros(1, 8, 1).half()},
    ),
    "npu::npu_gather_pa_kv_cache": ([*pages(), *(x.clone() for x in FILLED.values())], {}),
    "npu::npu_gather_pa_kv_cache_functional": ([*pages(), *FILLED.values()], {}),
    "npu::npu_fused_infer_attention_score": (fia(), {}),
    "npu::npu_fused_infer_attention_score.out": (fia(), OUT),
    "npu::_npu_fused_infer_attention_score_get_max_workspace": (fia(), {}),
    "npu::npu_fused_infer_attention_score_v2": (fia(), {}),
    "npu::npu_fused_infer_attention_score_v2.out": (fia(), OUT),
    "npu::_npu_fused_infer_attention_score_v2_get_max_workspace": (fia(), {}),
    "npu::npu_attention_update": ([[torch.zeros(2)], [half(2, 8)], 0], {}),
    "npu::npu_ring_attention_update": ([half(2, 1, 64), SUMS, SUMS, half(2, 1, 64), SUMS, SUMS], {}),
    "npu::npu_fusion_attention_grad": gradient(),
    "npu::npu_fusion_attention_grad_v2": gradient(),
    "npu::npu_fusion_attention_grad_v3": gradient(),
    "npu::npu_rms_norm": ([half(2, 8), half(8)], {}),
    "npu::npu_add_rms_norm": ([half(2, 8), half(2, 8), half(8)], {}),
    "npu::npu_interleave_rope": ([half(1, 2, 3, 64), half(1, 1, 3, 64), half(1, 1, 3, 64)], {}),
    "npu::npu_kv_rmsnorm_rope_cache": (latent_rows(), {"cache_mode": "PA"}),
    "npu::npu_quantize": ([half(2, 8), torch.ones(1), None, torch.qint8, -1, True], {}),
    "npu::npu_dynamic_quant": ([half(2, 8)], {}),
    "npu::npu_quant_matmul": ([INTEGERS, INTEGERS.T, torch.ones(2)], {"output_dtype": torch.float16}),
    "npu::npu_swiglu": ([half(2, 8)], {}),
    "npu::npu_moe_gating_top_k": ([half(2, 8), 2], {"norm_type": 1}),
    "npu::npu_moe_init_routing_v2": ([half(2, 8), INTEGERS[:, :1].int()], {"expert_num": 4}),
    "npu::npu_grouped_matmul": ([[half(3, 8)], [half(2, 8, 4)]], GROUPED),
    "npu::npu_moe_finalize_routing": ([half(4, 8), None, None, None, None, torch.arange(4).int(), None, 2, 2], {}),
}  # fmt: skip
WRITERS = {name for name in CALLS if name.endswith(("out", "gather_pa_kv_cache", "rope_cache"))}
OF_THE_VENDOR = {"npu::npu_rms_norm", "npu::npu_swiglu", "npu::npu_moe_gating_top_k"}
"""Have a derivative in torch_npu, and none here."""


def test_every_operator_is_tried_backwards():
    differentiated = {f"npu::npu_fusion_attention{version}" for version in ("", "_v2", "_v3")}
    assert set(CALLS) | differentiated == set(KERNELS)


def first_of(x):
    return x[0] if isinstance(x, list) else x


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize("name", CALLS)
def test_a_backward_without_a_derivative_raises(name):
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    operator = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    args, options = CALLS[name]
    operator(*args, **options)  # good without a gradient
    place, first = next((i, x) for i, x in enumerate(map(first_of, args)) if is_float(x))
    leaf = first.clone().requires_grad_()
    args = list(args)
    args[place] = [leaf, *args[place][1:]] if isinstance(args[place], list) else leaf
    with torch.no_grad():
        operator(*args, **options)
    if name in WRITERS:
        with pytest.raises(RuntimeError, match=f"{name} writes into .* requires grad"):
            operator(*args, **options)
        return
    results = operator(*args, **options)
    results = results if isinstance(results, (tuple, list)) else [results]
    if name == "npu::npu_quantize":  # integers have no gradient that could be missing
        assert not results[0].requires_grad
        return
    first = next(filter(is_float, results))
    assert first.requires_grad
    where = "here; torch_npu has one" if name in OF_THE_VENDOR else "here as on the NPU"
    with pytest.raises(RuntimeError, match=f"{name} has no derivative,? {where}"):
        first.sum().backward()
    assert leaf.grad is None


def test_what_is_written_counts_as_changed():
    weight = torch.ones(2, 2, 128).half().requires_grad_()
    saved = torch.ones(2, 2, 128).half()
    product = (weight * saved).sum()
    ATB.npu_ring_mla.out(*ring_mla(), output=saved, softmax_lse=torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# --- what the gradient refuses


Q, DY = torch.zeros(1, 3, 2, 16).half(), torch.zeros(1, 3, 2, 16).half()
STATISTIC = torch.ones(1, 2, 3, 8)
GOOD = {"softmax_max": STATISTIC, "softmax_sum": STATISTIC, "attention_in": DY}
REFUSALS = {
    "no maximum": ({"softmax_max": None}, "without softmax_max, softmax_sum and attention_in"),
    "no out": ({"attention_in": None}, "without softmax_max, softmax_sum and attention_in"),
    "dropout": ({"keep_prob": 0.9, "seed": 4}, "not implemented in the emulation: dropout"),
    "pse": ({"pse": Q}, "not implemented in the emulation: pse"),
    "sink": ({"sink": torch.zeros(2)}, "not implemented in the emulation: sink"),
    "keep_prob": ({"keep_prob": 0.0}, "keep_prob value must be in range"),
    "mode": ({"sparse_mode": 7}, r"must be in range of \[0,6\], but got 7"),
    "dy dtype": ({"dy": DY.float()}, "dy is torch.float32, query torch.float16"),
    "dy shape": ({"dy": DY[:, :2]}, "must have the tokens and heads of query"),
    "dy dims": ({"dy": DY[0]}, "dy has 3 dims, query 4"),
    "out shape": ({"attention_in": DY[..., :8]}, "attention_in is .* must have the tokens and heads"),
    "statistic dtype": ({"softmax_sum": STATISTIC.half()}, "softmax_sum is torch.float16, must be float32"),
    "statistic shape": ({"softmax_max": STATISTIC[..., :1]}, r"must be \(1, 2, 3, 8\)"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_gradient_refuses(what):
    changes, phrase = REFUSALS[what]
    options = GOOD | {"dy": DY} | changes
    with pytest.raises(RuntimeError, match=f"npu_fusion_attention_grad: .*{phrase}"):
        GRAD(Q, Q, Q, options.pop("dy"), 2, "BSND", **options)
    assert GRAD(Q, Q, Q, DY, 2, "BSND", **GOOD)[0].shape == Q.shape


@pytest.mark.parametrize(
    ("version", "options", "phrase"),
    [
        ("_v2", {"query_rope": Q}, "not implemented in the emulation: query_rope"),
        ("_v2", {"q_start_idx": [3]}, "not implemented in the emulation: q_start_idx"),
        ("_v2", {"pse": Q, "pse_type": 2}, "not implemented in the emulation: pse"),
        ("_v2", {"keep_prob": 0.5, "seed": 9}, "not implemented in the emulation: dropout"),
        ("_v3", {"keep_prob": 0.5}, "not implemented in the emulation: dropout"),
        ("_v3", {"actual_seq_qlen": torch.tensor([3.0])}, "actual_seq_qlen is .* must be int64"),
    ],
)
def test_versions_refuse_in_their_own_name(version, options, phrase):
    with pytest.raises(RuntimeError, match=f"npu_fusion_attention{version}: .*{phrase}"):
        getattr(OPS, f"npu_fusion_attention{version}")(Q, Q, Q, 2, "BSND", **options)
