"""The ring backwards gives the derivatives of dense attention, for every exchange, and keeps O(seq/cp) a device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import attention, block_program, device_program, mesh
from strategies import RULES, SCALE, examples, largest, problem, problems, seen

from cpjax.blocks import tiles, tiles_backward
from cpjax.blocks.tiles import attend
from cpjax.exchange.device import EXCHANGES
from cpjax.exchange.ring import ring_attention
from cpjax.mask import Tokens, tokens
from cpjax.partial import Partial


def plain(rule, visible, q, k, v, sink):
    """Dense attention by jax.nn's own building blocks: (out, lse), with rows that see nothing set to 0."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    s = SCALE * jnp.einsum("btnh,bsnh->btns", q, k)
    s = s if rule.softcap is None else rule.softcap * jnp.tanh(s / rule.softcap)
    s = jnp.concatenate([s, jnp.broadcast_to(sink[None, None, :, None], (*s.shape[:3], 1))], axis=3)
    v = jnp.concatenate([v, jnp.zeros_like(v[:, :1])], axis=1)
    see = jnp.concatenate([visible, jnp.ones_like(visible[:, :, :1])], axis=2)[:, :, None]
    see = see & ~jnp.isneginf(s)
    anything = see.any(axis=3, keepdims=True)
    s = jnp.where(see, s, jnp.where(anything, -jnp.inf, 0.0))
    lse = jax.nn.logsumexp(s, axis=3)
    p = jnp.where(see, jnp.exp(s - lse[..., None]), 0.0)
    return jnp.einsum("btns,bsnv->btnv", p, v), jnp.where(anything[..., 0], lse, 0.0)


def weighed(out, lse, weights):
    """A number that depends on every out and lse."""
    return (weights[0] * out).sum() + (weights[1] * jnp.where(jnp.isneginf(lse), 0.0, lse)).sum()


@functools.cache
def derivatives(exchange, cp, rule):
    def loss(q, k, v, sink, places, weights):
        return weighed(*device_program(exchange, cp, rule, 2)(q, k, v, *places, sink), weights)

    return jax.jit(jax.grad(loss, (0, 1, 2, 3)))


@functools.cache
def plain_derivatives(rule):
    def loss(q, k, v, sink, visible, weights):
        return weighed(*plain(rule, visible, q, k, v, sink), weights)

    return jax.jit(jax.grad(loss, (0, 1, 2, 3)))


def check(exchange, cp, p, seed):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(*p.query.shape[:3], p.value.shape[3])), rng.normal(size=p.query.shape[:3])
    sink = np.where(np.isneginf(p.sink), -1e4, p.sink)  # far below: a derivative of 0, but not NaN
    arrays = p.query, p.key, p.value, sink
    with jax.enable_x64(True):
        found = derivatives(exchange, cp, p.rule)(*arrays, (p.q_tokens, p.kv_tokens), weights)
        right = plain_derivatives(p.rule)(*arrays, seen(p.q_tokens, p.kv_tokens, p.rule), weights)
    size = 1 + largest(p.query) * largest(p.key) * p.query.shape[3]
    for a, b in zip(found, right, strict=True):
        assert (np.abs(np.asarray(a) - np.asarray(b)) <= 1e-12 * size**2 * (1 + largest(p.value))).all()


@pytest.mark.slow
@examples(0.5)
@given(
    st.sampled_from([1, 2, 3, 4]).flatmap(lambda cp: st.tuples(st.just(cp), problems(2 * cp, 2 * cp))),
    st.integers(0, 2**32 - 1),
)
def test_ring_has_the_derivatives_of_dense(case, seed):
    check("ring", *case, seed)


@pytest.mark.parametrize("exchange", [name for name in EXCHANGES if name != "ring"])
@examples(0.1)
@given(problems(8, 8, heads=(8, 4), rules=RULES[:1]), st.integers(0, 2**32 - 1))
def test_so_has_every_exchange(exchange, p, seed):
    check(exchange, (2, 2) if exchange == "all_to_all_ring" else 4, p, seed)


@pytest.mark.parametrize("keys", [1400, 3072])  # on either of two ranks a whole tile and a rest, three whole tiles
def test_across_key_tiles(keys):
    p = problem(0, "normal", tokens(1, 4, start=keys - 4), tokens(1, keys), RULES[0])
    check("ring", 2, p, 0)


@functools.cache
def in_small_tiles(rule):
    """The derivative of a block in tiles of 2 queries and 3 keys."""

    def run(q, k, v, q_tokens, kv_tokens, *rest):
        with pytest.MonkeyPatch.context() as patch:
            for module in (tiles, tiles_backward):
                patch.setattr(module, "QUERY_TILE", 2)
                patch.setattr(module, "KEY_TILE", 3)
            return tiles_backward.attend_backward(q, k, v, q_tokens, kv_tokens, attention(rule), *rest)

    return jax.jit(run)


