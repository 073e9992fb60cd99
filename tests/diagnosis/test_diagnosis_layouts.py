"""The diagnosis of packed requests, cached prefixes and decode: chunks are those of requests, and have other ranks."""

import jax
import numpy as np
import pytest

from cpjax.crosscheck import judge
from cpjax.crosscheck.conformance.cases import conformance_cases
from cpjax.crosscheck.run.session import how
from cpjax.dense import dense_attention
from cpjax.mask import Mask, Tokens
from cpjax.partition import Blocks

CASES = {case.name: case for case in conformance_cases() if case.layout == "packed"}


def computed(query, key, value, q_tokens, kv_tokens, scale, lost=()):
    """Attention, rounded once, to all keys but the lost ones."""
    segment = np.array(kv_tokens.segment)
    segment[0, list(lost)] = -1
    with jax.enable_x64():
        arrays = [x.astype(np.float64) for x in (query, key, value)]
        out, lse = dense_attention(
            *arrays, q_tokens, kv_tokens._replace(segment=segment), mask=Mask(is_causal=True), scale=scale
        )
        return np.asarray(out).astype(np.float16), np.asarray(lse).astype(np.float32)


def of_case(name, *, scale=1.0, lost=()):
    """The diagnosis of a conformance case, computed with another scale or without some keys."""
    case = CASES[name]
    arrays = (case.query, case.key, case.value)
    result = computed(*arrays, case.q_tokens, case.kv_tokens, scale * case.scale, lost)
    said = judge(*arrays, *result, **how(case), precision="flash_fp16", order="ring")
    assert not said.passed
    count = int(np.asarray(case.kv_tokens.segment).max()) + 1
    assert said.chunk_weights.shape[1] <= count * (2 * case.cp + 1)
    return said.diagnosis


@pytest.mark.slow
@pytest.mark.parametrize("name", ["36-packed-gqa-cp2", "37-prefix-gqa-cp2", "38-decode-gqa-cp1"])
def test_a_wrong_scale(name):
    assert "the scale is 1.01 times" in of_case(name, scale=1.01)[0]


def test_a_chunk_of_one_request():
    said = of_case("36-packed-gqa-cp2", lost=range(18))  # 70 tokens, padded to 72, in four chunks
    assert "key/value chunk 0 (of rank 0, request 0) never entered query chunk 1–3" in said[0], said


@pytest.mark.slow
def test_a_prefix():
    case = CASES["37-prefix-gqa-cp2"]
    tokens, keys = case.query.shape[1], case.key.shape[1]
    assert "a cached prefix) were dropped (with" in of_case(case.name, lost=range(tokens, keys))[0]
    last = tokens + np.flatnonzero(np.asarray(case.kv_tokens.segment)[0, tokens:] == 2)
    said = " ".join(of_case(case.name, lost=last))
    assert "key/value chunk 14 (a prefix, request 2) never entered query chunk 10" in said, said


def test_what_one_rank_holds_of_a_request_in_decode():
    rng = np.random.default_rng(0)
    lengths, cp = (300, 200), 2
    kv = Tokens(*(np.concatenate(x).astype(np.int32)[None] for x in ([np.arange(n) for n in lengths], _same(lengths))))
    q = Tokens(np.array([[298, 299, 199]], np.int32), np.array([[0, 0, 1]], np.int32))
    query, key, value = (rng.standard_normal((1, n, 2, 32)).astype(np.float16) for n in (3, 500, 500))
    places = {"q_positions": q.position, "kv_positions": kv.position, "segment_ids": (q.segment, kv.segment)}
    asked = {"scale": 32**-0.5, "layout": "decode", "cp": cp, "precision": "flash_fp16", **places}
    assert judge(query, key, value, *computed(query, key, value, q, kv, 32**-0.5), **asked).passed
    lost = np.flatnonzero(Blocks(cp).kv_chunks(q.segment[0], kv.segment[0]) == 1)  # of request 0 on rank 1
    said = judge(query, key, value, *computed(query, key, value, q, kv, 32**-0.5, lost), **asked)
    assert "rank 0, 1: key/value chunk 1 (of rank 1, request 0) never entered query chunk 0" in said.diagnosis[0]


def _same(lengths):
    return [np.full(n, i) for i, n in enumerate(lengths)]
