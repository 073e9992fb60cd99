"""What a JAX user does with it: transformations, meshes of every kind, one's own `shard_map`, a new scale, donation."""

import doctest
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from programs import equal_bits
from strategies import examples
from test_parallel import mesh_of

from cpjax.attention import Attention, Computation
from cpjax.crosscheck import judge
from cpjax.errors import InputError
from cpjax.exchange.device import attention_on_device
from cpjax.mask import Mask
from cpjax.parallel import _run, context_parallel_attention, cp_mesh
from cpjax.partition import Zigzag
from cpjax.precision import profile

RNG = np.random.default_rng(0)
X = tuple(RNG.normal(size=(2, 8, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
attend = functools.partial(context_parallel_attention, mesh=cp_mesh(2))
SHARDED = jax.P(None, "cp")


@functools.cache
def expected():
    return tuple(np.asarray(x) for x in attend(*X))


def near(found, wanted=None, atol=2e-6):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected() if wanted is None else wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def loss(attention, *arrays):
    out, lse = attention(*arrays)
    return (out**2).sum() + lse.sum()


@functools.cache
def slopes():
    return jax.jit(jax.grad(functools.partial(loss, attend), (0, 1, 2)))(*X)


@pytest.mark.slow
def test_the_page_for_jax_users():
    page = (Path(__file__).parents[2] / "docs" / "jax.md").read_text()
    examples = doctest.DocTestParser().get_doctest(re.sub(r"(?m)^```.*$", "", page), {}, "jax.md", "jax.md", 0)
    assert len(examples.examples) > 30
    assert doctest.DocTestRunner().run(examples).failed == 0


# Transformations -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_remat():
    again = jax.jit(jax.grad(functools.partial(loss, jax.checkpoint(attend)), (0, 1, 2)))(*X)
    near(again, slopes(), atol=1e-5)


def test_scan_over_layers():
    def layer(query, scale):
        return query + attend(query, *X[1:], scale=scale).out, None

    scales = jnp.array([0.5, 0.25], jnp.float32)
    found, _ = jax.jit(lambda q: jax.lax.scan(layer, q, scales))(X[0])
    wanted = X[0]
    for scale in (0.5, 0.25):
        wanted = layer(jnp.asarray(wanted), scale)[0]
    near(found, wanted, atol=1e-5)


def test_vmap_of_the_derivative():
    each = jax.vmap(jax.grad(lambda *x: loss(attend, *x)))(*(x[:, None] for x in map(jnp.asarray, X)))
    near(each[:, 0], slopes()[0], atol=1e-5)


def test_a_donated_query_becomes_the_output():
    program = jax.jit(lambda q, k, v: attend(q, k, v).out, donate_argnums=0)
    placed = [jax.device_put(x.astype(np.float16), jax.NamedSharding(cp_mesh(2), SHARDED)) for x in X]
    out = program(*placed)
    assert out.dtype == np.float16
    assert placed[0].is_deleted()
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(placed[0])


# Meshes --------------------------------------------------------------------------------------------------------------


def mesh_with(kind, *axes):
    return jax.make_mesh(
        (2,) * len(axes), axes, devices=jax.devices()[: 2 ** len(axes)], axis_types=(kind,) * len(axes)
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("place", ["host", "sharded", "replicated"])
def test_auto_and_explicit_meshes(kind, place):
    mesh = mesh_with(kind, "cp")
    spec = {"sharded": SHARDED, "replicated": jax.P()}.get(place)
    x = X if spec is None else [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in X]
    found = context_parallel_attention(*x, mesh=mesh)
    near(found)
    for a in found:
        assert a.sharding.is_equivalent_to(jax.NamedSharding(mesh, SHARDED), a.ndim)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_mesh_that_is_set(kind):
    want = slopes()  # by a mesh that is given, where none is set
    with jax.set_mesh(mesh_with(kind, "cp")):
        near(context_parallel_attention(*X))
        program = jax.jit(jax.grad(lambda *x: loss(context_parallel_attention, *x), (0, 1, 2)))
        near(program(*X), want, atol=1e-5)


@pytest.mark.parametrize("kinds", [(AxisType.Explicit,) * 3, (AxisType.Auto, AxisType.Explicit, AxisType.Explicit)])
def test_typed_axes_for_batch_and_heads(kinds):
    mesh = jax.make_mesh((2, 2, 2), ("dp", "cp", "tp"), axis_types=kinds)
    found = context_parallel_attention(*X, mesh=mesh, head_axis="tp", batch_axis="dp")
    near(found)
    assert found.out.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P("dp", "cp", "tp")), 4)


def test_no_mesh_at_all_is_refused():
    with pytest.raises(InputError, match=r"no mesh is given and none is set; give mesh=cp_mesh\(ranks\)"):
        context_parallel_attention(*X)


def test_another_mesh_than_the_one_set_is_refused():
    with jax.set_mesh(mesh_with(AxisType.Explicit, "cp")):
        with pytest.raises(InputError, match=r"mesh has axes {'cp': 4}, the one that is set {'cp': 2}; leave mesh out"):
            context_parallel_attention(*X, mesh=cp_mesh(4))
        with pytest.raises(InputError, match="the axes of mesh are Auto, those of the one that is set Explicit"):
            attend(*X)


# Inside one's own shard_map ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_inside_ones_own_shard_map(given):
    """Arrays are this device's: runs of the text go in and come out."""
    mesh = mesh_with(AxisType.Auto, "cp")
    device = attend if given else context_parallel_attention
    program = jax.shard_map(device, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED)
    near(jax.jit(program)(*X))


def test_inside_a_shard_map_over_everything():
    mesh = mesh_of(dp=2, cp=2)
    spec = jax.P("dp", "cp")
    program = jax.shard_map(context_parallel_attention, mesh=mesh, in_specs=spec, out_specs=spec)
    near(jax.jit(jax.grad(lambda *x: loss(program, *x), (0, 1, 2)))(*X), slopes(), atol=1e-5)


def test_inside_a_shard_map_over_another_axis():
    """What is not cut yet is cut here."""
    mesh = mesh_of(dp=2, cp=2)
    one = {"mesh": mesh, "in_specs": jax.P("dp"), "out_specs": jax.P("dp"), "axis_names": {"dp"}}
    near(jax.jit(jax.shard_map(context_parallel_attention, **one))(*X))
    misled = functools.partial(context_parallel_attention, batch_axis="dp")
    with pytest.raises(
        InputError, match="the shard_map around is over 'dp', so arrays are cut already; leave batch_axis"
    ):
        jax.shard_map(misled, **one)(*X)


def test_a_shard_map_over_one_axis_of_two_is_refused():
    mesh = mesh_of(outer=2, inner=2)
    device = functools.partial(context_parallel_attention, axis_name=("outer", "inner"), exchange="all_to_all_ring")
    program = jax.shard_map(device, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), axis_names={"outer"})
    with pytest.raises(InputError, match=r"the shard_map around is over \['outer'\] but not over all of"):
        program(*X)


# What follows from the arrays, and what compiles nothing --------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_precision_follows_the_arrays(dtype):
    name = {"float16": "flash_fp16", "bfloat16": "flash_bf16"}.get(dtype, dtype)
    with jax.enable_x64(True):
        x = [a.astype(jnp.dtype(dtype)) for a in X]
        found = attend(*x)
        assert found.out.dtype == dtype
        assert found.lse.dtype == ("float64" if dtype == "float64" else "float32")
        equal_bits(found, attend(*x, precision=name))


@pytest.mark.slow
@examples(0.05)
@given(st.sampled_from(["float16", "bfloat16", "float32", "float64"]), st.integers(0, 2**32 - 1), st.booleans())
def test_the_judge_needs_to_be_told_the_partition_only(dtype, seed, far):
    """Values of mean 3 under flat weights: every key matters, and roundings of merges are large against the result."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(1, 64, 2, 16)) for _ in range(3))
    x = [a.astype(jnp.dtype(dtype)) for a in ((0.05 * q, k, v + 3) if far else (q, k, v))]
    with jax.enable_x64(True):
        found = context_parallel_attention(*x, mesh=cp_mesh(4))
    verdict = judge(*x, *found, partition=Zigzag(4))
    assert verdict.passed, verdict.reasons
    assert not judge(*x, found.out[:, ::-1], partition=Zigzag(4)).passed


def test_no_precision_belongs_to_eight_bits():
    x = [a.astype(jnp.float8_e4m3fn) for a in X]
    with pytest.raises(InputError, match="no precision belongs to arrays of float8_e4m3fn; name one of"):
        attend(*x)


def test_another_scale_compiles_nothing():
    attend(*X, scale=0.3)
    before = _run._cache_size()
    one, two = attend(*X, scale=0.4), attend(*X, scale=np.float32(0.6))
    assert _run._cache_size() == before
    assert not np.array_equal(one.out, two.out)


@pytest.mark.slow
@examples(0.2)
@given(st.sampled_from(["flash_fp16", "ring_mla_fp16"]), st.floats(0.0625, 2.0, width=32))
def test_a_traced_scale_is_the_same_bits(name, scale):
    """As the operand that a number becomes; and the format of the scores rounds it as NumPy does."""
    x = tuple(a.astype(np.float16) for a in X)
    said = np.asarray(attend(*x, scale=scale, precision=name).out)
    np.testing.assert_array_equal(traced(name)(np.float32(scale), *x).out, said)
    if name == "ring_mla_fp16":
        np.testing.assert_array_equal(attend(*x, scale=float(np.float16(scale)), precision=name).out, said)


@functools.cache
def traced(name):
    return jax.jit(lambda scale, *x: attend(*x, scale=scale, precision=name))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_derivative_of_the_scale(softcap):
    with jax.enable_x64(True):
        x = [a.astype(np.float64) for a in X]
        f = jax.jit(lambda scale: loss(functools.partial(attend, scale=scale, softcap=softcap), *x))
        slope = jax.grad(f)(0.5)
        assert float(slope) == pytest.approx(float(f(0.5 + 1e-5) - f(0.5 - 1e-5)) / 2e-5, rel=1e-7)


@pytest.mark.parametrize("lengths", [[3, 4], np.array([3, 4]), (np.int64(3), 4)])
def test_lengths_as_anyone_writes_them(lengths):
    x = [a[:1] for a in X]
    equal_bits(attend(*x, lengths=lengths), attend(*x, lengths=(3, 4)))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("lengths are 8; they must be a sequence of integers", {"lengths": 8}),
        (r"lengths are \[7\.5\]; they must be a sequence of integers", {"lengths": [7.5]}),
        (r"scale is array\(\[0.5\]\); it must be one finite number", {"scale": np.array([0.5])}),
        ("scale is 'half'; it must be one finite number", {"scale": "half"}),
        ("scale is inf; it must be a finite number", {"scale": jnp.array(jnp.inf)}),
        ("alibi is said in the computation, but is not computed", {"computation": Computation(alibi=np.ones(4))}),
        ("bias is said in the computation", {"computation": Computation(bias=np.ones(4))}),
        ("scale is said twice", {"computation": Computation(scale=1.0), "scale": 1.0}),
        ("order is 'gather', but exchange 'ring' merges in order 'ring'", {"computation": Computation(order="gather")}),
    ],
)
def test_what_is_refused(message, options):
    with pytest.raises(InputError, match=message):
        attend(*X, **options)


def test_what_is_traced_and_must_not_be():
    with pytest.raises(InputError, match="lengths are traced; they decide the shapes of a program"):
        jax.jit(lambda n: attend(*X, lengths=[n]))(8)
    with pytest.raises(InputError, match=r"scale is traced as float32\[2\]; it must be one floating number"):
        jax.jit(lambda scale: attend(*X, scale=scale))(np.ones(2, np.float32))


def test_a_computation_says_what_keywords_say():
    sink = np.ones(4, np.float32)
    words = {"mask": Mask(window=3), "scale": 0.3, "softcap": 2.0, "sink": sink, "precision": "flash_fp16"}
    said = Computation(**words, partition="striped", order="ring")
    equal_bits(attend(*X, computation=said), attend(*X, **words, partition="striped"))


def test_an_unknown_order_is_refused():
    with pytest.raises(InputError, match="unknown merge order 'random'"):
        Computation(order="random")


def test_on_a_device_a_scale_may_be_an_array():
    how = Attention(Mask(), 0.5, profile("float32"))
    device = lambda scale, *x: attention_on_device(  # noqa: E731
        *x, *places(x), Attention(Mask(), scale, profile("float32")), axis_name="cp"
    )
    constant = lambda *x: attention_on_device(*x, *places(x), how, axis_name="cp")  # noqa: E731
    on_mesh = functools.partial(jax.shard_map, mesh=cp_mesh(2), out_specs=SHARDED)
    found = jax.jit(on_mesh(device, in_specs=(jax.P(), SHARDED, SHARDED, SHARDED)))(jnp.float32(0.5), *X)
    near(found, jax.jit(on_mesh(constant, in_specs=SHARDED))(*X))


def places(x):
    from cpjax.mask import Tokens

    position = jnp.broadcast_to(jax.lax.axis_index("cp") * 4 + jnp.arange(4), x[0].shape[:2])
    return Tokens(position, 0 * position), Tokens(position, 0 * position)
