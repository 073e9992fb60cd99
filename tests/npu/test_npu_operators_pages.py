"""Caches in blocks: FIA over them in every layout, and their tokens gathered again."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_judge import assert_same_bits
from oracle import dense
from strategies import examples

import npu_backend  # noqa: F401 (declares the operators)

FIA, FIA_1 = torch.ops.npu.npu_fused_infer_attention_score_v2, torch.ops.npu.npu_fused_infer_attention_score
GATHER = torch.ops.npu.npu_gather_pa_kv_cache
TRIANGLE = torch.ones(2048, 2048, dtype=torch.int8).triu(1)
SEEDS = st.integers(0, 2**32 - 1)
STORED = {  # tokens first, [blocks, block, K, D]
    "flat": lambda x: x.flatten(2),
    "by head": lambda x: x.transpose(1, 2).contiguous(),
    "nz": lambda x: x.unflatten(3, (-1, 16)).permute(0, 2, 3, 1, 4).contiguous(),
}
LAY = {
    "BSH": lambda x: x.flatten(2),
    "BSND": lambda x: x,
    "BNSD": lambda x: x.transpose(1, 2).contiguous(),
    "TND": lambda x: x.flatten(0, 1),
    "NTD": lambda x: x.flatten(0, 1).transpose(0, 1).contiguous(),
    "NTD_TND": lambda x: x.flatten(0, 1).transpose(0, 1).contiguous(),
}


def paged(seed, lengths, block, kv_heads, dims, dtype):
    """Caches `[blocks, block, K, D]`, the table of each request's blocks in a random order, the rest of it −1."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    counts = [-(-n // block) for n in lengths]
    order = rng.permutation(sum(counts) + 1)
    table = np.full((len(lengths), max(1, *counts) + 1), -1, np.int32)
    for i, count in enumerate(counts):
        table[i, :count] = order[sum(counts[:i]) : sum(counts[: i + 1])]
    caches = [torch.randn(len(order), block, kv_heads, d, generator=generator).to(dtype) for d in dims]
    return caches, torch.from_numpy(table)


