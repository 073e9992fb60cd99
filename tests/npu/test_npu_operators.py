"""npu_ring_mla on a CPU: its contract, its roundings bit by bit, and its wrapper."""

import ast
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_strategies import (
    HEADS,
    Problem,
    exact_problem,
    hard_bound,
    problem,
    staged_merge,
    staged_row,
)
from oracle import dense
from strategies import examples

import npu_backend
from npu_backend.errors import InputError
from npu_backend.operators import Partial, ring_mla_block

ROOT = Path(npu_backend.__file__).parents[1]
VENDOR_SCHEMA = (  # as torch_npu 2.13.0 prints it
    "atb::npu_ring_mla(Tensor q_nope, Tensor q_rope, Tensor k_nope, Tensor k_rope, Tensor value, Tensor mask, Tensor "
    "seqlen, int head_num, int kv_head_num, *, Tensor? pre_out=None, Tensor? prev_lse=None, float qk_scale=1., str? "
    "kernel_type=None, str? mask_type=None, str? input_layout=None, str? calc_type=None) -> (Tensor, Tensor)"
)
TRIU = torch.full((512, 512), -torch.inf, dtype=torch.float16).triu(1)
MASKED = {"mask_type": "mask_type_triu"}
MERGED = {"calc_type": "calc_type_default"}


def operator(query, key, value, seqlen, mask=TRIU, scale=0.07, heads=None, **options):
    """The vendor's call from packed `[T, N, 192]`, `[S, K, 192]`, `[S, K, 128]` tensors."""
    nope, rope = (..., slice(None, 128)), (..., slice(128, None))
    lengths = torch.tensor(seqlen, dtype=torch.int32)
    n, k = heads or (query.shape[1], key.shape[1])
    parts = (query[nope], query[rope], key[nope], key[rope], value)
    return torch.ops.atb.npu_ring_mla(*parts, mask, lengths, n, k, qk_scale=scale, **options)


def packed(tokens, keys, heads=(2, 1), seed=0, dtype=torch.float16):
    rng = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads[0], 192), (keys, heads[1], 192), (keys, heads[1], 128)
    return [torch.randn(*shape, generator=rng).to(dtype) for shape in shapes]


def tensors(p: Problem) -> list[torch.Tensor]:
    return [torch.from_numpy(x) for x in p[:3]]


# --- the mathematics


@examples(0.4)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(("normal", "needle", "mean")),
    st.sampled_from(HEADS),
    st.integers(1, 150),
    st.integers(1, 2),
    st.booleans(),
)
def test_one_block_is_dense_attention(seed, kind, heads, length, batch, is_causal):
    p = problem(seed, kind, heads, (length,) * batch, length, is_causal=is_causal, cp=1)
    got = ring_mla_block(*tensors(p), is_causal=is_causal, scale=p.scale)
    assert_near_dense(p, got, merges=0)


@examples(0.4)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from(HEADS), st.lists(st.integers(0, 90), min_size=1, max_size=3), st.data()
)
def test_blocks_merged_in_any_order_are_dense_attention(seed, heads, kv_lengths, data):
    """Each block shows the first so many keys of each request, possibly none: a cut of the keys into pieces."""
    kv_lengths = tuple(n or 1 for n in kv_lengths)
    total = max(kv_lengths)
    p = problem(seed, "normal", heads, kv_lengths, total, is_causal=False, cp=1)
    query, key, value = (torch.nan_to_num(x) for x in tensors(p))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=3))})
    pieces = data.draw(st.permutations(list(pairwise(cuts))))
    carried = None
    for start, stop in pieces:
        seen = tuple(min(max(n - start, 0), stop - start) for n in kv_lengths)
        block = key[:, start:stop], value[:, start:stop]
        carried = ring_mla_block(query, *block, is_causal=False, scale=p.scale, kv_lengths=seen, previous=carried)
    assert_near_dense(p, carried, merges=len(pieces))


