"""Run by test_npu_sdk.py in a process of its own, where the real torch_npu is imported: its dispatcher, our kernels.

Not collected by itself: without torch_npu it has nothing to say.
"""

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from npu_layer import check_stages, layer, write_layer
from npu_strategies import problem, write_case
from oracle import dense
from safetensors import safe_open

from npu_backend import operators, vendor
from npu_backend.layer.run import run_layers
from npu_backend.runner import run
from npu_backend.schemas import SCHEMAS

SOME = settings(deadline=None, max_examples=25, derandomize=True, database=None)
SEEDS = st.integers(0, 2**32 - 1)


def overload(schema):
    namespace, _, name = schema.partition("(")[0].partition("::")
    packet, _, which = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), which or "default")


def test_everything_is_declared_by_torch_npu_itself():
    assert vendor.TORCH_NPU_PROBLEM is None
    assert sys.modules["torch_npu"].__version__.startswith("2.13.0")
    assert not vendor.DECLARED_HERE
    assert callable(sys.modules["torch_npu"].atb.npu_ring_mla)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: s.partition("(")[0])
def test_our_schema_is_the_vendors_to_the_letter(schema):
    assert str(overload(schema)._schema) == schema


# --- shapes and dtypes: the vendor's own inference


def on_meta(x):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), x)


def assert_as_inferred(operator, *args, results=slice(None), **options):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.default._name, "Meta")
    ours, theirs = operator(*args, **options), operator(*on_meta(args), **on_meta(options))
    ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (ours, theirs))
    pairs = list(zip(ours[results], theirs[results], strict=True))
    for mine, other in pairs:
        if isinstance(mine, torch.Tensor):
            assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        else:
            assert mine == other
    return pairs


LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD", "BSH_BNSD", "BSND_BNSD")
PACKED = ("TND", "TND_NTD", "NTD_TND")
ORDER = {"BSND": (0, 1, 2, 3), "BNSD": (0, 2, 1, 3)}


def laid_out(x, layout):
    source = layout.partition("_")[0]
    return x.flatten(2) if source == "BSH" else x.permute(ORDER[source]).contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_lse", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "b", "t", "s", "d"), [(4, 2, 2, 5, 7, 64), (2, 2, 1, 1, 3, 128), (1, 1, 3, 2, 2, 64)]
)
def test_fused_infer_attention_padded(layout, has_lse, n, k, b, t, s, d):
    q, key, value = (torch.randn(b, m, h, d).half() for m, h in ((t, n), (s, k), (s, k)))
    parts = [laid_out(x, layout) for x in (q, key, value)]
    heads = {"num_key_value_heads": k, "input_layout": layout}
    v1, v2 = torch.ops.npu.npu_fused_infer_attention_score, torch.ops.npu.npu_fused_infer_attention_score_v2
    assert_as_inferred(v1, *parts, num_heads=n, softmax_lse_flag=has_lse, **heads)
    assert_as_inferred(v2, *parts, num_query_heads=n, return_softmax_lse=has_lse, **heads)


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("has_lse", [True, False])
@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (64, 64)])
def test_fused_infer_attention_packed(layout, has_lse, dims):
    q, key, value = (torch.randn(m, 2, d).half() for m, d in ((9, dims[0]), (11, dims[0]), (11, dims[1])))
    if layout == "NTD_TND":
        q, key, value = (x.transpose(0, 1).contiguous() for x in (q, key, value))
    lengths = {"actual_seq_qlen": [4, 9], "actual_seq_kvlen": [5, 11]}
    options = {"num_query_heads": 2, "input_layout": layout, "return_softmax_lse": has_lse}
    assert_as_inferred(torch.ops.npu.npu_fused_infer_attention_score_v2, q, key, value, **options, **lengths)


