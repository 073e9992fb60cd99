"""The schedule is the mask, it is what the exchanges really do, and the backend's is the same."""

import jax
import numpy as np
import numpy_twin as twin
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import device_program, exact
from strategies import RULES, SCALE, examples

import npu_backend.schedule
from cpjax.errors import InputError
from cpjax.exchange.device import EXCHANGES
from cpjax.mask import Tokens
from cpjax.partition import SEQUENCES, Zigzag, sequence_of
from cpjax.partition.schedule import Block, schedule, show

pytestmark = pytest.mark.optimized

CASES = given(
    st.sampled_from(list(EXCHANGES)), st.sampled_from(list(SEQUENCES)), st.integers(1, 7), st.booleans(), st.data()
)


def inner_of(exchange, cp, data) -> int:
    divisors = [n for n in range(1, cp + 1) if cp % n == 0]
    return data.draw(st.sampled_from(divisors)) if exchange == "all_to_all_ring" else 1


def chunk_tokens(layout, cp, chunk, size) -> np.ndarray:
    """Global indices of a chunk's tokens; each chunk of `size`."""
    return chunk + cp * np.arange(size) if layout == "striped" else chunk * size + np.arange(size)


def square(mask, size) -> np.ndarray:
    if mask == "none":
        return np.ones((size, size), int)
    return np.tri(size, k=0 if mask == "triu" else -1, dtype=int)


@pytest.mark.slow
@CASES
def test_union_of_blocks_is_the_mask_exactly_once(exchange, layout, cp, is_causal, data):
    size, inner = data.draw(st.integers(1, 3)), inner_of(exchange, cp, data)
    length = sequence_of(layout, cp).chunk_count * size
    counted = np.zeros((length, length), int)
    for blocks in schedule(exchange, layout, cp, is_causal=is_causal, inner=inner):
        for block in blocks:
            rows, columns = (chunk_tokens(layout, cp, c, size) for c in (block.query_chunk, block.kv_chunk))
            counted[np.ix_(rows, columns)] += square(block.mask, size)
    heads = {"all_to_all": cp, "all_to_all_ring": inner}.get(exchange, 1)  # each group of heads computes everything
    mask = np.tri(length, dtype=int) if is_causal else np.ones((length, length), int)
    np.testing.assert_array_equal(counted, heads * mask)


@CASES
def test_first_marks_the_first_block_of_each_query_chunk(exchange, layout, cp, is_causal, data):
    inner = inner_of(exchange, cp, data)
    ranks = schedule(exchange, layout, cp, is_causal=is_causal, inner=inner)
    chunks = sequence_of(layout, cp).chunk_count
    heads = {"all_to_all": cp, "all_to_all_ring": inner}.get(exchange, 1)
    for chunk in range(chunks):
        of_chunk = [b for blocks in ranks for b in blocks if b.query_chunk == chunk]
        assert sum(b.first for b in of_chunk) == heads
        assert min(of_chunk, key=lambda b: b.step).first


@given(st.integers(1, 9), st.booleans())
def test_ring_is_the_backends(cp, is_causal):
    for rank, blocks in enumerate(schedule("ring", "zigzag", cp, is_causal=is_causal)):
        theirs = [
            (step, *block)
            for step in range(cp)
            for block in npu_backend.schedule.blocks(rank, step, cp, is_causal=is_causal)
        ]
        assert [tuple(block) for block in blocks] == theirs


@given(st.sampled_from(["ring", "gather"]), st.sampled_from(list(SEQUENCES)), st.integers(1, 9))
def test_merge_order_is_the_judges(exchange, layout, cp):
    for query_chunk, expected in enumerate(sequence_of(layout, cp).merge_orders(exchange)):
        met = [b.kv_chunk for bs in schedule(exchange, layout, cp, is_causal=False) for b in bs if b[1] == query_chunk]
        assert met == expected.tolist()


def test_mindie_meets_chunks_in_the_same_order_on_every_rank():
    """The vendor's table for cp 2: kv0, kv3, kv1, kv2, without those that lie in the future."""
    zero, one = schedule("gather", "zigzag", 2, is_causal=True)
    assert zero == (
        Block(0, 0, 0, "triu", True),
        Block(0, 3, 0, "none", True),
        Block(0, 3, 3, "triu", False),
        Block(1, 3, 1, "none", False),
        Block(1, 3, 2, "none", False),
    )
    assert [(b.step, b.query_chunk, b.kv_chunk) for b in one] == [(0, 1, 0), (0, 2, 0), (1, 1, 1), (1, 2, 1), (1, 2, 2)]