def assert_near_dense(p: Problem, got: Partial, merges: int):
    real = p.segment == 0
    zero = [np.where(real[..., None, None], x, 0) for x in p[:3]]
    out, lse = dense(*zero, scale=p.scale, visible=p.visible)
    bound_out, bound_lse = hard_bound(p, merges)
    assert (abs(got.out.double().numpy() - out) <= bound_out)[real].all()
    assert (abs(got.lse.double().numpy() - lse) <= bound_lse)[real].all()


def test_mask_is_top_left_when_there_are_more_keys_than_queries():
    query, key, value = packed(3, 700)
    got_out, got_lse = operator(query, key, value, [[3], [700]], **MASKED)
    want_out, want_lse = operator(query, key[:3], value[:3], [3], **MASKED)
    # A float32 sum in another order may fall on the other side of a FP16 rounding of a score, 0.004 at most here.
    torch.testing.assert_close(got_out, want_out, rtol=0, atol=0.02)
    torch.testing.assert_close(got_lse, want_lse, rtol=0, atol=0.01)
    torch.testing.assert_close(got_out[0, 0], value[0, 0], rtol=0, atol=0)  # the first query sees the first key only


def test_keys_beyond_the_diagonal_block_are_not_read():
    query, key, value = packed(128, 400)
    value[128:] = torch.nan
    assert operator(query, key, value, [[128], [400]], **MASKED)[0].isfinite().all()


def test_scale_is_one_unless_given():
    query, key, value = packed(4, 4)
    default = torch.ops.atb.npu_ring_mla(
        query[..., :128], query[..., 128:], key[..., :128], key[..., 128:], value, TRIU, torch.tensor([4]).int(), 2, 1
    )
    torch.testing.assert_close(default, operator(query, key, value, [4], scale=1.0), rtol=0, atol=0)


def test_first_ring_ignores_what_was_before():
    query, key, value = packed(4, 4)
    old = torch.full((4, 2, 128), 9.0).half(), torch.zeros(2, 4)
    got = operator(query, key, value, [4], pre_out=old[0], prev_lse=old[1])
    torch.testing.assert_close(got, operator(query, key, value, [4]), rtol=0, atol=0)


def test_two_lses_of_minus_infinity_merge_to_nan_as_the_operator_documents():
    query, key, value = packed(1, 1)
    key.fill_(-1e4)
    query.fill_(1e4)  # q·k overflows FP16 to −inf
    nothing = torch.zeros(1, 2, 128).half(), torch.full((2, 1), -torch.inf)
    out, lse = operator(query, key, value, [1])
    assert (out == 0).all()
    assert torch.isneginf(lse).all()
    assert operator(query, key, value, [1], pre_out=nothing[0], prev_lse=nothing[1], **MERGED)[1].isnan().all()


@pytest.mark.parametrize("options", [{}, MASKED])
def test_rows_of_a_request_without_keys_stay_unwritten(options):
    query, key, value = packed(7, 5)
    before = torch.ones(7, 2, 128).half(), torch.zeros(2, 7)
    for more in ({}, {"pre_out": before[0], "prev_lse": before[1], **MERGED}):
        out, lse = operator(query, key, value, [[2, 3, 2], [2, 0, 3]], **options, **more)
        empty = torch.tensor([0, 0, 1, 1, 1, 0, 0], dtype=torch.bool)
        assert out[empty].isnan().all()
        assert lse[:, empty].isnan().all()
        assert out[~empty].isfinite().all()
        assert lse[:, ~empty].isfinite().all()


