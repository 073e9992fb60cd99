"""What people really dump, asked on the command line: each right result passes as it is, each wrong one does not."""

import hashlib
import json
from dataclasses import replace as changed
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.crosscheck.dumps import judge_dump as module
from cpjax.crosscheck.dumps.dtypes import candidates
from cpjax.crosscheck.dumps.question import Question
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.partition import partition_of
from cpjax.precision import profile

SCALE = 16**-0.5
SAID = ("--scale", str(SCALE))


def attention(query, key, value, seen, scale=SCALE):
    """out and lse of `[B, T, N, H]` in float64; −inf and 0 where nothing is seen."""
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x.astype(np.float64), group, axis=2) for x in (key, value))
    score = np.where(seen, scale * np.einsum("btnh,bsnh->bnts", query.astype(np.float64), key), -np.inf)
    lse = np.logaddexp.reduce(score, axis=-1)
    p = np.where(seen, np.exp(score - np.where(np.isneginf(lse), 0, lse)[..., None]), 0)
    return np.einsum("bnts,bsnv->btnv", p, value), lse.swapaxes(1, 2)


def drawn(length=32, keys=None, heads=4, kv_heads=2, batch=1, seed=0):
    """query, key, value of float32 with head dimension 16."""
    rng = np.random.default_rng(seed)
    shapes = [(length, heads), (keys or length, kv_heads), (keys or length, kv_heads)]
    return [rng.standard_normal((batch, *shape, 16)).astype(np.float32) for shape in shapes]


def dump(folder, **arrays):
    """Files of the arrays; float64 becomes float32, as kernels store it."""
    folder.mkdir(exist_ok=True, parents=True)
    files = []
    for name, x in arrays.items():
        np.save(folder / f"{name}.npy", np.asarray(x, np.float32) if np.asarray(x).dtype == np.float64 else x)
        files += [f"--{name.replace('_', '-')}", str(folder / f"{name}.npy")]
    return files


def ask(files, *more, causal=True):
    return CliRunner().invoke(app, ["judge-dump", *files, *SAID, "--causal" if causal else "--no-causal", *more])


def passes(said):
    assert said.exit_code == 0, said.output
    return said.output


def refused(said):
    assert said.exit_code == 2, said.output
    assert said.output.startswith("cpjax: ")
    assert said.output.count("\n") == 1
    return said.output


CAUSAL = np.tri(32, dtype=bool)


# Layouts


def test_a_layout_that_makes_no_sense_drops_out(tmp_path):
    q, k, v = drawn(64, heads=4, kv_heads=4)
    out, _ = attention(q, k, v, np.tri(64, dtype=bool))
    assert "taken as bsnd; as bnsd it would be 64 heads of 4 tokens" in passes(
        ask(dump(tmp_path / "a", query=q, key=k, value=v, out=out))
    )
    full, _ = attention(q, k, v, np.ones((64, 64), bool))
    said = ask(dump(tmp_path / "b", query=q, key=k, value=v, out=full))
    assert said.exit_code == 1
    assert "causal mask" in " ".join(said.output.split())


def test_out_may_lie_as_the_next_layer_takes_it(tmp_path):
    """Hugging Face hands on tokens before heads, vLLM heads and their dimension in one axis."""
    q, k, v = drawn(24, batch=2)
    out, _ = attention(q, k, v, np.tri(24, dtype=bool))
    first = {name: x.swapaxes(1, 2) for name, x in (("query", q), ("key", k), ("value", v))}
    wrong = np.roll(out, 1, axis=1)
    flat = "out: [2, 24, 64] is taken as [2, 24, 4, 16], the heads one after the other"
    for name, inputs, turn, says in (
        ("a", first, lambda x: x, "out: [B, T, N, V], tokens before heads"),
        ("b", first, lambda x: x.reshape(2, 24, -1), flat),
        ("c", {"query": q, "key": k, "value": v}, lambda x: x.reshape(2, 24, -1), flat),
    ):
        assert says in passes(ask(dump(tmp_path / name, **inputs, out=turn(out))))
        assert ask(dump(tmp_path / f"{name}2", **inputs, out=turn(wrong))).exit_code == 1
    rows = {"query": q[0], "key": k[0], "value": v[0]}
    passes(ask(dump(tmp_path / "d", **rows, out=out[0].reshape(24, -1))))
    # The other way round nobody hands it on: heads first, where tokens were, is a mistake.
    files = dump(tmp_path / "e", query=q, key=k, value=v, out=out.swapaxes(1, 2))
    assert "heads or out do not fit" in refused(ask(files, "--layout-of", "bsnd"))
    files = dump(tmp_path / "f", **{name: x.reshape(24, -1) for name, x in {**rows, "out": out[0]}.items()})
    assert "has shape [24, 64]" in refused(ask(files))
    assert "reshape it to one" in refused(ask(files))


