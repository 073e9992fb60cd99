"""Who sees whom: literal matrices, and the rule pair by pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import RULES, places, seen

from cpjax.errors import InputError
from cpjax.mask import PAD, Mask, Tokens, tokens, visible


def matrix(mask: Mask, q: Tokens, kv: Tokens | None = None) -> list[str]:
    rows = visible(mask, q, q if kv is None else kv)[0]
    return ["".join("x" if pair else "." for pair in row) for row in rows]


def row(position, segment) -> Tokens:
    return Tokens(np.array([position], np.int32), np.array([segment], np.int32))


def test_full():
    assert matrix(Mask(is_causal=False), tokens(1, 3)) == ["xxx", "xxx", "xxx"]


def test_causal_includes_the_diagonal():
    assert matrix(Mask(), tokens(1, 4)) == ["x...", "xx..", "xxx.", "xxxx"]


def test_causal_after_a_prefix_of_two():
    assert matrix(Mask(), tokens(1, 3, start=2), tokens(1, 5)) == ["xxx..", "xxxx.", "xxxxx"]


def test_causal_window_counts_the_own_key():
    assert matrix(Mask(window=2), tokens(1, 4)) == ["x...", "xx..", ".xx.", "..xx"]
    assert matrix(Mask(window=1), tokens(1, 3)) == ["x..", ".x.", "..x"]


def test_full_window_looks_both_ways():
    assert matrix(Mask(is_causal=False, window=2), tokens(1, 4)) == ["xx..", "xxx.", ".xxx", "..xx"]


def test_packed_requests_do_not_see_each_other():
    two = row([0, 1, 2, 0, 1], [0, 0, 0, 1, 1])
    assert matrix(Mask(), two) == ["x....", "xx...", "xxx..", "...x.", "...xx"]


def test_pads_see_nothing_and_nobody_sees_them():
    assert matrix(Mask(is_causal=False), tokens(1, 2, pads=2)) == ["xx..", "xx..", "....", "...."]


def test_zigzag_shard_sees_by_position_not_by_place():
    shard = row([0, 1, 6, 7], [0] * 4)  # rank 0 of 2
    other = row([2, 3, 4, 5], [0] * 4)
    assert matrix(Mask(), shard, other) == ["....", "....", "xxxx", "xxxx"]
    assert matrix(Mask(), other, shard) == ["xx..", "xx..", "xx..", "xx.."]


@given(st.sampled_from(RULES), places(2, 5, 7))
def test_is_the_rule_pair_by_pair(rule, where):
    np.testing.assert_array_equal(visible(rule.mask, *where), seen(*where, rule))


masks = st.builds(Mask, st.booleans(), st.none() | st.integers(1, 9))


@given(masks, masks, places(1, 6, 6))
def test_and_is_the_intersection(a, b, where):
    np.testing.assert_array_equal(visible(a & b, *where), visible(a, *where) & visible(b, *where))


@pytest.mark.parametrize("window", [0, -3])
def test_window_below_one_is_refused(window):
    with pytest.raises(InputError, match=rf"window is {window}; it must be at least 1"):
        Mask(window=window)


def test_tokens():
    made = tokens(2, 2, start=7, pads=1)
    assert made.position.tolist() == [[7, 8, 9]] * 2
    assert made.segment.tolist() == [[0, 0, PAD]] * 2
    assert made.position.dtype == made.segment.dtype == np.int32
