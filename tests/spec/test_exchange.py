"""Every exchange computes dense attention, whatever the ranks hold, and sends exactly what it says."""

import inspect
import re
from collections import Counter

import jax
import numpy as np
import pytest
from collectives import collectives
from hypothesis import given
from hypothesis import strategies as st
from programs import assert_dense, device_program, equal_bits
from strategies import RULES, examples, problem, problems

from cpjax.exchange.device import EXCHANGES
from cpjax.mask import Tokens, tokens

ONE_AXIS = [name for name in EXCHANGES if name != "all_to_all_ring"]


def grid(*sizes: int) -> list[tuple[int, int, int]]:
    """cp, query length, key length: one token a chunk, and more keys than queries."""
    return [(cp, t, s) for cp in sizes for t, s in ((2 * cp, 2 * cp), (2 * cp, 6 * cp))]


@st.composite
def on_ranks(draw, sizes, heads=None):
    """A problem, the ranks, the chunks, and an order in which the ranks hold the tokens: any permutation."""
    cp, length, kv_length = draw(st.sampled_from(sizes))
    p = draw(problems(length, kv_length, heads or (4, 2)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return p, cp, 2, rng.permutation(length), rng.permutation(kv_length)


def run(exchange, cp, p, chunks, q_order, kv_order, precision="float64"):
    """Shards in the given order, and the result back in natural order."""
    at = lambda places, order: Tokens(*(x[:, order] for x in places))  # noqa: E731
    result = device_program(exchange, cp, p.rule, chunks, precision)(
        p.query[:, q_order],
        p.key[:, kv_order],
        p.value[:, kv_order],
        at(p.q_tokens, q_order),
        at(p.kv_tokens, kv_order),
        p.sink,
    )
    back = np.argsort(q_order)
    return type(result)(*(np.asarray(x)[:, back] for x in result))


@given(on_ranks(grid(1, 2, 3, 4)))
def test_ring_is_dense(case):
    p, cp, chunks, *orders = case
    with jax.enable_x64(True):
        assert_dense(run("ring", cp, p, chunks, *orders), p)


@examples(0.3)
@given(on_ranks(grid(8)))
def test_ring_of_eight_is_dense(case):
    p, cp, chunks, *orders = case
    with jax.enable_x64(True):
        assert_dense(run("ring", cp, p, chunks, *orders), p)


@pytest.mark.slow
@examples(0.4)
@given(st.sampled_from([(1, 1), (2, 2), (4, 1)]).flatmap(lambda heads: on_ranks(grid(2), heads)))
def test_ring_is_dense_for_any_heads(case):
    p, cp, chunks, *orders = case
    with jax.enable_x64(True):
        assert_dense(run("ring", cp, p, chunks, *orders), p)


@pytest.mark.parametrize("exchange", ["ring_both_ways", "gather", "pass_query"])
@examples(0.4)
@given(on_ranks(grid(1, 2, 3, 4)))
def test_others_are_dense(exchange, case):
    p, cp, chunks, *orders = case
    with jax.enable_x64(True):
        assert_dense(run(exchange, cp, p, chunks, *orders), p)


@examples(0.4)
@given(st.sampled_from([1, 2, 3]).flatmap(lambda cp: on_ranks(grid(cp), (2 * cp, cp))))
def test_all_to_all_is_dense(case):
    p, cp, chunks, *orders = case
    with jax.enable_x64(True):
        assert_dense(run("all_to_all", cp, p, chunks, *orders), p)


@examples(0.4)
@given(st.sampled_from([(2, 2), (3, 2), (2, 1), (1, 2)]), st.data())
def test_two_axes_are_dense(axes, data):
    p, _, chunks, *orders = data.draw(on_ranks(grid(axes[0] * axes[1])))
    with jax.enable_x64(True):
        assert_dense(run("all_to_all_ring", axes, p, chunks, *orders), p)


@examples(0.3)
@given(on_ranks(grid(4)), st.integers(0, 3))
def test_the_ring_may_start_anywhere(case, turn):
    """Giving every shard to the next rank changes who computes what when, and nothing else."""
    p, cp, chunks, q_order, kv_order = case
    turned = [np.roll(order, turn * len(order) // cp) for order in (q_order, kv_order)]
    with jax.enable_x64(True):
        assert_dense(run("ring", cp, p, chunks, *turned), p)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_zero_new_tokens(exchange):
    cp = (2, 2) if exchange == "all_to_all_ring" else 2
    p = problem(0, "normal", tokens(1, 0), tokens(1, 8), RULES[0])
    with jax.enable_x64(True):
        out, lse = run(exchange, cp, p, 2, np.arange(0), np.arange(8))
    assert out.shape == (1, 0, 4, 3)
    assert lse.shape == (1, 0, 4)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_future_and_hidden_keys_never_leak(exchange):
    """Through any exchange, in FP16: change the last third of the keys, and no earlier query changes a bit."""
    cp = (2, 2) if exchange == "all_to_all_ring" else 4
    place = tokens(1, 24)
    p = problem(3, "normal", place, place, RULES[0], heads=(8, 4))
    order = np.random.default_rng(0).permutation(24)
    before = run(exchange, cp, p, 2, order, order, "flash_fp16")
    other = p._replace(key=p.key.copy(), value=p.value.copy())
    other.key[:, 16:], other.value[:, 16:] = np.nan, 6e4
    after = run(exchange, cp, other, 2, order, order, "flash_fp16")
    equal_bits([x[:, :16] for x in before], [x[:, :16] for x in after])
    assert np.isnan(after.lse[:, 16:]).all()


def traffic(exchange, cp) -> dict[str, int]:
    """Collectives of the compiled program."""
    place = tokens(1, 24)
    p = problem(0, "normal", place, place, RULES[0], heads=(8, 4))
    program = device_program(exchange, cp, p.rule, 2, "float32")
    arrays = [x.astype(np.float32) for x in p[:3]]
    text = program.lower(*arrays, place, place, p.sink.astype(np.float32)).compile().as_text()
    return dict(Counter(x.kind for x in collectives(text)))


@pytest.mark.parametrize("exchange", ONE_AXIS)
def test_one_rank_sends_nothing(exchange):
    assert traffic(exchange, 1) == {}


@pytest.mark.parametrize("cp", [2, 3, 4, 6])
def test_ring_sends_each_shard_cp_minus_one_times(cp):
    # Keys and values are one array, positions and segments another.
    assert traffic("ring", cp) == {"collective-permute": 2 * (cp - 1)}
    assert traffic("ring_both_ways", cp) == {"collective-permute": 2 * (cp - 1)}


def test_gather_gathers_each_array_once():
    assert traffic("gather", 4) == {"all-gather": 4}


def test_pass_query_sends_queries_cp_minus_one_times_and_results_cp_times():
    # Queries are one array and places another; out and lse are one.
    assert traffic("pass_query", 4) == {"collective-permute": 2 * 3 + 4}


def test_all_to_all_moves_inputs_there_and_results_back():
    # query, key, value; positions and segments of both; out, lse
    assert traffic("all_to_all", 4) == {"all-to-all": 5, "all-gather": 4}


def test_the_program_of_a_ring_has_a_permute_for_each_neighbour_pair():
    place = tokens(1, 24)
    p = problem(0, "normal", place, place, RULES[0], heads=(8, 4))
    program = device_program("ring", 4, p.rule, 2, "float32")
    text = program.lower(*p[:3], place, place, p.sink).compile().as_text()
    pairs = set(re.findall(r"source_target_pairs=\{(.*?)\}\}", text))
    assert pairs == {"{0,1},{1,2},{2,3},{3,0"}


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["ring", "pass_query"])
def test_a_program_is_as_large_for_eight_ranks_as_for_six(exchange):
    """The steps are a loop, forwards and backwards."""

    def size(cp):
        place = tokens(1, 48)
        p = problem(0, "normal", place, place, RULES[0], heads=(8, 4))
        program = device_program(exchange, cp, p.rule, 2, "float32")
        loss = lambda q, k, v: program(q, k, v, place, place, p.sink).out.sum()  # noqa: E731
        return len(jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*p[:3]).as_text().splitlines())

    assert size(6) == size(8)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_shard_is_one_piece_unless_said_otherwise(exchange):
    """Two pieces would give the same but for the last bits, which is why no other test sees it."""
    assert inspect.signature(EXCHANGES[exchange]).parameters["chunks"].default == 1