def test_tokens_may_stand_before_the_batch_if_that_is_said(tmp_path):
    q, k, v = drawn(24, batch=2)
    out, _ = attention(q, k, v, np.tri(24, dtype=bool))
    arrays = {"query": q, "key": k, "value": v, "out": out}
    files = dump(tmp_path / "a", **{name: x.swapaxes(0, 1) for name, x in arrays.items()})
    assert "asked: layout sbnd, query float32 [2, 24, 4, 16]" in passes(ask(files, "--layout-of", "sbnd"))
    arrays["out"] = out[::-1]
    files = dump(tmp_path / "b", **{name: x.swapaxes(0, 1) for name, x in arrays.items()})
    assert ask(files, "--layout-of", "sbnd").exit_code == 1


def test_a_wrong_result_does_not_choose_the_layout(tmp_path):
    q, k, v = drawn(8, heads=4, kv_heads=4)
    out, _ = attention(q, k, v, np.tri(8, dtype=bool))
    assert "as bnsd it does not pass" in passes(ask(dump(tmp_path / "a", query=q, key=k, value=v, out=out)))
    files = dump(tmp_path / "b", query=q, key=k, value=v, out=out[:, ::-1])
    assert "say --layout-of bsnd or --layout-of bnsd" in refused(ask(files))
    assert ask(files, "--layout-of", "bsnd").exit_code == 1


# lse


LSE = {
    "bsn": lambda x: x, "bns": lambda x: x.swapaxes(1, 2), "tn": lambda x: x[0], "nt": lambda x: x[0].T,
    "bsn1": lambda x: x[..., None], "tn8": lambda x: np.repeat(x[0][..., None], 8, axis=-1),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("word", LSE)
def test_axes_and_base_of_lse_are_found_and_said(tmp_path, word, base):
    q, k, v = drawn()
    out, lse = attention(q, k, v, CAUSAL)
    files = dump(tmp_path, query=q, key=k, value=v, out=out, lse=LSE[word](lse / (np.log(2) if base == "2" else 1)))
    found = passes(ask(files, "--layout-of", "bsnd"))
    assert "lse: taken as [" in found
    assert ("base two" if base == "2" else "natural logarithm") in found
    passes(ask(files, "--layout-of", "bsnd", "--lse-base", base, "--lse-layout", word))
    other = {"e": "2", "2": "e"}[base]
    assert ask(files, "--layout-of", "bsnd", "--lse-base", other).exit_code == 1


def test_a_wrong_lse_is_wrong_in_every_reading(tmp_path):
    """The maximum natural, the sum in base two."""
    q, k, v = drawn()
    out, lse = attention(q, k, v, CAUSAL)
    score = np.where(CAUSAL, SCALE * np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=2)), -np.inf)
    top = score.max(axis=-1).swapaxes(1, 2)
    said = ask(
        dump(tmp_path, query=q, key=k, value=v, out=out, lse=top + (lse - top) / np.log(2)), "--layout-of", "bsnd"
    )
    assert said.exit_code == 1
    assert "in no way is it near" in said.output


def test_plus_infinity_is_the_lse_of_queries_that_see_nothing_and_of_no_others(tmp_path):
    q, k, v = drawn(40, 24)
    seen = np.arange(-16, 24)[:, None] >= np.arange(24)
    out, lse = attention(q, k, v, seen)
    at = ("--layout-of", "bsnd", "--align", "bottom-right")
    plus = np.where(np.isneginf(lse), np.inf, lse)
    assert "+inf in 16 queries" in passes(ask(dump(tmp_path / "a", query=q, key=k, value=v, out=out, lse=plus), *at))
    plus[0, 20] = np.inf
    assert ask(dump(tmp_path / "b", query=q, key=k, value=v, out=out, lse=plus), *at).exit_code == 1


