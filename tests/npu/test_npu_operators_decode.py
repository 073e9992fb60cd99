"""What surrounds family 1: npu_paged_cache_load, and npu_multi_head_latent_attention with lse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_judge import assert_near_dense, assert_same_bits
from npu_strategies import BlockProblem, staged_row
from strategies import examples

import npu_backend  # noqa: F401 (declares the operators)
from npu_backend.emulation import arithmetic
from npu_backend.errors import InputError
from npu_backend.operators import latent_decode, paged_latent

LOAD = torch.ops.atb.npu_paged_cache_load
MLA = torch.ops.atb.npu_multi_head_latent_attention
SEEDS = st.integers(0, 2**32 - 1)
SCALE = 576**-0.5


def ints(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def paged(seed, lengths, size, dtype=torch.float16, more=2):
    """Latent and rope caches, a table whose unused entries are −1, and what each request holds, in order."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    blocks = [-(-n // size) for n in lengths]
    order = rng.permutation(sum(blocks) + more)
    table = np.full((len(lengths), max(1, *blocks)), -1, np.int32)
    for b, count in enumerate(blocks):
        table[b, :count] = order[sum(blocks[:b]) :][:count]
    caches = [torch.randn(len(order), size, 1, d, generator=generator).to(dtype) for d in (512, 64)]
    held = [[x[table[b, : blocks[b]]].flatten(0, 1)[:n] for x in caches] for b, n in enumerate(lengths)]
    return *caches, torch.from_numpy(table), held


# --- npu_paged_cache_load: bit by bit


