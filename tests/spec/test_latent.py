"""Latent attention, expanded and absorbed, is plain attention on the expanded heads; only the latent travels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import dense
from programs import attention, mesh
from strategies import RULES, SCALE, examples, places, seen

from cpjax.errors import InputError
from cpjax.latent import HEADLESS, UpProjection, latent_attention_on_device
from cpjax.mask import Tokens, tokens

pytestmark = pytest.mark.optimized

B, N, C, R, D, V = 1, 4, 6, 2, 3, 5  # as DeepSeek-V3's 128 heads, 512, 64, 128, 128
SHARDS = jax.P(None, "cp")


@functools.cache
def program(cp, rule, exchange, absorbed, precision="float64"):
    def device(query, c_kv, k_rope, up, q_tokens, kv_tokens):
        return latent_attention_on_device(
            query,
            c_kv,
            k_rope,
            up,
            q_tokens,
            kv_tokens,
            attention(rule, precision),
            axis_name="cp",
            exchange=exchange,
            absorbed=absorbed,
            chunks=2,
        )

    specs = (SHARDS, SHARDS, SHARDS, jax.P(), SHARDS, SHARDS)
    return jax.jit(jax.shard_map(device, mesh=mesh(cp), in_specs=specs, out_specs=SHARDS))


def inputs(seed, length, dims=(C, R, D, V), heads=N):
    rng = np.random.default_rng(seed)
    c, r, d, v = dims
    query, c_kv, k_rope = (rng.normal(size=(B, length, *x)) for x in ((heads, d + r), (c,), (r,)))
    return query, c_kv, k_rope, UpProjection(rng.normal(size=(c, heads, d)), rng.normal(size=(c, heads, v)))


def expected(query, c_kv, k_rope, up, visible):
    """By plain NumPy: expand, then the oracle."""
    key = np.einsum("bsc,cnd->bsnd", c_kv, up.key)
    rope = np.repeat(k_rope[:, :, None], key.shape[2], axis=2)
    value = np.einsum("bsc,cnv->bsnv", c_kv, up.value)
    return dense(query, np.concatenate([key, rope], axis=3), value, scale=SCALE, visible=visible)


@pytest.mark.slow
@examples(0.4)
@given(
    st.sampled_from([1, 2, 3]).flatmap(lambda cp: st.tuples(st.just(cp), places(B, 2 * cp, 2 * cp))),
    st.sampled_from(RULES[:2]),
    st.sampled_from(HEADLESS),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_is_plain_attention_on_expanded_heads(where, rule, exchange, absorbed, seed):
    cp, (q_tokens, kv_tokens) = where
    x = inputs(seed, 2 * cp)
    with jax.enable_x64(True):
        out, lse = program(cp, rule, exchange, absorbed)(*x, q_tokens, kv_tokens)
    right_out, right_lse = expected(*x, seen(q_tokens, kv_tokens, rule))
    np.testing.assert_allclose(out, right_out, rtol=0, atol=1e-11)
    empty = np.isneginf(right_lse)
    np.testing.assert_array_equal(np.isneginf(lse), empty)
    np.testing.assert_allclose(np.asarray(lse)[~empty], right_lse[~empty], rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("absorbed", [False, True])
def test_derivatives_of_both_forms_agree_with_plain_attention(absorbed):
    place = tokens(B, 8)
    with jax.enable_x64(True):
        x = jax.tree.map(jnp.asarray, inputs(0, 8))

        def loss(query, c_kv, k_rope, up):
            return (program(2, RULES[0], "ring", absorbed)(query, c_kv, k_rope, up, place, place).out ** 2).sum()

        def plain(query, c_kv, k_rope, up):
            key = jnp.einsum("bsc,cnd->bsnd", c_kv, up.key)
            rope = jnp.broadcast_to(k_rope[:, :, None], (*key.shape[:3], R))
            s = SCALE * jnp.einsum("btnh,bsnh->bnts", query, jnp.concatenate([key, rope], axis=3))
            p = jax.nn.softmax(jnp.where(np.tri(8, dtype=bool), s, -jnp.inf), axis=-1)
            return (jnp.einsum("bnts,bsc,cnv->btnv", p, c_kv, up.value) ** 2).sum()

        found, right = jax.grad(loss, (0, 1, 2, 3))(*x), jax.grad(plain, (0, 1, 2, 3))(*x)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_only_the_latent_travels_at_deepseeks_dims():
    """576 numbers a token and their place, for any number of heads."""
    x = jax.tree.map(lambda a: a.astype(np.float32), inputs(0, 8, (512, 64, 128, 128), heads=16))
    place = tokens(B, 8)
    text = program(2, RULES[0], "gather", False, "float32").lower(*x, place, place).compile().as_text()
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", text)
    numbers = sorted(np.prod([int(n) for n in shape.split(",")]) for dtype, shape in gathered if dtype == "f32")
    assert numbers == [8 * 64, 8 * 512]
    assert not re.search(r"collective-permute|all-to-all|all-reduce", text)


def test_fp16_in_both_forms_is_near_plain_attention():
    x = jax.tree.map(lambda a: (a / 2).astype(np.float16), inputs(1, 8))
    place = tokens(B, 8)
    right, _ = expected(*jax.tree.map(np.float64, x), np.tri(8, dtype=bool)[None])
    for absorbed in (False, True):
        out = program(2, RULES[0], "gather", absorbed, "flash_fp16")(*x, place, place).out
        assert np.abs(np.asarray(out) - right).max() < 2e-3 * np.abs(right).max()


def test_exchanges_over_heads_are_refused():
    x, place = inputs(0, 8), tokens(B, 8)
    with pytest.raises(InputError, match="exchange is 'all_to_all'; a latent has no heads"):
        program(2, RULES[0], "all_to_all", False)(*x, place, place)


def test_head_dims_that_disagree_are_refused():
    query, *rest = inputs(0, 8)
    with pytest.raises(InputError, match=r"query head_dim is 4; it must be the up-projection's 3 plus rope's 2"):
        program(2, RULES[0], "gather", False)(query[..., :4], *rest, *2 * (Tokens(*tokens(B, 8)),))