# Places


def test_the_alignment_is_asked_for_and_decides(tmp_path):
    q, k, v = drawn(8, 32)
    out, _ = attention(q, k, v, np.arange(24, 32)[:, None] >= np.arange(32))
    files = dump(tmp_path, query=q, key=k, value=v, out=out)
    assert "--align bottom-right" in refused(ask(files))
    passes(ask(files, "--align", "bottom-right"))
    assert ask(files, "--layout-of", "bsnd", "--align", "top-left").exit_code == 1


def test_requests_by_cu_seqlens_with_more_keys_than_queries(tmp_path):
    q, k, v = drawn(20, 32)
    cu_q, cu_k = np.array([0, 12, 20], np.int32), np.array([0, 16, 32], np.int32)
    seen = np.zeros((20, 32), bool)
    for (a, b), (c, d) in (((0, 12), (0, 16)), ((12, 20), (16, 32))):
        seen[a:b, c:d] = np.arange(d - c - (b - a), d - c)[:, None] >= np.arange(d - c)
    out, lse = attention(q, k, v, seen)
    files = dump(
        tmp_path, query=q[0], key=k[0], value=v[0], out=out[0], lse=lse[0].T, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
    )
    assert "requests 2" in passes(ask(files, "--align", "bottom-right"))
    assert "--align" in refused(ask(files))
    assert ask(files, "--layout-of", "tnd", "--align", "top-left").exit_code == 1


@pytest.mark.parametrize("way", ["segments", "cu_seqlens_padded"])
def test_pads_between_documents_may_hold_nan(tmp_path, way):
    q, k, v = drawn(32)
    segment = np.array([0] * 13 + [-1] * 3 + [1] * 14 + [-1] * 2)
    seen = CAUSAL & (segment[:, None] == segment) & (segment >= 0)
    out, lse = attention(q, k, v, seen)
    for x in (q, k, v, out, lse):
        x[0, segment < 0] = np.nan
    said = {"segments": segment}
    if way == "cu_seqlens_padded":
        said = {"cu_seqlens_q": np.array([0, 13, 27]), "cu_seqlens_padded": np.array([0, 16, 32])}
    files = dump(tmp_path / "a", query=q, key=k, value=v, out=out, lse=lse, **said)
    assert "pads 5" in passes(ask(files, "--layout-of", "bsnd"))
    out[0, 28:30] = 0
    files = dump(tmp_path / "b", query=q, key=k, value=v, out=out, **said)
    assert ask(files, "--layout-of", "bsnd").exit_code == 1


def test_unused_slots_of_a_cache_may_hold_nan(tmp_path):
    q, k, v = drawn(1, 32)
    out, _ = attention(q, k[:, :20], v[:, :20], np.ones((1, 20), bool))
    k[:, 20:], v[:, 20:] = np.nan, np.inf
    passes(ask(dump(tmp_path / "a", query=q, key=k, value=v, out=out, positions=np.array([19], np.uint8))))
    files = dump(tmp_path / "b", query=q, key=k, value=v, out=out, positions=np.array([20], np.uint8))
    assert "key.npy: holds a NaN or an infinity, first at batch 0, token 20" in refused(ask(files))


@pytest.mark.parametrize("how", ["seq_lens", "cu_seqlens_k"])
def test_paged_caches_are_taken_as_they_are(tmp_path, how):
    rng = np.random.default_rng(0)
    q, k_cache, v_cache = (
        rng.standard_normal(s).astype(np.float32) for s in ((2, 1, 4, 16), (9, 8, 2, 16), (9, 8, 2, 16))
    )
    table, lens = np.array([[7, 3, 1], [0, 5, -1]], np.int32), np.array([19, 9])
    out = np.empty((2, 1, 4, 16))
    for i, n in enumerate(lens):
        blocks = table[i][table[i] >= 0]
        one = [x[blocks].reshape(1, -1, 2, 16)[:, :n] for x in (k_cache, v_cache)]
        out[i] = attention(q[i : i + 1], *one, np.ones((1, n), bool))[0]
    k_cache[1, 3:] = np.nan  # behind the last token
    said = {how: lens if how == "seq_lens" else np.cumsum([0, *lens])}
    files = dump(tmp_path / "a", query=q, key=k_cache, value=v_cache, out=out, block_table=table, **said)
    passes(ask(files, "--layout-of", "bsnd", causal=False))
    assert "--align" in refused(ask(files, "--layout-of", "bsnd"))
    passes(ask(files, "--layout-of", "bsnd", "--align", "bottom-right"))
    files = dump(tmp_path / "b", query=q, key=k_cache, value=v_cache, out=out, block_table=table[:, ::-1], **said)
    assert "request 1 has 9 cached tokens, which take 2 blocks, and one of them is -1; there are 9, from 0" in refused(
        ask(files, "--layout-of", "bsnd", causal=False)
    )


