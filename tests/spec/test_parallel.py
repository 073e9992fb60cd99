"""The way in with global arrays: any layout, mesh and transformation, and every misuse refused before tracing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from programs import assert_dense, equal_bits
from strategies import RULES, SCALE, examples, problem, problems

from cpjax.dense import dense_attention
from cpjax.errors import InputError
from cpjax.exchange.device import EXCHANGES
from cpjax.mask import Mask, Tokens, tokens
from cpjax.parallel import context_parallel_attention, cp_mesh
from cpjax.partition import SEQUENCES
from cpjax.precision import profile

pytestmark = pytest.mark.optimized


def mesh_of(**axes):
    count = int(np.prod(list(axes.values())))
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:count], axis_types=kinds)


def run(p, mesh, **options):
    options = {"precision": "float64", **options}
    sink = None if np.isneginf(p.sink).all() else p.sink
    rule = {"mask": p.rule.mask, "softcap": p.rule.softcap, "scale": SCALE}
    return context_parallel_attention(*p.arrays, mesh=mesh, sink=sink, **rule, **options)


@pytest.mark.slow
@examples(0.3)
@given(problems(12, 24), st.sampled_from(list(SEQUENCES)), st.sampled_from([1, 2, 3]))
def test_any_layout_is_dense(p, layout, cp):
    with jax.enable_x64(True):
        assert_dense(run(p, cp_mesh(cp), partition=layout), p)


@examples(0.2)
@given(problems(8, 8, heads=(8, 4), batch=2, rules=RULES[:1]), st.sampled_from(list(EXCHANGES)))
def test_on_a_mesh_with_tp_and_dp(p, exchange):
    """Heads and batch sharded too; a sink's heads with them."""
    two = exchange == "all_to_all_ring"
    mesh = mesh_of(dp=1, outer=2, inner=2, tp=2) if two else mesh_of(dp=2, cp=2, tp=2)
    axes = ("outer", "inner") if two else "cp"
    with jax.enable_x64(True):
        result = run(p, mesh, axis_name=axes, head_axis="tp", batch_axis="dp", exchange=exchange)
        assert_dense(result, p)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_tp_and_dp_change_nothing(exchange):
    """But the order in which XLA adds up a product: with fewer heads a device it takes another matrix kernel."""
    place = tokens(2, 16)
    p = problem(0, "normal", place, place, RULES[0], heads=(4, 2))
    with jax.enable_x64(True):
        alone = run(p, cp_mesh(2), precision="float64", exchange=exchange)
        mesh = mesh_of(dp=2, cp=2, tp=2)
        found = run(p, mesh, head_axis="tp", batch_axis="dp", precision="float64", exchange=exchange)
    for x, y in zip(found, alone, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-14 * np.abs(p.value).max())


def test_one_rank_is_one_block_bit_for_bit():
    from cpjax.attention import Attention
    from cpjax.blocks.tiles import attend

    place = tokens(1, 8)
    p = problem(0, "normal", place, place, RULES[0])
    arrays = [x.astype(np.float16) for x in p[:3]]
    how = Attention(Mask(), SCALE, profile("flash_fp16"))
    whole = context_parallel_attention(*arrays, mesh=cp_mesh(1), partition="contiguous", scale=SCALE)
    equal_bits(whole, jax.jit(functools.partial(attend, attention=how))(*arrays, place, place))


def test_vmap_over_the_batch():
    place = tokens(3, 8)
    p = problem(0, "normal", place, place, RULES[0])
    x = [jnp.asarray(a, jnp.float32) for a in p[:3]]
    attention = functools.partial(context_parallel_attention, mesh=cp_mesh(2), precision="float32")
    mapped = jax.vmap(lambda q, k, v: attention(q[None], k[None], v[None]))(*x)
    whole = attention(*x)
    np.testing.assert_allclose(mapped.out[:, 0], whole.out, rtol=0, atol=2e-6)
    np.testing.assert_allclose(mapped.lse[:, 0], whole.lse, rtol=0, atol=2e-6)


def test_eval_shape_and_jit():
    shape = jax.ShapeDtypeStruct((2, 8, 4, 6), jnp.float16)
    value = jax.ShapeDtypeStruct((2, 8, 4, 5), jnp.float16)
    attention = jax.jit(functools.partial(context_parallel_attention, mesh=cp_mesh(2)))
    out, lse = jax.eval_shape(attention, shape, shape, value)
    assert (out.shape, out.dtype) == ((2, 8, 4, 5), jnp.float16)
    assert (lse.shape, lse.dtype) == ((2, 8, 4), jnp.float32)


def test_grad_through_the_global_function():
    place = tokens(1, 8)
    p = problem(0, "normal", place, place, RULES[0])
    with jax.enable_x64(True):
        loss = lambda q: context_parallel_attention(q, *p[1:3], mesh=cp_mesh(2), precision="float64").out.sum()  # noqa: E731
        slope = jax.grad(loss)(jnp.asarray(p.query))
        step = 1e-6 * np.random.default_rng(0).normal(size=p.query.shape)
        change = (loss(p.query + step) - loss(p.query - step)) / 2
    assert float((np.asarray(slope) * step).sum()) == pytest.approx(float(change), rel=1e-6)