@pytest.mark.parametrize("options", [{}, MASKED])
def test_in_place_rows_of_a_request_without_keys_keep_what_was_there(options):
    """As vllm-ascend calls it: the outputs are what was before, and later pieces leave short requests out."""
    query, key, value = packed(7, 5)
    before = torch.randn(7, 2, 128).half(), torch.randn(2, 7)
    out, lse = (x.clone() for x in before)
    merged = {"pre_out": out, "prev_lse": lse, **options, **MERGED}
    fresh = operator(query, key, value, [[2, 3, 2], [2, 0, 3]], **merged)
    nope, rope = (..., slice(None, 128)), (..., slice(128, None))
    parts = (query[nope], query[rope], key[nope], key[rope], value, TRIU)
    lengths = torch.tensor([[2, 3, 2], [2, 0, 3]], dtype=torch.int32)
    got = torch.ops.atb.npu_ring_mla.out(*parts, lengths, 2, 1, qk_scale=0.07, **merged, output=out, softmax_lse=lse)
    assert got[0] is out or got[0].data_ptr() == out.data_ptr()
    torch.testing.assert_close((out[2:5], lse[:, 2:5]), (before[0][2:5], before[1][:, 2:5]), rtol=0, atol=0)
    for rows in (slice(2), slice(5, 7)):
        torch.testing.assert_close((out[rows], lse[:, rows]), (fresh[0][rows], fresh[1][:, rows]), rtol=0, atol=0)
        assert not torch.equal(out[rows], before[0][rows])


def test_given_outputs_must_fit():
    query, key, value = packed(4, 4)
    nope, rope = (..., slice(None, 128)), (..., slice(128, None))
    parts = (query[nope], query[rope], key[nope], key[rope], value, TRIU, torch.tensor([4], dtype=torch.int32), 2, 1)
    out, lse = torch.zeros(4, 2, 128).half(), torch.zeros(2, 4)
    for outputs, name in (((out[:3], lse), "output"), ((out, lse.T), "softmax_lse"), ((out.float(), lse), "output")):
        with pytest.raises(RuntimeError, match=f"{name} is"):
            torch.ops.atb.npu_ring_mla.out(*parts, output=outputs[0], softmax_lse=outputs[1])


@examples(0.25)
@given(st.integers(0, 999), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=2, max_size=4))
def test_a_pack_is_its_requests_one_by_one(seed, lengths):
    q_lengths, kv_lengths = zip(*lengths, strict=True)
    if not sum(q_lengths) or not sum(kv_lengths):
        return
    query, key, value = packed(sum(q_lengths), sum(kv_lengths), seed=seed)
    out, lse = operator(query, key, value, [q_lengths, kv_lengths])
    q_start = kv_start = 0
    for m, n in lengths:
        q, kv = slice(q_start, q_start + m), slice(kv_start, kv_start + n)
        if m and n:
            one_out, one_lse = operator(query[q], key[kv], value[kv], [[m], [n]])
            torch.testing.assert_close(out[q], one_out, rtol=0, atol=0.02)
            torch.testing.assert_close(lse[:, q], one_lse, rtol=0, atol=0.01)
        q_start, kv_start = q.stop, kv.stop


# --- the roundings, bit by bit


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("heads", "length"), [((2, 1), 150), ((4, 2), 60), ((2, 2), 1300)])
def test_bits_are_those_of_the_naive_staged_twin(heads, length, is_causal):
    p = exact_problem(length, heads, (length,), length, is_causal=is_causal, cp=1, chunks=1)
    got = ring_mla_block(*tensors(p), is_causal=is_causal, scale=p.scale)
    compared = 0
    for i in np.unique(np.linspace(0, length - 1, 60).astype(int)):
        for n in range(heads[0]):
            seen, h = np.flatnonzero(p.visible[0, i]), n // (heads[0] // heads[1])
            row = staged_row(p.query[0, i, n], p.key[0, seen, h], p.value[0, seen, h], p.scale)
            if row.exact:
                assert_same_bits(got.out[0, i, n], got.lse[0, i, n], row)
                compared += 1
    assert compared >= 60


@pytest.mark.parametrize("seed", range(6))
def test_bits_with_two_keys_of_general_logits(seed):
    """Few keys, so that sums are exact, but logits of any size: every stage has something to round."""
    rng = np.random.default_rng(seed)
    query, key = (rng.integers(-24, 25, size=(1, 40, 2, 192)) / 8 for _ in range(2))
    arrays = [x.astype(np.float16) for x in (query, key[:, :2], rng.normal(size=(1, 2, 2, 128)))]
    for scale in (192**-0.5, 0.01, 0.3, 2.0):
        got = ring_mla_block(*map(torch.from_numpy, arrays), is_causal=False, scale=scale)
        for i, n in np.ndindex(40, 2):
            row = staged_row(arrays[0][0, i, n], arrays[1][0, :, n], arrays[2][0, :, n], scale)
            assert row.exact
            assert_same_bits(got.out[0, i, n], got.lse[0, i, n], row)


