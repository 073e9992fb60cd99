"""The definition, against the oracle that was written apart from it, and against values known by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from programs import assert_dense, equal_bits
from strategies import RULES, SCALE, problem, problems

from cpjax.dense import dense_attention
from cpjax.mask import Mask, Tokens, tokens

SHAPES = st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([(1, 1), (4, 2), (3, 1)]))


def dense(p):
    sink = None if np.isneginf(p.sink).all() else p.sink
    return dense_attention(*p.arrays, mask=p.rule.mask, scale=SCALE, softcap=p.rule.softcap, sink=sink)


@given(SHAPES.flatmap(lambda s: problems(s[0], s[1], s[2], batch=2)))
def test_is_the_oracle(p):
    assert_dense(dense(p), p)


@given(problems(5, 300))
def test_is_the_oracle_with_many_keys(p):
    assert_dense(dense(p), p)


def test_is_the_oracle_across_query_tiles():
    place = tokens(1, 515, pads=5)
    p = problem(1, "normal", place, place, RULES[0], heads=(1, 1))
    assert_dense(dense(p), p)


@given(problems(6, 6), st.integers(0, 2**32 - 1))
def test_pads_may_hold_anything(p, seed):
    rng = np.random.default_rng(seed)
    pad = rng.random(6) < 0.3
    p.kv_tokens.segment[:, pad] = -1
    expected = dense(p)
    for x in (p.key, p.value):
        x[:, pad] = rng.choice([np.nan, np.inf, 1e300], (x.shape[0], pad.sum(), *x.shape[2:]))
    p.query[p.q_tokens.segment == -1] = np.nan
    equal_bits(dense(p), expected)


def test_lse_of_equal_logits_counts_the_visible_keys():
    place = tokens(1, 7)
    x = np.zeros((1, 7, 2, 3))
    lse = dense_attention(x, x, x, place, place, mask=Mask(window=4), scale=1.0).lse
    np.testing.assert_allclose(lse[0, :, 0], np.log([1, 2, 3, 4, 4, 4, 4]), rtol=1e-15)


def test_a_query_that_sees_no_key():
    place = Tokens(np.array([[0, 1]], np.int32), np.array([[0, 1]], np.int32))
    alone = Tokens(np.array([[0]], np.int32), np.array([[0]], np.int32))
    ones = np.ones((1, 2, 1, 1))
    out, lse = dense_attention(ones, ones[:, :1], ones[:, :1], place, alone, mask=Mask(), scale=1.0)
    assert out[0, 1] == 0
    assert lse[0, 1] == -np.inf
    assert out[0, 0] == 1