def keys_of(cache, table, length):
    """The tokens of one request, `[n, K, D]`."""
    block = cache.shape[1]
    return torch.cat([cache[i] for i in table[: -(-length // block)].tolist()] or [cache[0, :0]])[:length]


# --- FIA


DIMS = {
    "64": (64, 64, 0),
    "128": (128, 128, 0),
    "192/128": (192, 128, 0),
    "rope": (128, 128, 64),
    "latent": (512, 512, 64),
}


@examples(0.5)
@given(
    SEEDS, st.sampled_from(sorted(DIMS)), st.sampled_from(sorted(LAY)), st.sampled_from(sorted(STORED)),
    st.sampled_from((16, 48, 128, 1024)), st.lists(st.integers(0, 150), min_size=1, max_size=3),
    st.sampled_from((1, 2, 5)), st.booleans(), st.sampled_from((torch.float16, torch.bfloat16)),
)  # fmt: skip
def test_any_layout_of_queries_goes_with_any_layout_of_the_cache(
    seed, dims, layout, stored, block, lengths, t, causal, dtype
):
    width, v_width, rope = DIMS[dims]
    if dims == "latent" and layout.startswith("NTD"):
        return
    n, k = (4, 1) if dims == "latent" else (4, 2)
    is_packed = layout in ("TND", "NTD", "NTD_TND")
    if dims == "192/128" and not is_packed:  # other sizes are refused
        block = 128 if t > 1 else min(block, 512)
    caches, table = paged(seed, lengths, block, k, (width, v_width, *([rope] if rope else [])), dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    q, q_rope = (torch.randn(len(lengths), t, n, d, generator=generator).to(dtype) for d in (width, 64))
    options = {"query_rope": LAY[layout](q_rope), "key_rope": STORED[stored](caches[2])} if rope else {}
    options |= {"actual_seq_qlen": [t * (i + 1) for i in range(len(lengths))]} if is_packed else {}
    options |= {"sparse_mode": 3, "atten_mask": TRIANGLE} if causal and (t > 1 or is_packed or rope) else {}
    out, lse = FIA(
        LAY[layout](q), *(STORED[stored](x) for x in caches[:2]), num_query_heads=n, num_key_value_heads=k,
        input_layout=layout, softmax_scale=0.1, block_table=table, block_size=block, actual_seq_kvlen=lengths,
        return_softmax_lse=True, **options,
    )  # fmt: skip
    out = {"BNSD": lambda x: x.transpose(1, 2), "NTD": lambda x: x.transpose(0, 1)}.get(layout, lambda x: x)(out)
    out = out.reshape(len(lengths), t, n, v_width)
    lse = lse.reshape(len(lengths), t, n) if is_packed else lse[..., 0].transpose(1, 2)
    for i, length in enumerate(lengths):
        key, value, *rest = (keys_of(x, table[i], length)[None].double().numpy() for x in caches)
        queries = [x[i : i + 1].double().numpy() for x in (q, q_rope)[: 1 + bool(rope)]]
        visible = np.tri(t, length, length - t, dtype=bool) if "sparse_mode" in options else np.ones((t, length), bool)
        want, want_lse = dense(
            np.concatenate(queries, -1), np.concatenate([key, *rest], -1), value, scale=0.1, visible=visible[None]
        )
        saw = visible.any(-1)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
        assert (abs(out[i].double().numpy() - want[0]) <= tolerance * (1 + abs(want).max()))[saw].all()
        assert (abs(lse[i].double().numpy() - want_lse[0])[saw] <= 2e-5 * (1 + abs(want_lse[0][saw]))).all()
        assert (out[i].double().numpy()[~saw] == 0).all()


@examples(0.2)
@given(SEEDS, st.sampled_from((1, 2, 4)), st.sampled_from(("one", "each", "one head", "each head")), st.booleans())
def test_masks_over_pages_cover_all_that_the_pages_hold(seed, t, kind, is_latent):
    """vLLM-Ascend's speculative decode gives `[B, 1, Q, KV]` beside a cache in blocks."""
    lengths, block = [200, 1, 33], 128
    width, heads = (512, (4, 1)) if is_latent else (64, (4, 2))
    caches, table = paged(seed, lengths, block, heads[1], (width, width, 64), torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    q, rope = (torch.randn(3, t, heads[0], d, generator=generator).bfloat16() for d in (width, 64))
    batch = 1 if kind.startswith("one") else 3
    # A single query's mask covers what the table can name, more queries' what the longest request has.
    columns = block * (table.shape[1] if t == 1 else 2)
    mask = torch.rand(batch, t, columns, generator=generator) < 0.5
    mask[..., 0] = False
    options = {"query_rope": rope, "key_rope": caches[2].flatten(2)} if is_latent else {}
    out, lse = FIA(
        q, *(x.flatten(2) for x in caches[:2]), num_query_heads=4, num_key_value_heads=heads[1], input_layout="BSND",
        softmax_scale=0.1, block_table=table, block_size=block, actual_seq_kvlen=lengths, return_softmax_lse=True,
        atten_mask=mask[:, None] if kind.endswith("head") else mask, **options,
    )  # fmt: skip
    for i, length in enumerate(lengths):
        parts = [keys_of(x, table[i], length)[None].double().numpy() for x in caches]
        key = np.concatenate([parts[0], parts[2]], -1) if is_latent else parts[0]
        query = torch.cat([q, rope], -1) if is_latent else q
        visible = ~mask[i % batch, :, :length].numpy()
        want = dense(query[i : i + 1].double().numpy(), key, parts[1], scale=0.1, visible=visible[None])
        assert (abs(out[i].double().numpy() - want[0][0]) <= 0.02 * (1 + abs(want[0]).max())).all()
        np.testing.assert_allclose(lse[i, :, :, 0].T, want[1][0], rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("shape", "t"),
    [((5, 9), 5), ((16, 16), 5), ((32, 32), 5), ((1, 5, 9), 5), ((2, 16, 32), 5), ((1, 1, 5, 16), 5),
     ((2, 1, 16, 9), 5), ((2, 9), 1), ((2, 16), 1), ((2, 1, 32), 1), ((2, 1, 1, 9), 1)],
)  # fmt: skip
def test_masks_may_be_rounded_up_and_have_a_batch_axis_or_not(shape, t):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, m, 2, 64, generator=generator).half() for m in (t, 9, 9))
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[..., 0] = False
    options = {"num_query_heads": 2, "input_layout": "BSND"}
    out = FIA(q, k, v, atten_mask=mask, **options)[0]
    is_by_request = len(shape) == 2 and t == 1
    whole = mask[:, None] if is_by_request else mask.reshape(-1, *shape[-2:])[:, :t]
    want, _ = dense(
        *(x.double().numpy() for x in (q, k, v)), scale=1.0, visible=~whole[..., :9].expand(2, t, 9).numpy()
    )
    np.testing.assert_allclose(out.double(), want, rtol=0, atol=4e-3)


@pytest.mark.parametrize(
    ("dims", "heads", "layout"),
    [((192, 128), (4, 2), "BSND"), ((192, 128), (2, 2), "BSH"), ((192, 128), (4, 1), "BNSD_BSND"),
     ((256, 256), (4, 2), "TND"), ((16, 16), (2, 1), "TND"), ((192, 192), (4, 2), "TND"), ((192, 192), (2, 2), "TND"),
     ((64, 64), (4, 2), "NTD"), ((128, 128), (130, 1), "BSND"), ((128, 128), (65, 1), "TND")],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_dims_and_ratios_of_the_document_of_2026(dims, heads, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 5, heads[0], dims[0]), (1, 9, heads[1], dims[0]), (1, 9, heads[1], dims[1]))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    lay = LAY[layout.partition("_")[0]]
    ends = {"actual_seq_qlen": [5], "actual_seq_kvlen": [9]} if layout in ("TND", "NTD") else {}
    out, _ = FIA(
        lay(q), lay(k), lay(v), num_query_heads=heads[0], num_key_value_heads=heads[1], input_layout=layout,
        softmax_scale=0.1, **ends,
    )  # fmt: skip
    out = out.transpose(0, 1) if layout == "NTD" else out
    visible = np.ones((1, 5, 9), bool)
    want, _ = dense(*(x.double().numpy() for x in (q, k, v)), scale=0.1, visible=visible)
    assert (
        abs(out.double().numpy().reshape(want.shape) - want) <= (0.02 if dtype == torch.bfloat16 else 2e-3) * 4
    ).all()


@pytest.mark.parametrize(
    ("dims", "heads", "options", "phrase"),
    [((256, 256), (2, 2), {"input_layout": "TND"}, "packed tokens with head dims 256, 256.*August 2026"),
     ((512, 512), (2, 1), {"input_layout": "TND"}, "head dim 512 need query_rope.*August 2026"),
     ((272, 272), (2, 1), {"input_layout": "TND"}, "packed tokens with head dims 272.*August 2026"),
     ((192, 192), (2, 2), {"input_layout": "NTD"}, "head dims 192, 192 with paging or NTD"),
     ((16, 16), (2, 2), {"input_layout": "BSND_BNSD"}, "layout BSND_BNSD with head dim 16.*August 2026"),
     ((192, 128), (2, 2), {"input_layout": "BSND_NBSD"}, "layout BSND_NBSD with head dims 192, 128.*August 2026")],
)  # fmt: skip
def test_head_dims_that_the_document_does_not_have(dims, heads, options, phrase):
    layout = options["input_layout"]
    shapes = ((1, 5, heads[0], dims[0]), (1, 9, heads[1], dims[0]), (1, 9, heads[1], dims[1]))
    tensors = [LAY[layout.partition("_")[0]](torch.zeros(shape).half()) for shape in shapes]
    ends = {"actual_seq_qlen": [5], "actual_seq_kvlen": [9]} if layout in ("TND", "NTD") else {}
    with pytest.raises(RuntimeError, match=phrase):
        FIA(*tensors, num_query_heads=heads[0], num_key_value_heads=heads[1], **options, **ends)


def test_of_more_lengths_than_requests_the_first_count():
    q, k, v = (torch.randn(2, m, 2, 64).half() for m in (4, 6, 6))
    options = {"num_query_heads": 2, "input_layout": "BSND"}
    a = FIA(q, k, v, actual_seq_qlen=[4, 3], actual_seq_kvlen=[5, 6], **options)[0]
    b = FIA(q, k, v, actual_seq_qlen=[4, 3, 9], actual_seq_kvlen=[5, 6, 0, 0], **options)[0]
    assert torch.equal(a, b)


# --- FIA as graph mode calls it


@pytest.mark.parametrize("version", ["", "_v2"])
@pytest.mark.parametrize("has_lse", [True, False])
def test_out_writes_what_would_be_returned(version, has_lse):
    q, k, v = (torch.randn(2, m, 2, 64).half() for m in (4, 6, 6))
    names = ("num_heads", "softmax_lse_flag") if version == "" else ("num_query_heads", "return_softmax_lse")
    options = dict(zip(names, (2, has_lse), strict=True)) | {"input_layout": "BSND"}
    operator = getattr(torch.ops.npu, f"npu_fused_infer_attention_score{version}")
    workspace = getattr(torch.ops.npu, f"_npu_fused_infer_attention_score{version}_get_max_workspace")(
        q, k, v, **options
    )
    assert workspace.dtype == q.dtype
    want = operator(q, k, v, **options)
    out = [torch.full_like(want[0], torch.nan), torch.full((2, 2, 4, 1) if has_lse else (1,), 7.0)]
    kept = out[1].clone()
    got = operator.out(q, k, v, workspace=workspace, out=out, **options)
    assert got[0] is out[0]
    assert torch.equal(out[0], want[0])
    assert torch.equal(out[1], want[1] if has_lse else kept)


@pytest.mark.parametrize(
    ("out", "phrase"),
    [
        ([torch.zeros(1, 4, 2, 64).half()], "out has 1 tensors, must have 2"),
        ([torch.zeros(1, 4, 2, 64), torch.zeros(1, 2, 4, 1)], "attention_out is .*float32, must be .*float16"),
        ([torch.zeros(1, 4, 2, 64).half(), torch.zeros(1, 4, 2, 1)], "softmax_lse is .* must be"),
    ],
)
def test_out_refuses_other_tensors(out, phrase):
    q = torch.zeros(1, 4, 2, 64).half()
    with pytest.raises(RuntimeError, match=f"npu_fused_infer_attention_score_v2.out: .*{phrase}"):
        FIA.out(q, q, q, num_query_heads=2, input_layout="BSND", return_softmax_lse=True, out=out)


def test_the_workspace_form_refuses_what_the_call_would():
    q = torch.zeros(1, 4, 2, 64).half()
    with pytest.raises(RuntimeError, match=r"_get_max_workspace: .*sparse_mode 3 needs atten_mask"):
        torch.ops.npu._npu_fused_infer_attention_score_get_max_workspace(
            q, q, q, num_heads=2, input_layout="BSND", sparse_mode=3
        )


# --- the cache gathered


@examples(0.4)
@given(
    SEEDS, st.lists(st.integers(0, 40), min_size=1, max_size=4), st.sampled_from((4, 16)), st.booleans(), st.booleans(),
    st.sampled_from((torch.float16, torch.bfloat16, torch.int8)),
)  # fmt: skip
def test_gather_is_the_tokens_in_the_order_of_the_table(seed, lengths, block, is_cumulative, has_offset, dtype):
    rng = np.random.default_rng(seed)
    offsets = rng.integers(0, 3 * block, len(lengths)) if has_offset else np.zeros(len(lengths), int)
    skipped = offsets // block  # whole blocks; the rest of an offset is dropped
    width = int(max(-(-n // block) + s for n, s in zip(lengths, skipped, strict=True))) + 1
    table = torch.from_numpy(rng.integers(0, 9, (len(lengths), width)).astype(np.int32))
    caches = [torch.from_numpy(rng.integers(-100, 100, (9, block, 2, d))).to(dtype) for d in (16, 24)]
    given_lengths = np.cumsum([0, *lengths]) if is_cumulative else np.array(lengths)
    options = {"is_seq_lens_cumsum": is_cumulative}
    options |= {"seq_offset": torch.from_numpy(offsets.astype(np.int32))} if has_offset else {}
    key, value = (torch.full((sum(lengths), 2, d), 77).to(dtype) for d in (16, 24))
    arguments = *caches, table, torch.from_numpy(given_lengths.astype(np.int32))
    copies = torch.ops.npu.npu_gather_pa_kv_cache_functional(*arguments, key, value, **options)
    assert (key == 77).all()
    assert GATHER(*arguments, key, value, **options) is None
    for got, copy, cache in zip((key, value), copies, caches, strict=True):
        start = 0
        for i, length in enumerate(lengths):
            for j in range(length):
                token = cache[table[i, skipped[i] + j // block], j % block]
                assert torch.equal(got[start + j], token)
            start += length
        assert torch.equal(got, copy)


def test_gather_is_paged_cache_load_into_given_tensors():
    """The one has taken the place of the other in vLLM-Ascend."""
    caches = [torch.randn(5, 8, 1, d).bfloat16() for d in (512, 64)]
    table, lengths = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32), torch.tensor([11, 16], dtype=torch.int32)
    want = torch.ops.atb.npu_paged_cache_load(*caches, table, lengths)
    got = [torch.empty_like(x) for x in want]
    GATHER(*caches, table, lengths, *got)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


CACHE, TABLE = torch.zeros(3, 4, 2, 16).half(), torch.zeros(2, 2, dtype=torch.int32)
GOOD = {
    "key_cache": CACHE, "value_cache": CACHE, "block_tables": TABLE, "seq_lens": torch.tensor([3, 5]).int(),
    "key": torch.zeros(8, 2, 16).half(), "value": torch.zeros(8, 2, 16).half(),
}  # fmt: skip
REFUSALS = {
    "cache dims": ({"key_cache": CACHE[0]}, "key_cache has 3 dims, must have 4"),
    "cache dtype": ({"value_cache": CACHE.float()}, "value_cache is torch.float32, must be int8, float16 or bfloat16"),
    "dtypes": ({"value_cache": CACHE.bfloat16()}, "must have the same blocks and dtype"),
    "blocks": ({"value_cache": CACHE[:2]}, "must have the same blocks and dtype"),
    "a large token": ({"key_cache": torch.zeros(3, 4, 149, 512).half()}, "bytes, at most 151552"),
    "table dims": ({"block_tables": TABLE[0]}, "block_tables has 1 dims"),
    "table empty": ({"block_tables": TABLE[:, :0]}, "must not be empty"),
    "table dtype": ({"block_tables": TABLE.long()}, "block_tables is torch.int64, must be int32"),
    "lengths dims": ({"seq_lens": TABLE}, "seq_lens has 2 dims"),
    "lengths dtype": ({"seq_lens": torch.tensor([3, 5])}, "seq_lens is torch.int64"),
    "lengths count": ({"seq_lens": torch.tensor([8]).int()}, "seq_lens has 1 numbers, must have 2 for 2 requests"),
    "negative": ({"seq_lens": torch.tensor([9, -1]).int()}, "has a negative length"),
    "cumulative count": ({"is_seq_lens_cumsum": True}, "seq_lens has 2 numbers, must have 3"),
    "cumulative start": (
        {"is_seq_lens_cumsum": True, "seq_lens": torch.tensor([1, 3, 8]).int()}, "must start with 0",
    ),
    "falling": ({"is_seq_lens_cumsum": True, "seq_lens": torch.tensor([0, 9, 8]).int()}, "has a negative length"),
    "key tokens": ({"key": torch.zeros(7, 2, 16).half()}, r"key is \(7, 2, 16\) torch.float16, must be \(8, 2, 16\)"),
    "value dtype": ({"value": torch.zeros(8, 2, 16)}, "value is .*torch.float32, must be .*torch.float16"),
    "offset shape": ({"seq_offset": torch.zeros(3).int()}, r"seq_offset is \(3,\), must be \[2\]"),
    "offset dtype": ({"seq_offset": torch.zeros(2).long()}, "seq_offset is torch.int64"),
    "offset negative": ({"seq_offset": torch.tensor([-1, 0]).int()}, "must not be negative"),
    "table too short": ({"seq_offset": torch.tensor([0, 4]).int()}, "5 tokens from 4 on, block_tables holds 2 blocks"),
    "block id": ({"block_tables": TABLE + 3}, r"ids must be 0 to 2 \(unsafe\)"),
    "block id −1": ({"block_tables": TABLE - 1}, r"ids must be 0 to 2 \(unsafe\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_gather_refuses(what):
    changes, phrase = REFUSALS[what]
    with pytest.raises(RuntimeError, match=f"npu_gather_pa_kv_cache: .*{phrase}"):
        GATHER(**(GOOD | changes))
    GATHER(**GOOD)


# --- decode over a cache in NZ format


@examples(0.2)
@given(SEEDS, st.sampled_from((1, 16, 128)), st.lists(st.integers(0, 140), min_size=1, max_size=3))
def test_latent_decode_over_nz_has_the_bits_of_krope_ctkv(seed, block, lengths):
    (latent, rope), table = paged(seed, lengths, block, 1, (512, 64), torch.float16)
    if not any(lengths):
        return
    generator = torch.Generator().manual_seed(seed)
    q = [torch.randn(len(lengths), 8, d, generator=generator).half() for d in (512, 64)]
    operator = torch.ops.atb.npu_multi_head_latent_attention.lse
    more = (table, lengths, 8, 0.05, 1, True)
    want = operator(*q, latent, rope, *more, calc_type="calc_type_ring")
    nz = (x[:, :, 0].unflatten(2, (-1, 16)).transpose(1, 2).contiguous() for x in (latent, rope))
    got = operator(*q, *nz, *more, calc_type="calc_type_ring", cache_mode="nzcache")
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b.numpy())


@pytest.mark.parametrize(
    ("latent", "rope", "options", "phrase"),
    [
        ((2, 32, 129, 16), (2, 4, 129, 16), {}, "block size 129, at most 128"),
        ((2, 16, 4, 32), (2, 4, 4, 16), {}, r"ctkv is \(2, 16, 4, 32\), must be \(2, 32, 4, 16\)"),
        ((2, 32, 4, 16), (2, 4, 1, 64), {}, r"k_rope is .* must be \(2, 4, 4, 16\)"),
        ((2, 4, 1, 512), (2, 4, 1, 64), {}, r"ctkv is \(2, 4, 1, 512\), must be"),
        ((2, 32, 4, 16), (2, 4, 4, 16), {"cache_mode": "int8_nzcache"}, "not implemented .* int8_nzcache"),
        ((2, 32, 4, 16), (2, 4, 4, 16), {"cache_mode": "nz"}, "Unsupported cache_mode value: 'nz'"),
    ],
)
def test_latent_decode_over_nz_refuses(latent, rope, options, phrase):
    table = torch.zeros(1, 1, dtype=torch.int32)
    q = torch.zeros(1, 8, 512).half(), torch.zeros(1, 8, 64).half()
    caches = torch.zeros(latent).half(), torch.zeros(rope).half()
    with pytest.raises(RuntimeError, match=phrase):
        torch.ops.atb.npu_multi_head_latent_attention(
            *q, *caches, table, [3], 8, 0.1, 1, **({"cache_mode": "nzcache"} | options)
        )
