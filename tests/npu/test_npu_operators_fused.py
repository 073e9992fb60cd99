"""Family 2: npu_fused_infer_attention_score on a CPU, merged by npu_attention_update."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_judge import assert_near_dense, assert_rounded_once, assert_same_bits
from npu_strategies import block_problems, exact_problem, exp, staged_row
from oracle import dense
from strategies import examples

import npu_backend  # noqa: F401 (declares the operators)
from npu_backend.emulation import arithmetic
from npu_backend.errors import InputError
from npu_backend.operators import Partial, fused_infer_block, merge_partials

FIA = torch.ops.npu.npu_fused_infer_attention_score_v2
FIA_1 = torch.ops.npu.npu_fused_infer_attention_score
UPDATE = torch.ops.npu.npu_attention_update
TRIANGLE = torch.ones(2048, 2048, dtype=torch.int8).triu(1)
MLA, LATENT = (192, 128), (576, 512)
LOWEST = torch.finfo(torch.float32).min
ONE_HEAD = ((1, 1), (2, 1), (4, 1), (8, 1))


# --- the wrapper: everything the contract can express


@examples(0.5)
@given(block_problems([MLA, (16, 16), (64, 64), (128, 128)]), st.sampled_from(("BSH", "BSND", "BNSD")))
def test_padded_block_is_dense_attention(p, layout):
    assert_near_dense(p, fused_infer_block(*p.tensors, layout=layout, **p.options))


@examples(0.25)
@given(block_problems([MLA, (64, 64), (128, 128), (192, 192)], dtypes=(torch.bfloat16,), heads=((1, 1), (2, 2))))
def test_packed_block_in_bfloat16_is_dense_attention(p):
    assert_near_dense(p, fused_infer_block(*p.tensors, layout="TND", **p.options))


@examples(0.25)
@given(block_problems([(64, 64), (128, 128)], dtypes=(torch.float16,), heads=((1, 1), (2, 2)), is_causal=True))
def test_packed_causal_block_in_float16_is_dense_attention(p):
    assert_near_dense(p, fused_infer_block(*p.tensors, layout="TND", **p.options))


@examples(0.15)
@given(block_problems([LATENT], heads=ONE_HEAD), st.sampled_from(("BSH", "BSND", "BNSD", "TND")))
def test_latent_block_is_dense_attention(p, layout):
    assert_near_dense(p, fused_infer_block(*p.tensors, layout=layout, **p.options))


@examples(0.3)
@given(block_problems([MLA, (32, 32)], is_causal=False), st.data())
def test_partials_merged_in_any_order_are_dense_attention(p, data):
    cuts = sorted({0, p.key.shape[1], *data.draw(st.lists(st.integers(0, p.key.shape[1]), max_size=5))})
    partials = [
        fused_infer_block(
            p.query, p.key[:, a:b], p.value[:, a:b], is_causal=False, scale=p.scale, q_lengths=p.q_lengths,
            kv_lengths=tuple(min(max(n - a, 0), b - a) for n in p.kv_lengths),
        )
        for a, b in pairwise(cuts)
    ]  # fmt: skip
    assert_near_dense(p, merge_partials(data.draw(st.permutations(partials))), merges=len(partials))


# --- the operator: masks, layouts, pages


def plain(b, t, s, n=2, k=1, d=16, dtype=torch.float16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(b, m, h, d, generator=rng).to(dtype) for m, h in ((t, n), (s, k), (s, k))]


def call(q, k, v, operator=FIA, **options):
    options = {"num_query_heads": q.shape[2], "num_key_value_heads": k.shape[2], "input_layout": "BSND"} | options
    return operator(q, k, v, return_softmax_lse=True, softmax_scale=0.25, **options)


def assert_is_dense(got, q, k, v, visible, tolerance=2e-3):
    out, lse = dense(*(x.double().numpy() for x in (q, k, v)), scale=0.25, visible=visible)
    saw = visible.any(-1)
    assert (abs(got[0].double().numpy() - out) <= tolerance * (1 + abs(out).max()))[saw].all()
    assert (abs(got[1].squeeze(-1).transpose(1, 2).double().numpy() - lse)[saw] <= 1e-5).all()


SEEDS = st.integers(0, 2**32 - 1)


@examples(0.1)
@given(
    SEEDS,
    st.integers(1, 2),
    st.integers(2, 20),
    st.integers(1, 30),
    st.integers(0, 9),
    st.integers(0, 9),
    st.booleans(),
)
def test_sparse_modes_show_what_the_table_says(seed, b, t, s, before, after, per_request):
    q, k, v = plain(b, t, s, seed=seed)
    rng = np.random.default_rng(seed)
    hidden = rng.random((b if per_request else 1, 1, t, s)) < 0.4
    hidden[..., 0] = False
    i, j = np.arange(t)[:, None], np.arange(s)[None]
    end = i + s - t
    mask = torch.from_numpy(hidden)
    band = {"pre_tokens": before, "next_tokens": after}
    shown = ~hidden[:, 0]
    cases = (
        ({"sparse_mode": 0}, np.ones((t, s), bool)),
        ({"sparse_mode": 0, "atten_mask": mask}, shown),
        ({"sparse_mode": 0, "atten_mask": mask.to(torch.uint8), **band}, shown & (j >= i - before) & (j <= i + after)),
        ({"sparse_mode": 1, "atten_mask": mask.to(torch.int8), **band}, shown),
        ({"sparse_mode": 2, "atten_mask": TRIANGLE}, j <= i),
        ({"sparse_mode": 3, "atten_mask": TRIANGLE[None, None], **band}, j <= end),
        ({"sparse_mode": 4, "atten_mask": TRIANGLE.bool(), **band}, (j >= end - before) & (j <= end + after)),
    )
    for options, visible in cases:
        assert_is_dense(call(q, k, v, **options), q, k, v, np.broadcast_to(visible, (b, t, s)))


OUT = {
    "BSND": "bsnd", "BNSD": "bnsd", "BNSD_BSND": "bsnd", "BSND_BNSD": "bnsd", "BSND_NBSD": "nbsd", "BNSD_NBSD": "nbsd",
}  # fmt: skip


@examples(0.25)
@given(SEEDS, st.sampled_from(sorted(OUT)), st.integers(1, 5), st.integers(1, 9))
def test_layouts_are_transpositions(seed, layout, t, s):
    q, k, v = plain(2, t, s, n=4, k=2, d=64, seed=seed)  # BSND_BNSD takes no other small head dim
    out, lse = call(q, k, v)
    given_parts = [x.transpose(1, 2).contiguous() if layout.startswith("BNSD") else x for x in (q, k, v)]
    got = call(*given_parts, num_query_heads=4, num_key_value_heads=2, input_layout=layout)
    want = torch.from_numpy(np.einsum(f"bsnd->{OUT[layout]}", out.numpy()))
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], lse)
    assert lse.shape == (2, 4, t, 1)
    flat = call(*(x.flatten(2) for x in (q, k, v)), num_query_heads=4, num_key_value_heads=2, input_layout="BSH")
    assert torch.equal(flat[0], out.flatten(2))


@examples(0.3)
@given(SEEDS, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), st.booleans())
def test_a_pack_is_its_requests_one_by_one_and_its_lse_is_by_token(seed, lengths, is_causal):
    q_lengths, kv_lengths = zip(*lengths, strict=True)
    if not sum(q_lengths) or not sum(kv_lengths):
        return
    q, k, v = (x[0] for x in plain(1, sum(q_lengths), sum(kv_lengths), n=2, k=2, d=64, seed=seed))
    mask = {"sparse_mode": 3, "atten_mask": TRIANGLE} if is_causal else {}
    ends = {"actual_seq_qlen": list(np.cumsum(q_lengths)), "actual_seq_kvlen": list(np.cumsum(kv_lengths))}
    packed = {"num_query_heads": 2, "num_key_value_heads": 2, **mask, **ends}
    out, lse = call(q, k, v, input_layout="TND", **packed)
    assert lse.shape == (sum(q_lengths), 2, 1)
    heads_first = [x.transpose(0, 1).contiguous() for x in (q, k, v)]
    assert torch.equal(call(*heads_first, input_layout="NTD_TND", **packed)[0], out)
    turned = call(q, k, v, input_layout="TND_NTD", **packed)
    assert torch.equal(turned[0], out.transpose(0, 1))
    assert torch.equal(turned[1], lse)  # by token, whatever the layout of out
    a = b = 0
    for m, n in lengths:
        if m and n:
            one = [q[None, a : a + m], k[None, b : b + n], v[None, b : b + n]]
            want_out, want_lse = call(*one, **(mask if m > 1 else {}))
            np.testing.assert_allclose(out[a : a + m], want_out[0], rtol=0, atol=2e-3)
            np.testing.assert_allclose(lse[a : a + m, :, 0].T, want_lse[0, ..., 0], rtol=0, atol=1e-5)
        a, b = a + m, b + n


@examples(0.2)
@given(
    SEEDS, st.lists(st.integers(0, 300), min_size=1, max_size=3), st.sampled_from((1, 3)), st.booleans(), st.booleans()
)
def test_pages_are_the_keys_in_the_order_of_the_table(seed, lengths, t, is_latent, is_flat):
    size, rng = 128, np.random.default_rng(seed)
    d, kv_heads, n = (512, 1, 2) if is_latent else (16, 2, 2)
    blocks = [-(-n_keys // size) for n_keys in lengths]
    order, width = rng.permutation(sum(blocks) + 1), max(1, *blocks)
    table = np.full((len(lengths), width), -1, np.int32)  # unused entries are not looked at
    for b, count in enumerate(blocks):
        table[b, :count] = order[sum(blocks[:b]) : sum(blocks[: b + 1])]
    generator = torch.Generator().manual_seed(seed)
    dims = (d, d, 64) if is_latent else (d, d)
    caches = [torch.randn(len(order), size, kv_heads, x, generator=generator).half() for x in dims]
    q, rope = (torch.randn(len(lengths), t, n, x, generator=generator).half() for x in (d, 64))
    stored = [x.flatten(2) if is_flat or is_latent else x.transpose(1, 2).contiguous() for x in caches]
    options = {"query_rope": rope.transpose(1, 2).contiguous(), "key_rope": stored[2]} if is_latent else {}
    out, lse = call(
        q.transpose(1, 2).contiguous(), *stored[:2], block_table=torch.from_numpy(table), block_size=size,
        actual_seq_kvlen=lengths, input_layout="BNSD", num_query_heads=n, num_key_value_heads=kv_heads, **options,
    )  # fmt: skip
    for b, length in enumerate(lengths):
        if not length:
            assert (out[b] == 0).all()
            continue
        key, value, *k_rope = (x[table[b, : blocks[b]]].flatten(0, 1)[None, :length] for x in caches)
        whole = [torch.cat([x[b : b + 1], rope[b : b + 1]], dim=-1) if is_latent else x[b : b + 1] for x in (q,)]
        key = torch.cat([key, *k_rope], dim=-1)
        one = out[b : b + 1].transpose(1, 2), lse[b : b + 1]
        assert_is_dense(one, whole[0], key, value, np.ones((1, t, length), bool))


def test_version_1_is_version_2_by_other_names():
    q, k, v = plain(2, 3, 5)
    options = {"sparse_mode": 3, "atten_mask": TRIANGLE, "input_layout": "BSND", "num_key_value_heads": 1}
    one = FIA_1(
        q, k, v, num_heads=2, scale=0.25, softmax_lse_flag=True,
        actual_seq_lengths=[3, 2], actual_seq_lengths_kv=[5, 4], **options,
    )  # fmt: skip
    two = call(q, k, v, actual_seq_qlen=[3, 2], actual_seq_kvlen=[5, 4], **options)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    defaults = FIA(q.flatten(2), *(x.flatten(2) for x in (k, v)), num_query_heads=2, num_key_value_heads=1)
    scaled = FIA(q, k, v, softmax_scale=1.0, num_query_heads=2, num_key_value_heads=1, input_layout="BSND")
    assert torch.equal(defaults[0], scaled[0].flatten(2))  # BSH, scale 1
    assert defaults[1].shape == (0,)


# --- degenerate rows, as the table of the emulation says


def test_rows_that_the_band_empties_are_zero_and_plus_infinity():
    q, k, v = plain(1, 5, 3)
    out, lse = call(q, k, v, sparse_mode=3, atten_mask=TRIANGLE)
    assert (out[0, :2] == 0).all()
    assert torch.isposinf(lse[0, :, :2]).all()
    assert lse[0, :, 2:].isfinite().all()


@pytest.mark.parametrize(("inner_precise", "low"), [(0, LOWEST), (1, -65504.0)])
def test_rows_that_the_mask_empties_are_means_unless_repair_is_asked_for(inner_precise, low):
    q, k, v = plain(1, 3, 4)
    mask = torch.zeros(1, 1, 3, 4, dtype=torch.bool)
    mask[..., 1, :] = True
    out, lse = call(q, k, v, atten_mask=mask, inner_precise=inner_precise)
    torch.testing.assert_close(out[0, 1], v[0].float().mean(0).half().expand(2, -1), rtol=0, atol=1e-3)
    np.testing.assert_allclose(lse[0, :, 1], low, rtol=1e-4)
    out, lse = call(q, k, v, atten_mask=mask, inner_precise=inner_precise + 2)
    assert (out[0, 1] == 0).all()
    assert torch.isposinf(lse[0, :, 1]).all()
    assert lse[0, :, [0, 2]].isfinite().all()


@pytest.mark.parametrize(("t", "want"), [(1, LOWEST), (2, torch.inf)])
def test_requests_without_keys(t, want):
    q, k, v = plain(2, t, 4)
    out, lse = call(q, k, v, actual_seq_kvlen=[0, 4])
    assert (out[0] == 0).all()
    assert (lse[0] == want).all()
    assert lse[1].isfinite().all()
    out, lse = call(q, k[:, :0], v[:, :0])
    assert (out == 0).all()
    assert torch.isposinf(lse).all()


def test_pad_queries_are_zero_and_minus_infinity_and_empty_queries_come_back():
    q, k, v = plain(1, 4, 3)
    out, lse = call(q, k, v, actual_seq_qlen=[2])
    assert (out[0, 2:] == 0).all()
    assert torch.isneginf(lse[0, :, 2:]).all()
    assert call(q[:, :0], k, v)[0].shape == (1, 0, 2, 16)


def test_one_query_ignores_sparse_mode_without_rope():
    q, k, v = plain(1, 1, 9)
    torch.testing.assert_close(call(q, k, v, sparse_mode=2, atten_mask=TRIANGLE), call(q, k, v), rtol=0, atol=0)
    two = [torch.cat([x, x], dim=1) for x in (q,)]
    assert not torch.equal(call(two[0], k, v, sparse_mode=2, atten_mask=TRIANGLE)[0][:, :1], call(q, k, v)[0])


# --- the roundings, bit by bit


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("dtype", "inner_precise"), [(torch.float16, 0), (torch.float16, 1), (torch.bfloat16, 0)])
def test_bits_are_those_of_the_naive_staged_twin(is_causal, dtype, inner_precise):
    length = 700
    p = exact_problem(3, (2, 1), (length,), length, is_causal=is_causal, cp=1, chunks=1)
    tensors = [torch.from_numpy(x).to(dtype) for x in p[:3]]
    mask = {"sparse_mode": 3, "atten_mask": TRIANGLE} if is_causal else {}
    parts = {"query_rope": tensors[0][..., 128:].contiguous(), "key_rope": tensors[1][..., 128:].contiguous()}
    out, lse = FIA(
        *(x[..., :128].contiguous() for x in tensors), num_query_heads=2, num_key_value_heads=1, input_layout="BSND",
        softmax_scale=p.scale, return_softmax_lse=True, inner_precise=inner_precise, **mask, **parts,
    )  # fmt: skip
    score = np.float16 if inner_precise else np.float32
    compared = 0
    for i in np.unique(np.linspace(0, length - 1, 45).astype(int)):
        seen = np.flatnonzero(p.visible[0, i])
        for n in range(2):
            arrays = (x.float().numpy() for x in (tensors[0][0, i, n], tensors[1][0, seen, 0], tensors[2][0, seen, 0]))
            row = staged_row(*arrays, p.scale, score, str(dtype).removeprefix("torch."))
            if row.exact:
                assert_same_bits(out[0, i, n].float(), row.out.astype(np.float32))
                assert_same_bits(lse[0, n, i, 0], np.float32(row.lse))
                compared += 1
    assert compared >= 60


@pytest.mark.parametrize("scale", [192**-0.5, 0.01, 2.0])
@pytest.mark.parametrize("inner_precise", [0, 1])
def test_bits_with_two_keys_of_general_logits(scale, inner_precise):
    rng = np.random.default_rng(int(scale * 100))
    q, k = (rng.integers(-24, 25, size=(1, m, 2, 64)) / 8 for m in (40, 2))
    arrays = [x.astype(np.float16) for x in (q, k, rng.normal(size=(1, 2, 2, 64)))]
    out, lse = FIA(
        *map(torch.from_numpy, arrays), num_query_heads=2, input_layout="BSND", softmax_scale=scale,
        return_softmax_lse=True, inner_precise=inner_precise,
    )  # fmt: skip
    for i, n in np.ndindex(40, 2):
        row = staged_row(
            arrays[0][0, i, n], arrays[1][0, :, n], arrays[2][0, :, n], scale, (np.float32, np.float16)[inner_precise]
        )
        assert row.exact
        assert_same_bits(out[0, i, n], row.out)
        assert_same_bits(lse[0, n, i, 0], np.float32(row.lse))


def test_scores_saturate_in_high_performance_mode_only():
    q, k = torch.full((1, 2, 1, 16), 200.0).half(), torch.full((1, 2, 1, 16), 200.0).half()  # q·k = 640,000
    v = torch.randn(1, 2, 1, 16).half()
    for inner_precise, want in ((0, 0.001 * 640000), (1, float(np.float16(0.001) * np.float16(65504)))):
        out, lse = FIA(
            q, k, v, input_layout="BSND", softmax_scale=0.001, return_softmax_lse=True, inner_precise=inner_precise
        )
        assert (abs(lse - want - np.log(2)) < 1e-3).all()
        assert out.isfinite().all()


def test_one_query_and_the_latent_are_computed_in_high_precision_whatever_is_asked():
    """A2's tiling of these kernels looks at the flag for quantised caches only."""
    q, k, v = plain(1, 2, 40, d=64)
    for tokens, is_same in ((1, True), (2, False)):
        a, b = (call(q[:, :tokens] * 8, k, v, inner_precise=x) for x in (0, 1))
        assert torch.equal(a[1], b[1]) == is_same
    q, k, v = plain(1, 3, 40, n=4, d=512)
    rope = {"query_rope": q[..., :64].contiguous(), "key_rope": k[..., :64].contiguous()}
    a, b = (call(q, k, v, inner_precise=x, **rope) for x in (0, 1))
    assert torch.equal(a[1], b[1])