def test_fused_infer_attention_with_rope_and_pages():
    operator = torch.ops.npu.npu_fused_infer_attention_score_v2
    q, cache = torch.randn(2, 3, 4, 512).half(), torch.randn(5, 16, 512).half()
    options = {"query_rope": torch.randn(2, 3, 4, 64).half(), "key_rope": torch.randn(5, 16, 64).half()}
    options |= {"block_table": torch.tensor([[0, 1], [4, 2]], dtype=torch.int32), "block_size": 16}
    options |= {"num_query_heads": 4, "num_key_value_heads": 1, "input_layout": "BSND", "actual_seq_kvlen": [20, 3]}
    assert_as_inferred(operator, q, cache, cache, return_softmax_lse=True, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_update(dtype):
    lses, outs = [torch.randn(6) for _ in range(3)], [torch.randn(6, 16).to(dtype) for _ in range(3)]
    assert_as_inferred(torch.ops.npu.npu_attention_update, lses, outs, 1)
    # The vendor's inference gives a second result for update_type 0 too, its kernel an undefined one.
    assert_as_inferred(torch.ops.npu.npu_attention_update, lses, outs, 0, results=slice(1))
    assert torch.ops.npu.npu_attention_update(lses, outs, 0)[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "k", "v"), [(4, 2, 64), (2, 2, 32)])
def test_fusion_attention(dtype, n, k, v, monkeypatch):
    # Its inference asks the device, which is not there, whether to print a caution, unless it already has.
    meta = sys.modules["torch_npu.op_plugin.meta._meta_registrations"]
    monkeypatch.setattr(meta, "_npu_fusion_attention_warning_printed", True)
    operator = torch.ops.npu.npu_fusion_attention
    q, key, value = (torch.randn(2, m, h, d).to(dtype) for m, h, d in ((5, n, 64), (7, k, 64), (7, k, v)))
    for layout, lay in {
        "BSH": lambda x: x.flatten(2),
        "SBH": lambda x: x.transpose(0, 1).flatten(2),
        "BSND": lambda x: x,
        "BNSD": lambda x: x.transpose(1, 2).contiguous(),
    }.items():
        assert_as_inferred(operator, lay(q), lay(key), lay(value), n, layout)
    ends = {"actual_seq_qlen": [5, 10], "actual_seq_kvlen": [7, 14]}
    assert_as_inferred(operator, *(x.flatten(0, 1) for x in (q, key, value)), n, "TND", **ends)


@pytest.mark.parametrize("version", ["", "_v3"])
@pytest.mark.parametrize("layout", ["BSH", "SBH", "BSND", "BNSD"])
def test_fusion_attention_backward(version, layout, monkeypatch):
    """Not `_grad_v2`: the vendor's own inference of it raises, it makes tensors like a list."""
    meta = sys.modules["torch_npu.op_plugin.meta._meta_registrations"]
    monkeypatch.setattr(meta, "_npu_fusion_attention_warning_printed", True)
    lay = {
        "BSH": lambda x: x.flatten(2),
        "SBH": lambda x: x.transpose(0, 1).flatten(2),
        "BSND": lambda x: x,
        "BNSD": lambda x: x.transpose(1, 2).contiguous(),
    }[layout]
    q, key, value, dy = (lay(torch.randn(2, m, h, 64).half()) for m, h in ((5, 4), (7, 2), (7, 2), (5, 4)))
    forward = getattr(torch.ops.npu, f"npu_fusion_attention{version}")
    out, maximum, total, *_ = forward(q, key, value, 4, layout)
    backward = getattr(torch.ops.npu, f"npu_fusion_attention_grad{version}")
    left = {"softmax_max": maximum, "softmax_sum": total, "attention_in": out}
    assert_as_inferred(backward, q, key, value, dy, 4, layout, results=slice(3), **left)
    if version:
        assert_as_inferred(forward, q, key, value, 4, layout, results=slice(4))


