"""Decode over a cache that is cut by tokens: dense in float64, every rank alike, and the profile bit for bit."""

import functools

import jax
import numpy as np
import numpy_twin as twin
import pytest
from collectives import collectives
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from programs import assert_dense, attention, exact, same
from strategies import RULES, SCALE, examples, problem, problems

from cpjax.decode import cache_moves, context_parallel_decode
from cpjax.errors import InputError
from cpjax.exchange.decode import decode_attention
from cpjax.mask import PAD, Tokens, tokens
from cpjax.parallel import cp_mesh
from cpjax.partition import Blocks, Interleaved, Pages

pytestmark = pytest.mark.optimized

CP = st.sampled_from([1, 2, 3, 5])


def owners(data, length, cp):
    """Any placement, ranks that hold nothing included."""
    most = data.draw(st.integers(0, cp - 1))
    return np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).integers(0, most + 1, length)


def in_caches(p, owner, cp, slots):
    """Key, value and places as the ranks' caches hold them, one after the other; NaN in slots that are not used."""
    held = [np.flatnonzero(owner == rank) for rank in range(cp)]
    index = np.concatenate([np.append(x, np.full(slots - len(x), -1)) for x in held])
    key, value = (np.where((index < 0)[None, :, None, None], np.nan, x[:, index]) for x in p.arrays[1:3])
    places = (np.where(index < 0, fill, np.asarray(x)[:, index]) for x, fill in zip(p.kv_tokens, (0, PAD), strict=True))
    return key, value, Tokens(*(x.astype(np.int32) for x in places))


@examples(0.5)
@given(problems(3, 12, rules=RULES[:4]), CP, st.data())
def test_caches_of_any_placement_are_dense(p, cp, data):
    """A rank that holds nothing included. One program for all placements: nothing is moved."""
    p = p._replace(sink=np.full(4, -np.inf))
    key, value, kv_tokens = in_caches(p, owners(data, 12, cp), cp, 12)
    with jax.enable_x64(True):
        found = context_parallel_decode(
            p.query, key, value, p.q_tokens, kv_tokens, in_partition_order=True, mesh=cp_mesh(cp), mask=p.rule.mask,
            scale=SCALE, precision="float64",
        )  # fmt: skip
        assert_dense(found, p)


@examples(0.12)
@given(problems(3, 12, rules=RULES[:1]), CP, st.data())
def test_keys_are_moved_to_any_owner(p, cp, data):
    p = p._replace(sink=np.full(4, -np.inf))
    owner = owners(data, 12, cp)
    with jax.enable_x64(True):
        found = context_parallel_decode(
            *p.arrays, owner=owner, mesh=cp_mesh(cp), mask=p.rule.mask, scale=SCALE, precision="float64"
        )
        assert_dense(found, p)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_keys_are_sent_and_never_gathered(kind):
    """Each key that changes its rank goes once, in rounds that pads fill up; the exchange gathers partials."""
    cp, length, heads = 4, 32, 2
    mesh = jax.make_mesh((cp,), ("cp",), devices=jax.devices()[:cp], axis_types=(kind,))
    cut = jax.NamedSharding(mesh, P(None, "cp"))
    shape = lambda *s, dtype=np.float16, **how: jax.ShapeDtypeStruct(s, dtype, **how)  # noqa: E731
    owner = Blocks(cp, block=2).owners(0, length)
    new = Tokens(np.array([[length - 1]], np.int32), np.zeros((1, 1), np.int32))

    def step(query, key, value):
        return context_parallel_decode(query, key, value, new, tokens(1, length), owner=owner, mesh=mesh)

    arrays = (shape(1, 1, heads, 4), *(shape(1, length, heads, n, sharding=cut) for n in (4, 3)))
    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(*arrays).compile()
    found = collectives(compiled)
    assert {x.kind for x in found} == {"collective-permute", "all-gather"}
    gathered = sum(x.size for x in found if x.kind == "all-gather")
    assert gathered == cp * heads * 2 * (3 + 1)  # out and lse of one query, in FP16
    changed = int((owner != np.arange(length) // (length // cp)).sum())
    sent = sum(x.sent for x in found)
    how = cache_moves(tuple(owner.tolist()), cp)
    filled = sum(step.send.shape[1] * len(step.pairs) for step in how.rounds)
    assert changed <= filled <= changed + cp * how.slots - length
    # A place is two int32 of which segments, all 0 but for pads, need not travel.
    assert filled * heads * 2 * (4 + 3) <= sent <= filled * (heads * 2 * (4 + 3) + 8)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(compiled.output_shardings))


def test_explicit_meshes_and_the_one_that_is_set():
    p = problem(3, "needle", tokens(1, 2, start=10), tokens(1, 12), RULES[0])
    half = [x.astype(np.float16) for x in p[:3]]
    want = context_parallel_decode(*half, *p[3:5], partition=Interleaved(2), mesh=cp_mesh(2), scale=SCALE)
    explicit = jax.make_mesh((2,), ("cp",), devices=jax.devices()[:2])
    assert explicit.axis_types == (AxisType.Explicit,)
    given_, set_ = [], []
    given_ += context_parallel_decode(*half, *p[3:5], partition=Interleaved(2), mesh=explicit, scale=SCALE)
    with jax.set_mesh(explicit):
        set_ += context_parallel_decode(*half, *p[3:5], partition=Interleaved(2), scale=SCALE)
    for found in (given_, set_):
        assert same([np.asarray(x) for x in found], [np.asarray(x) for x in want])


@examples(0.2)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(2, 2), (1, 3), (3, 1)]))
def test_over_two_axes_the_outer_one_comes_first(seed, shape):
    """MindIE's cp and sp: rank cp_rank · sp + sp_rank."""
    p = problem(seed, "needle", tokens(1, 2, start=10), tokens(1, 12), RULES[0])
    ranks = int(np.prod(shape))
    devices = jax.devices()[:ranks]
    both = jax.make_mesh(shape, ("cp", "sp"), devices=devices, axis_types=(AxisType.Auto,) * 2)
    p = p._replace(**{name: getattr(p, name).astype(np.float16) for name in ("query", "key", "value")})
    key, value, kv_tokens = in_caches(p, np.random.default_rng(seed).integers(0, ranks, 12), ranks, 12)
    one, two = (
        context_parallel_decode(
            p.query, key, value, p.q_tokens, kv_tokens, in_partition_order=True, mesh=mesh, axis_name=axes, scale=SCALE
        )
        for mesh, axes in ((cp_mesh(ranks), "cp"), (both, ("cp", "sp")))
    )
    assert same(two, [np.asarray(x) for x in one])