# --- npu_attention_update


def naive_update(lses, outs, dtype):
    """By element, in float32, in the order of the lists; K ≤ 16."""
    lses = [np.where(np.isposinf(x), np.float32(-np.inf), x) for x in lses]
    top = np.max(lses, axis=0)
    with np.errstate(invalid="ignore"):
        total = np.zeros_like(top)
        for x in lses:
            total = total + exp(x - top)
        lse = top + torch.log(torch.from_numpy(total)).numpy()
        out = np.zeros(outs[0].shape, np.float32)
        for x, o in zip(lses, outs, strict=True):
            out = out + o.astype(np.float32) * exp(x - lse)[:, None]
    return out.astype(dtype), lse


def lists(seed, k, n=5, h=8, dtype=np.float16):
    rng = np.random.default_rng(seed)
    lses = [rng.normal(size=n).astype(np.float32) * 3 for _ in range(k)]
    return lses, [rng.normal(size=(n, h)).astype(dtype) for _ in range(k)]


def update(lses, outs, update_type=1):
    return UPDATE([torch.from_numpy(x) for x in lses], [torch.from_numpy(x) for x in outs], update_type)


@given(SEEDS, st.integers(1, 16), st.sampled_from((np.float16, np.float32)), st.integers(0, 3))
def test_update_bits_are_those_of_the_naive_twin(seed, k, dtype, infinite):
    lses, outs = lists(seed, k, dtype=dtype)
    for i in range(min(infinite, k - 1)):
        lses[i][:2] = -np.inf if i % 2 else np.inf
    out, lse = update(lses, outs)
    want_out, want_lse = naive_update(lses, outs, dtype)
    assert_same_bits(out, want_out)
    assert_same_bits(lse, want_lse)
    first, second = update(lses, outs, 0)
    assert_same_bits(first, want_out)
    assert second is None  # undefined


