"""Who holds which tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpjax.errors import InputError
from cpjax.partition.layout import LAYOUTS, chunks_per_rank, held_chunks, inverse, order

CASES = given(st.sampled_from(LAYOUTS), st.integers(1, 12), st.integers(0, 5))


@CASES
def test_is_a_permutation_that_can_be_undone(layout, cp, chunk):
    length = cp * chunks_per_rank(layout) * chunk
    held = order(layout, length, cp)
    np.testing.assert_array_equal(np.sort(held), np.arange(length))
    x = np.random.default_rng(0).normal(size=length)
    np.testing.assert_array_equal(x[held][inverse(held)], x)


@CASES
def test_a_rank_holds_its_chunks_in_order(layout, cp, chunk):
    length = cp * chunks_per_rank(layout) * chunk
    shards = order(layout, length, cp).reshape(cp, -1)
    for rank in range(cp):
        if layout == "striped":
            expected = list(range(rank, length, cp))
        else:
            expected = [c * chunk + i for c in held_chunks(layout, rank, cp) for i in range(chunk)]
        assert shards[rank].tolist() == expected


def test_by_hand():
    assert order("contiguous", 6, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert order("zigzag", 12, 3).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert order("striped", 6, 3).tolist() == [0, 3, 1, 4, 2, 5]


def work(layout: str, length: int, cp: int) -> np.ndarray:
    """Pairs that each rank computes under a causal mask."""
    return (order(layout, length, cp) + 1).reshape(cp, -1).sum(axis=1)


@pytest.mark.parametrize(("cp", "ratio"), [(2, 1.50), (4, 1.75), (8, 1.87), (64, 1.98)])
def test_causal_work_is_equal_in_zigzag_only(cp, ratio):
    length = 2 * cp * 64
    of_zigzag, of_contiguous, of_striped = (work(layout, length, cp) for layout in ("zigzag", "contiguous", "striped"))
    assert len(set(of_zigzag.tolist())) == 1
    assert of_contiguous.max() / of_contiguous.mean() == pytest.approx(ratio, abs=0.01)
    assert of_striped.max() / of_striped.mean() < 1.01


@pytest.mark.parametrize(
    ("layout", "length", "cp", "message"),
    [
        ("zigzag", 10, 2, r"10 tokens cannot be cut into 4 equal parts \(layout 'zigzag', cp 2\); pad to 12"),
        ("striped", 10, 3, r"10 tokens cannot be cut into 3 equal parts .* pad to 12"),
        ("zigzag", 8, 0, "cp is 0; it is a number of ranks, at least 1"),
        ("zigzag", 8, -1, "cp is -1"),
        ("spiral", 8, 2, "unknown layout 'spiral'; known are contiguous, zigzag, striped"),
    ],
)
def test_misuse_is_refused(layout, length, cp, message):
    with pytest.raises(InputError, match=message):
        order(layout, length, cp)