@examples(0.3)
@given(problems(5, 7, rules=(RULES[2], RULES[4])), st.integers(0, 2**32 - 1))
def test_of_one_block_in_small_tiles(p, seed):
    """Tiles of queries inside tiles of keys, whole ones and a rest, some hidden and some seen whole."""
    rng = np.random.default_rng(seed)
    visible = seen(p.q_tokens, p.kv_tokens, p.rule)
    sees = visible.any(axis=2)[..., None]
    dout = np.where(sees[..., None], rng.normal(size=(*p.query.shape[:3], p.value.shape[3])), 0.0)
    dlse = np.where(sees, rng.normal(size=p.query.shape[:3]), 0.0)
    with jax.enable_x64(True):
        out, lse = (np.asarray(x) for x in block_program(p.rule, "float64")(*p.arrays))
        found = in_small_tiles(p.rule)(*p.arrays, lse, (dout * out).sum(axis=-1) - dlse, dout)
        sink = np.full(p.query.shape[2], -1e4)
        right = plain_derivatives(p.rule)(*p[:3], sink, visible, (dout, dlse))
    size = 1 + largest(p.query) * largest(p.key) * p.query.shape[3]
    for a, b in zip(found, right, strict=False):
        assert (np.abs(np.asarray(a) - np.asarray(b)) <= 1e-12 * size**2 * (1 + largest(p.value))).all()


def test_nothing_comes_from_rows_that_see_nothing():
    """Not even from a cotangent of NaN or infinity."""
    nowhere = Tokens(np.zeros((1, 4), np.int32), np.array([[0, 0, -1, 5]], np.int32))
    p = problem(0, "normal", nowhere, tokens(1, 4), RULES[1])
    program = device_program("ring", 2, p.rule, 1)
    with jax.enable_x64(True):
        _, back = jax.vjp(lambda q, k, v: program(q, k, v, p.q_tokens, p.kv_tokens, p.sink), *p[:3])
        cotangent = Partial(np.ones((1, 4, 4, 3)), np.ones((1, 4, 4)))
        clean = back(cotangent)
        for x in cotangent:
            x[:, 2:] = np.nan
        dirty = back(cotangent)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.isfinite(a).all()
    np.testing.assert_array_equal(np.asarray(clean[0])[:, 2:], 0.0)


def kept(run, cp: int, length: int) -> int:
    """Numbers that one device keeps from the forward pass for the backward one."""
    place = tokens(1, length)
    p = problem(0, "normal", place, place, RULES[0])
    arrays = [x.astype(np.float32) for x in p[:3]]
    _, back = jax.vjp(lambda q, k, v: run(q, k, v, place, place), *arrays)
    return sum(x.size for x in jax.tree.leaves(back) if hasattr(x, "size")) // cp


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_a_device_keeps_its_own_inputs_and_result_only(cp):
    length, (heads, kv_heads, dim, value_dim) = 16, (4, 2, 4, 3)
    program = device_program("ring", cp, RULES[0], 1, "float32")
    sink = np.full(heads, -np.inf, np.float32)
    own = length // cp * (heads * dim + kv_heads * (dim + value_dim) + heads * (value_dim + 1) + 4)
    # Besides, of the merge with the sink: weights and sums, a few numbers a row.
    few = length // cp * heads * (value_dim + 8) * 2
    assert kept(lambda *x: program(*x, sink), cp, length) <= own + few + 64


def test_autodiff_through_the_loop_would_keep_every_block():
    """So the explicit ring backwards is worth having: the loop keeps cp times as much."""

    def loop(q, k, v, q_place, kv_place):
        shards = jax.P(None, "cp")
        run = functools.partial(ring_attention, attention=attention(RULES[0], "float32"), axis_name="cp")
        return jax.jit(jax.shard_map(run, mesh=mesh(8), in_specs=shards, out_specs=shards))(q, k, v, q_place, kv_place)

    program = device_program("ring", 8, RULES[0], 1, "float32")
    sink = np.full(4, -np.inf, np.float32)
    assert kept(loop, 8, 64) > 2 * kept(lambda *x: program(*x, sink), 8, 64)


@pytest.mark.slow
def test_autodiff_of_one_block_is_finite_and_right():
    """Latent attention is differentiated through the loop."""
    nowhere = Tokens(np.array([[0, 1, 2, 3]], np.int32), np.array([[0, 0, 0, -1]], np.int32))
    p = problem(0, "normal", nowhere, tokens(1, 4), RULES[0])
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(1, 4, 4, 3)), rng.normal(size=(1, 4, 4))
    with jax.enable_x64(True):
        block = lambda *x: weighed(*attend(*x, p.q_tokens, p.kv_tokens, attention(p.rule)), weights)  # noqa: E731
        found = jax.grad(block, (0, 1, 2))(*map(jnp.asarray, p[:3]))
        right = plain_derivatives(p.rule)(*p[:3], np.full(4, -1e4), seen(p.q_tokens, p.kv_tokens, p.rule), weights)
    for a, b in zip(found, right, strict=False):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_forward_mode_is_refused_by_name():
    place = tokens(1, 4)
    p = problem(0, "normal", place, place, RULES[0])
    program = device_program("ring", 2, p.rule, 1, "float32")
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in p[:3])
    with pytest.raises(TypeError, match=r"forward-mode autodiff.*custom_vjp"):
        jax.jvp(lambda q, k, v: program(q, k, v, place, place, p.sink.astype(np.float32)).out, arrays, arrays)
