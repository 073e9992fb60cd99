"""What is sharded over the sequence stays sharded: read from the compiled program, forwards and backwards.

Bytes are counted. A token that changes its rank is sent once; the exchange sends what its docstring says; nothing else
goes over the wire, and in particular nobody gathers what it is not to hold.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from programs import equal_bits
from test_parallel import mesh_of

from cpjax.exchange.device import EXCHANGES
from cpjax.mask import tokens
from cpjax.parallel import context_parallel_attention, cp_mesh
from cpjax.partition import Contiguous, Striped, Zigzag
from cpjax.partition.packing import packed_order

B, T, N, K, H, V, CP = 1, 32, 4, 4, 4, 3, 4
SHAPES = (B, T, N, H), (B, T, K, H), (B, T, K, V)
NAMED = {
    "gather": {"all-gather"},
    "all_to_all": {"all-gather", "all-to-all"},
    "all_to_all_ring": {"all-gather", "all-to-all"},
}
"""What exchanges name besides `ppermute`. The all-gathers of all-to-all are of places: 4 bytes a token."""


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""The program is read, not run; its collectives are settled before LLVM sees it."""


def changed(order) -> int:
    """Tokens that change their rank between runs of the text and shards."""
    return int((order // (T // CP) != np.arange(T) // (T // CP)).sum())


@functools.cache
def compiled(exchange, partition, lengths=None, in_order=False, backwards=False):
    two = exchange == "all_to_all_ring"
    mesh = mesh_of(outer=2, inner=2) if two else cp_mesh(CP)
    axis_name = ("outer", "inner") if two else "cp"
    how = {"axis_name": axis_name, "exchange": exchange, "partition": partition, "lengths": lengths}
    attention = functools.partial(context_parallel_attention, mesh=mesh, in_partition_order=in_order, **how)

    def derivatives(q, k, v, dout, dlse):
        return jax.vjp(attention, q, k, v)[1](type(attention_shape)(dout, dlse))

    placed = jax.NamedSharding(mesh, jax.P(None, axis_name))
    shaped = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)  # noqa: E731
    inputs = [shaped(shape) for shape in SHAPES]
    attention_shape = jax.eval_shape(attention, *inputs)
    if backwards:
        return jax.jit(derivatives).lower(*inputs, shaped((B, T, N, V)), shaped((B, T, N))).compile(QUICK), placed
    return jax.jit(attention).lower(*inputs).compile(QUICK), placed


def stays_sharded(program, placed):
    for x, there in zip(jax.tree.leaves(program.output_shardings), jax.tree.leaves(program.out_info), strict=True):
        assert x.is_equivalent_to(placed, len(there.shape))


TOKEN = {"query": 4 * N * H, "kv": 4 * K * (H + V), "out": 4 * N * (V + 1), "place": 8}
SHARD = T // CP * (TOKEN["kv"] + TOKEN["place"])
"""Bytes of keys, values and places that one rank holds."""
VISITOR, RESULT = T // CP * (TOKEN["query"] + TOKEN["place"]), T // CP * TOKEN["out"]

RING = {
    "ring": CP * (CP - 1) * SHARD,
    "ring_both_ways": CP * (CP - 1) * SHARD,
    "gather": 0,
    "pass_query": CP * ((CP - 1) * VISITOR + CP * RESULT),
    "all_to_all": 0,
    "all_to_all_ring": CP * SHARD,  # two nodes of two: one transfer, of two ranks' tokens of half the heads each
}
"""Bytes that all ranks together send by `ppermute`."""


ORDERS = {
    "contiguous": Contiguous(CP).order(T),
    "striped": Striped(CP).order(T),
    "packed": packed_order("zigzag", (13, 10), CP),
}


def moving(order) -> int:
    """Query, key and value go, the result comes back; no places, for these are made where they are needed."""
    return B * changed(order) * (TOKEN["query"] + TOKEN["kv"] + TOKEN["out"])


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_forwards_every_byte_is_named(exchange):
    program, placed = compiled(exchange, "zigzag")
    stays_sharded(program, placed)
    found = collectives(program)
    assert {x.kind for x in found} <= {"collective-permute"} | NAMED.get(exchange, set())
    two = exchange == "all_to_all_ring"
    sent = moving(Zigzag(CP).order(T)) + RING[exchange] + two * CP * T // CP * TOKEN["place"]
    assert sum(x.sent for x in found) == sent
    # XLA does not gather segments, which are all 0: 4 bytes a token are positions.
    places = {"gather": T, "all_to_all": T, "all_to_all_ring": T // 2}.get(exchange, 0) * 4
    gathered = sum(x.size for x in found if x.kind == "all-gather")
    assert gathered == places + (T * TOKEN["kv"] if exchange == "gather" else 0)
    dealt = sum(x.size for x in found if x.kind == "all-to-all")
    one_rank = T // CP * (TOKEN["query"] + TOKEN["kv"] + TOKEN["out"])
    assert dealt == (one_rank if "all-to-all" in NAMED.get(exchange, ()) else 0)


@pytest.mark.parametrize("partition", ["contiguous", "striped", "packed"])
def test_forwards_in_every_partition(partition):
    lengths = (13, 10) if partition == "packed" else None
    program, placed = compiled("ring", "zigzag" if lengths else partition, lengths)
    stays_sharded(program, placed)
    assert {x.kind for x in collectives(program)} == {"collective-permute"}
    assert sum(x.sent for x in collectives(program)) == moving(ORDERS[partition]) + RING["ring"]


AGAIN = {"ring": CP * SHARD, "ring_both_ways": CP * SHARD, "pass_query": CP * T // CP * TOKEN["place"]}
"""Bytes of the first transfer that both passes make alike: XLA makes it once."""


def both_passes(exchange, order) -> int:
    """Bytes of the forward pass, whose result nobody asks for here, and of one more ring, whose dk and dv come home."""
    inputs = moving(order) - B * changed(order) * TOKEN["out"]
    two = (exchange == "all_to_all_ring") * CP * T // CP * TOKEN["place"]
    home = CP * CP * T // CP * TOKEN["kv"]
    return inputs + RING[exchange] + two + moving(order) + RING["ring"] + home - AGAIN.get(exchange, 0)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_backwards_every_byte_is_named(exchange):
    """The derivatives are one more ring, whatever the exchange: shards, and dk and dv, which come home."""
    program, placed = compiled(exchange, "zigzag", backwards=True)
    stays_sharded(program, placed)
    found = collectives(program)
    assert {x.kind for x in found} <= {"collective-permute"} | NAMED.get(exchange, set())
    assert sum(x.sent for x in found) == both_passes(exchange, Zigzag(CP).order(T))


@pytest.mark.parametrize("partition", ["packed", "contiguous", "striped"])
def test_backwards_in_every_partition(partition):
    packed = partition == "packed"
    program, placed = compiled("ring", "zigzag" if packed else partition, (13, 10) if packed else None, backwards=True)
    stays_sharded(program, placed)
    assert {x.kind for x in collectives(program)} == {"collective-permute"}
    assert sum(x.sent for x in collectives(program)) == both_passes("ring", ORDERS[partition])


def test_shards_of_the_partition_are_not_moved():
    program, placed = compiled("ring", "zigzag", in_order=True)
    stays_sharded(program, placed)
    assert sum(x.sent for x in collectives(program)) == RING["ring"]


@pytest.mark.parametrize("name", ["zigzag", "striped", "packed"])
def test_partition_order_is_natural_order_permuted(name):
    """But for what XLA fuses another way; with the places made or given."""
    rng = np.random.default_rng(0)
    x = [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]
    lengths = (13, 10) if name == "packed" else None
    partition = Striped(CP) if name == "striped" else Zigzag(CP)
    order = packed_order(partition, lengths, CP) if lengths else partition.order(T)
    whole = context_parallel_attention(*x, mesh=cp_mesh(CP), partition=partition, lengths=lengths)
    here = functools.partial(context_parallel_attention, mesh=cp_mesh(CP), partition=partition, in_partition_order=True)
    shards = [a[:, order] for a in x]
    found = here(*shards, lengths=lengths)
    for a, b in zip(found, whole, strict=True):
        np.testing.assert_allclose(a, np.asarray(b)[:, order], rtol=0, atol=1e-6)
    if not lengths:
        place = jax.tree.map(lambda a: a[:, order], tokens(B, T))
        equal_bits(here(*shards, place, place), found)
