"""Family 3: npu_fusion_attention on a CPU, merged by npu_ring_attention_update."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_judge import assert_near_dense, assert_same_bits
from npu_strategies import block_problems, exact_problem, exp, staged_row
from oracle import dense
from strategies import examples

import npu_backend  # noqa: F401 (declares the operators)
from npu_backend.emulation import arithmetic
from npu_backend.errors import InputError
from npu_backend.operators import Carried, fusion_block, fusion_update

FUSION = torch.ops.npu.npu_fusion_attention
UPDATE = torch.ops.npu.npu_ring_attention_update
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
LOWEST = torch.finfo(torch.float32).min
ALL = (torch.float16, torch.bfloat16, torch.float32)
SEEDS = st.integers(0, 2**32 - 1)


# --- the wrapper: everything the contract can express


@examples(0.5)
@given(block_problems([(192, 128), (64, 64), (72, 24)], dtypes=ALL))
def test_packed_block_is_dense_attention(p):
    assert_near_dense(p, fusion_block(*p.tensors, **p.options).partial())


@examples(0.25)
@given(block_problems([(192, 128), (64, 32)], dtypes=ALL, has_pads=False))
def test_sbh_block_is_dense_attention(p):
    assert_near_dense(p, fusion_block(*p.tensors, layout="SBH", **p.options).partial())


@examples(0.3)
@given(block_problems([(192, 128), (64, 64)], dtypes=ALL, is_causal=False), st.sampled_from(("SBH", "TND")), st.data())
def test_blocks_merged_in_any_order_are_dense_attention(p, layout, data):
    cuts = sorted({0, p.key.shape[1], *data.draw(st.lists(st.integers(0, p.key.shape[1]), max_size=3))})
    carried = None
    pieces = data.draw(st.permutations(list(pairwise(cuts))))
    for a, b in pieces:
        block = fusion_block(
            p.query, p.key[:, a:b], p.value[:, a:b], is_causal=False, scale=p.scale, q_lengths=p.q_lengths,
            kv_lengths=tuple(min(max(n - a, 0), b - a) for n in p.kv_lengths),
        )  # fmt: skip
        carried = block if carried is None else fusion_update(carried, block, layout=layout)
    assert carried is not None
    assert_near_dense(p, carried.partial(), merges=len(pieces))


@examples(0.2)
@given(SEEDS, st.sampled_from(("SBH", "TND")))
def test_merging_a_block_without_keys_changes_nothing(seed, layout):
    rng = torch.Generator().manual_seed(seed)
    out, maximum, total = (torch.randn(2, 3, 2, *more, generator=rng) for more in ((64,), (), ()))
    some = Carried(out.half(), maximum, 1 + total.abs())
    none = Carried(torch.zeros_like(some.out), torch.full_like(maximum, -torch.inf), torch.zeros_like(total))
    torch.testing.assert_close(tuple(fusion_update(some, none, layout=layout)), tuple(some), rtol=0, atol=0)
    torch.testing.assert_close(tuple(fusion_update(none, some, layout=layout)), tuple(some), rtol=0, atol=0)
    both = fusion_update(none, none, layout=layout)
    torch.testing.assert_close(tuple(both), tuple(none), rtol=0, atol=0)
    assert torch.isneginf(both.partial().lse).all()


# --- the operator: masks, layouts, where the statistics lie


def plain(b, t, s, n=2, k=1, d=16, v=16, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(b, m, h, x, generator=rng).to(dtype) for m, h, x in ((t, n, d), (s, k, d), (s, k, v))]


def blind_rows(b, t, s, options):
    """Rows whose band lies beyond the keys, in mode 0 with a mask; none otherwise."""
    i = np.arange(t)
    is_banded = "atten_mask" in options and options.get("sparse_mode", 0) == 0
    return np.broadcast_to((i - options["pre_tockens"] >= s) if is_banded else np.zeros(t, bool), (b, t)).copy()


@examples(0.1)
@given(SEEDS, st.integers(1, 2), st.integers(1, 20), st.integers(1, 30), st.integers(0, 9), st.integers(0, 9))
def test_sparse_modes_show_what_the_table_says(seed, b, t, s, before, after):
    q, k, v = plain(b, t, s, seed=seed)
    hidden = np.random.default_rng(seed).random((b, 1, t, s)) < 0.4
    hidden[..., 0] = False
    mask, shown = torch.from_numpy(hidden), ~hidden[:, 0]
    i, j = np.arange(t)[:, None], np.arange(s)[None]
    end, band = i + s - t, {"pre_tockens": before, "next_tockens": after}
    cases = (
        ({**band}, np.ones((t, s), bool)),
        ({"atten_mask": mask, **band}, shown & (j >= i - before) & (j <= i + after)),
        ({"sparse_mode": 1, "atten_mask": mask.to(torch.uint8), **band}, shown),
        ({"sparse_mode": 1, "atten_mask": mask[0, 0]}, shown[:1]),
        ({"sparse_mode": 2, "atten_mask": TRIANGLE}, j <= i),
        ({"sparse_mode": 3, "atten_mask": TRIANGLE}, j <= end),
        ({"sparse_mode": 4, "atten_mask": TRIANGLE, **band}, (j >= end - before) & (j <= end + after)),
    )
    for options, visible in cases:
        seen = np.broadcast_to(visible, (b, t, s))
        out, maximum, total, empty, *numbers = FUSION(q, k, v, 2, "BSND", scale=0.25, **options)
        want_out, want_lse = dense(*(x.double().numpy() for x in (q, k, v)), scale=0.25, visible=seen)
        saw = seen.any(-1)
        np.testing.assert_allclose(out.double()[torch.from_numpy(saw)], want_out[saw], rtol=0, atol=3e-6)
        lse = (maximum + total.log()).double().transpose(1, 2).numpy()  # [B, S, N, 8]
        np.testing.assert_allclose(lse[saw], np.repeat(want_lse[saw][..., None], 8, -1), rtol=0, atol=2e-6)
        assert (empty.shape, numbers) == ((0,), [0, 0, 0])
        # Rows whose mask hides all are means of all values: hidden scores are replaced, not minus infinity. Rows that
        # the band alone empties the operator finds by itself, and zeroes as under inner_precise 2.
        nobody = torch.from_numpy(~saw)
        blind = nobody if options.get("sparse_mode", 0) > 1 else torch.from_numpy(blind_rows(b, t, s, options))
        masked = nobody & ~blind
        assert (maximum.transpose(1, 2)[nobody] == LOWEST).all()
        assert (total.transpose(1, 2)[masked] == s).all()
        assert (total.transpose(1, 2)[blind] == -LOWEST).all()
        mean = v.mean(1, keepdim=True).expand(b, t, 2, 16)
        torch.testing.assert_close(out[masked], mean[masked], rtol=0, atol=1e-5)
        assert (out[blind] == 0).all()
        zeroed = FUSION(q, k, v, 2, "BSND", scale=0.25, inner_precise=2, **options)
        assert (zeroed[0][nobody] == 0).all()
        assert (zeroed[1].transpose(1, 2)[nobody] == LOWEST).all()
        assert (zeroed[2].transpose(1, 2)[nobody] == -LOWEST).all()
        assert torch.equal(zeroed[0][~nobody], out[~nobody])


@examples(0.1)
@given(SEEDS, st.integers(1, 3), st.booleans(), st.sampled_from(("BNSD", "BSH")))
def test_masks_with_a_batch_axis_a_head_axis_or_both(seed, b, zeroes, layout):
    q, k, v = plain(b, 6, 9, n=4, k=2, seed=seed)
    rng = np.random.default_rng(seed)
    lay = {"BNSD": lambda x: x.transpose(1, 2).contiguous(), "BSH": lambda x: x.flatten(2)}[layout]
    for lead in ((b, 4), (1, 4), (b, 1), (1, 1)):
        hidden = rng.random((*lead, 6, 9)) < 0.6
        hidden[:, :, 2] = True
        whole = np.broadcast_to(hidden, (b, 4, 6, 9))
        out, maximum, total, *_ = FUSION(
            lay(q), lay(k), lay(v), 4, layout, scale=0.25, sparse_mode=1, atten_mask=torch.from_numpy(hidden),
            inner_precise=2 * zeroes,
        )  # fmt: skip
        out = out.transpose(1, 2) if layout == "BNSD" else out.unflatten(2, (4, 16))
        for n in range(4):
            one = (x.double().numpy() for x in (q[:, :, n : n + 1], k[:, :, n // 2, None], v[:, :, n // 2, None]))
            want, lse = dense(*one, scale=0.25, visible=~whole[:, n])
            saw = ~whole[:, n].all(-1)
            np.testing.assert_allclose(out[:, :, n][torch.from_numpy(saw)], want[:, :, 0][saw], rtol=0, atol=3e-6)
            np.testing.assert_allclose((maximum + total.log())[:, n, :, 5][saw], lse[:, :, 0][saw], rtol=0, atol=2e-6)
            nobody = out[:, :, n][torch.from_numpy(~saw)]
            mean = v[:, :, n // 2].mean(1, keepdim=True).expand(b, 6, 16)[torch.from_numpy(~saw)]
            torch.testing.assert_close(nobody, 0 * mean if zeroes else mean, rtol=0, atol=1e-5)


@examples(0.1)
@given(SEEDS, st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4))
def test_a_packs_mask_is_that_of_its_longest_request_and_others_read_its_corner(seed, lengths):
    q_lengths, kv_lengths = zip(*lengths, strict=True)
    q, k, v = (x[0] for x in plain(1, sum(q_lengths), sum(kv_lengths), seed=seed))
    mask = torch.from_numpy(np.random.default_rng(seed).random((max(q_lengths), max(kv_lengths))) < 0.4)
    mask[:, 0] = False
    ends = {"actual_seq_qlen": list(np.cumsum(q_lengths)), "actual_seq_kvlen": list(np.cumsum(kv_lengths))}
    out = FUSION(q, k, v, 2, "TND", atten_mask=mask, sparse_mode=1, **ends)[0]
    a = b = 0
    for m, n in lengths:
        some = (x[None, start : start + count] for x, start, count in ((q, a, m), (k, b, n), (v, b, n)))
        want = FUSION(*some, 2, "BSND", atten_mask=mask[:m, :n].contiguous(), sparse_mode=1)[0][0]
        torch.testing.assert_close(out[a : a + m], want, rtol=0, atol=1e-6)
        a, b = a + m, b + n


def test_trailing_zeros_leave_requests_out():
    q, k, v = (x[0] for x in plain(1, 9, 11))
    two = {"actual_seq_qlen": [2, 5], "actual_seq_kvlen": [3, 6]}
    want = FUSION(q[:5], k[:6], v[:6], 2, "TND", **two)
    got = FUSION(q, k, v, 2, "TND", actual_seq_qlen=[2, 5, 0, 0], actual_seq_kvlen=[3, 6, 0, 0])
    for x, y in zip(got[:3], want[:3], strict=True):
        assert x.shape[0] == 9
        assert torch.equal(x[:5], y)
        assert x[5:].isnan().all()


def test_what_a_seed_an_offset_and_a_mode_without_a_mask_do_is_nothing():
    q, k, v = plain(1, 4, 6)
    want = FUSION(q, k, v, 2, "BSND", scale=0.25)
    for options in ({"seed": 5}, {"offset": 16}, {"seed": -1, "offset": 2**40}, {"inner_precise": 1},
                    {"sparse_mode": 3}, {"sparse_mode": 4, "pre_tockens": 0, "next_tockens": 0}):  # fmt: skip
        got = FUSION(q, k, v, 2, "BSND", scale=0.25, **options)
        assert all(torch.equal(x, y) for x, y in zip(got[:3], want[:3], strict=True))
        assert got[4:] == (0, 0, 0)  # as the vendor's shape inference has them
    positional = [None, None, None, 0.25, 1.0, 2147483647, 2147483647, 0, None, None, None, 0, True, False, "", None,
                  None, 7, 8]  # fmt: skip
    assert torch.equal(FUSION(q, k, v, 2, "BSND", *positional)[0], want[0])


def test_layouts_are_transpositions():
    q, k, v = plain(2, 5, 7, n=4, k=2, v=8)
    base = FUSION(q, k, v, 4, "BSND")
    for layout, lay in {
        "BNSD": lambda x: x.transpose(1, 2).contiguous(),
        "BSH": lambda x: x.flatten(2),
        "SBH": lambda x: x.transpose(0, 1).flatten(2),
    }.items():
        got = FUSION(lay(q), lay(k), lay(v), 4, layout)
        assert torch.equal(got[0], lay(base[0]))
        assert torch.equal(got[1], base[1])
        assert torch.equal(got[2], base[2])
    assert base[1].shape == (2, 4, 5, 8)


@examples(0.25)
@given(SEEDS, st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=4))
def test_packed_statistics_lie_sequence_by_sequence_heads_first(seed, lengths):
    q_lengths, kv_lengths = zip(*lengths, strict=True)
    if not sum(q_lengths):
        return
    q, k, v = (x[0] for x in plain(1, sum(q_lengths), sum(kv_lengths), seed=seed))
    ends = {"actual_seq_qlen": list(np.cumsum(q_lengths)), "actual_seq_kvlen": list(np.cumsum(kv_lengths))}
    out, maximum, total, *_ = FUSION(q, k, v, 2, "TND", **ends)
    natural = FUSION(q, k, v, 2, "TND", softmax_layout="TND", **ends)
    assert maximum.shape == natural[1].shape == (sum(q_lengths), 2, 8)
    memory = [x.flatten().numpy() for x in (maximum, total)]
    at = a = b = 0
    for m, n in lengths:
        if m:
            one = FUSION(q[None, a : a + m], k[None, b : b + n], v[None, b : b + n], 2, "BSND")
            np.testing.assert_allclose(out[a : a + m], one[0][0], rtol=0, atol=1e-5)
            for flat, inside, want in zip(memory, natural[1:3], one[1:3], strict=True):
                block = flat[at : at + 2 * m * 8].reshape(2, m, 8)
                np.testing.assert_allclose(block, want[0], rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(inside[a : a + m].transpose(0, 1), want[0], rtol=1e-5, atol=1e-6)
        at, a, b = at + 2 * m * 8, a + m, b + n


def test_empty_tensors_are_zeros_and_a_packed_sequence_without_keys_is_unwritten():
    q, k, v = plain(1, 3, 4)
    for x in FUSION(q, k[:, :0], v[:, :0], 2, "BSND")[:3]:
        assert (x == 0).all()
    assert FUSION(q[:, :0], k, v, 2, "BSND")[0].shape == (1, 0, 2, 16)
    out, maximum, total, *_ = FUSION(
        q[0], k[0], v[0], 2, "TND", softmax_layout="TND", actual_seq_qlen=[1, 3], actual_seq_kvlen=[0, 4]
    )
    for x in (out, maximum, total):
        assert x[:1].isnan().all()
        assert x[1:].isfinite().all()


# --- the roundings, bit by bit


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bits_are_those_of_the_naive_staged_twin(is_causal, dtype):
    length = 700
    p = exact_problem(5, (2, 1), (length,), length, is_causal=is_causal, cp=1, chunks=1)
    tensors = [torch.from_numpy(x).to(dtype) for x in p[:3]]
    mask = {"sparse_mode": 3, "atten_mask": TRIANGLE} if is_causal else {}
    out, maximum, total, *_ = FUSION(*tensors, 2, "BSND", scale=p.scale, **mask)
    compared = 0
    for i in np.unique(np.linspace(0, length - 1, 45).astype(int)):
        seen = np.flatnonzero(p.visible[0, i])
        for n in range(2):
            arrays = (x.float().numpy() for x in (tensors[0][0, i, n], tensors[1][0, seen, 0], tensors[2][0, seen, 0]))
            row = staged_row(*arrays, p.scale, np.float32, str(dtype).removeprefix("torch."))
            if row.exact:
                assert_same_bits(out[0, i, n].float(), row.out.astype(np.float32))
                lse = maximum[0, n, i, 3] + total[0, n, i, 3].log()
                assert_same_bits(lse, np.float32(row.lse))
                compared += 1
    assert compared >= 60


def sides(seed, shape, heads, dtype):
    """Outs `[*shape, heads·D]`-like and statistics by token and head, two of each."""
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(*shape, heads, 64)).astype(dtype), *(rng.random((2, *shape, heads)).astype(np.float32) * 3))
        for _ in range(2)
    ]


def naive_update(a, b):
    """By token and head, in float32."""
    (po, pm, ps), (co, cm, cs) = a, b
    m = np.maximum(pm, cm)
    p, c = ps * exp(pm - m), cs * exp(cm - m)
    s = p + c
    out = po.astype(np.float32) * (p / s)[..., None] + co.astype(np.float32) * (c / s)[..., None]
    return out.astype(po.dtype), m, s


def eight(x):
    return torch.from_numpy(np.repeat(x[..., None], 8, -1).copy())


@examples(0.25)
@given(SEEDS, st.sampled_from((np.float16, np.float32)), st.integers(1, 2), st.integers(1, 4))
def test_update_bits_in_sbh_are_those_of_the_naive_twin(seed, dtype, batch, heads):
    both = sides(seed, (5, batch), heads, dtype)
    stored = [x for o, m, s in both for x in (
        torch.from_numpy(o).flatten(2), eight(m.transpose(1, 2, 0)), eight(s.transpose(1, 2, 0)),
    )]  # fmt: skip
    out, maximum, total = UPDATE(*stored)
    want = naive_update(*both)
    assert_same_bits(out, want[0].reshape(out.shape))
    for got, x in zip((maximum, total), want[1:], strict=True):
        assert got.shape == (batch, heads, 5, 8)
        assert_same_bits(got, eight(x.transpose(1, 2, 0)).numpy())


@examples(0.25)
@given(SEEDS, st.lists(st.integers(0, 4), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_update_bits_in_tnd_are_those_of_the_naive_twin(seed, lengths, is_natural, has_leading_zero):
    if not sum(lengths):
        return
    both = sides(seed, (sum(lengths),), 3, np.float16)

    def memory(x):
        """By sequence, heads first, unless natural; declared `[T, N, 8]` all the same."""
        if is_natural:
            return eight(x)
        parts = np.split(x, np.cumsum(lengths)[:-1])
        return eight(np.concatenate([part.T.ravel() for part in parts])).reshape(*x.shape, 8)

    stored = [x for o, m, s in both for x in (torch.from_numpy(o), memory(m), memory(s))]
    ends = torch.tensor([0] * has_leading_zero + list(np.cumsum(lengths)))
    options = {"input_softmax_layout": "TND" if is_natural else ""}
    got = UPDATE(*stored, actual_seq_qlen=ends, input_layout="TND", **options)
    want = naive_update(*both)
    assert_same_bits(got[0], want[0])
    for x, y in zip(got[1:], want[1:], strict=True):
        assert_same_bits(x, memory(y).numpy())


def test_update_of_rows_that_neither_saw_stays_finite_in_the_form_of_inner_precise_2():
    out, low, high = torch.zeros(1, 1, 64), torch.full((1, 1, 1, 8), LOWEST), torch.full((1, 1, 1, 8), -LOWEST)
    got = UPDATE(out, low, high, out, low, high)
    assert (got[0] == 0).all()
    assert (got[1] == LOWEST).all()
    some = torch.randn(1, 1, 64), torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1, 8)
    merged = UPDATE(out, low, high, *some)
    torch.testing.assert_close(merged, some, rtol=0, atol=0)


def test_exact_arithmetic_in_float32_is_dense_attention_rounded_once():
    q, k, v = plain(1, 30, 600, d=64, v=64)
    with arithmetic("exact"):
        parts = [fusion_block(q, k[:, s], v[:, s], is_causal=False, scale=0.1) for s in (slice(250), slice(250, None))]
        got = fusion_update(*parts).partial()
    want = dense(*(x.double().numpy() for x in (q, k, v)), scale=0.1, visible=np.ones((1, 30, 600), bool))
    np.testing.assert_allclose(got.out.double(), want[0], rtol=0, atol=1e-7)
    np.testing.assert_allclose(got.lse.double(), want[1], rtol=1e-7)


# --- what is refused


Q, KV = torch.zeros(2, 3, 2, 64).half(), torch.zeros(2, 5, 1, 64).half()
T, TK = torch.zeros(3, 2, 64).half(), torch.zeros(5, 1, 64).half()
PACK = {"tensors": (T, TK, TK), "input_layout": "TND", "actual_seq_qlen": [3], "actual_seq_kvlen": [5]}
REFUSALS = {
    "no heads": ({"head_num": 0}, "head_num must > 0, but got 0"),
    "keep_prob 0": ({"keep_prob": 0.0}, r"The keep_prob value must be in range of \(0, 1\], but got 0"),
    "keep_prob 2": ({"keep_prob": 2.0}, r"The keep_prob value must be in range of \(0, 1\], but got 2"),
    "dropout": ({"keep_prob": 0.9}, "not implemented in the emulation: dropout"),
    "padding mask": ({"padding_mask": Q}, "padding_mask must be None"),
    "layout": ({"input_layout": "NTD"}, "The input_layout should be BSH/SBH/BNSD/BSND/TND"),
    "sparse 7": ({"sparse_mode": 7}, r"The sparse_mode value must be in range of \[0,6\], but got 7"),
    "sparse -1": ({"sparse_mode": -1}, r"The sparse_mode value must be in range of \[0,6\], but got -1"),
    "sparse 5 packed": ({**PACK, "sparse_mode": 5}, r"must be in range of \[0,5\) or \(5,8\], but got 5"),
    "sparse 9 packed": ({**PACK, "sparse_mode": 9}, r"must be in range of \[0,5\) or \(5,8\], but got 9"),
    "prefix": ({"sparse_mode": 6}, "not implemented in the emulation: sparse_mode 6"),
    "pse": ({"pse": Q}, "not implemented in the emulation: pse"),
    "sink": ({"sink": Q}, "not implemented in the emulation: sink"),
    "inner_precise": ({"inner_precise": 3}, "inner_precise is 3, must be 0, 1 or 2"),
    "softmax layout": ({"softmax_layout": "BSND"}, "must be empty or TND"),
    "dims": ({"input_layout": "BSH"}, "query has 4 dims, layout BSH has 3"),
    "dtype": ({"tensors": (Q.double(), KV.double(), KV.double())}, "must be float16, bfloat16 or float32"),
    "dtypes": ({"tensors": (Q, KV.float(), KV)}, "must be the same dtype"),
    "heads": ({"head_num": 4}, "query has 2 heads, head_num is 4"),
    "not divisible": ({"tensors": (Q, KV.expand(2, 5, 3, 64), KV.expand(2, 5, 3, 64))}, "2 heads on 3"),
    "value wider": ({"tensors": (Q, KV, torch.zeros(2, 5, 1, 72).half())}, "head dims 64, 64, 72"),
    "key tokens": ({"tensors": (Q, KV, KV[:, :4])}, "same tokens and heads"),
    "batches": ({"tensors": (Q, KV[:1], KV[:1])}, "2 requests in query, 1 in key"),
    "mask dtype": ({"atten_mask": torch.zeros(3, 5, dtype=torch.int8)}, "must be bool or uint8"),
    "mask dims": ({"atten_mask": torch.zeros(1, 3, 5, dtype=torch.bool)}, r"atten_mask is \(1, 3, 5\)"),
    "mask shape": ({"atten_mask": torch.zeros(3, 4, dtype=torch.bool)}, r"atten_mask is \(3, 4\)"),
    "mask of 4 heads": ({"atten_mask": torch.zeros(2, 4, 3, 5, dtype=torch.bool)}, r"atten_mask is \(2, 4, 3, 5\)"),
    "pack mask": ({**PACK, "atten_mask": torch.zeros(1, 1, 3, 5, dtype=torch.bool)}, r"must be \(3, 5\)"),
    "dropout with a seed": ({"keep_prob": 0.9, "seed": 5}, "not implemented in the emulation: dropout"),
    "triangle": ({"sparse_mode": 2, "atten_mask": TRIANGLE.T.contiguous()}, "ones above the diagonal .*unsafe"),
    "triangle shape": ({"sparse_mode": 2, "atten_mask": TRIANGLE[:512, :512]}, r"needs \(2048, 2048\)"),
    "no lengths": ({**PACK, "actual_seq_qlen": None}, "size of actual_seq_qlen and actual_seq_kvlen cannot be empty"),
    "ends": ({**PACK, "actual_seq_qlen": [2]}, "must end at the 3 tokens given"),
    "falling": ({**PACK, "actual_seq_kvlen": [6, 5]}, "must not decrease"),
    "counts": ({**PACK, "actual_seq_kvlen": [1, 5]}, "differ in length"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_operator_refuses(what):
    changes, phrase = REFUSALS[what]
    arguments = {"tensors": (Q, KV, KV), "head_num": 2, "input_layout": "BSND"} | changes
    with pytest.raises(RuntimeError, match=f"npu_fusion_attention: .*{phrase}"):
        FUSION(*arguments.pop("tensors"), arguments.pop("head_num"), arguments.pop("input_layout"), **arguments)


OUT, STAT = torch.zeros(5, 2, 128).half(), torch.ones(2, 2, 5, 8)  # SBH: S 5, B 2, two heads of 64
P_OUT, P_STAT = torch.zeros(5, 2, 64).half(), torch.ones(5, 2, 8)
PACKED = {"input_layout": "TND", "actual_seq_qlen": torch.tensor([0, 5])}
STATISTICS = ("prev_softmax_max", "prev_softmax_sum", "cur_softmax_max", "cur_softmax_sum")
UPDATES = {
    "layout": ({"input_layout": "BSH"}, "input_layout only supports 'SBH' or 'TND', but got BSH"),
    "softmax layout": ({"input_softmax_layout": "x"}, "input_softmax_layout only supports '', 'SBH' or 'TND'"),
    "shapes": ({"cur_attn_out": OUT[:4]}, "prev_attn_out and cur_attn_out must have the same shape"),
    "dtypes": ({"cur_attn_out": OUT.float()}, "prev_attn_out and cur_attn_out must have the same dtype"),
    "dtype": ({"prev_attn_out": OUT.double(), "cur_attn_out": OUT.double()}, "only supports float16, float32 or"),
    "softmax shapes": ({"cur_softmax_sum": STAT[:1]}, "softmax tensors must keep the same shape"),
    "softmax dtype": ({"cur_softmax_sum": STAT.half()}, "softmax tensors must use float32"),
    "softmax 4": (dict.fromkeys(STATISTICS, STAT[..., :4]), "last dimension to be 8"),
    "out dims": ({"prev_attn_out": OUT[0], "cur_attn_out": OUT[0]}, "attention tensors must be 3D"),
    "softmax dims": (dict.fromkeys(STATISTICS, STAT[0]), "softmax tensors must be 4D when"),
    "not the same tokens": ({"prev_attn_out": OUT[:4], "cur_attn_out": OUT[:4]}, "is not .S, B, N·D. of softmax"),
    "no lengths": ({"packed": True, "actual_seq_qlen": None}, "actual_seq_qlen is required when input_layout is 'TND'"),
    "int32 lengths": ({"packed": True, "actual_seq_qlen": torch.tensor([5]).int()}, "actual_seq_qlen must use int64"),
    "packed softmax dims": ({"input_layout": "TND", "actual_seq_qlen": torch.tensor([5])}, "must be 3D when"),
    "packed dim": ({"packed": True, "prev_attn_out": P_OUT[..., :32], "cur_attn_out": P_OUT[..., :32]}, "of 64 up"),
    "packed tokens": ({"packed": True, "actual_seq_qlen": torch.tensor([0, 4])}, "must rise to the 5 tokens"),
    "packed heads": ({"packed": True, "prev_attn_out": P_OUT[:, :1], "cur_attn_out": P_OUT[:, :1]}, "softmax"),
}  # fmt: skip


@pytest.mark.parametrize("what", UPDATES)
def test_update_refuses(what):
    changes, phrase = UPDATES[what]
    is_packed = changes.get("packed", False)
    out, stat = (P_OUT, P_STAT) if is_packed else (OUT, STAT)
    arguments = {f"{side}_{name}": x for side in ("prev", "cur") for name, x in (
        ("attn_out", out), ("softmax_max", stat), ("softmax_sum", stat),
    )} | (PACKED if is_packed else {}) | {name: x for name, x in changes.items() if name != "packed"}  # fmt: skip
    with pytest.raises(RuntimeError, match=f"npu_ring_attention_update: .*{phrase}"):
        UPDATE(**arguments)


def test_the_good_calls_are_good():
    assert FUSION(Q, KV, KV, 2, "BSND")[0].shape == Q.shape
    options = {name: x for name, x in PACK.items() if name.startswith("actual")}
    assert FUSION(T, TK, TK, 2, "TND", **options)[0].shape == T.shape
    assert UPDATE(OUT, STAT, STAT, OUT, STAT, STAT)[0].shape == OUT.shape
    assert UPDATE(P_OUT, P_STAT, P_STAT, P_OUT, P_STAT, P_STAT, **PACKED)[0].shape == P_OUT.shape


def block(h=64, v=64, n=2, k=2, dtype=torch.float16):
    return [torch.zeros(1, *shape, dtype=dtype) for shape in ((4, n, h), (5, k, h), (5, k, v))]


@pytest.mark.parametrize(
    ("tensors", "options", "rule"),
    [
        (block(dtype=torch.float64), {}, "takes float16, bfloat16, float32"),
        (block(n=3), {}, "N is a multiple of K"),
        (block(v=72), {}, "takes 1 ≤ V ≤ H ≤ 768"),
        (block(h=800, v=64), {}, "takes 1 ≤ V ≤ H ≤ 768"),
        (block(), {"layout": "BSND"}, "neither SBH nor TND"),
        (block(), {"layout": "SBH", "kv_lengths": (4,)}, "layout SBH has no lengths: use TND"),
        (block(), {"kv_lengths": (6,)}, "must be 1 numbers from 0 to 5"),
        (block(), {"scale": float("inf")}, "is not finite"),
    ],
)
def test_block_refuses_before_the_call(tensors, options, rule, monkeypatch):
    monkeypatch.setattr(torch.ops.npu, "npu_fusion_attention", None)
    with pytest.raises(InputError, match=rule):
        fusion_block(*tensors, **({"is_causal": False, "scale": 0.1} | options))


SOME = Carried(torch.zeros(1, 2, 1, 64).half(), torch.zeros(1, 2, 1), torch.ones(1, 2, 1))


@pytest.mark.parametrize(
    ("other", "layout", "rule"),
    [
        (SOME, "BSND", "neither SBH nor TND"),
        (SOME._replace(out=SOME.out.float()), "TND", "both must be"),
        (SOME._replace(out=SOME.out[:, :1]), "TND", "current has"),
        (SOME._replace(total=SOME.total.double()), "TND", "current has"),
        (SOME._replace(total=-SOME.total), "TND", "infinite, negative or NaN"),
        (SOME._replace(total=SOME.total * torch.inf), "TND", "infinite, negative or NaN"),
        (SOME._replace(maximum=SOME.maximum + torch.nan), "TND", "infinite, negative or NaN"),
    ],
)
def test_update_wrapper_refuses_before_the_call(other, layout, rule, monkeypatch):
    monkeypatch.setattr(torch.ops.npu, "npu_ring_attention_update", None)
    with pytest.raises(InputError, match=rule):
        fusion_update(SOME, other, layout=layout)


def test_update_wrapper_refuses_dims_that_tnd_does_not_take():
    narrow = SOME._replace(out=SOME.out[..., :24])
    with pytest.raises(InputError, match="multiple of 64 up to 768: use SBH"):
        fusion_update(narrow, narrow)
    assert fusion_update(narrow, narrow, layout="SBH").out.shape == narrow.out.shape