@pytest.mark.parametrize("exchange", ["ring", "gather", "ring_both_ways"])
@pytest.mark.parametrize("cp", [1, 2, 3, 8, 64])
def test_causal_zigzag_gives_every_rank_the_same_work(exchange, cp):
    ranks = schedule(exchange, "zigzag", cp, is_causal=True)
    assert {sum(0.5 if b.mask == "triu" else 1 for b in bs) for bs in ranks} == {2 * cp if cp > 1 else 0.5}


def test_show():
    text = show(schedule("ring", "striped", 2, is_causal=True))
    assert text.splitlines()[0] == "rank 0   step 0: q0·k0◣first   step 1: q0·k1◺"


def run_schedule(exchange, layout, cp, inner, query, key, value, stages, size, variant):
    """Every query chunk's blocks, computed and merged by the NumPy twin in the order of the schedule."""
    outs, lses = np.empty((len(query), value.shape[1]), np.float32), np.empty(len(query), np.float32)
    ranks = schedule(exchange, layout, cp, is_causal=True, inner=inner)
    blocks = [(block, rank) for rank, of_rank in enumerate(ranks) for block in of_rank]
    for chunk in range(sequence_of(layout, cp).chunk_count):
        mine = [(b, rank) for b, rank in blocks if b.query_chunk == chunk]
        if exchange.startswith("all_to_all"):  # every group of heads does the same
            mine = [(b, rank) for b, rank in mine if rank == mine[0][1]]
        rows, result = chunk_tokens(layout, cp, chunk, size), None
        for block, _ in sorted(mine, key=lambda x: x[0].step):
            columns = chunk_tokens(layout, cp, block.kv_chunk, size)
            seen = square(block.mask, size).astype(bool)
            part = twin.attend(query[rows], key[columns], value[columns], seen, SCALE, None, stages, 512, variant)
            assert block.first == (result is None)
            result = part if result is None else twin.merge(result, part, stages, variant)
        outs[rows], lses[rows] = twin.to(result[0], stages.out), result[1]
    return outs, lses


@pytest.mark.parametrize("exchange", EXCHANGES)
@examples(0.15)
@given(
    st.sampled_from(list(SEQUENCES)),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from(["flash_fp16", "ring_mla_fp16", "decode_fp16_lse"]),
    st.integers(0, 2**32 - 1),
)
def test_an_exchange_is_its_schedule_bit_for_bit(exchange, layout, cp, name, seed):
    """Two keys a chunk: every sum has one rounding. The order of merges is visible in the bits."""
    axes, inner = ((cp // 2, 2), 2) if exchange == "all_to_all_ring" else (cp, 1)
    if exchange == "all_to_all_ring" and cp % 2:
        axes, inner = (cp, 1), 1
    size, heads = 2, 4 if cp != 3 else 3
    length = sequence_of(layout, cp).chunk_count * size
    rng = np.random.default_rng(seed)
    query, key = exact(rng, heads, length, 4) / 4, exact(rng, heads, length, 4)
    value = twin.to(rng.normal(size=(heads, length, 3)) + 1, "float16")
    held = sequence_of(layout, cp).order(length)
    place = Tokens(held.astype(np.int32)[None], np.zeros((1, length), np.int32))
    arrays = [x.transpose(1, 0, 2)[None, held] for x in (query, key, value)]
    program = device_program(exchange, axes, RULES[0], sequence_of(layout, cp).chunks_per_rank, name)
    found = program(*arrays, place, place, np.full(heads, -np.inf, np.float32))
    back = np.argsort(held)
    stages = twin.PROFILES[name]

    def expected(variant):
        per_head = [
            run_schedule(exchange, layout, cp, inner, query[n], key[n], value[n], stages, size, variant)
            for n in range(heads)
        ]
        return [np.stack(x, axis=1) for x in zip(*per_head, strict=True)]

    result = [np.asarray(x)[0, back] for x in found]
    assert twin.one_of(result, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("teleport", "zigzag", 2), "unknown exchange 'teleport'"),
        (("ring", "spiral", 2), "unknown partition 'spiral'"),
        (("ring", "zigzag", 0), "cp is 0"),
    ],
)
def test_misuse_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        schedule(*arguments, is_causal=True)


def test_inner_must_divide():
    with pytest.raises(InputError, match="inner is 3; it must divide the 4 ranks"):
        schedule("all_to_all_ring", "zigzag", 4, is_causal=True, inner=3)


def test_every_exchange_has_a_schedule():
    assert jax.device_count() == 8
    for name in EXCHANGES:
        assert schedule(name, "zigzag", 2, is_causal=True)
    assert Zigzag(2).held_chunks(0) == npu_backend.schedule.held_chunks(0, 2)