def test_a_slot_of_a_batch_that_no_request_has_sees_no_key(tmp_path):
    """vLLM pads a batch of decode with requests of 0 cached tokens; the vendor's caches of latents have three axes."""
    rng = np.random.default_rng(0)
    q, cache = rng.standard_normal((3, 4, 16)).astype(np.float32), rng.standard_normal((5, 8, 16)).astype(np.float32)
    table, lens = np.array([[2, 1], [-1, -1], [4, 0]]), np.array([11, 0, 5])
    out = np.zeros((3, 4, 16))
    for i in (0, 2):
        keys = cache[table[i]].reshape(1, -1, 1, 16)[:, : lens[i]]
        out[i] = attention(q[None, i : i + 1], keys, keys, np.ones((1, lens[i]), bool))[0][0, 0]
    paged = {"query": q, "key": cache, "value": cache, "block_table": table}
    said = passes(ask(dump(tmp_path / "a", **paged, out=out, seq_lens=lens), "--layout-of", "tnd", causal=False))
    assert "value: a cache of 3 axes is taken as [blocks, block_size, 1, dim], one head" in said
    out[1] = 1
    assert ask(dump(tmp_path / "b", **paged, out=out, seq_lens=lens), "--layout-of", "tnd", causal=False).exit_code == 1
    files = dump(tmp_path / "c", **paged, out=out, seq_lens=lens * 0)
    assert "nothing to attend to" in refused(ask(files, "--layout-of", "tnd", causal=False))


def test_a_window_is_asked_for(tmp_path):
    q, k, v = drawn()
    near = np.arange(32)[:, None] - np.arange(32) < 5
    files = dump(tmp_path, query=q, key=k, value=v, out=attention(q, k, v, CAUSAL & near)[0])
    assert "no bias, no alibi\n" in passes(ask(files, "--window", "5"))
    assert ask(files, "--layout-of", "bsnd").exit_code == 1


# dtypes