def test_gather_of_pages():
    key_cache, value_cache = torch.randn(4, 16, 2, 64).half(), torch.randn(4, 16, 2, 64).half()
    tables, lengths = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32), torch.tensor([20, 5], dtype=torch.int32)
    outs = [torch.zeros(25, 2, 64).half() for _ in range(2)]
    operator = torch.ops.npu.npu_gather_pa_kv_cache_functional
    key, value = operator(key_cache, value_cache, tables, lengths, *outs)
    assert torch.equal(key, torch.cat([key_cache[3], key_cache[1, :4], key_cache[0, :5]]))
    assert_as_inferred(operator, key_cache, value_cache, tables, lengths, *outs)
    torch.ops.npu.npu_gather_pa_kv_cache(key_cache, value_cache, tables, lengths, *outs)
    assert torch.equal(outs[0], key)
    assert torch.equal(outs[1], value)


@pytest.mark.parametrize("version", ["", "_v2"])
def test_graph_mode_forms(version):
    operator = getattr(torch.ops.npu, f"npu_fused_infer_attention_score{version}")
    heads = {"num_query_heads" if version else "num_heads": 2, "input_layout": "BSND"}
    tensors = [torch.randn(1, 5, 2, 64).half() for _ in range(3)]
    assert (
        getattr(torch.ops.npu, f"_npu_fused_infer_attention_score{version}_get_max_workspace")(*tensors, **heads).dim()
        == 1
    )
    out = [torch.empty(1, 5, 2, 64).half(), torch.empty(0)]
    operator.out(*tensors, out=out, **heads)
    assert torch.equal(out[0], operator(*tensors, **heads)[0])


def test_autograd_through_the_vendors_dispatcher():
    q, key, value = (torch.randn(1, 5, 2, 64, requires_grad=True) for _ in range(3))
    torch.ops.npu.npu_fusion_attention(q, key, value, 2, "BSND", scale=0.125)[0].sum().backward()
    wanted = torch.autograd.grad(
        torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, key, value))).sum(),
        (q, key, value),
    )
    for x, grad in zip((q, key, value), wanted, strict=True):
        torch.testing.assert_close(x.grad, grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="npu_fused_infer_attention_score_v2"):
        torch.ops.npu.npu_fused_infer_attention_score_v2(
            *(x.detach().half().requires_grad_() for x in (q, key, value)), num_query_heads=2, input_layout="BSND"
        )[0].sum().backward()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ring_attention_update(dtype):
    operator = torch.ops.npu.npu_ring_attention_update
    out, statistic = torch.randn(5, 2, 4 * 64).to(dtype), torch.rand(2, 4, 5, 8)
    assert_as_inferred(operator, out, statistic, statistic, out, statistic, statistic)
    out, statistic = torch.randn(10, 4, 64).to(dtype), torch.rand(10, 4, 8)
    packed = {"input_layout": "TND", "actual_seq_qlen": torch.tensor([0, 5, 10])}
    assert_as_inferred(operator, out, statistic, statistic, out, statistic, statistic, **packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latent_attention(dtype):
    q, cache = torch.randn(2, 8, 576).to(dtype), torch.randn(3, 16, 1, 576).to(dtype)
    tables = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    args = q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], tables, [20, 5], 8, 0.05, 1
    operator = torch.ops.atb.npu_multi_head_latent_attention
    assert_as_inferred(operator, *args)
    operator = operator.lse
    ours, theirs = (
        operator(*args, True, calc_type="calc_type_ring"),
        operator(*on_meta(args), True, calc_type="calc_type_ring"),
    )
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in theirs]


# --- what a decoder layer needs besides attention


def test_norms_rope_and_activation():
    x, weight = torch.randn(3, 4, 64).half(), torch.randn(64).half()
    assert_as_inferred(torch.ops.npu.npu_rms_norm, x, weight, 1e-6)
    assert_as_inferred(torch.ops.npu.npu_add_rms_norm, x, x, weight, 1e-6)
    assert_as_inferred(torch.ops.npu.npu_swiglu, x, -1)
    assert_as_inferred(
        torch.ops.npu.npu_interleave_rope, x[:, :, None].contiguous(), *[x[:, :1, None].contiguous()] * 2
    )
    kv, angle = torch.randn(1, 1, 5, 576).half(), torch.randn(1, 1, 5, 64).half()
    caches = [torch.zeros(1, 16, 1, width).half() for width in (64, 512)]
    call = kv, torch.randn(512).half(), angle, angle, torch.arange(5), *caches
    assert_as_inferred(torch.ops.npu.npu_kv_rmsnorm_rope_cache, *call, cache_mode="PA_BNSD", is_output_kv=True)


