"""Who holds which tokens: the laws of every partition, drawn over all of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpjax.errors import InputError
from cpjax.mask import PAD
from cpjax.partition import (
    ORDERS,
    PARTITIONS,
    SEQUENCES,
    Blocks,
    Contiguous,
    Interleaved,
    Packed,
    Pages,
    SequencePartition,
    Striped,
    Zigzag,
    inverse,
    partition_of,
    sequence_of,
)
from cpjax.partition.cached import Cached

CASES = given(st.sampled_from(list(SEQUENCES)), st.integers(1, 12), st.integers(0, 5))


@st.composite
def partitions(draw):
    """What makes a partition, and segments of queries and keys of one row that can lie so."""
    cp = draw(st.integers(1, 5))
    kind = draw(st.sampled_from([*SEQUENCES, "packed", "blocks", "interleaved", "pages"]))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    # Nothing is made here: the type checks of the package look at tuples at random, which a strategy must not.
    zigzag = 2 * cp if cp > 1 else 1
    if kind in SEQUENCES:
        segment = np.zeros((zigzag if kind == "zigzag" else cp) * draw(st.integers(1, 3)), int)
        return (lambda: sequence_of(kind, cp)), segment, segment
    if kind == "packed":
        unit = zigzag
        padded = [-(-n // unit) * unit for n in lengths]
        row = [np.where(np.arange(p) < n, i, PAD) for i, (n, p) in enumerate(zip(lengths, padded, strict=True))]
        prefixes = [np.full(draw(st.integers(0, 3)), i) for i in range(len(lengths))]
        return (lambda: Packed(cp)), np.concatenate(row), np.concatenate(row + prefixes)
    if kind == "pages":
        page = draw(st.integers(1, 4))
        rank = st.integers(0, cp - 1)
        table = tuple(tuple(draw(rank) for _ in range(-(-n // page))) for n in lengths)
        make = lambda: Pages(cp, page=page, ranks=table)  # noqa: E731
    else:
        size = draw(st.integers(1, 4))
        make = lambda: Blocks(cp, block=size) if kind == "blocks" else Interleaved(cp, size=size)  # noqa: E731
    keys = np.repeat(np.arange(len(lengths)), lengths)
    new = [draw(st.integers(1, n)) for n in lengths]
    return make, np.repeat(np.arange(len(lengths)), new), keys


@given(partitions())
def test_every_query_is_somewhere(drawn):
    """Held by one rank; or, over caches, by all of them."""
    make, q_segment, kv_segment = drawn
    one = make()
    one.check(q_segment[None], kv_segment[None])
    held = one.held(q_segment)
    assert len(held) == one.cp
    rows = held if isinstance(one, Cached) else held.reshape(1, -1)
    for row in rows:
        np.testing.assert_array_equal(np.sort(row), np.arange(len(q_segment)))
    chunk = one.q_chunks(q_segment, kv_segment)
    for rank, row in enumerate(held):
        assert all(rank in one.q_ranks(int(c)) for c in chunk[row])


@given(partitions(), st.sampled_from(ORDERS))
def test_every_pair_of_tokens_is_computed_once(drawn, order):
    """Each query chunk merges each key chunk once, in every order; chunks are disjoint and cover all keys."""
    make, q_segment, kv_segment = drawn
    one = make()
    q_chunk, kv_chunk = one.q_chunks(q_segment, kv_segment), one.kv_chunks(q_segment, kv_segment)
    assert q_chunk.shape == q_segment.shape
    assert kv_chunk.shape == kv_segment.shape
    merging = one.merging(order, q_segment, kv_segment)
    assert q_chunk.max() < len(merging)
    assert kv_chunk.max() < merging.shape[1]
    for row in merging:
        np.testing.assert_array_equal(np.sort(row), np.arange(merging.shape[1]))


@given(partitions())
def test_a_chunk_is_of_one_rank_and_of_one_request(drawn):
    make, q_segment, kv_segment = drawn
    one = make()
    kv_chunk = one.kv_chunks(q_segment, kv_segment)
    for c in np.unique(kv_chunk):
        of_chunk = kv_segment[kv_chunk == c]
        if one.request(int(c)) is not None:
            assert set(of_chunk.tolist()) <= {one.request(int(c)), PAD}
        assert one.rank(int(c)) is None or 0 <= one.rank(int(c)) < one.cp
    for number, q in enumerate(one.q_chunks(q_segment, kv_segment)):
        if (own := one.own(int(q))) is not None:  # the query's token is the key of the same number
            assert kv_chunk[number] == own


@given(partitions(), st.sampled_from(["ring", "gather"]))
def test_steps_are_those_of_the_order_of_merging(drawn, order):
    """What is merged at a later step stands later in the order; a ring begins with the rank's own chunks."""
    make, q_segment, kv_segment = drawn
    one = make()
    merging = one.merging(order, q_segment, kv_segment)
    for q in np.unique(one.q_chunks(q_segment, kv_segment)):
        requests = one.request(int(q))
        mine = [int(c) for c in merging[q] if requests is None or one.request(int(c)) == requests]
        steps = [s for c in mine if (s := one.step(order, int(q), c)) is not None]
        assert steps == sorted(steps)
        if steps and order == "ring":
            assert steps[0] == 0
            assert one.rank(mine[0]) == one.rank(int(q))
        if steps:
            assert set(steps) == set(range(one.cp))