@given(SEEDS, st.integers(2, 40), st.data())
def test_permuted_partials_in_exact_mode_change_at_most_the_last_place(seed, k, data):
    lses, outs = lists(seed, k, dtype=np.float32)
    order = data.draw(st.permutations(range(k)))
    with arithmetic("exact"):
        a, b = update(lses, outs), update([lses[i] for i in order], [outs[i] for i in order])
    for x, y in zip(a, b, strict=True):
        assert (abs(x - y).numpy() <= np.spacing(abs(x.numpy()))).all()


@given(SEEDS, st.integers(1, 40), st.sampled_from((np.float16, np.float32)))
def test_update_in_exact_mode_is_rounded_once(seed, k, dtype):
    lses, outs = lists(seed, k, dtype=dtype)
    with arithmetic("exact"):
        out, lse = update(lses, outs)
    x = np.array(lses, np.float64)
    total = np.log(np.exp(x).sum(0))
    want = (np.exp(x - total)[..., None] * np.array(outs, np.float64)).sum(0)
    assert_rounded_once(lse, total)
    size = np.abs(np.array(outs, np.float64)).max()
    assert (abs(out.double().numpy() - want) <= np.spacing(abs(want).astype(dtype)) + 1e-7 * size).all()


@given(SEEDS, st.integers(17, 40))
def test_more_than_16_partials_are_merged_fifteen_at_a_time(seed, k):
    lses, outs = lists(seed, k, dtype=np.float32)
    carried = np.zeros_like(outs[0]), np.full_like(lses[0], -1e38)
    for start in range(0, k, 15):
        carried = naive_update(
            [carried[1], *lses[start : start + 15]], [carried[0], *outs[start : start + 15]], np.float32
        )
    out, lse = update(lses, outs)
    assert_same_bits(out, carried[0])
    assert_same_bits(lse, carried[1])


