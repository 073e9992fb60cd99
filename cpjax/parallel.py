"""Global arrays in, global arrays out: on every device move tokens, run an exchange, move the result back.

q[B, T, N, H]  ─shard_map─▶  run of T/cp tokens  ─moves─▶  shard of the partition  ─exchange─▶  out  ─moves─▶  run

What is sharded over the sequence stays so, forwards and backwards: `cpjax.partition.moves` sends the tokens whose rank
changes and no others, and the exchange sends what it says.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from cpjax.attention import Attention, Computation
from cpjax.blocks.chosen import DEFAULT, block_of
from cpjax.checks import (
    check_axes,
    check_kernel,
    check_mesh,
    check_order,
    check_packed,
    check_precision,
    check_scale,
    check_sink,
    checked_lengths,
    current_mesh,
    manual_axes,
    ranks,
)
from cpjax.errors import InputError
from cpjax.exchange.blocks import delivered
from cpjax.exchange.device import attention_on_device, check_block
from cpjax.exchange.moving import moved, places
from cpjax.inputs import check_inputs
from cpjax.mapping import mapped
from cpjax.mask import Mask, Tokens, tokens
from cpjax.mesh import ring_order
from cpjax.partial import Partial
from cpjax.partition.moves import moves
from cpjax.partition.names import sequence_of
from cpjax.partition.packing import packed_order, packed_tokens
from cpjax.partition.partition import Partition
from cpjax.partition.sequence import SequencePartition
from cpjax.precision import Precision, scale_in


def context_parallel_attention(
    query: Array | np.ndarray,
    key: Array | np.ndarray,
    value: Array | np.ndarray,
    q_tokens: Tokens | None = None,
    kv_tokens: Tokens | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | tuple[str, ...] = "cp",
    head_axis: str | None = None,
    batch_axis: str | None = None,
    partition: str | Partition | None = None,
    in_partition_order: bool = False,
    lengths: Sequence[int] | Any = None,
    exchange: str = "ring",
    attend: str = DEFAULT,
    mask: Mask | None = None,
    scale: Any = None,
    softcap: float | None = None,
    sink: Array | np.ndarray | None = None,
    precision: Precision | str | None = None,
    computation: Computation | None = None,
) -> Partial:
    """Attention of a whole sequence, computed together by the devices of `mesh`.

    Arrays that are sharded over `axis_name` along their tokens stay so, and so do the results and all derivatives; no
    device ever holds a whole one. Inside a `jax.shard_map` of the caller's over `axis_name`, arrays and results are
    this device's.

    Args:
      query, key, value: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`, of one float dtype, N a multiple of K, in
        natural (global) token order. T and S must be multiples of 2·cp for zigzag, of cp
        otherwise; fill up with pads (segment −1, see `cpjax.mask.tokens`).
      q_tokens, kv_tokens: places of the tokens; None: one request, positions 0, 1, 2, … (queries and keys then have
        equal lengths).
      mesh: a mesh with axis `axis_name`, Auto or Explicit; see `cp_mesh`. None: that of `jax.set_mesh`, or of the
        `jax.shard_map` around.
      axis_name: the axis over which tokens are sharded; (ring, all-to-all) for exchange "all_to_all_ring".
      head_axis, batch_axis: further axes of the mesh over which heads and batch are sharded ("tp", "dp").
      partition: who holds which tokens, a name or value of `cpjax.partition.SEQUENCES`, None is zigzag; it changes no
        result but in the last bits.
      in_partition_order: arrays, places and results are the ranks' shards one after the other (`order` of the
        partition, `packed_order` for lengths), instead of natural order: nothing has to be moved.
      lengths: a packed batch: real lengths of the requests, each padded on its own to a multiple of 2·cp
        (`cpjax.partition.packing.pack`) and laid out on its own. Places of the tokens follow from them.
      exchange: how keys meet queries, a name of `cpjax.exchange.device.EXCHANGES`.
      attend: computes one block of queries and keys. "tiles" is the readable one, which defines what is right.
        "splash" is JAX's kernel for TPUs (on a CPU interpreted, for tests), "cudnn" cuDNN's for GPUs of NVIDIA. These
        two take zigzag or contiguous texts without places or lengths, runs of a multiple of 128 tokens (splash), a
        causal or full mask, no softcap; the derivative is that of the readable block (docs/jax.md).
      mask: None is causal.
      scale: None is 1/√H. It is an operand: another number compiles nothing, and a traced one has a derivative.
      softcap: logits become softcap · tanh(logit / softcap).
      sink: per query head, the logit of one more key with value 0 that every query sees, pads included.
      precision: a profile or its name; None follows from the dtype of the arrays: float16 flash_fp16, bfloat16
        flash_bf16, float32 and float64 what they say; with "splash" and "cudnn" scaled_query_fp16 and
        scaled_query_bf16, for these are handed scale · q. float64 needs `jax_enable_x64`.
      computation: mask, scale, softcap, sink, precision, partition and order in one value, which `judge` takes too;
        what it says must not be said by a keyword.

    Returns:
      `out` `[B, T, N, V]` in the profile's out dtype, `lse` `[B, T, N]` in its compute dtype (float32, or float64), in
      the order of `query`.

    Raises:
      InputError: whatever does not fit, named with the rule and the fix, before anything is traced.

    >>> x = jnp.arange(4, dtype=jnp.float16).reshape(1, 4, 1, 1)
    >>> result = context_parallel_attention(0 * x, x, x, mesh=cp_mesh(2))
    >>> result.out.ravel()  # all logits are 0: the mean of the values so far
    Array([0. , 0.5, 1. , 1.5], dtype=float16)
    """
    words = {"mask": mask, "scale": scale, "softcap": softcap, "sink": sink}
    words |= {"precision": precision, "partition": partition}
    if computation is not None:
        computation.only(*words, "order")
        words = computation.with_words(**words)
        check_order(computation.order, exchange)
    mesh = current_mesh(mesh)
    axis_name = axis_name if isinstance(axis_name, str) else tuple(axis_name)
    check_axes(mesh, cp_axes := (axis_name,) if isinstance(axis_name, str) else axis_name)
    manual = manual_axes(cp_axes)
    cp = ranks(mesh, axis_name)
    parts = cp if manual else 1
    if lengths is not None:
        lengths = checked_lengths(lengths)
        check_packed(query, key, cp, parts, lengths, q_tokens, kv_tokens)
    check_inputs(query, key, value, q_tokens, kv_tokens)
    one = sequence_of(words["partition"] or "zigzag", cp)
    check_mesh(query, key, mesh, axis_name, head_axis, batch_axis, one, exchange, manual)
    precision = block_of(attend).precision(words["precision"], query.dtype)
    check_precision(precision)
    check_sink(words["sink"], query.shape[2])
    scale = check_scale(query.shape[-1] ** -0.5 if words["scale"] is None else words["scale"])
    if isinstance(scale, float):
        scale = np.asarray(scale_in(precision, scale), precision.compute)
    attention = Attention(mask=words["mask"] or Mask(), scale=1.0, precision=precision, softcap=words["softcap"])
    if block_of(attend).is_kernel:
        check_kernel(attend, mesh, one, lengths, q_tokens, kv_tokens)
        check_block(attend, query, key, value, attention, exchange, one.chunks_per_rank, 1 if manual else cp)
    how = _How(
        None if manual else mesh,
        axis_name,
        head_axis,
        batch_axis,
        one,
        in_partition_order,
        lengths,
        exchange,
        attend,
        attention,
        (query.shape[1] * parts, key.shape[1] * parts),
    )
    operands = (query, key, value, q_tokens, kv_tokens, words["sink"], scale)
    return _run(how, *jax.tree.map(jnp.asarray, operands))


def simulate_devices(count: int) -> None:
    """Have at least so many CPU devices, if JAX has not begun; else nothing happens, and a mesh says what is missing.

    >>> simulate_devices(2)
    """
    with suppress(RuntimeError):  # JAX has begun: the number is fixed
        there = jax.config.values["jax_num_cpu_devices"]  # −1 where it was not said
        jax.config.update("jax_num_cpu_devices", max(there, count))


def cp_mesh(cp: int) -> Mesh:
    """A mesh with the one axis "cp" over the first `cp` devices, in the order of `cpjax.mesh.ring_order`.

    >>> cp_mesh(2).shape["cp"]
    2

    Raises:
      InputError: for cp below 1, and when JAX has fewer devices; on a CPU it says how to simulate more.
    """
    if cp < 1:
        raise InputError(f"cp is {cp}; it is a number of ranks, at least 1")
    devices = jax.devices()
    if len(devices) < cp:
        raise InputError(
            f"cp is {cp} but JAX sees {len(devices)} device(s); on a CPU call "
            f"jax.config.update('jax_num_cpu_devices', {cp}) before JAX is first used"
        )
    return Mesh(np.array(ring_order(devices[:cp])), ("cp",), axis_types=(AxisType.Auto,))


class _How(NamedTuple):
    """What is no operand. Another value is another program."""

    mesh: Mesh | AbstractMesh | None
    """None: the devices are those of a `shard_map` around, and arrays are this device's."""
    axis_name: str | tuple[str, ...]
    head_axis: str | None
    batch_axis: str | None
    partition: SequencePartition
    in_partition_order: bool
    lengths: tuple[int, ...] | None
    exchange: str
    attend: str
    attention: Attention
    """Its scale is an operand."""
    shape: tuple[int, int]
    """Queries and keys of the whole sequence."""


@partial(jax.jit, static_argnums=0)
def _run(how: _How, *operands):
    if how.mesh is None:
        return _on_device(how, *operands)
    place, array = P(how.batch_axis, how.axis_name), P(how.batch_axis, how.axis_name, how.head_axis)
    specs = (array, array, array, place, place, P(how.head_axis), P())
    # JAX's kernels do not say over which axes their results vary.
    checked = not block_of(how.attend).is_kernel
    return mapped(partial(_on_device, how), how.mesh, specs, array, check_vma=checked)(*operands)


def _on_device(how: _How, query, key, value, q_tokens, kv_tokens, sink, scale) -> Partial:
    cp, axis_name, batch = how.partition.cp, how.axis_name, query.shape[0]
    q_order, kv_order = (_order(how, length) for length in how.shape)
    q_moves, kv_moves = ((), ()) if how.in_partition_order else (moves(q_order, cp), moves(kv_order, cp))
    query, q_tokens = moved((query, q_tokens), q_moves, axis_name)
    key, value, kv_tokens = moved((key, value, kv_tokens), kv_moves, axis_name)
    q_tokens = places(_text(how, q_order), cp, batch, axis_name) if q_tokens is None else q_tokens
    kv_tokens = places(_text(how, kv_order), cp, batch, axis_name) if kv_tokens is None else kv_tokens
    result = attention_on_device(
        query,
        key,
        value,
        q_tokens,
        kv_tokens,
        replace(how.attention, scale=scale),
        axis_name=axis_name,
        exchange=how.exchange,
        chunks=how.partition.chunks_per_rank,
        sink=sink,
        attend=how.attend,
    )
    return moved(delivered(result, how.attention.precision), tuple(step.back() for step in q_moves), axis_name)


def _order(how: _How, length: int) -> np.ndarray:
    return (
        how.partition.order(length)
        if how.lengths is None
        else packed_order(how.partition, how.lengths, how.partition.cp)
    )


def _text(how: _How, order: np.ndarray) -> Tokens:
    """The places of the text's tokens, in this order."""
    whole = tokens(1, len(order)) if how.lengths is None else packed_tokens(how.lengths, how.partition.cp)
    return Tokens(*(np.asarray(x)[0][order] for x in whole))
