"""One block in tiles is the definition, for any tile size, and looks at nothing that is hidden."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import assert_dense, attention, block_program, equal_bits
from strategies import RULES, examples, problem, problems, seen

from cpjax.blocks import tiles
from cpjax.blocks.tiles import attend, seen_of
from cpjax.mask import Tokens, tokens

SHAPES = [((5, 7), (4, 2)), ((1, 1), (1, 1)), ((3, 11), (3, 1)), ((2, 4), (2, 2)), ((4, 0), (4, 2)), ((0, 4), (4, 2))]
NO_SINK = np.full(4, -np.inf)


def run(p, precision="float64"):
    return block_program(p.rule, precision)(*p.arrays)


@given(st.sampled_from(SHAPES).flatmap(lambda s: problems(*s[0], s[1], batch=2)))
def test_is_dense(p):
    with jax.enable_x64(True):
        p = p._replace(sink=np.full(p.query.shape[2], -np.inf))
        assert_dense(run(p), p)


@examples(0.3)
@given(problems(5, 7), st.sampled_from([1, 2, 3, 7, 8]))
def test_is_dense_with_any_tile(p, tile):
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "KEY_TILE", tile)
        p = p._replace(sink=NO_SINK)
        # A function of its own: JAX would find the program of another tile under the old one.
        assert_dense(jax.jit(lambda *arrays: attend(*arrays, attention(p.rule)))(*p.arrays), p)


@pytest.mark.parametrize("keys", [512, 513, 1024, 1300])
def test_is_dense_around_the_real_tile(keys):
    p = problem(keys, "normal", tokens(1, 3, start=keys - 3), tokens(1, keys), RULES[0])
    with jax.enable_x64(True):
        assert_dense(run(p), p)


@examples(0.3)
@given(problems(5, 7), st.sampled_from([1, 2, 3, 5]))
def test_is_dense_with_any_query_tile(p, tile):
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "QUERY_TILE", tile)
        patch.setattr(tiles, "KEY_TILE", 2)
        p = p._replace(sink=NO_SINK)
        assert_dense(jax.jit(lambda *arrays: attend(*arrays, attention(p.rule)))(*p.arrays), p)


@given(problems(5, 7, batch=2))
def test_what_is_seen_of_a_tile_is_never_said_wrongly(p):
    """0 and 2 are promises; 1 is none."""
    every = seen(p.q_tokens, p.kv_tokens, p.rule)
    for rows in (slice(0, 2), slice(2, 5), slice(3, 4)):
        for keys in (slice(0, 3), slice(3, 7), slice(6, 7)):
            q, kv = (Tokens(*(x[:, cut] for x in t)) for t, cut in ((p.q_tokens, rows), (p.kv_tokens, keys)))
            said, truth = int(seen_of(p.rule.mask, q, kv)), every[:, rows, keys]
            assert said == 1 or truth.all() == truth.any() == (said == 2)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_seen_of_a_tile_is_told_where_it_is_plain(rule):
    """Else no tile would ever be left out, and none computed without its mask."""
    old, new = tokens(1, 4), tokens(1, 4, start=8)
    other = Tokens(old.position, old.segment + 1)
    assert seen_of(rule.mask, old, other) == 0
    assert seen_of(rule.mask, old, new) == (0 if rule.is_causal or rule.window else 2)
    assert seen_of(rule.mask, new, old) == (0 if rule.window else 2)


@given(problems(5, 7), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_the_future_never_leaks(p, j, seed):
    """Key or value j may become any finite number: no bit changes where it is hidden."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        before = run(p)
        other = p._replace(key=p.key.copy(), value=p.value.copy())
        other.key[:, j] = rng.choice([0.0, 1e30, -1e30, 3.0], other.key[:, j].shape)
        other.value[:, j] = rng.choice([0.0, 1e300, -1e300, 3.0], other.value[:, j].shape)
        after = run(other)
        hidden = ~tiles.visible(p.rule.mask, p.q_tokens, p.kv_tokens)[0, :, j]
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(np.asarray(x)[:, hidden], np.asarray(y)[:, hidden])


@given(problems(5, 7), st.integers(0, 6))
def test_nan_in_a_hidden_key_does_not_leak(p, j):
    with jax.enable_x64(True):
        before = run(p)
        p.key[:, j] = np.nan
        after = run(p)
        hidden = ~tiles.visible(p.rule.mask, p.q_tokens, p.kv_tokens)[0, :, j]
        for x, y in zip(before, after, strict=True):
            np.testing.assert_array_equal(np.asarray(x)[:, hidden], np.asarray(y)[:, hidden])
        assert np.isnan(np.asarray(after.lse)[:, ~hidden]).all()  # where it is seen it shows


@given(problems(5, 7), st.lists(st.booleans(), min_size=7, max_size=7))
def test_pads_may_hold_anything(p, pad):
    with jax.enable_x64(True):
        p.kv_tokens.segment[:, pad] = -1
        before = run(p)
        for x in (p.key, p.value):
            x[:, pad] = np.nan
        p.query[p.q_tokens.segment == -1] = np.nan
        equal_bits(run(p), before)


@given(problems(5, 7), st.permutations(range(7)), st.permutations(range(5)))
def test_tokens_may_be_permuted_with_their_places(p, kv_order, q_order):
    q_order, kv_order = np.array(q_order), np.array(kv_order)
    moved = p._replace(
        query=p.query[:, q_order],
        key=p.key[:, kv_order],
        value=p.value[:, kv_order],
        q_tokens=type(p.q_tokens)(*(x[:, q_order] for x in p.q_tokens)),
        kv_tokens=type(p.kv_tokens)(*(x[:, kv_order] for x in p.kv_tokens)),
        sink=NO_SINK,
    )
    with jax.enable_x64(True):
        assert_dense(run(moved), moved)
        result = run(p)
        back = np.argsort(q_order)
        assert_dense(type(result)(*(x[:, back] for x in run(moved))), p._replace(sink=NO_SINK))


@given(problems(5, 7), st.floats(-50, 50))
def test_a_constant_on_all_logits_of_a_row_moves_only_lse(p, shift):
    """One more dimension in which all keys are 1 adds the query's entry there to all its logits."""
    if p.rule.softcap is not None:
        return  # a softcap is not linear
    with jax.enable_x64(True):
        wide = p._replace(
            query=np.concatenate([p.query, np.full((*p.query.shape[:3], 1), shift)], axis=3),
            key=np.concatenate([p.key, np.ones((*p.key.shape[:3], 1))], axis=3),
            sink=NO_SINK,
        )
        result = run(wide)
        assert_dense(result, wide)
        unshifted = type(result)(result.out, result.lse - 0.5 * shift)
        assert_dense(unshifted, wide._replace(query=p.query, key=p.key)) if abs(shift) < 1 else None


@given(problems(5, 7), st.permutations(range(2)), st.permutations(range(2)))
def test_heads_may_be_permuted(p, kv_heads, within):
    heads = np.array([kv * 2 + g for kv in kv_heads for g in within])
    with jax.enable_x64(True):
        moved = run(p._replace(query=p.query[:, :, heads], key=p.key[:, :, kv_heads], value=p.value[:, :, kv_heads]))
        equal_bits(moved, type(moved)(*(np.asarray(x)[:, :, heads] for x in run(p))))