def test_defaults_are_causal_one_over_sqrt_h_zigzag_flash_fp16():
    place = tokens(1, 8)
    p = problem(0, "normal", place, place, RULES[0])
    x = [a.astype(np.float16) for a in p[:3]]
    said = context_parallel_attention(
        *x, place, place, mesh=cp_mesh(2), partition="zigzag", mask=Mask(True), scale=0.5, precision="flash_fp16"
    )
    equal_bits(context_parallel_attention(*x, mesh=cp_mesh(2)), said)  # head dim 4: 1/√4 = 0.5


@pytest.mark.parametrize("name", ["flash_fp16", "ring_mla_fp16", "decode_fp16_lse", "flash_bf16", "float32"])
def test_null_models_are_far_from_what_the_profile_computes(name):
    """The distance at which the profile lies from dense is small against that of zeros and of the mean of values."""
    place = tokens(1, 16)
    p = problem(0, "needle", place, place, RULES[1])
    x = [a.astype(np.float16) for a in p[:3]]
    exact = dense_attention(*x, place, place, mask=p.rule.mask, scale=0.1)
    found = context_parallel_attention(*x, mesh=cp_mesh(2), mask=p.rule.mask, scale=0.1, precision=name)
    distance = lambda out: float(np.sqrt(np.mean((np.asarray(out) - exact.out) ** 2)))  # noqa: E731
    limit = {"flash_bf16": 1e-2, "float32": 1e-6}.get(name, 4e-3)
    assert distance(found.out) < limit
    assert distance(0 * exact.out) > 0.3
    assert distance(np.broadcast_to(np.repeat(x[2].mean(1, keepdims=True), 2, 2), exact.out.shape)) > 0.3


GOOD = np.zeros((2, 8, 4, 6), np.float32)
PLACE = tokens(2, 8)


def case(message, query=GOOD, key=GOOD, value=GOOD, q_tokens=None, kv_tokens=None, **options):
    return pytest.param(message, (query, key, value, q_tokens, kv_tokens), options, id=message[:40])


@pytest.mark.parametrize(
    ("message", "arrays", "options"),
    [
        case(r"query has shape \(8, 4, 6\); it must be \[batch, seq, heads, head_dim\]", query=GOOD[0]),
        case("key is of dtype int32; it must be a floating dtype", key=GOOD.astype(np.int32)),
        case("dtypes differ: query float16, key float32", query=GOOD.astype(np.float16)),
        case("batch sizes differ, query 1", query=GOOD[:1]),
        case("must agree in batch, length and heads", value=GOOD[:, :4]),
        case("query head_dim 5 and key head_dim 6 must be equal", query=GOOD[..., :5]),
        case("4 query heads cannot share 3 key/value heads evenly", key=GOOD[:, :, :3], value=GOOD[:, :, :3]),
        case("query length 4 and key length 8 differ", query=GOOD[:, :4]),
        case(r"positions of the query have shape \(2, 4\); they must be", q_tokens=tokens(2, 4), kv_tokens=PLACE),
        case("positions of the key are of dtype float32", q_tokens=PLACE, kv_tokens=Tokens(GOOD[:, :, 0, 0], PLACE[1])),
        case("unknown partition 'spiral'; known are contiguous, zigzag, striped", partition="spiral"),
        case("unknown exchange 'teleport'; known are ring", exchange="teleport"),
        case("unknown precision 'fp8'", precision="fp8"),
        case(r"the mesh has axes \('cp',\), none is 'sp'", axis_name="sp"),
        case(r"the mesh has axes \('cp',\), none is 'tp'", head_axis="tp"),
        case("axes .* are not all different", head_axis="cp"),
        case("takes one axis", axis_name=("cp", "cp")),
        case(r"takes two axes, \(ring, all-to-all\)", exchange="all_to_all_ring"),
        case(r"6 tokens cannot be cut into 4 equal parts .* pad to 8", *[GOOD[:, :6]] * 3),
        case("3 query heads cannot be cut into 2 parts", *[GOOD[:, :, :3]] * 3, exchange="all_to_all"),
        case("scale is nan; it must be a finite number", scale=float("nan")),
        case("softcap is 0.0; it must be a positive finite number", softcap=0.0),
        case(r"sink has shape \(3,\); it must be \(4,\)", sink=np.zeros(3, np.float32)),
        case("precision float64 needs float64 in JAX", precision="float64"),
        case("lengths and tokens are both given", q_tokens=PLACE, kv_tokens=PLACE, lengths=(8,)),
        case(r"query has batch and length \(2, 8\); requests of lengths \(3,\), padded, make \(1, 4\)", lengths=(3,)),
    ],
)
def test_misuse_is_refused_before_tracing(message, arrays, options, monkeypatch):
    monkeypatch.setattr("cpjax.parallel._run", None)  # reaching it would be a TypeError
    with pytest.raises(InputError, match=message):
        context_parallel_attention(*arrays, mesh=cp_mesh(2), **{"precision": "float32", **options})


def test_batch_that_does_not_divide_is_refused():
    x = GOOD[:1]
    with pytest.raises(InputError, match="a batch of 1 cannot be cut into 2 equal parts"):
        context_parallel_attention(x, x, x, mesh=mesh_of(dp=2, cp=2), batch_axis="dp", precision="float32")


@pytest.mark.parametrize(("cp", "message"), [(0, "cp is 0"), (-1, "cp is -1"), (9, r"cp is 9 but JAX sees 8 device")])
def test_meshes_that_cannot_be_are_refused(cp, message):
    with pytest.raises(InputError, match=message):
        cp_mesh(cp)