def test_a_float32_query_on_a_float16_cache(tmp_path):
    q, k, v = drawn()
    k, v = k.astype(np.float16), v.astype(np.float16)
    exact = dump(tmp_path / "a", query=q, key=k, value=v, out=attention(q, k, v, CAUSAL)[0])
    said = passes(ask(exact, "--layout-of", "bsnd"))
    assert "precision: float32 probabilities with float32 out passes" in said
    assert "dtypes: query float32, key float16" in said
    q = q + np.float32(2**-10)  # so that rounding it is felt beside the rounding of probabilities
    out = attention(q.astype(np.float16).astype(np.float32) * 64, k, v, CAUSAL)[0]
    rounded = dump(tmp_path / "b", query=q * 64, key=k, value=v, out=out)
    assert "of the query rounded to float16 passes" in passes(ask(rounded, "--layout-of", "bsnd"))
    wrong = dump(tmp_path / "c", query=q, key=k, value=v, out=attention(q, k, v, CAUSAL)[0] * 1.003)
    assert ask(wrong, "--layout-of", "bsnd").exit_code == 1


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["bfloat16", "float16"])
def test_narrow_tensors_that_were_dumped_as_float32(tmp_path, fmt):
    """NumPy has no BF16, so people write `x.float().numpy()`."""
    dtype = np.dtype(ml_dtypes.bfloat16 if fmt == "bfloat16" else fmt)
    q, k, v = (x.astype(dtype).astype(np.float32) for x in drawn())
    out = attention(q, k, v, CAUSAL)[0]
    narrow = out.astype(dtype).astype(np.float32)
    said = passes(ask(dump(tmp_path / "a", query=q, key=k, value=v, out=narrow), "--layout-of", "bsnd"))
    assert f"hold {fmt} numbers only; tried as such, too" in said
    assert f"flash_{'bf16' if fmt == 'bfloat16' else 'fp16'} passes; float32 does not" in said
    wrong = (out * 1.03).astype(dtype).astype(np.float32)
    assert ask(dump(tmp_path / "b", query=q, key=k, value=v, out=wrong), "--layout-of", "bsnd").exit_code == 1
    # Of a float32 kernel neither inputs that are BF16 numbers by chance, nor an out that is, are enough.
    coarse = out.astype(np.float32) * np.float32(1 + 2.0**-10)
    assert ask(dump(tmp_path / "c", query=q, key=k, value=v, out=coarse), "--layout-of", "bsnd").exit_code == 1
    q, k, v = drawn()
    out = attention(q, k, v, CAUSAL)[0].astype(dtype).astype(np.float32)
    assert ask(dump(tmp_path / "d", query=q, key=k, value=v, out=out), "--layout-of", "bsnd").exit_code == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_lse_in_half_precision_is_rounded_once(tmp_path, dtype):
    q, k, v = drawn()
    out, lse = attention(q, k, v, CAUSAL)
    arrays = {"query": q, "key": k, "value": v, "out": out}
    said = passes(ask(dump(tmp_path / "a", **arrays, lse=lse.astype(dtype)), "--layout-of", "bsnd"))
    assert f"lse: is {np.dtype(dtype).name}, so one rounding to {np.dtype(dtype).name} is taken for granted" in said
    off = (lse * (1 + 4 * ml_dtypes.finfo(dtype).eps)).astype(dtype)
    assert ask(dump(tmp_path / "b", **arrays, lse=off), "--layout-of", "bsnd").exit_code == 1
    rounded = lse.astype(dtype).astype(np.float32)  # in a file that claims float32
    assert ask(dump(tmp_path / "c", **arrays, lse=rounded), "--layout-of", "bsnd").exit_code == 1
    files = dump(tmp_path / "d", **arrays, lse=(lse / np.log(2)).astype(dtype))
    assert "known here of natural logarithms only" in refused(ask(files, "--layout-of", "bsnd"))


def test_an_fp8_cache_with_its_scale(tmp_path):
    q, k, v = drawn()
    k8, v8 = k.astype(ml_dtypes.float8_e4m3fn), v.astype(ml_dtypes.float8_e4m3fn)
    k, v = k8.astype(np.float64) * 0.3, v8.astype(np.float64) * 0.7
    out = attention(q, k, v, CAUSAL)[0].astype(np.float32)
    save_file({"attn.q": q, "attn.k": k8, "attn.v": v8, "attn.out": out}, tmp_path / "x.safetensors")
    file = [str(tmp_path / "x.safetensors")]
    assert "say --key-scale" in refused(ask(file))
    said = passes(ask(file, "--key-scale", "0.3", "--value-scale", "0.7", "--layout-of", "bsnd"))
    assert "probabilities in FP8 are not among" in said
    assert ask(file, "--kv-scale", "0.3", "--layout-of", "bsnd").exit_code == 1


@pytest.mark.parametrize("layout", ["bsnd", "bnsd", "tnd"])
def test_a_rope_key_with_one_head_is_taken_for_all_and_that_is_said(tmp_path, layout):
    """As MLA has it; nope and rope parts dumped apart."""
    q, k, v = drawn(kv_heads=4)
    k[..., 10:] = k[:, :, :1, 10:]
    out = attention(q, k, v, CAUSAL)[0]
    parts = {"query": q[..., :10], "query_2": q[..., 10:], "key": k[..., :10], "key_2": k[:, :, :1, 10:]}
    turned = {
        name: {"bsnd": x, "bnsd": x.swapaxes(1, 2), "tnd": x[0]}[layout]
        for name, x in (parts | {"value": v, "out": out}).items()
    }
    files = [x.removesuffix("-2") if x.startswith("--") else x for x in dump(tmp_path, **turned)]
    said = passes(ask(files, "--layout-of", layout))
    assert "key: part 2 has one head, which is taken for all 4" in said
    turned["key_2"] = np.repeat(turned["key_2"], 3, axis={"bsnd": 2, "bnsd": 1, "tnd": 1}[layout])
    files = [x.removesuffix("-2") if x.startswith("--") else x for x in dump(tmp_path / "b", **turned)]
    assert "or one part have a single head" in refused(ask(files, "--layout-of", layout))


