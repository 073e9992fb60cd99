"""From runs of the text to shards: every token arrives once, only those that change rank are sent, and back again."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import equal_bits, mesh
from strategies import examples

from cpjax.errors import InputError
from cpjax.exchange.moving import moved
from cpjax.partition import SEQUENCES, inverse
from cpjax.partition.moves import moves
from cpjax.partition.packing import packed_order


def carried_out(rounds, x, cp):
    """The rounds in NumPy: (what lies where at the end, how many tokens were sent)."""
    shards = np.asarray(x).reshape(cp, -1)
    found, sent = np.full_like(shards, -1), 0
    for step in rounds:
        assert sorted(step.destination) == list(range(cp))
        for source, destination in enumerate(step.destination):
            into = step.receive[destination]
            assert (found[destination, into] == -1).all(), "a place that is filled twice"
            found[destination, into] = shards[source, step.send[source]]
            sent += len(into) * ((source, destination) in step.pairs)
    return found.ravel(), sent


def law(order, cp):
    natural = np.arange(len(order))
    rounds, shard = moves(order, cp), max(1, len(order) // cp)
    if not rounds:
        np.testing.assert_array_equal(order, natural)
        return
    found, sent = carried_out(rounds, natural, cp)
    np.testing.assert_array_equal(found, order)
    assert sent == (order // shard != natural // shard).sum()
    again, sent_back = carried_out([step.back() for step in rounds], found, cp)
    np.testing.assert_array_equal(again, natural)
    assert sent_back == sent
    assert len(rounds) <= cp**2 - 2 * cp + 2  # so many permutations suffice for any matrix (Marcus and Ree 1959)


@given(st.integers(1, 6), st.integers(0, 12), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_any_permutation(cp, shard, seed, mixed):
    rng = np.random.default_rng(seed)
    order, some = np.arange(cp * shard), rng.random(cp * shard) < mixed
    order[some] = rng.permutation(order[some])
    law(order, cp)


@given(st.sampled_from(list(SEQUENCES.values())), st.integers(1, 9), st.integers(0, 5))
def test_partitions(kind, cp, times):
    one = kind(cp)
    law(one.order(one.chunk_count * times), cp)


@given(st.sampled_from(list(SEQUENCES)), st.integers(1, 5), st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_packs(name, cp, lengths):
    law(packed_order(name, lengths, cp), cp)


@pytest.mark.parametrize("cp", [2, 3, 4, 8, 16])
def test_how_many_transfers(cp):
    sent = {
        name: sum(map(bool, (s.pairs for s in moves(kind(cp).order(2 * cp * cp), cp))))
        for name, kind in SEQUENCES.items()
    }
    assert sent == {"contiguous": 0, "zigzag": 1 if cp == 2 else 2, "striped": cp - 1}


@examples(0.1)
@given(st.sampled_from([(2, "zigzag"), (3, "striped"), (4, "zigzag"), ((2, 2), "striped")]), st.integers(0, 2**32 - 1))
def test_devices_do_what_the_rounds_say(case, seed):
    """And the derivative is the way back, bit for bit; over two axes of a mesh, too."""
    cp, name = case
    ranks = int(np.prod(cp))
    order = SEQUENCES[name](ranks).order(2 * ranks * ranks)
    x = np.random.default_rng(seed).normal(size=(2, len(order), 3)).astype(np.float32)
    forth, back = programs(cp, name)
    equal_bits(forth(x), x[:, order])
    equal_bits(back(x), x[:, inverse(order)])


@functools.cache
def programs(cp, name):
    ranks, axis_name = int(np.prod(cp)), "cp" if isinstance(cp, int) else ("outer", "inner")
    rounds = moves(SEQUENCES[name](ranks).order(2 * ranks * ranks), ranks)
    device, spec = functools.partial(moved, rounds=rounds, axis_name=axis_name), jax.P(None, axis_name)
    forth = jax.shard_map(device, mesh=mesh(cp), in_specs=spec, out_specs=spec)
    return jax.jit(forth), jax.jit(lambda x: jax.vjp(forth, x)[1](x)[0])


@pytest.mark.parametrize("order", [[0, 0, 1, 2], [0, 1, 2], [1, 2, 3, 4]])
def test_what_is_no_permutation_is_refused(order):
    with pytest.raises(InputError, match="order is no permutation that 2 ranks can share equally"):
        moves(np.array(order), 2)
