"""Partials are a commutative monoid, and attending to the parts of any partition of the keys is attending to all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import assert_dense, block_program, equal_bits, oracle
from strategies import largest, largest_logit, problems

from cpjax import partial
from cpjax.partial import Partial, empty, merge, sink_partial
from cpjax.precision import PROFILES, profile

PRECISE = profile("float64")
SETTING = problems(5, 7, batch=1)
PARTS = st.lists(st.integers(0, 2), min_size=7, max_size=7)
merged = jax.jit(merge, static_argnums=2)


def attend_to(p, chosen: np.ndarray) -> Partial:
    """Attention over the chosen keys only: the others become another request's."""
    kv_tokens = p.kv_tokens._replace(segment=np.where(chosen, p.kv_tokens.segment, 9).astype(np.int32))
    return block_program(p.rule)(p.query, p.key, p.value, p.q_tokens, kv_tokens)


def close(a: Partial, b: Partial, p) -> None:
    size = 1 + largest_logit(p)
    assert (np.abs(np.asarray(a.out) - np.asarray(b.out)) <= 1e-12 * largest(p.value) * size).all()
    np.testing.assert_array_equal(np.isneginf(a.lse), np.isneginf(b.lse))
    seen = ~np.isneginf(a.lse)
    assert (np.abs(np.asarray(a.lse)[seen] - np.asarray(b.lse)[seen]) <= 1e-12 * size).all()


@given(SETTING, PARTS)
def test_merging_any_partition_in_any_order_is_attending_to_all(p, part):
    p = p._replace(sink=np.full(4, -np.inf))
    with jax.enable_x64(True):
        a, b, c = (attend_to(p, np.array(part) == i) for i in range(3))
        in_order = merged(merged(a, b, PRECISE), c, PRECISE)
        assert_dense(in_order, p)
        close(merged(a, merged(b, c, PRECISE), PRECISE), in_order, p)
        close(merged(c, merged(b, a, PRECISE), PRECISE), in_order, p)


@given(SETTING, PARTS, st.sampled_from([name for name, p in PROFILES.items() if not p.is_normalised]))
def test_merging_an_empty_partial_changes_no_bit(p, part, name):
    with jax.enable_x64(name == "float64"):
        kv_tokens = p.kv_tokens._replace(segment=np.where(np.array(part) == 0, p.kv_tokens.segment, 9).astype(np.int32))
        arrays = [x.astype(PROFILES[name].compute) for x in p[:3]]
        a = block_program(p.rule, name)(*arrays, p.q_tokens, kv_tokens)
        equal_bits(merged(a, empty(a.out), PROFILES[name]), a)
        equal_bits(merged(empty(a.out), a, PROFILES[name]), a)


@given(SETTING)
def test_a_sink_is_one_more_key_with_value_zero(p):
    with jax.enable_x64(True):
        result = block_program(p.rule)(*p.arrays)
        assert_dense(merged(result, sink_partial(jnp.asarray(p.sink), result), PRECISE), p)


@pytest.mark.parametrize("lse", [1e4, -1e4, 80.0])
def test_merge_of_large_logs_does_not_overflow(lse):
    a = Partial(jnp.full((1, 1, 1, 1), 4.0), jnp.full((1, 1, 1), lse))
    b = Partial(jnp.full((1, 1, 1, 1), 8.0), jnp.full((1, 1, 1), lse))
    out, total = merge(a, b, profile("float32"))
    assert out.item() == 6.0
    assert total.item() == pytest.approx(lse + np.log(2), rel=1e-6)


def test_merge_weighs_by_exp_of_lse():
    a = Partial(jnp.full((1, 1, 1, 1), 1.0), jnp.full((1, 1, 1), np.float32(np.log(3))))
    b = Partial(jnp.full((1, 1, 1, 1), 5.0), jnp.zeros((1, 1, 1)))
    out, lse = merge(a, b, profile("float32"))
    assert out.item() == pytest.approx((3 * 1 + 5) / 4)
    assert lse.item() == pytest.approx(np.log(4))


def test_derivatives_are_finite_where_nothing_was_seen():
    def total(out, lse):
        both = merge(Partial(out, lse), empty(out), profile("float32"))
        return both.out.sum() + jnp.where(jnp.isneginf(both.lse), 0.0, both.lse).sum()

    lse = jnp.array([[[-jnp.inf], [0.5]]])
    d_out, d_lse = jax.grad(total, (0, 1))(jnp.ones((1, 2, 1, 3)), lse)
    np.testing.assert_array_equal(d_out, [[[[0.0] * 3], [[1.0] * 3]]])
    np.testing.assert_array_equal(d_lse, [[[0.0], [1.0]]])


def test_oracle_and_block_have_nothing_in_common():
    """Only so do the tests above say anything."""
    assert oracle.__globals__["dense"].__module__ == "oracle"
    assert "oracle" not in vars(partial)