def test_quantised_products():
    x, w = torch.randn(3, 32).half(), torch.randint(-128, 128, (32, 8), dtype=torch.int8)
    quantize, dynamic, matmul = (
        getattr(torch.ops.npu, f"npu_{x}") for x in ("quantize", "dynamic_quant", "quant_matmul")
    )
    offset = torch.tensor([3], dtype=torch.int32)
    assert_as_inferred(quantize, x, torch.tensor([0.1]), offset, torch.qint8, -1, True)
    (a, _), (scale, _) = assert_as_inferred(dynamic, x, dst_type=torch.int8)
    bits, bias = torch.ones(8).view(torch.int32).long(), torch.zeros(8, dtype=torch.int32)
    assert_as_inferred(matmul, a, w, bits, bias=bias, output_dtype=torch.float16)
    assert_as_inferred(matmul, a, w, torch.ones(8), pertoken_scale=scale, output_dtype=torch.float16)
    assert_as_inferred(matmul, a, w, torch.ones(8), output_dtype=torch.int32)


def test_router_and_experts():
    logits, bias = torch.randn(5, 16), torch.randn(16)
    options = {"k_group": 2, "group_count": 4, "group_select_mode": 1, "norm_type": 1}
    gate = torch.ops.npu.npu_moe_gating_top_k
    (weight, _), (expert, _), _ = assert_as_inferred(gate, logits, 4, bias=bias, **options)
    init, finalize = torch.ops.npu.npu_moe_init_routing_v2, torch.ops.npu.npu_moe_finalize_routing
    for x, quant_mode in ((torch.randn(5, 32).half(), -1), (torch.randn(5, 32).half(), 1)):
        routing = {"active_num": 20, "expert_num": 16, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
        routing |= {"active_expert_range": [0, 16], "quant_mode": quant_mode}
        (rows, _), (place, _), (counts, _), (scale, _) = assert_as_inferred(init, x, expert, **routing)
    # The inference prints the dtype of x where a scale is given; the call is the same.
    grouped = {"group_list": counts.cumsum(0), "split_item": 2, "group_type": 0}
    w8, w4 = torch.zeros(16, 32, 8, dtype=torch.int8), torch.zeros(16, 32, 2, dtype=torch.int32)
    w8_options = {"scale": [torch.ones(16, 8)], "per_token_scale": [scale], "output_dtype": torch.float16}
    w4_options = w8_options | {"scale": [torch.ones(16, 1, 16, dtype=torch.int64)], "bias": [torch.zeros(16, 16)]}
    for weights, more in ((w8, w8_options), (w4, w4_options)):
        mine = torch.ops.npu.npu_grouped_matmul([rows], [weights], **grouped, **more)
        theirs = torch.ops.npu.npu_grouped_matmul(*on_meta(([rows], [weights])), **on_meta(grouped | more))
        assert [(x.shape, x.dtype) for x in mine] == [(x.shape, x.dtype) for x in theirs]
    assert_as_inferred(finalize, mine[0].float(), None, None, None, weight, place, expert, 2)


# --- every call that npu_backend makes


@SOME
@given(
    SEEDS,
    st.sampled_from(((2, 2), (4, 2), (2, 1))),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(("normal", "mean")),
)
def test_blocks_of_all_families_are_dense_attention(seed, heads, length, is_causal, kind):
    p = problem(seed, kind, heads, (length,), length, is_causal=is_causal, cp=1)
    tensors = [torch.from_numpy(x) for x in p[:3]]
    out, lse = dense(*p[:3], scale=p.scale, visible=p.visible)
    options = {"is_causal": is_causal, "scale": p.scale}
    for got in (
        operators.ring_mla_block(*tensors, **options),
        operators.fused_infer_block(*tensors, **options),
        operators.fusion_block(*tensors, layout="SBH", **options).partial(),
        operators.fusion_block(*tensors, layout="TND", **options).partial(),
    ):
        assert_near(got, out, lse)


@SOME
@given(SEEDS, st.integers(2, 40))
def test_merges_of_all_families_are_dense_attention(seed, length):
    p = problem(seed, "normal", (2, 1), (length,), length, is_causal=False, cp=1)
    query, key, value = (torch.from_numpy(x) for x in p[:3])
    out, lse = dense(*p[:3], scale=p.scale, visible=p.visible)
    halves = [(key[:, some], value[:, some]) for some in (slice(length // 2), slice(length // 2, None))]
    options = {"is_causal": False, "scale": p.scale}
    carried = None
    for half in halves:
        carried = operators.ring_mla_block(query, *half, previous=carried, **options)
    blocks = [operators.fused_infer_block(query, *half, **options) for half in halves]
    for layout in ("SBH", "TND"):
        parts = [operators.fusion_block(query, *half, layout=layout, **options) for half in halves]
        assert_near(operators.fusion_update(*parts, layout=layout).partial(), out, lse)
    assert_near(carried, out, lse)
    assert_near(operators.merge_partials(blocks), out, lse)


def test_decode_and_paged_cache():
    generator = torch.Generator().manual_seed(0)
    latent, rope = (torch.randn(4, 16, 1, d, generator=generator).half() for d in (512, 64))
    tables, lengths = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32), (20, 0)
    query = torch.randn(2, 1, 8, 576, generator=generator).half()
    got = operators.latent_decode(query, latent, rope, tables, kv_lengths=lengths, scale=0.04)
    keys, ropes = operators.paged_latent(latent, rope, tables, lengths)
    assert torch.equal(keys, torch.cat([latent[3], latent[1, :4]]))
    key = torch.cat([keys, ropes], dim=-1)[None]
    out, lse = dense(query[:1].numpy(), key.numpy(), keys[None].numpy(), scale=0.04, visible=np.ones((1, 1, 20), bool))
    assert abs(got.out[:1].double().numpy() - out).max() < 0.01
    assert abs(got.lse[:1].double().numpy() - lse).max() < 0.01
    assert torch.isneginf(got.lse[1]).all()


def test_the_ring_runs_under_torch_npu(tmp_path):
    p = problem(0, "needle", (2, 1), (20,), 24, is_causal=True, cp=2)
    path = write_case(tmp_path, p)
    outcomes = run(path, tmp_path / "results", device="cpu", timeout=120)
    assert len(outcomes) == 1
    with safe_open(outcomes[0].result, "numpy") as file:
        assert json.loads(file.metadata()["about"])["torch_npu"].startswith("2.13.0")


@pytest.mark.parametrize(("kind", "latent"), [("FLOAT", 512), ("W8A8", 48), ("W8A8_DYNAMIC", 48)])
def test_a_layer_runs_under_torch_npu(tmp_path, kind, latent):
    """Dense or with experts, every operator of it through the vendor's dispatcher; the stages are right."""
    expert_kind = "W4A8_DYNAMIC" if kind == "W8A8" else kind
    for is_moe in (False, True):
        options = {"kind": kind, "expert_kind": expert_kind, "kv_lora_rank": latent, "tokens": 9}
        case, arrays = layer(0, is_moe=is_moe, **options)
        path = write_layer(tmp_path, f"moe-{is_moe}", case, arrays)
        (outcome,) = run_layers(path, tmp_path / "results", device="cpu")
        assert outcome.error is None, outcome.error
        check_stages(case, arrays, outcome.result)
        with safe_open(outcome.result, "numpy") as file:
            assert json.loads(file.metadata()["about"])["torch_npu"].startswith("2.13.0")


def assert_near(got, out, lse):
    """That the call was understood; how near it must be is the matter of other tests."""
    assert abs(got.out.double().numpy() - out).max() <= 0.03 * (1 + abs(out).max())
    assert abs(got.lse.double().numpy() - lse).max() <= 0.02