def test_a_wider_out_is_judged_in_its_own_format():
    out = np.full(3, 1 / 3, np.float32)
    flash = profile("flash_fp16")
    (one,), says = candidates(*[np.dtype(np.float16)] * 3, out, flash)
    assert (one.precision.out, one.precision.probability) == ("float32", "float16")
    assert "out is float32" in says
    (one,), says = candidates(*[np.dtype(np.float16)] * 3, out.astype(np.float16).astype(np.float32), flash)
    assert (one.precision.out, says) == ("float16", None)


# One file


def test_one_file_holds_all_tensors_under_known_names_or_said_ones(tmp_path):
    q, k, v = drawn()
    out, lse = attention(q, k, v, CAUSAL)
    arrays = {"q": q, "layer.0.key": k, "V": v, "y": out.astype(np.float32), "softmax_lse": lse.astype(np.float32)}
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    assert "no tensor is named as out may be; it holds V, layer.0.key, q" in refused(ask([str(path)]))
    said = passes(ask([str(path)], "--names", "out=y"))
    assert "lse: taken as" in said
    assert "holds V" in refused(ask([str(path)], "--names", "out=z"))
    np.savez(path, **arrays, output=v, o=v)
    assert "o and output may both be out" in refused(ask([str(path)]))


def test_names_of_the_stacks_and_parts_that_are_named_beside_the_file(tmp_path):
    q, k, v = drawn()
    out = attention(q, k, v, CAUSAL)[0].astype(np.float32)
    path = str(tmp_path / "x.npz")
    np.savez(path, query_layer=q, key_layer=k, value_layer=v, context_layer=out)  # Megatron
    passes(ask([path]))
    parts = {"q_nope": q[..., :12], "q_pe": q[..., 12:], "k_nope": k[..., :12], "k_pe": k[..., 12:]}
    np.savez(path, **parts, v=v, o=out)
    named = [x for name in parts for x in ("--query" if name[0] == "q" else "--key", f"{path}::{name}")]
    passes(ask([path, *named]))


# Ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
def test_how_ranks_were_cut_is_found_and_a_wrong_result_is_asked_about(tmp_path, name):
    q, k, v = drawn()
    out, lse = attention(q, k, v, CAUSAL)
    rows = partition_of(name, 2).order(32).reshape(2, -1)

    def folders(folder, **arrays):
        for what, x in arrays.items():
            for rank in range(2):
                dump(folder / what, **{f"rank{rank}": x[:, rows[rank]]})
        return [word for what in arrays for word in (f"--{what}", str(folder / what))]

    files = folders(tmp_path / "a", query=q, key=k, value=v, out=out, lse=lse)
    said = passes(ask(files, "--layout-of", "bsnd"))
    assert f"ranks joined as {name}" in said
    assert "cp: 2, as the folders hold 2 ranks" in said
    passes(ask(files, "--layout-of", "bsnd", "--partition", name))
    wrong = folders(tmp_path / "b", query=q, key=k, value=v, out=out[:, ::-1])
    assert "say --partition" in refused(ask(wrong, "--layout-of", "bsnd"))
    assert ask(wrong, "--layout-of", "bsnd", "--partition", name).exit_code == 1