def test_update_when_nobody_saw_a_key():
    nothing = np.full(5, -np.inf, np.float32)
    _, outs = lists(0, 17)
    for fill in (-np.inf, np.inf):
        out, lse = update([np.full_like(nothing, fill)] * 16, outs[:16])
        assert out.isnan().all()
        assert lse.isnan().all()
        out, lse = update([np.full_like(nothing, fill)] * 17, outs)
        assert (out == 0).all()
        np.testing.assert_allclose(lse, -1e38, rtol=1e-6)


def test_merge_keeps_the_meaning_of_no_keys():
    some = Partial(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1))
    none = Partial(torch.zeros(1, 2, 1, 8), torch.full((1, 2, 1), -torch.inf))
    both = merge_partials([none, none])
    assert (both.out == 0).all()
    assert torch.isneginf(both.lse).all()
    for order in ([some, none], [none, some, none]):
        torch.testing.assert_close(tuple(merge_partials(order)), tuple(some), rtol=3e-7, atol=0)


# --- what is refused


GOOD = {"num_query_heads": 2, "num_key_value_heads": 1, "input_layout": "BSND"}
X, KV = torch.zeros(2, 3, 2, 128).half(), torch.zeros(2, 5, 1, 128).half()
PACK = {"input_layout": "TND", "num_key_value_heads": 2, "actual_seq_qlen": [3], "actual_seq_kvlen": [5]}
T, TK = torch.zeros(3, 2, 128).half(), torch.zeros(5, 2, 128).half()
PAGES = {"block_table": torch.zeros(2, 1, dtype=torch.int32), "block_size": 128, "actual_seq_kvlen": [5, 5]}
CACHE = torch.zeros(1, 128, 128).half()
ROPE = {"query_rope": torch.zeros(2, 3, 2, 64).half(), "key_rope": torch.zeros(2, 5, 1, 64).half()}
REFUSALS = {
    "no heads": ({"num_query_heads": 0}, "numHeads should be greater than 0, but got 0"),
    "layout": ({"input_layout": "SBH"}, "layout only support BSH, BSND, TND, NTD"),
    "query dims": ({"input_layout": "BSH"}, "query's dim should be consistent with that of Layout"),
    "value dims": ({"v": KV[0]}, "value'dim should equal to query's dim!"),
    "paged value dims": ({"v": KV[0, 0], **PAGES}, "value's dim should be 3/4/5, but got 2"),
    "paged nz": (
        {"v": torch.zeros(1, 1, 8, 16, 8).half(), **PAGES},
        "in NZ format it must be \\[blocks, 1, D/16, block, 16\\]",
    ),
    "heads of query": ({"num_query_heads": 4}, "query has 2 heads, the arguments say 4"),
    "many heads": ({"num_query_heads": 257, "q": torch.zeros(2, 3, 257, 128).half()}, "257 heads, at most 256"),
    "not divisible": ({"num_query_heads": 3, "num_key_value_heads": 2}, "must be a multiple of"),
    "dtype": ({"q": X.float()}, "not implemented in the emulation: query of torch.float32"),
    "int8 keys": ({"k": KV.to(torch.int8)}, "not implemented in the emulation: key of torch.int8"),
    "head dim": ({"q": X[..., :8], "k": KV[..., :8], "v": KV[..., :8]}, "head dim 8, must be a multiple of 16"),
    "dims differ": ({"k": KV[..., :64]}, "head dims of query and key are 128 and 64"),
    "value dim": ({"v": KV[..., :64]}, "head dims of key and value are 128 and 64"),
    "kv tokens": ({"v": KV[:, :4]}, "key and value must have the same tokens"),
    "batches": ({"k": KV[:1], "v": KV[:1]}, "2 queries, 1 keys"),
    "pse": ({"pse_shift": X}, "not implemented in the emulation: pse_shift"),
    "sink": ({"learnable_sink": X}, "not implemented in the emulation: learnable_sink"),
    "quant": ({"quant_scale_out": X}, "not implemented in the emulation: quant_scale_out"),
    "quant mode": ({"query_quant_mode": 3}, "not implemented in the emulation: query_quant_mode"),
    "tree mask": ({"sparse_mode": 9}, "not implemented in the emulation: sparse_mode 9"),
    "sparse 5": ({"sparse_mode": 5}, "161002 .* sparse_mode is 5"),
    "inner_precise": ({"inner_precise": 4}, "161002 .* inner_precise is 4"),
    "no mask": ({"sparse_mode": 3}, "161002 .* sparse_mode 3 needs atten_mask"),
    "no full mask": ({"sparse_mode": 1}, "161002 .* sparse_mode 1 needs atten_mask"),
    "mask shape": ({"sparse_mode": 3, "atten_mask": TRIANGLE[:512, :512]}, "sparse_mode 3 needs \\(2048, 2048\\)"),
    "mask dtype": ({"sparse_mode": 3, "atten_mask": TRIANGLE.half()}, "must be bool, int8 or uint8"),
    "mask lower": ({"sparse_mode": 2, "atten_mask": TRIANGLE.T.contiguous()}, "ones above the diagonal .*unsafe"),
    "mask shifted": ({"sparse_mode": 4, "atten_mask": TRIANGLE.triu(2)}, "ones above the diagonal .*unsafe"),
    "full mask shape": ({"atten_mask": torch.zeros(2, 1, 3, 4, dtype=torch.bool)}, "atten_mask is \\(2, 1, 3, 4\\)"),
    "q lengths": ({"actual_seq_qlen": [3, 4]}, "actual_seq_qlen \\[3, 4\\] of 3 tokens"),
    "q lengths count": (
        {"q": X.expand(2, 3, 2, 128)[[0, 1, 1]], "k": KV[[0, 1, 1]], "v": KV[[0, 1, 1]], "actual_seq_qlen": [3, 3]},
        "2 numbers for 3 requests",
    ),
    "kv lengths": ({"actual_seq_kvlen": [6, 5]}, "actual_seq_kvlen \\[6, 5\\] of 5 tokens"),
    "one rope": ({"query_rope": ROPE["query_rope"]}, "both be given or neither"),
    "rope dim": ({k: v[..., :32] for k, v in ROPE.items()}, "rope dims are \\(32, 32\\), must be 64"),
    "rope with 64": (
        {"q": X[..., :64], "k": KV[..., :64], "v": KV[..., :64], **ROPE},
        "with rope head dims must be 128 or 512",
    ),
    "pack without lengths": ({"q": T, "k": TK, "v": TK, **PACK, "actual_seq_qlen": None}, "packed tokens need"),
    "pack lengths": ({"q": T, "k": TK, "v": TK, **PACK, "actual_seq_qlen": [2]}, "must end at the 3 tokens"),
    "pack not cumulative": ({"q": T, "k": TK, "v": TK, **PACK, "actual_seq_kvlen": [7, 5]}, "must not decrease"),
    "pack counts": ({"q": T, "k": TK, "v": TK, **PACK, "actual_seq_kvlen": [1, 5]}, "2 numbers for 1 requests"),
    "pack gqa fast": (
        {"q": T, "k": TK[:, :1], "v": TK[:, :1], **PACK, "num_key_value_heads": 1, "inner_precise": 1},
        "packed tokens with inner_precise 1.*V4",
    ),
    "pack mode 2": ({"q": T, "k": TK, "v": TK, **PACK, "sparse_mode": 2, "atten_mask": TRIANGLE}, "packed .* 0, 3, 4"),
    "pack dims": ({"q": T[..., :96], "k": TK[..., :96], "v": TK[..., :96], **PACK}, "packed tokens with head dims 96"),
    "pack mask": ({"q": T, "k": TK, "v": TK, **PACK, "atten_mask": TRIANGLE}, "only without mask"),
    "pack repair": ({"q": T, "k": TK, "v": TK, **PACK, "inner_precise": 2}, "packed tokens with inner_precise 2"),
    "bfloat16 fast": ({"q": X.bfloat16(), "k": KV.bfloat16(), "v": KV.bfloat16(), "inner_precise": 1}, "float16 only"),
    "pages without lengths": ({"k": CACHE, "v": CACHE, **PAGES, "actual_seq_kvlen": None}, "paging needs"),
    "page size": ({"k": CACHE, "v": CACHE, **PAGES, "block_size": 64}, "block_size 64, the cache has blocks of 128"),
    "page size 24": (
        {"k": CACHE[:, :24], "v": CACHE[:, :24], **PAGES, "block_size": 24},
        "block_size 24: a multiple of 16 up to 1024 .*V4",
    ),
    "page size 96 of 256 dims": (
        {
            "q": torch.zeros(2, 3, 2, 256).half(),
            "k": torch.zeros(1, 96, 256).half(),
            "v": torch.zeros(1, 96, 256).half(),
            **PAGES,
            "block_size": 96,
        },
        "block_size 96: a multiple of 128 up to 1024 .*V4",
    ),
    "page size 1024 of one query": (
        {
            "q": torch.zeros(2, 1, 2, 256).half(),
            "k": torch.zeros(1, 1024, 256).half(),
            "v": torch.zeros(1, 1024, 256).half(),
            **PAGES,
            "block_size": 1024,
        },
        "block_size 1024: a multiple of 16 up to 512 .*V4",
    ),
    "wide pages": (
        {
            "num_query_heads": 256,
            "num_key_value_heads": 256,
            "q": torch.zeros(2, 3, 256, 512).half(),
            "k": torch.zeros(1, 1, 256 * 512).half(),
            "v": torch.zeros(1, 1, 256 * 512).half(),
            **PAGES,
            "block_size": 1,
        },
        "131072 numbers a token, at most 65535: heads first",
    ),
    "page id": (
        {"k": CACHE, "v": CACHE, **PAGES, "block_table": torch.tensor([[0], [-1]], dtype=torch.int32)},
        "block_table .*unsafe",
    ),
    "page table dtype": ({"k": CACHE, "v": CACHE, **PAGES, "block_table": torch.zeros(2, 1).long()}, "must be int32"),
    "pages of two kinds": ({"k": CACHE[:, None], "v": CACHE, **PAGES}, "key has 4 dims, must have 3"),
    "pages and a mask that is too narrow": (
        {"k": CACHE, "v": CACHE, **PAGES, "atten_mask": torch.zeros(3, 5, dtype=torch.bool)},
        "keys: at least 128, all that the pages hold",
    ),
    "long mask of one query": (
        {
            "q": X[:, :1],
            "k": torch.zeros(2, 513, 1, 128).half(),
            "v": torch.zeros(2, 513, 1, 128).half(),
            "atten_mask": torch.zeros(1, 1, 1, 513, dtype=torch.bool),
        },
        "more than 512 keys is misread \\(unsafe\\)",
    ),
    "empty with rope": ({"k": KV[:, :0], "v": KV[:, :0], **ROPE, "key_rope": ROPE["key_rope"][:, :0]}, "empty tensors"),
    "latent heads": (
        {
            "q": torch.zeros(2, 3, 3, 512).half(),
            "k": torch.zeros(2, 5, 1, 512).half(),
            "v": torch.zeros(2, 5, 1, 512).half(),
            "num_query_heads": 3,
            "query_rope": torch.zeros(2, 3, 3, 64).half(),
            "key_rope": ROPE["key_rope"],
        },
        "head dim 512 with 3 heads",
    ),
    "latent sparse 2": (
        {
            "q": torch.zeros(2, 3, 2, 512).half(),
            "k": torch.zeros(2, 5, 1, 512).half(),
            "v": torch.zeros(2, 5, 1, 512).half(),
            "sparse_mode": 2,
            "atten_mask": TRIANGLE,
            **ROPE,
        },
        "head dim 512 with sparse_mode 2",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_operator_refuses(what):
    changes, phrase = REFUSALS[what]
    arguments = GOOD | {"q": X, "k": KV, "v": KV} | changes
    tensors = [arguments.pop(name) for name in "qkv"]
    with pytest.raises(RuntimeError, match=phrase):
        FIA(*tensors, **arguments)


def test_the_good_calls_are_good():
    assert FIA(X, KV, KV, **GOOD)[0].shape == X.shape
    assert FIA(T, TK, TK, **(GOOD | PACK))[0].shape == T.shape
    assert FIA(X, CACHE, CACHE, **GOOD, **PAGES)[0].shape == X.shape
    assert FIA(X, KV, KV, **GOOD, **ROPE)[0].shape == X.shape


N5, N58 = torch.zeros(5), torch.zeros(5, 8)
UPDATES = {
    "type": ((([N5], [N58], 2)), "update_type is 2, must be 0 or 1"),
    "sizes": (([N5, N5], [N58], 1), "2 lse and 1 local_out"),
    "too many": (([N5] * 129, [N58] * 129, 1), "129 partials, must be 1 to 128"),
    "lse dims": (([N58], [N58], 1), r"lse\[0\] has 2 dims, must be 1"),
    "out dims": (([N5], [N58[None]], 1), r"local_out\[0\] has 3 dims, must be 2"),
    "lse dtype": (([N5.half()], [N58], 1), r"lse\[0\] is torch.float16, must be float32"),
    "out dtype": (([N5], [N58.double()], 1), "must be float32, float16 or bfloat16"),
    "dtypes differ": (([N5, N5], [N58, N58.half()], 1), "must be the same dtype"),
    "shapes differ": (([N5, N5], [N58, N58[:4]], 1), r"local_out\[1\] \(4, 8\) must be"),
    "lse shape": (([N5[:4]], [N58], 1), r"lse\[0\] \(4,\)"),
    "H 12": (([N5], [torch.zeros(5, 12)], 1), "head dim 12, must be a multiple of 8"),
    "H 520": (([N5], [torch.zeros(5, 520)], 1), "head dim 520, must be a multiple of 8 from 8 to 512"),
}


@pytest.mark.parametrize("what", UPDATES)
def test_update_refuses(what):
    arguments, phrase = UPDATES[what]
    with pytest.raises(RuntimeError, match=f"npu_attention_update: 161002 .*{phrase}"):
        UPDATE(*arguments)


def block(dims=(128, 128), n=2, k=2, dtype=torch.float16, b=1, t=4, s=5):
    (h, v) = dims
    return (
        torch.zeros(b, t, n, h, dtype=dtype),
        torch.zeros(b, s, k, h, dtype=dtype),
        torch.zeros(b, s, k, v, dtype=dtype),
    )


WRAPPER = {
    "float32": (block(dtype=torch.float32), {}, "takes float16, bfloat16"),
    "dims": (block((192, 64)), {}, "head dims 192 and 64"),
    "dims 24": (block((24, 24)), {}, "head dims 24 and 24"),
    "heads": (block(n=3, k=2), {}, "N is a multiple of K"),
    "latent without rope": (block((512, 512)), {"layout": "TND", "is_causal": True}, "TND takes head dims 128"),
    "many heads": (block(n=257, k=257), {}, "at most 256"),
    "latent heads": (block((576, 512), n=2, k=2), {}, "K = 1, N a power of 2"),
    "latent 3": (block((576, 512), n=3, k=1), {}, "K = 1, N a power of 2"),
    "layout": (block(), {"layout": "SBH"}, "layout 'SBH' is none of"),
    "lengths": (block(), {"kv_lengths": (6,)}, "kv_lengths \\(6,\\) must be 1 numbers from 0 to 5"),
    "q lengths": (block(), {"q_lengths": (1, 1)}, "q_lengths \\(1, 1\\) must be 1 numbers"),
    "scale": (block(), {"scale": float("nan")}, "scale nan is not finite"),
    "pack dims": (block((96, 96)), {"layout": "TND", "is_causal": True}, "TND takes head dims 128"),
    "pack gqa": (block(k=1), {"layout": "TND", "is_causal": True}, "TND takes float16 only with as many key heads"),
    "pack bug": (block(), {"layout": "TND"}, "known to return plain means"),
    "three dims": (tuple(x[0] for x in block()), {}, "query has 3 dims"),
}


@pytest.mark.parametrize("what", WRAPPER)
def test_wrapper_refuses_before_the_call(what, monkeypatch):
    tensors, options, rule = WRAPPER[what]
    monkeypatch.setattr(torch.ops.npu, "npu_fused_infer_attention_score_v2", None)
    with pytest.raises(InputError, match=rule):
        fused_infer_block(*tensors, **({"is_causal": False, "scale": 0.1} | options))


GOOD_PARTIAL = Partial(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1))


@pytest.mark.parametrize(
    ("partials", "rule"),
    [
        ([], "0 partials; npu_attention_update takes 1 to 16"),
        ([GOOD_PARTIAL] * 17, "17 partials"),
        ([Partial(*(x.double() for x in GOOD_PARTIAL))], "takes float16, bfloat16 and float32"),
        ([Partial(torch.zeros(1, 2, 1, 12), torch.zeros(1, 2, 1))], "V a multiple of 8"),
        ([GOOD_PARTIAL, Partial(torch.zeros(1, 2, 1, 8).half(), torch.zeros(1, 2, 1))], "all must have"),
        ([GOOD_PARTIAL._replace(lse=torch.full((1, 2, 1), torch.inf))], "an lse is .inf or NaN"),
        ([GOOD_PARTIAL._replace(lse=torch.full((1, 2, 1), torch.nan))], "an lse is .inf or NaN"),
    ],
)
def test_merge_refuses_before_the_call(partials, rule, monkeypatch):
    monkeypatch.setattr(torch.ops.npu, "npu_attention_update", None)
    with pytest.raises(InputError, match=rule):
        merge_partials(partials)
