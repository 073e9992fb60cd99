"""A diagnosis ends in sentences, whatever was asked and whatever was handed over."""

import warnings

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from cpjax.crosscheck import judge

KINDS = ("zeros", "NaN in a row", "mean of all values", "noise", "infinite", "rows exchanged", "of other keys")


@st.composite
def questions(draw):
    """Shapes and a mask under which rows may see nothing, one key or all; options; and a wrong result."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, length, keys = draw(st.integers(1, 2)), draw(st.integers(1, 24)), draw(st.integers(1, 24))
    kv_heads, group, width = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 8]))
    heads, dtype = kv_heads * group, draw(st.sampled_from([np.float16, np.float32, np.float64]))
    query = rng.standard_normal((batch, length, heads, 8)) * draw(st.sampled_from([0.0, 1.0, 30.0]))
    key = rng.standard_normal((batch, keys, kv_heads, 8))
    value = rng.standard_normal((batch, keys, kv_heads, width)) + draw(st.sampled_from([0.0, 1.0, 100.0]))
    start = draw(st.integers(-keys - 2, keys + 2))
    asked = {
        "is_causal": draw(st.booleans()),
        "q_positions": np.broadcast_to(np.arange(start, start + length), (batch, length)),
        "kv_positions": np.broadcast_to(np.arange(keys), (batch, keys)),
        "cp": draw(st.sampled_from([1, 2, 3])),
        "partition": draw(st.sampled_from(["contiguous", "zigzag", "striped"])),
        "order": draw(st.sampled_from(["ascending", "ring", "gather", "together", "unknown"])),
    }
    if draw(st.booleans()):
        asked["window"] = draw(st.integers(1, 6))
    if draw(st.booleans()):
        asked["sink"] = rng.standard_normal(heads).astype(np.float32)
    if draw(st.booleans()):
        asked["softcap"] = draw(st.sampled_from([0.5, 30.0]))
    if draw(st.booleans()):
        own = rng.integers(-1, 3, (batch, length)), rng.integers(-1, 3, (batch, keys))
        own[0][:, 0] = 3  # some query is no pad
        asked["segment_ids"] = tuple(np.sort(x, axis=1) for x in own)
    out = rng.standard_normal((batch, length, heads, width)).astype(dtype)
    kind, row = draw(st.sampled_from(KINDS)), draw(st.integers(0, length - 1))
    if kind == "zeros":
        out[:] = 0
    elif kind == "NaN in a row":
        out[:, row] = np.nan
    elif kind == "mean of all values":
        out[:] = np.repeat(value.mean(axis=1, keepdims=True), group, axis=2).astype(dtype)
    elif kind == "infinite":
        out[:, row:] = np.inf
    elif kind == "rows exchanged":
        out = out[:, ::-1]
    elif kind == "of other keys":
        out[:] = np.repeat(value[:, :1], group, axis=2).astype(dtype)
    lse = draw(st.sampled_from([None, 0.0, np.nan, np.inf, -np.inf]))
    lse = None if lse is None else np.full((batch, length, heads), lse, np.float32)
    return [x.astype(dtype) for x in (query, key, value)], out, lse, asked


@examples(0.6)
@given(questions())
def test_it_ends_in_sentences(question):
    (query, key, value), out, lse, asked = question
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdict = judge(query, key, value, out, lse, **asked)
        if verdict.passed or not verdict.judgeable:
            return
        assert verdict.diagnosis
        # Capital letters where a sentence speaks of a NaN; a number that is none is never told.
        assert not any("nan" in line for line in verdict.diagnosis)