@CASES
def test_is_a_permutation_that_can_be_undone(name, cp, size):
    one = sequence_of(name, cp)
    length = one.chunk_count * size
    held = one.order(length) if length else np.arange(0)
    np.testing.assert_array_equal(np.sort(held), np.arange(length))
    x = np.random.default_rng(0).normal(size=length)
    np.testing.assert_array_equal(x[held][inverse(held)], x)


@CASES
def test_a_rank_holds_its_chunks_in_order(name, cp, size):
    one = sequence_of(name, cp)
    length = one.chunk_count * size
    if not length:
        return
    shards = one.order(length).reshape(cp, -1)
    for rank in range(cp):
        if name == "striped":
            expected = list(range(rank, length, cp))
        else:
            expected = [c * size + i for c in one.held_chunks(rank) for i in range(size)]
        assert shards[rank].tolist() == expected


def test_by_hand():
    assert Contiguous(3).order(6).tolist() == [0, 1, 2, 3, 4, 5]
    assert Zigzag(3).order(12).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert Striped(3).order(6).tolist() == [0, 3, 1, 4, 2, 5]
    assert Blocks(3, block=1).owners(0, 7).tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert Interleaved(3, size=2).owners(0, 9).tolist() == [0, 0, 1, 1, 2, 2, 0, 0, 1]


@pytest.mark.parametrize("name", SEQUENCES)
def test_one_device_is_one_chunk(name):
    assert sequence_of(name, 1).chunk_count == 1
    assert not sequence_of(name, 1).travel_together()


def work(name: str, length: int, cp: int) -> np.ndarray:
    """Pairs that each rank computes under a causal mask."""
    return (sequence_of(name, cp).order(length) + 1).reshape(cp, -1).sum(axis=1)


@pytest.mark.parametrize(("cp", "ratio"), [(2, 1.50), (4, 1.75), (8, 1.87), (64, 1.98)])
def test_causal_work_is_equal_in_zigzag_only(cp, ratio):
    length = 2 * cp * 64
    of_zigzag, of_contiguous, of_striped = (work(name, length, cp) for name in ("zigzag", "contiguous", "striped"))
    assert len(set(of_zigzag.tolist())) == 1
    assert of_contiguous.max() / of_contiguous.mean() == pytest.approx(ratio, abs=0.01)
    assert of_striped.max() / of_striped.mean() < 1.01


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_name_is_a_value(name):
    one = partition_of(name, 2)
    assert one.cp == 2
    assert partition_of(one) is one
    assert partition_of(one, 2) == one
    assert hash(one) == hash(partition_of(name, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Zigzag(2).order(10),
            r"10 tokens cannot be cut into 4 equal parts \(partition 'zigzag', cp 2\); pad to 12",
        ),
        (lambda: Striped(3).order(10), r"10 tokens cannot be cut into 3 equal parts .* pad to 12"),
        (lambda: Zigzag(0), "cp is 0; it is a number of ranks"),
        (lambda: Zigzag(-1), "cp is -1"),
        (lambda: Zigzag(True), "cp is True"),
        (lambda: Zigzag(10**6), "cp is 1000000; it is a number of ranks, a whole number from 1 to 1024"),
        (lambda: partition_of("spiral", 2), "unknown partition 'spiral'; known are contiguous, zigzag, striped"),
        (lambda: partition_of("zigzag:3", 2), "only blocks, decode, interleaved take a size"),
        (lambda: partition_of("interleaved:x", 2), "take a size"),
        (lambda: partition_of(Zigzag(4), 2), "cp is 2, but the partition is over 4 ranks"),
        (lambda: sequence_of("packed", 2), "an exchange takes contiguous, zigzag, striped"),
        (lambda: sequence_of(Zigzag(4), 2), "cp is 2, but the partition is over 4 ranks"),
        (lambda: Interleaved(2, size=0), "size is 0"),
        (lambda: Pages(2, page=0), "page is 0"),
        (lambda: Pages(2, page=1, ranks=((2,),)), "names rank 2"),
        (lambda: Pages(2, page=2, ranks=((0,),)).owners(0, 3), "2 pages of 2, but the page table has 1"),
        (lambda: Zigzag(2).merge_orders("sideways"), "unknown merge order 'sideways'"),
    ],
)
def test_misuse_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_sequence_is_what_an_exchange_takes():
    assert all(isinstance(sequence_of(name, 3), SequencePartition) for name in SEQUENCES)