@pytest.mark.parametrize("seed", range(4))
def test_bits_of_a_merge(seed):
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(-24, 25, size=(1, m, 2, 192)) / 8 for m in (30, 4)] + [rng.normal(size=(1, 4, 2, 128))]
    query, key, value = (x.astype(np.float16) for x in arrays)
    carried = None
    for start in (0, 2):
        block = (torch.from_numpy(x[:, start : start + 2]) for x in (key, value))
        carried = ring_mla_block(torch.from_numpy(query), *block, is_causal=False, scale=0.07, previous=carried)
    assert carried is not None
    for i, n in np.ndindex(30, 2):
        a, b = (staged_row(query[0, i, n], key[0, s : s + 2, n], value[0, s : s + 2, n], 0.07) for s in (0, 2))
        assert_same_bits(carried.out[0, i, n], carried.lse[0, i, n], staged_merge(a, b))


def assert_same_bits(out, lse, row):
    np.testing.assert_array_equal(out.numpy().view(np.int16), row.out.view(np.int16))
    np.testing.assert_array_equal(lse.numpy().view(np.int32), row.lse.view(np.int32))


def test_bfloat16_keeps_scores_in_float32_and_multiplies_its_mask():
    query, key, value = packed(64, 64, heads=(2, 2), dtype=torch.bfloat16)
    mask = torch.ones(512, 512, dtype=torch.bfloat16).triu(1)
    out, lse = operator(query, key, value, [64], mask=mask, **MASKED)
    exact = [x.float().double().numpy()[None] for x in (query, key, value)]
    want_out, want_lse = dense(*exact, scale=float(np.float32(0.07)), visible=np.tri(64, dtype=bool)[None])
    # lse sees no rounding but float32's; out has BF16 probabilities and is BF16: (|o| + Σ A|v|)/256, of which 2 < 8.
    np.testing.assert_allclose(lse.T.double(), want_lse[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(out.double(), want_out[0], rtol=0, atol=8 / 256)
    assert out.dtype == torch.bfloat16


# --- what the operator refuses


def call(**changes):
    """A good masked, merging call with some arguments replaced."""
    query, key, value = packed(6, 6)
    good = {
        "q_nope": query[..., :128],
        "q_rope": query[..., 128:],
        "k_nope": key[..., :128],
        "k_rope": key[..., 128:],
        "value": value,
        "mask": TRIU,
        "seqlen": torch.tensor([4, 2], dtype=torch.int32),
        "head_num": 2,
        "kv_head_num": 1,
        "pre_out": torch.zeros(6, 2, 128).half(),
        "prev_lse": torch.zeros(2, 6),
        "qk_scale": 0.07,
        **MASKED,
        **MERGED,
    }
    return torch.ops.atb.npu_ring_mla(**(good | changes))


def test_the_good_call_is_good():
    out, lse = call()
    assert (out.shape, out.dtype) == ((6, 2, 128), torch.float16)
    assert (lse.shape, lse.dtype) == ((2, 6), torch.float32)


def lengths(*rows):
    return torch.tensor(rows, dtype=torch.int32)


REFUSALS = {
    "kernel type unknown": ({"kernel_type": "fast"}, "Unsupported kernel_type value: 'fast'"),
    "kernel type default": ({"kernel_type": "kernel_type_default"}, "Ring MLA only supports"),
    "mask type unknown": ({"mask_type": "triu"}, "Unsupported mask_type value: 'triu'"),
    "layout unknown": ({"input_layout": "type_tnd"}, "Unsupported input_layout value"),
    "calc type unknown": ({"calc_type": "0"}, "Unsupported calc_type value"),
    "no heads": ({"head_num": 0}, "Ring MLA expects headNum"),
    "negative kv heads": ({"kv_head_num": -1}, "Ring MLA expects kvHeadNum"),
    "heads not divisible": ({"head_num": 3, "kv_head_num": 2}, "divisible by kvHeadNum"),
    "fewer heads than kv heads": ({"kv_head_num": 4}, "divisible by kvHeadNum"),
    "too many heads": ({"head_num": 129, "kv_head_num": 129}, "headsize is invalid"),
    "heads of the tensor": ({"head_num": 4}, "q_nope has 2 heads"),
    "query dims": ({"q_nope": torch.zeros(6, 256).half()}, "ERROR_INVALID_TENSOR_DIM_NUM"),
    "nope width": ({"k_nope": torch.zeros(6, 1, 64).half()}, "k_nope is"),
    "rope width": ({"q_rope": torch.zeros(6, 2, 128).half()}, "q_rope is"),
    "value width": ({"value": torch.zeros(6, 1, 192).half()}, "value is"),
    "token mismatch": ({"k_rope": torch.zeros(5, 1, 64).half()}, "ERROR_INVALID_TENSOR_DIM"),
    "float32": ({"q_nope": torch.zeros(6, 2, 128)}, "must be float16 or bfloat16"),
    "dtypes differ": ({"value": torch.zeros(6, 1, 128).bfloat16()}, "ERROR_INVALID_VALUE"),
    "mask dims": ({"mask": TRIU[0]}, "ERROR_INVALID_TENSOR_DIM_NUM"),
    "mask dtype": ({"mask": TRIU.float()}, "mask is torch.float32"),
    "mask 128": ({"mask": TRIU[:128, :128].contiguous()}, "current mask shape is unsupported!"),
    "mask as long as the request": ({"mask": TRIU[:4, :4].contiguous()}, "current mask shape is unsupported!"),
    "mask per request, not stored": ({"mask": TRIU.expand(2, 512, 512)}, "current mask shape is unsupported!"),
    "masks of 128": ({"mask": TRIU[:128, :128].repeat(2, 1, 1)}, "current mask shape is unsupported!"),
    "masks of three requests": ({"mask": TRIU.repeat(3, 1, 1)}, "batch of seqlen and mask should be the same, got 2"),
    "masks of one request": ({"mask": TRIU[None]}, "batch of seqlen and mask should be the same"),
    "masks that differ": ({"mask": torch.stack([TRIU, 0 * TRIU.clamp(min=-1)])}, "masks of the batch differ"),
    "masks of 0 and 1": ({"mask": torch.ones(2, 512, 512).half().triu(1)}, "mask values are unsafe"),
    "three masks, of which none is read": (
        {"mask": TRIU.repeat(3, 1, 1), "mask_type": "no_mask"},
        "batch of seqlen and mask should be the same",
    ),
    "mask not contiguous": ({"mask": TRIU.T.contiguous().T}, "current mask shape is unsupported!"),
    "mask of 0 and 1": ({"mask": torch.ones(512, 512).half().triu(1)}, "mask values are unsafe"),
    "mask shifted": ({"mask": torch.full((512, 512), -torch.inf).half().triu(2)}, "mask values are unsafe"),
    "mask strict": ({"mask": torch.full((512, 512), -torch.inf).half().triu(0)}, "mask values are unsafe"),
    "seqlen dims": ({"seqlen": torch.zeros(1, 2, 2).int()}, "ERROR_INVALID_TENSOR_DIM_NUM"),
    "seqlen rows": ({"seqlen": lengths([4, 2], [4, 2], [4, 2])}, r"must be \[B\] or \[2, B\]"),
    "seqlen dtype": ({"seqlen": torch.tensor([4, 2])}, "must be int32"),
    "negative queries": ({"seqlen": lengths([7, -1], [4, 2])}, "qSeqlen min value invalid"),
    "negative keys": ({"seqlen": lengths([4, 2], [7, -1])}, "kvSeqlen min value invalid"),
    "no queries": ({"seqlen": lengths([0, 0], [4, 2])}, "qSeqlen max value invalid"),
    "no keys": ({"seqlen": lengths([4, 2], [0, 0])}, "kvSeqlen max value invalid"),
    "fewer keys than queries": ({"seqlen": lengths([4, 2], [3, 3])}, "no smaller than qSeqLen"),
    "queries left over": ({"seqlen": lengths([3, 2], [4, 2])}, "must add up to the 6 tokens"),
    "keys left over": ({"seqlen": lengths([4, 2], [4, 1])}, "must"),
    "nothing to merge with": ({"pre_out": None}, "needs pre_out and prev_lse"),
    "no previous lse": ({"prev_lse": None}, "needs pre_out and prev_lse"),
    "previous out dims": ({"pre_out": torch.zeros(6, 256).half()}, "ERROR_INVALID_TENSOR_DIM_NUM"),
    "previous out shape": ({"pre_out": torch.zeros(6, 1, 128).half()}, "ERROR_INVALID_TENSOR_DIM"),
    "previous lse layout": ({"prev_lse": torch.zeros(6, 2)}, "ERROR_INVALID_TENSOR_DIM"),
    "previous lse dtype": ({"prev_lse": torch.zeros(2, 6).half()}, "ERROR_INVALID_VALUE"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_operator_refuses(what):
    changes, phrase = REFUSALS[what]
    with pytest.raises(RuntimeError, match=phrase):
        call(**changes)


def test_without_a_mask_the_mask_and_the_order_of_lengths_are_not_looked_at():
    call(mask_type="no_mask", mask=torch.zeros(1), seqlen=lengths([4, 2], [3, 3]))


def test_a_mask_for_each_request_is_the_same_as_one_for_all():
    """`[B, 512, 512]`: the kernel reads the first; the vendor's own tests pass such masks."""
    for mask in (TRIU, TRIU.clamp(min=-10000)):
        torch.testing.assert_close(call(mask=mask.repeat(2, 1, 1)), call(), rtol=0, atol=0)
    call(mask=TRIU.repeat(2, 1, 1), mask_type="no_mask")
    query, key, value = (x.bfloat16() for x in packed(20, 28))
    ones = torch.ones(512, 512).bfloat16().triu(1)
    lengths = [[12, 8], [20, 8]]
    want = operator(query, key, value, lengths, mask=ones, **MASKED)
    torch.testing.assert_close(operator(query, key, value, lengths, mask=ones.repeat(2, 1, 1), **MASKED), want)


@pytest.mark.parametrize("low", [-torch.inf, -65504.0, -10000.0])
def test_mask_values_are_added(low):
    torch.testing.assert_close(call(mask=TRIU.clamp(min=low)), call(), rtol=0, atol=0)


# --- the wrapper


def test_wrapper_keeps_the_meaning_of_no_keys():
    query, key, value = (x[None].expand(3, -1, -1, -1) for x in packed(4, 4))
    nothing = ring_mla_block(query, key, value, is_causal=False, scale=1.0, kv_lengths=(0, 0, 0))
    assert (nothing.out == 0).all()
    assert torch.isneginf(nothing.lse).all()
    some = ring_mla_block(query, key, value, is_causal=False, scale=1.0, kv_lengths=(4, 0, 1))
    assert (some.out[1] == 0).all()
    assert torch.isneginf(some.lse[1]).all()
    again = ring_mla_block(query, key, value, is_causal=False, scale=1.0, kv_lengths=(0, 0, 0), previous=some)
    torch.testing.assert_close(again, some, rtol=0, atol=0)
    one = ring_mla_block(query, key, value, is_causal=False, scale=1.0, kv_lengths=(0, 3, 0), previous=some)
    for b in (0, 2):
        torch.testing.assert_close((one.out[b], one.lse[b]), (some.out[b], some.lse[b]), rtol=0, atol=0)
    alone = ring_mla_block(query[1:2], key[1:2, :3], value[1:2, :3], is_causal=False, scale=1.0)
    torch.testing.assert_close((one.out[1:2], one.lse[1:2]), tuple(alone), rtol=0, atol=0)  # (0, −inf) is the identity


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"dtype": torch.bfloat16}, "FP16 only"),
        ({"dtype": torch.float32}, "FP16 only"),
        ({"dim": 128}, "192, 192, 128"),
        ({"kv_heads": 3}, "N a multiple of K"),
        ({"keys": 5}, "must be the same tokens"),
        ({"kv_lengths": (3,)}, "must be the same tokens"),
        ({"kv_lengths": (5,)}, "numbers from 0 to 4"),
        ({"kv_lengths": (4, 4)}, "must be 1 numbers"),
        ({"scale": 1e5}, "not finite in FP16"),
        ({"scale": float("nan")}, "not finite in FP16"),
        ({"previous": Partial(torch.zeros(1, 3, 2, 128).half(), torch.zeros(1, 3, 2))}, "not of these queries"),
    ],
)
def test_wrapper_refuses_before_the_call(change, rule):
    dim, dtype, keys = change.pop("dim", 192), change.pop("dtype", torch.float16), change.pop("keys", 4)
    kv_heads = change.pop("kv_heads", 1)
    query, key = torch.zeros(1, 4, 2, dim, dtype=dtype), torch.zeros(1, keys, kv_heads, dim, dtype=dtype)
    value = torch.zeros(1, keys, kv_heads, 128, dtype=dtype)
    with pytest.raises(InputError, match=rule):
        ring_mla_block(query, key, value, **({"is_causal": True, "scale": 0.1} | change))