@examples(0.25)
@given(SEEDS, st.lists(st.integers(0, 70), min_size=1, max_size=4), st.sampled_from((1, 16, 32)), st.data())
def test_load_copies_what_the_table_names(seed, lengths, size, data):
    latent, rope, table, held = paged(seed, lengths, size)
    want = [torch.cat([request[i] for request in held]) for i in (0, 1)]
    got = LOAD(latent, rope, table, ints(*lengths))
    cumulative = LOAD(latent, rope, table, ints(0, *np.cumsum(lengths)), cumsum=True)
    outputs = [torch.empty_like(x) for x in want]
    LOAD.out(latent, rope, table, ints(*lengths), key=outputs[0], value=outputs[1])
    for some in (got, cumulative, outputs, paged_latent(latent, rope, table, tuple(lengths))):
        for x, y in zip(some, want, strict=True):
            assert torch.equal(x, y)
    # Of a start only whole blocks are skipped; the remainder is dropped.
    starts = [data.draw(st.integers(0, n)) for n in lengths]
    rest = [n - start // size * size for n, start in zip(lengths, starts, strict=True)]
    got = LOAD(latent, rope, table, ints(*rest), seq_starts=ints(*starts))
    for i in (0, 1):
        tails = [request[i][len(request[i]) - n :] for request, n in zip(held, rest, strict=True)]
        assert torch.equal(got[i], torch.cat(tails))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_load_takes_other_dtypes_and_keeps_every_bit(dtype):
    cache = torch.randint(-128, 127, (3, 4, 2, 64), dtype=torch.int8)
    cache = cache if dtype == torch.int8 else cache.view(torch.bfloat16)
    key, value = LOAD(cache, cache, ints([2, 0]), ints(6))
    want = torch.cat([cache[2], cache[0, :2]])
    for x in (key, value):
        assert torch.equal(x.view(torch.int8), want.view(torch.int8))


CACHE, ROPES = torch.zeros(3, 16, 1, 512).half(), torch.zeros(3, 16, 1, 64).half()
LOADS = {
    "dims": ({"key_cache": CACHE[0]}, "not implemented in the emulation: key_cache of 3 dims"),
    "dtype": ({"key_cache": CACHE.float()}, "must be int8, float16 or bfloat16"),
    "bytes": ({"key_cache": CACHE[..., :8]}, "16 bytes, must be a multiple of 32"),
    "blocks": ({"value_cache": ROPES[:2]}, "must have the same blocks and heads"),
    "dtypes": ({"value_cache": ROPES.bfloat16()}, "must have the same dtype"),
    "table dtype": ({"block_table": torch.zeros(2, 2).long()}, "block_table must be int32"),
    "lens dtype": ({"context_lens": torch.tensor([1, 2])}, "context_lens must be int32"),
    "negative": ({"context_lens": ints(-1, 2)}, "Invalid context_lens: negative value encountered"),
    "falling": ({"context_lens": ints(0, 5, 3), "cumsum": True}, "Invalid context_lens: negative value encountered"),
    "overflow": ({"context_lens": ints(2**31 - 1, 1)}, "Integer overflow in accumulation: sum exceeds int32_t max"),
    "count": ({"context_lens": ints(1, 2, 3)}, "3 numbers for 2 requests"),
    "cumulative count": ({"cumsum": True}, "2 numbers for 2 requests"),
    "cumulative start": ({"context_lens": ints(1, 2, 3), "cumsum": True}, "must start with 0"),
    "too many": ({"context_lens": ints(33, 2)}, "block_table holds 2 blocks of 16"),
    "starts": ({"seq_starts": torch.tensor([0, 0])}, "seq_starts must be int32"),
    "negative start": ({"seq_starts": ints(0, -1)}, "must not be negative"),
    "block -1": ({"block_table": ints([-1, 0], [0, 1])}, "unsafe"),
    "block 3": ({"block_table": ints([3, 0], [0, 1])}, "unsafe"),
}


@pytest.mark.parametrize("what", LOADS)
def test_load_refuses(what):
    changes, phrase = LOADS[what]
    good = {"key_cache": CACHE, "value_cache": ROPES, "block_table": ints([0, 1], [2, 1]), "context_lens": ints(17, 2)}
    assert LOAD(**good)[0].shape == (19, 1, 512)
    with pytest.raises(RuntimeError, match=f"npu_paged_cache_load: .*{phrase}"):
        LOAD(**(good | changes))


def test_load_out_refuses_other_shapes():
    with pytest.raises(RuntimeError, match="key is"):
        LOAD.out(
            CACHE, ROPES, ints([0]), ints(3), key=torch.zeros(4, 1, 512).half(), value=torch.zeros(3, 1, 64).half()
        )


# --- npu_multi_head_latent_attention


@examples(0.2)
@given(
    SEEDS,
    st.lists(st.integers(0, 150), min_size=1, max_size=3),
    st.sampled_from((16, 128)),
    st.sampled_from((torch.float16, torch.bfloat16)),
)
def test_decode_is_dense_attention(seed, lengths, size, dtype):
    latent, rope, table, held = paged(seed, lengths, size, dtype)
    query = torch.randn(len(lengths), 1, 8, 576, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    got = latent_decode(query, latent, rope, table, kv_lengths=tuple(lengths), scale=SCALE)
    key = torch.zeros(len(lengths), max(1, *lengths), 1, 576).to(dtype)
    for b, parts in enumerate(held):
        key[b, : lengths[b]] = torch.cat(parts, dim=-1)
    p = BlockProblem(query, key, key[..., :512], (1,) * len(lengths), tuple(lengths), False, SCALE)
    # The operator stores its lse in the inputs' dtype: half a unit in its last place more.
    unit = 2.0**-11 if dtype == torch.float16 else 2.0**-8
    assert_near_dense(p, got, lse_unit=unit)


def test_decode_bits_are_those_of_the_naive_staged_twin():
    """Two keys of general logits, so that float32 sums are exact in any order."""
    rng = np.random.default_rng(0)
    latent, rope, table, _ = paged(0, [2], 16)
    latent[:], rope[:] = (torch.from_numpy(rng.integers(-24, 25, size=x.shape) / 8) for x in (latent, rope))
    key = torch.cat([x[table[0, 0]][:2, 0] for x in (latent, rope)], dim=-1).numpy()
    query = torch.from_numpy(rng.integers(-24, 25, size=(1, 8, 576)) / 8).half()
    parts = query[..., :512], query[..., 512:], latent, rope, table, [2], 8
    out, lse = MLA.lse(*parts, 0.003, 1, True, calc_type="calc_type_ring")
    for n in range(8):
        row = staged_row(query[0, n].numpy(), key, key[:, :512], 0.003, np.float32)
        assert row.exact
        assert_same_bits(out[0, n], row.out)
        assert_same_bits(lse[0, n, 0], np.float16(row.lse))


def decode(b=2, h=8, lengths=(20, 3), dtype=torch.float16, **changes):
    rng = torch.Generator().manual_seed(0)
    good = {
        "q_nope": torch.randn(b, h, 512, generator=rng).to(dtype),
        "q_rope": torch.randn(b, h, 64, generator=rng).to(dtype),
        "ctkv": torch.randn(3, 16, 1, 512, generator=rng).to(dtype),
        "k_rope": torch.randn(3, 16, 1, 64, generator=rng).to(dtype),
        "block_tables": ints([0, 1], [2, 1]),
        "context_lens": list(lengths),
        "q_headnum": h,
        "qk_scale": 0.04,
        "kv_headnum": 1,
    }
    return good | changes


def test_lse_is_there_for_calc_type_ring_only_whatever_return_lse_says():
    for flag in (True, False):
        out, lse = MLA.lse(**decode(), return_lse=flag)
        assert lse is None  # undefined
        ring_out, lse = MLA.lse(**decode(), return_lse=flag, calc_type="calc_type_ring")
        assert (lse.shape, lse.dtype) == ((2, 8, 1), torch.float16)
        assert torch.equal(out, ring_out)
        assert torch.equal(out, MLA(**decode()))


def test_rows_without_keys_are_not_written():
    out, lse = MLA.lse(**decode(lengths=(0, 3)), return_lse=True, calc_type="calc_type_ring")
    for x in (out, lse):
        assert x[0].isnan().all()
        assert x[1].isfinite().all()
    kept = torch.full((2, 8, 512), 7.0).half(), torch.full((2, 8, 1), 7.0).half()
    options = {"output": kept[0], "lse": kept[1], "return_lse": True, "calc_type": "calc_type_ring"}
    MLA.lse_out(**decode(lengths=(0, 3)), **options)
    for x, y in zip(kept, (out, lse), strict=True):
        assert (x[0] == 7).all()
        assert torch.equal(x[1], y[1])
    again = torch.full((2, 8, 512), 7.0).half()
    MLA.out(**decode(lengths=(0, 3)), output=again)
    assert torch.equal(again, kept[0])


DECODES = {
    "mask type": ({"mask_type": "triu"}, "Unsupported mask_type value: 'triu'"),
    "calc type": ({"calc_type": "ring"}, "Unsupported calc_type value: 'ring'"),
    "cache mode": ({"cache_mode": "nz"}, "Unsupported cache_mode value: 'nz'"),
    "spec": ({"calc_type": "calc_type_spec"}, "not implemented in the emulation: calc_type_spec"),
    "nz": ({"cache_mode": "int8_nzcache"}, "not implemented in the emulation: cache_mode int8_nzcache"),
    "descale": ({"qk_descale": torch.zeros(8)}, "not implemented in the emulation: qk_descale"),
    "spec lengths": ({"qseqlen": [1, 1]}, "not implemented in the emulation: qseqlen"),
    "int8": ({"q_nope": torch.zeros(2, 8, 512, dtype=torch.int8)}, "not implemented in the emulation: int8"),
    "mask": ({"mask": torch.zeros(2, 2).half()}, "mask and mask_type are for calc_type_spec only"),
    "heads": ({"q_headnum": 4}, "headNum is 4, must be one of"),
    "kv heads": ({"kv_headnum": 2}, "kvHeadNum is 2, must be 1"),
    "scale 0": ({"qk_scale": 0.0}, r"qkScale is 0.0, must be in \(0, 1\]"),
    "scale 2": ({"qk_scale": 2.0}, r"qkScale is 2.0, must be in \(0, 1\]"),
    "dtype": ({"q_nope": torch.zeros(2, 8, 512)}, "must be float16 or bfloat16"),
    "dims": ({"q_nope": torch.zeros(2, 512).half()}, "ERROR_INVALID_TENSOR_DIM_NUM"),
    "head count": ({"q_headnum": 16}, r"q_nope is \(2, 8, 512\)"),
    "rope": ({"q_rope": torch.zeros(2, 8, 32).half()}, "ERROR_INVALID_TENSOR_DIM"),
    "cache heads": ({"ctkv": torch.zeros(3, 16, 2, 512).half()}, "ERROR_INVALID_TENSOR_DIM"),
    "cache dtype": ({"k_rope": torch.zeros(3, 16, 1, 64).bfloat16()}, "ERROR_INVALID_VALUE"),
    "block size": ({"ctkv": torch.zeros(3, 129, 1, 512).half()}, "block size 129, at most 128"),
    "table": ({"block_tables": ints([0, 1])}, "1 rows of block_tables"),
    "table dtype": ({"block_tables": torch.zeros(2, 2).long()}, "block_tables must be int32"),
    "lengths": ({"context_lens": [1]}, "1 contextLens"),
    "negative": ({"context_lens": [1, -1]}, "must not be negative"),
    "too long": ({"context_lens": [33, 1]}, "unsafe"),
    "block": ({"block_tables": ints([-1, 1], [2, 1])}, "unsafe"),
}


@pytest.mark.parametrize("what", DECODES)
def test_decode_refuses(what):
    changes, phrase = DECODES[what]
    assert MLA(**decode()).shape == (2, 8, 512)
    with pytest.raises(RuntimeError, match=f"npu_multi_head_latent_attention: .*{phrase}"):
        MLA(**decode(**changes))


@pytest.mark.parametrize("outputs", [{"output": torch.zeros(2, 8, 511).half()}, {"output": torch.zeros(2, 8, 512)}])
def test_decode_out_refuses_other_shapes(outputs):
    with pytest.raises(RuntimeError, match="output is"):
        MLA.out(**decode(), **outputs)


def test_exact_arithmetic_rounds_once():
    args = decode()
    with arithmetic("exact"):
        out, lse = MLA.lse(**args, return_lse=True, calc_type="calc_type_ring")
    q = torch.cat([args["q_nope"], args["q_rope"]], dim=-1).double()[0]
    c = torch.cat([args["ctkv"][0], args["ctkv"][1, :4]])[:, 0].double()
    r = torch.cat([args["k_rope"][0], args["k_rope"][1, :4]])[:, 0].double()
    s = 0.04 * q @ torch.cat([c, r], dim=-1).T
    torch.testing.assert_close(out[0], (s.softmax(-1) @ c).half(), rtol=0, atol=0)
    torch.testing.assert_close(lse[0, :, 0], s.logsumexp(-1).half(), rtol=0, atol=0)


GOOD_QUERY = torch.zeros(2, 1, 8, 576).half()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"query": GOOD_QUERY.float()}, "takes float16 or bfloat16"),
        ({"query": GOOD_QUERY[:, :, :4]}, "one token each, N of"),
        ({"query": GOOD_QUERY.expand(2, 2, 8, 576)}, "one token each"),
        ({"latent_cache": CACHE.bfloat16()}, "latent_cache is"),
        ({"rope_cache": CACHE}, "rope_cache is"),
        ({"scale": 2.0}, "more than 0 and at most 1"),
        ({"kv_lengths": (1,)}, "for 2 requests"),
        ({"kv_lengths": (33, 1)}, "33 tokens in blocks"),
        ({"kv_lengths": (-1, 1)}, "-1 tokens in blocks"),
        ({"block_table": ints([3, 1], [2, 1])}, "there are blocks 0 to 2"),
        ({"block_table": torch.zeros(2, 2).long()}, "must be int32"),
    ],
)
def test_wrapper_refuses_before_the_call(changes, rule, monkeypatch):
    monkeypatch.setattr(torch.ops.atb, "npu_multi_head_latent_attention", None)
    good = {"query": GOOD_QUERY, "latent_cache": CACHE, "rope_cache": ROPES, "block_table": ints([0, 1], [2, 1])}
    arguments = good | {"kv_lengths": (17, 2), "scale": 0.1} | changes
    tensors = [arguments.pop(name) for name in ("query", "latent_cache", "rope_cache", "block_table")]
    with pytest.raises(InputError, match=rule):
        latent_decode(*tensors, **arguments)