@pytest.mark.slow
@pytest.mark.parametrize("cp", [2, 6])
@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
def test_files_whose_numbers_are_not_those_of_the_ranks(tmp_path, name, cp):
    """The result is right; the text was laid wrongly together, and no other cause is told."""
    q, k, v = drawn(48)
    out, lse = attention(q, k, v, np.tri(48, dtype=bool))
    rows = partition_of(name, cp).order(48).reshape(cp, -1)

    def folders(folder, order, **arrays):
        for what, x in arrays.items():
            dump(folder / what, **{f"rank{file}": x[:, rows[rank]] for file, rank in enumerate(order)})
        return [word for what in arrays for word in (f"--{what}", str(folder / what))]

    arrays = {"query": q, "key": k, "value": v, "out": out, "lse": lse}
    files = folders(tmp_path / "a", range(cp)[::-1], **arrays)
    said = ask(files, "--layout-of", "bsnd", "--partition", name)
    assert said.exit_code == 1
    text = " ".join(said.output.split())
    order = f"With the files in another order (rank 0 in file {cp - 1}"
    assert f"diagnosis: {order}" in text
    assert "the result passes: the numbers of the files are not those of the ranks." in text
    assert text.count("diagnosis:") == 1
    assert f"joined as {name} with the files in another order" in refused(ask(files, "--layout-of", "bsnd"))
    # Another cut than was said.
    other = {"contiguous": "zigzag", "zigzag": "striped", "striped": "contiguous"}[name]
    files = folders(tmp_path / "b", range(cp), **arrays)
    said = ask(files, "--layout-of", "bsnd", "--partition", other)
    assert said.exit_code == 1
    assert f"diagnosis: Joined as {name} the result passes: the ranks hold the text so." in " ".join(
        said.output.split()
    )
    # A wrong result is wrong in every order, and then the search is about the order that was said.
    files = folders(tmp_path / "c", range(cp), **{**arrays, "out": 1.01 * out})
    said = ask(files, "--layout-of", "bsnd", "--partition", name)
    assert "out is 1.01 times what it should be" in " ".join(said.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["contiguous", "interleaved", "interleaved:4", "blocks:8"])
def test_a_cache_that_is_cut_over_ranks(tmp_path, name, batch):
    """Decode: the ranks' keys and values are folders, queries and result are those of every rank."""
    length, cp, keys = 3, 4, 64
    q, k, v = drawn(length, keys, batch=batch)
    out, lse = attention(q, k, v, np.arange(keys) <= np.arange(keys - length, keys)[:, None])
    size = int(name.partition(":")[2] or 1)
    rank = np.arange(keys) * cp // keys if name == "contiguous" else np.arange(keys) // size % cp
    if name == "blocks:8":
        rank[-8:] = cp - 1  # MindIE's: the last block is on the last rank
    shared = dump(tmp_path / "shared", query=q, out=out, lse=lse)
    caches = []
    for what, x in {"key": k, "value": v}.items():
        dump(tmp_path / what, **{f"rank{r}": x[:, rank == r] for r in range(cp)})
        caches += [f"--{what}", str(tmp_path / what)]
    words = ("--layout-of", "bsnd", "--align", "bottom-right")
    said = passes(ask([*shared, *caches], *words, "--partition", name))
    assert f"partition {name.partition(':')[0]}, cp 4" in said
    if ":" not in name:
        assert f"ranks joined as {name}" in passes(ask([*shared, *caches], *words))
    wrong = dump(tmp_path / "wrong", query=q, out=out[:, ::-1])
    assert ask([*wrong, *caches], *words, "--partition", name).exit_code == 1
    other = "blocks:16" if name == "interleaved" else "interleaved:3"
    assert ask([*shared, *caches], *words, "--partition", other).exit_code in (1, 2)
    if name == "contiguous":
        return
    # Every rank may have dumped its copy.
    copies = []
    for what, x in {"query": q, "out": out}.items():
        dump(tmp_path / what, **{f"rank{r}": x for r in range(cp)})
        copies += [f"--{what}", str(tmp_path / what)]
    passes(ask([*copies, *caches], *words, "--partition", name))
    dump(tmp_path / "out", rank2=out[:, ::-1])
    assert "judge the result of each rank for itself" in refused(ask([*copies, *caches], *words, "--partition", name))
    dump(tmp_path / "key", rank1=k[:, :5])
    dump(tmp_path / "value", rank1=v[:, :5])
    assert "tokens; " in refused(ask([*shared, *caches], *words, "--partition", name))
    # Whole files of a batch are requests of one row, too.
    files = dump(tmp_path / "whole", query=q, key=k, value=v, out=out, lse=lse)
    passes(ask(files, *words, "--partition", name, "--cp", "4"))