def test_wrapper_refuses_what_overflows_the_operators_offsets():
    huge = [torch.zeros(1, 1, 1, width).half().expand(2, 2**17, 128, width) for width in (192, 192, 128)]
    with pytest.raises(InputError, match="offsets"):
        ring_mla_block(*huge, is_causal=True, scale=0.1)


# --- the operator by name, with and without torch_npu


def test_schema_is_the_vendors():
    assert str(torch.ops.atb.npu_ring_mla.default._schema).replace("qk_scale=1.0", "qk_scale=1.") == VENDOR_SCHEMA


USE = """
import npu_backend, torch
from npu_backend.schemas import SCHEMAS
x = torch.zeros(2, 1, 128).half(), torch.zeros(2, 1, 64).half()
out, lse = torch.ops.atb.npu_ring_mla(*x, *x, x[0], x[0][0], torch.tensor([2], dtype=torch.int32), 1, 1)
assert lse.shape == (1, 2)
for schema in SCHEMAS:
    name = schema.partition("(")[0]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name
both = torch.ops.npu.npu_attention_update([torch.zeros(2)], [torch.ones(2, 8)], 1)
assert (both[0] == 1).all()
print(npu_backend.vendor.TORCH_NPU_PROBLEM, len(npu_backend.vendor.DECLARED_HERE))
"""
BROKEN = "raise ImportError('libhccl.so: cannot open shared object file')"
PRESENT = f"""
import torch
library = torch.library.Library("atb", "DEF")  # as the real one: an owner, which tolerates no second definition
library.define({VENDOR_SCHEMA.removeprefix("atb::")!r})
def _autoload(): pass
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("source", "says"),
    [(None, "not installed 36"), (BROKEN, "libhccl.so: cannot open shared object file 36"), (PRESENT, "None 35")],
)
def test_operator_is_there_whether_torch_npu_is_absent_broken_or_present(tmp_path, source, says):
    if source is not None:
        (tmp_path / "torch_npu").mkdir()
        (tmp_path / "torch_npu" / "__init__.py").write_text(source)
        info = tmp_path / "torch_npu-2.13.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
        (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    where = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]"
    run = subprocess.run(
        [sys.executable, "-c", where + textwrap.dedent(USE)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert says in run.stdout
    if source == BROKEN:  # the case is real: torch alone cannot be imported there
        alone = [sys.executable, "-c", where + "\nimport torch"]
        assert subprocess.run(alone, capture_output=True, check=False).returncode != 0


def test_the_folder_needs_nothing_but_torch_numpy_safetensors():
    allowed = {"torch", "numpy", "safetensors", "rich", "npu_backend"} | set(sys.stdlib_module_names)
    files = [path for path in (ROOT / "npu_backend").rglob("*.py") if "sdk" not in path.parts]
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert {name.split(".")[0] for name in names} <= allowed, path
