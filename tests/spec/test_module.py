"""The Flax layer is projections around context-parallel attention, and trains."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracle import dense

from cpjax.mask import Mask
from cpjax.module import ContextParallelAttention
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
