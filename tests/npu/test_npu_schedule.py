"""The schedule is the mask: every pair that may see each other is computed exactly once, and no other."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npu_backend import schedule
from npu_backend.schedule import blocks, chunk_count, held_chunks, source, tokens_in_chunk

CP = st.integers(1, 12)


@given(CP, st.integers(1, 3), st.booleans())
def test_union_of_blocks_is_the_mask_exactly_once(cp, chunk, is_causal):
    tokens = chunk_count(cp) * chunk
    counted = np.zeros((tokens, tokens), int)
    for rank in range(cp):
        for step in range(cp):
            for block in blocks(rank, step, cp, is_causal=is_causal):
                square = np.tri(chunk) if block.mask == "triu" else np.ones((chunk, chunk))
                q, k = block.query_chunk * chunk, block.kv_chunk * chunk
                counted[q : q + chunk, k : k + chunk] += square.astype(int)
    expected = np.tri(tokens) if is_causal else np.ones((tokens, tokens))
    np.testing.assert_array_equal(counted, expected)


@given(CP, st.booleans())
def test_a_block_needs_only_what_its_rank_holds_at_that_step(cp, is_causal):
    for rank in range(cp):
        holds = rank
        for step in range(cp):
            assert source(rank, step, cp) == holds
            for block in blocks(rank, step, cp, is_causal=is_causal):
                assert block.query_chunk in held_chunks(rank, cp)
                assert block.kv_chunk in held_chunks(holds, cp)
            holds = (holds - 1) % cp  # what the previous rank held is passed on


@given(CP, st.booleans())
def test_first_marks_the_first_block_of_each_query_chunk_and_no_other(cp, is_causal):
    for rank in range(cp):
        begun = set()
        for step in range(cp):
            for block in blocks(rank, step, cp, is_causal=is_causal):
                assert block.first == (block.query_chunk not in begun)
                begun.add(block.query_chunk)
        assert begun == set(held_chunks(rank, cp))


@given(CP)
def test_causal_work_is_the_same_on_every_rank_and_step(cp):
    for rank in range(cp):
        work = [
            sum(0.5 if block.mask == "triu" else 1.0 for block in blocks(rank, step, cp, is_causal=True))
            for step in range(cp)
        ]
        assert work == ([2.0] * cp if cp > 1 else [0.5])  # one rank alone does not cut: one triangle


@given(CP)
def test_every_chunk_is_held_by_one_rank(cp):
    assert sorted(chunk for rank in range(cp) for chunk in held_chunks(rank, cp)) == list(range(chunk_count(cp)))


@pytest.mark.parametrize("rank", range(3))
def test_order_is_the_ring_of_the_format_page(rank):
    order = {
        0: [(0, 0), (5, 0), (5, 5), (5, 2), (5, 3), (5, 1), (5, 4)],
        1: [(1, 1), (4, 1), (4, 4), (1, 0), (4, 0), (4, 2), (4, 3)],
        2: [(2, 2), (3, 2), (3, 3), (2, 1), (3, 1), (2, 0), (3, 0)],
    }[rank]
    found = [block[:2] for step in range(3) for block in blocks(rank, step, 3, is_causal=True)]
    assert found == order


@given(st.integers(1, 8), st.integers(1, 9), st.data())
def test_tokens_in_chunks_add_up_to_the_request(chunks, chunk, data):
    lengths = tuple(data.draw(st.lists(st.integers(0, chunks * chunk), min_size=1, max_size=3)))
    counts = np.array([tokens_in_chunk(c, chunk, lengths) for c in range(chunks)])
    assert tuple(counts.sum(0)) == lengths
    assert ((counts[:-1] == chunk) | (counts[1:] == 0)).all()  # pads only at the right end


def test_examples_in_docstrings():
    assert doctest.testmod(schedule).failed == 0