@functools.cache
def on_every_rank(cp, name):
    """Queries to all, keys cut into cp parts; what each rank has in the end, `[cp, …]`."""

    def device(*arrays):
        result = decode_attention(*arrays, attention(RULES[0], name), axis_name="cp")
        return jax.tree.map(lambda x: x[None], result)

    cut = P(None, "cp")
    specs = (P(), cut, cut, P(), cut)
    return jax.jit(jax.shard_map(device, mesh=cp_mesh(cp), in_specs=specs, out_specs=P("cp")))


@pytest.mark.parametrize("name", sorted(twin.PROFILES))
@examples(0.25)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1))
def test_every_rank_has_the_bits_of_the_twin(name, cp, seed):
    """Two keys a rank: every sum has one rounding. Merged in the order of the ranks; lse rounded before the merge.

    Four queries: of three, XLA compiles each one's merge by itself, and fuses a·b + c otherwise in one than in another.
    """
    rng, stages, length = np.random.default_rng(seed), twin.PROFILES[name], 2 * cp
    query, key = exact(rng, 4, 4) / 4, exact(rng, length, 4)
    value = twin.to(rng.normal(size=(length, 3)) + 1, "float16")
    # Queries are somewhere, so that some see nothing of a rank; each sees the first key.
    position = rng.integers(0, length, 4).astype(np.int32)
    new, cached = Tokens(position[None], np.zeros((1, 4), np.int32)), tokens(1, length)
    found = on_every_rank(cp, name)(query[None, :, None], key[None, :, None], value[None, :, None], new, cached)
    seen = position[:, None] >= np.arange(length)

    def expected(variant):
        result = None
        for part in (slice(2 * rank, 2 * rank + 2) for rank in range(cp)):
            block = twin.attend(query, key[part], value[part], seen[:, part], SCALE, None, stages, 512, variant)
            result = block if result is None else twin.merge(result, block, stages, variant)
        return twin.to(result[0], stages.out), result[1]

    for rank in range(cp):
        mine = [np.asarray(found.out)[rank, 0, :, 0], np.asarray(found.lse)[rank, 0, :, 0]]
        assert same(mine, [np.asarray(found.out)[0, 0, :, 0], np.asarray(found.lse)[0, 0, :, 0]])
        assert twin.one_of(mine, expected)


def test_lse_really_travels_in_fp16():
    """Else the test above would pass without: beside lse 1,000 half a unit is lost, and with it the weights."""
    query, value = np.full((1, 1, 1, 1), 1.0, np.float32), np.array([1.0, 3.0], np.float32).reshape(1, 2, 1, 1)
    key = np.array([2000.0, 2000.5], np.float32).reshape(1, 2, 1, 1)  # scores 1000 and 1000.25; 1000.25 is no FP16
    arrays = (query, key, value, tokens(1, 1, start=1), tokens(1, 2))
    out = {name: float(on_every_rank(2, name)(*arrays).out[0].item()) for name in ("flash_fp16", "decode_fp16_lse")}
    assert out["decode_fp16_lse"] == 2.0  # both weights the same
    assert out["flash_fp16"] == pytest.approx(1 + 2 / (1 + np.exp(-0.25)), abs=1e-3)