def test_ranks_may_have_gathered_all_keys_and_merged_nothing(tmp_path):
    """Position 1 sees one key of each of two ranks. Merged, each has probability 1; together, both are rounded."""
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in drawn(96, seed=24))
    score = SCALE * np.einsum("btnh,bsnh->bnts", q.astype(np.float64), np.repeat(k, 2, axis=2).astype(np.float64))
    score = np.where(np.tri(96, dtype=bool), score, -np.inf)
    p = np.exp(score - score.max(axis=3, keepdims=True))
    sums, p = p.sum(axis=3), p.astype(ml_dtypes.bfloat16).astype(np.float64)
    out = np.einsum("bnts,bsnv->btnv", p, np.repeat(v, 2, axis=2).astype(np.float64)) / sums.swapaxes(1, 2)[..., None]
    rows = partition_of("striped", 4).order(96).reshape(4, -1)
    files = []
    for name, x in {"query": q, "key": k, "value": v, "out": out.astype(ml_dtypes.bfloat16)}.items():
        dump(tmp_path / name, **{f"rank{rank}": x[:, rows[rank]] for rank in range(4)})
        files += [f"--{name}", str(tmp_path / name)]
    said = passes(ask(files, "--layout-of", "bsnd", "--partition", "striped"))
    assert "order of merging: together passes" in said
    assert ask(files, "--layout-of", "bsnd", "--partition", "striped", "--order", "ring").exit_code == 1


# What was asked


def test_table_json_and_page_say_what_was_asked_and_assumed(tmp_path):
    q, k, v = drawn()
    files = dump(tmp_path, query=q, key=k, value=v, out=attention(q, k, v, CAUSAL)[0])
    digest = hashlib.sha256(Path(files[1]).read_bytes()).hexdigest()
    table = passes(ask(files, "--report", str(tmp_path / "page")))
    page = (tmp_path / "page" / "index.html").read_text()
    said = CliRunner().invoke(app, ["judge-dump", *files, *SAID, "--causal", "--json"])
    result = json.loads(said.stdout)["results"][0]
    assert result["verdict"]["asked"]["query"] == "float32 [1, 32, 4, 16]"
    assert result["verdict"]["asked"]["assumed"] == "no sink, no softcap, no bias, no alibi, no window"
    assert result["about"]["files"][files[1]] == digest
    assert result["about"]["date"].startswith("20")
    for text in (table, page):
        assert "query float32 [1, 32, 4, 16]" in text
        assert "no sink, no softcap, no bias" in text
        assert digest in text
        assert "mask causal" in text


def test_sink_softcap_alibi_and_bias_reach_the_judge(tmp_path, monkeypatch):
    q, k, v = drawn()
    given = {}

    def record(*arrays, softcap=None, sink=None, alibi=None, bias=None, **words):
        given.update(softcap=softcap, sink=sink, alibi=alibi, bias=bias)
        return checked_problem(*arrays, **words)

    monkeypatch.setattr(module, "checked_problem", record)
    files = dump(
        tmp_path, query=q, key=k, value=v, out=attention(q, k, v, CAUSAL)[0], sink=np.arange(4.0), alibi=np.ones(4),
        bias=np.zeros((32, 32)),
    )  # fmt: skip
    ask(files, "--layout-of", "bsnd", "--softcap", "30")
    assert given["softcap"] == 30
    assert given["sink"].tolist() == [0, 1, 2, 3]
    assert (given["alibi"].shape, given["bias"].shape) == ((4,), (32, 32))


PLAIN = Question((Path("q"),), (Path("k"),), Path("v"), Path("o"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"order": "backwards"}, "--order 'backwards' is unknown"),
        ({"lse_layout": "nbt"}, "--lse-layout 'nbt' is unknown"),
        ({"lse_base": "10"}, "--lse-base '10' is unknown"),
        ({"align": "left"}, "--align 'left' is unknown"),
        ({"partition": "spiral"}, "--partition: unknown partition"),
        ({"scale": float("nan")}, "--scale is nan"),
        ({"softcap": float("inf")}, "--softcap is inf"),
        ({"key_scale": -1.0}, "--key-scale is -1.0"),
        ({"lengths": (3,), "segments": Path("s")}, "--lengths and --segments both say"),
        ({"positions": Path("p"), "align": "top-left"}, "--positions says where queries are"),
        ({"block_table": Path("t")}, "--seq-lens or --cu-seqlens-k"),
        ({"seq_lens": Path("t")}, "--block-table"),
        ({"cu_seqlens_k": Path("t")}, "give --cu-seqlens-q"),
        ({"cu_seqlens_padded": Path("t")}, "give --cu-seqlens-q"),
    ],
)
def test_what_makes_no_question_is_refused(words, says):
    with pytest.raises(ValueError, match=says):
        changed(PLAIN, **words)
