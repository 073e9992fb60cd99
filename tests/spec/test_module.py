"""The Flax layer is projections around context-parallel attention, and trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from flax import nnx
from oracle import dense

from cpjax.errors import InputError
from cpjax.mask import Mask
from cpjax.module import ContextParallelAttention, attention_fn
from cpjax.parallel import cp_mesh


def layer(cp=2, **options):
    return ContextParallelAttention(
        8, 4, 2, 3, mesh=cp_mesh(cp), rngs=nnx.Rngs(0), **{"precision": "float32", **options}
    )


def test_is_projections_around_dense_attention():
    x = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    made = layer(partition="striped", exchange="gather", mask=Mask(window=3))
    weights = {name: np.asarray(getattr(made, name).kernel[...]) for name in ("query", "key", "value", "out")}
    q, k, v = (np.einsum("btd,dnh->btnh", x, weights[name]) for name in ("query", "key", "value"))
    ahead = np.arange(8)[:, None] - np.arange(8)
    visible = np.broadcast_to((ahead >= 0) & (ahead < 3), (2, 8, 8))
    out, _ = dense(q, k, v, scale=3**-0.5, visible=visible)
    np.testing.assert_allclose(made(jnp.asarray(x)), np.einsum("btnh,nhd->btd", out, weights["out"]), atol=1e-5)


def test_unknown_options_are_refused_when_it_is_made():
    with pytest.raises(InputError, match="unknown option 'sclae'; known are axis_name, head_axis"):
        layer(sclae=0.5)
    with pytest.raises(InputError, match=r"option mask is \[1\], which cannot be hashed"):
        layer(mask=[1])


@pytest.mark.slow
def test_is_a_value_that_flax_can_take_apart():
    """Hashed, split, merged, jitted by either, and mapped over inputs and over weights."""
    made, x = layer(), jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8)), jnp.float32)
    wanted = made(x)
    graph, state = nnx.split(made)
    assert hash(graph) == hash(nnx.split(layer())[0])
    assert graph == nnx.split(layer())[0]
    assert made.attention == attention_fn(mesh=cp_mesh(2), precision="float32")
    for found in (
        jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x),
        nnx.jit(lambda model, x: model(x))(made, x),
        jax.vmap(made)(jnp.stack([x, 2 * x]))[0],
        nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))(made, jnp.stack([x, 2 * x]))[0],
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    many = nnx.vmap(lambda rng: ContextParallelAttention(8, 4, 2, 3, mesh=cp_mesh(2), rngs=nnx.Rngs(rng)))
    made = many(jax.random.split(jax.random.key(0), 3))
    found = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(made, x)
    assert found.shape == (3, 1, 8, 8)
    assert not np.allclose(found[0], found[1])


def test_the_layer_gathers_nothing():
    """Tokens stay where they are, from the input of the layer to its output and to the input's derivative."""
    made, placed = layer(4, head_axis=None), jax.NamedSharding(cp_mesh(4), jax.P(None, "cp"))
    graph, state = nnx.split(made)

    def program(state, x):
        return jax.value_and_grad(lambda x: (nnx.merge(graph, state)(x) ** 2).sum())(x)

    x = jax.ShapeDtypeStruct((1, 16, 8), jnp.float32, sharding=placed)
    compiled = jax.jit(program).lower(state, x).compile()
    found = collectives(compiled)
    assert {y.kind for y in found} == {"collective-permute", "all-reduce"}
    assert sum(y.size for y in found if y.kind == "all-reduce") == 4, "the loss, one number"
    assert compiled.output_shardings[1].is_equivalent_to(placed, 3)


def test_attention_fn_fits_the_layer_of_flax():
    """The same weights give the same numbers as Flax's own attention with a causal mask."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8)), jnp.float32)
    ours = nnx.MultiHeadAttention(
        4, 8, decode=False, attention_fn=attention_fn(mesh=cp_mesh(2)), rngs=nnx.Rngs(params=0)
    )
    theirs = nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(params=0))
    mask = nnx.make_causal_mask(x[..., 0])
    wanted = theirs(x, mask=mask)
    np.testing.assert_allclose(ours(x), wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(ours(x[:, None])[:, 0], wanted, rtol=0, atol=2e-5)
    with pytest.raises(InputError, match="mask is an array"):
        ours(x, mask=mask)
    with pytest.raises(InputError, match=r"dropout_rate is 0\.5"):
        ours.attention_fn(*[jnp.ones((1, 4, 2, 4))] * 3, dropout_rate=0.5, deterministic=False)


@pytest.mark.slow
def test_is_the_same_on_any_number_of_ranks_and_trains():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 8)), jnp.float32)
    slopes = []
    for cp in (1, 4):
        loss = nnx.value_and_grad(lambda model: (model(x) ** 2).sum())
        value, grads = nnx.jit(loss)(layer(cp))
        assert value > 0
        slopes.append(jax.tree.leaves(grads))
    assert len(slopes[0]) == 4
    for a, b in zip(*slopes, strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=2e-5)