def test_the_compiled_program_gathers_once_an_array_and_in_fp16():
    shape = lambda *s, dtype=np.float16: jax.ShapeDtypeStruct(s, dtype)  # noqa: E731
    places = [Tokens(shape(1, n, dtype=np.int32), shape(1, n, dtype=np.int32)) for n in (3, 8)]
    arrays = (shape(1, 3, 2, 4), shape(1, 8, 2, 4), shape(1, 8, 2, 3), *places)
    text = on_every_rank(2, "decode_fp16_lse").lower(*arrays).as_text()
    gathers = [line for line in text.splitlines() if "all_gather" in line]
    assert len(gathers) == 2
    assert all("f16>" in line for line in gathers)


@given(st.integers(1, 300), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_moves_bring_every_key_to_its_owner(length, cp, seed):
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, rng.integers(1, cp + 1), length)
    how = cache_moves(tuple(owner.tolist()), cp)
    text = np.append(np.arange(length), np.full(how.run * cp - length, -1)).reshape(cp, how.run)
    before = np.pad(text, ((0, 0), (0, how.slots - how.run)), constant_values=-1)
    after = np.full_like(before, -2) if how.rounds else before
    for step in how.rounds:
        for source, to in enumerate(step.destination):
            after[to, step.receive[to]] = before[source, step.send[source]]
    for rank, mine in enumerate(after):
        count = np.count_nonzero(mine >= 0)
        np.testing.assert_array_equal(mine[:count], np.flatnonzero(owner == rank))
        assert (mine[count:] == -1).all()


X = np.zeros((1, 4, 2, 4), np.float16)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"owner has shape \(3,\); it must be \(4,\)", {"owner": np.zeros(3, int)}),
        ("owner is of dtype float64; ranks are integers", {"owner": np.zeros(4)}),
        ("4 slots are no multiple of 3 caches", {"owner": None, "in_partition_order": True, "mesh": cp_mesh(3)}),
        ("owners are from 0 to 2; they must be ranks, 0 to 1", {"owner": np.array([0, 1, 2, 0])}),
        ("owners are from -1 to 1", {"owner": np.array([0, 1, -1, 0])}),
        (r"the mesh has axes \('cp',\), none is 'sp'", {"axis_name": ("cp", "sp")}),
        ("unknown precision 'fp8'", {"precision": "fp8"}),
        ("precision float64 needs float64 in JAX", {"precision": "float64"}),
        ("scale is nan", {"scale": float("nan")}),
    ],
)
def test_misuse_is_refused_before_tracing(message, options, monkeypatch):
    monkeypatch.setattr("cpjax.decode._run", None)
    place = tokens(1, 4)
    options = {"owner": np.zeros(4, int), "mesh": cp_mesh(2), **options}
    with pytest.raises(InputError, match=message):
        context_parallel_decode(X, X, X, place, place, **options)


@examples(0.2)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3]), st.sampled_from(["blocks", "interleaved", "pages"]))
def test_requests_over_caches_cut_by_a_partition_are_dense(seed, cp, kind):
    """Two requests in a row; the partition says whose cache holds which key."""
    lengths = (7, 5)
    pages = tuple(tuple(int(r) for r in np.random.default_rng(seed).integers(0, cp, 4)) for _ in lengths)
    made = {"blocks": Blocks(cp, block=2), "interleaved": Interleaved(cp), "pages": Pages(cp, page=2, ranks=pages)}
    segment = np.repeat(np.arange(2, dtype=np.int32), lengths)[None]
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    new = Tokens(np.array([[5, 6, 4]], np.int32), np.array([[0, 0, 1]], np.int32))
    p = problem(seed, "needle", new, Tokens(position, segment), RULES[0])._replace(sink=np.full(4, -np.inf))
    with jax.enable_x64(True):
        found = context_parallel_decode(
            *p.arrays, partition=made[kind], mesh=cp_mesh(cp), mask=p.rule.mask, scale=SCALE, precision="float64"
        )
        assert_dense(found, p)


def test_either_a_partition_or_owners():
    x, new, cached = np.ones((1, 4, 1, 1), np.float16), tokens(1, 1, start=3), tokens(1, 4)
    twice = {"partition": Blocks(2), "owner": np.zeros(4, int)}
    for given_twice_or_not in ({}, twice, {"partition": Blocks(2), "in_partition_order": True}):
        with pytest.raises(InputError, match="give one of partition, owner"):
            context_parallel_decode(x[:, :1], x, x, new, cached, mesh=cp_mesh(2), **given_twice_or_not)
    with pytest.raises(InputError, match="over 3 ranks, the mesh over 2"):
        context_parallel_decode(x[:, :1], x, x, new, cached, mesh=cp_mesh(2), partition=Interleaved(3))
