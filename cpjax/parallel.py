"""Global arrays in, global arrays out: split over a mesh, run an exchange on every device, join.

q[B, T, N, H]  ─partition─▶  q[B, T_cp, N, H]  ──shard_map──▶  out[B, T_cp, N, V]  ──inverse──▶  out[B, T, N, V]
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from cpjax.attention import Attention
from cpjax.checks import check_axes, check_mesh, check_packed, check_precision, check_sink, ranks
from cpjax.errors import InputError
from cpjax.exchange.device import attention_on_device
from cpjax.inputs import check_inputs
from cpjax.mask import Mask, Tokens
from cpjax.partial import Partial
from cpjax.partition.names import sequence_of
from cpjax.partition.packing import packed_order
from cpjax.partition.partition import Partition, inverse
from cpjax.partition.sequence import SequencePartition
from cpjax.precision import Precision, profile


def context_parallel_attention(
    query: Array | np.ndarray,
    key: Array | np.ndarray,
    value: Array | np.ndarray,
    q_tokens: Tokens | None = None,
    kv_tokens: Tokens | None = None,
    *,
    mesh: Mesh,
    axis_name: str | tuple[str, str] = "cp",
    head_axis: str | None = None,
    batch_axis: str | None = None,
    partition: str | Partition = "zigzag",
    lengths: tuple[int, ...] | None = None,
    exchange: str = "ring",
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Array | np.ndarray | None = None,
    precision: Precision | str = "flash_fp16",
) -> Partial:
    """Attention of a whole sequence, computed together by the devices of `mesh`.

    Args:
      query, key, value: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`, of one float dtype, N a multiple of K, in
        natural (global) token order. T and S must be multiples of 2·cp for zigzag, of cp
        otherwise; fill up with pads (segment −1, see `cpjax.mask.tokens`).
      q_tokens, kv_tokens: places of the tokens; None: one request, positions 0, 1, 2, … (queries and keys then have
        equal lengths).
      mesh: a mesh with axis `axis_name` of type Auto; see `cp_mesh`.
      axis_name: the axis over which tokens are sharded; (ring, all-to-all) for exchange "all_to_all_ring".
      head_axis, batch_axis: further axes of the mesh over which heads and batch are sharded ("tp", "dp").
      partition: who holds which tokens, a name or value of `cpjax.partition.SEQUENCES`; it changes no result but in
        the last bits.
      lengths: a packed batch: real lengths of the requests, each padded on its own to a multiple of 2·cp
        (`cpjax.partition.packing.pack`) and laid out on its own. Places of the tokens follow from them.
      exchange: how keys meet queries, a name of `cpjax.exchange.device.EXCHANGES`.
      mask: None is causal.
      scale: None is 1/√H.
      softcap: logits become softcap · tanh(logit / softcap).
      sink: per query head, the logit of one more key with value 0 that every query sees, pads included.
      precision: a profile or its name. float64 needs `jax_enable_x64`.

    Returns:
      `out` `[B, T, N, V]` and `lse` `[B, T, N]` in natural order, stored in the profile's compute dtype (`out` holds
      values of the profile's out format).

    Raises:
      InputError: whatever does not fit, named with the rule and the fix, before anything is traced.

    >>> x = jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> result = context_parallel_attention(0 * x, x, x, mesh=cp_mesh(2))
    >>> result.out.ravel()  # all logits are 0: the mean of the values so far
    Array([0. , 0.5, 1. , 1.5], dtype=float32)
    """
    precision = profile(precision) if isinstance(precision, str) else precision
    if lengths is not None:
        q_tokens = kv_tokens = check_packed(query, key, mesh, axis_name, lengths, q_tokens, kv_tokens)
    q_tokens, kv_tokens = check_inputs(query, key, value, q_tokens, kv_tokens)
    check_axes(mesh, (axis_name,) if isinstance(axis_name, str) else axis_name)
    one = sequence_of(partition, ranks(mesh, axis_name))
    check_mesh(query, key, mesh, axis_name, head_axis, batch_axis, one, exchange)
    check_precision(precision)
    check_sink(sink, query.shape[2])
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    attention = Attention(Mask() if mask is None else mask, scale, precision, softcap)
    how = _How(mesh, axis_name, head_axis, batch_axis, one, lengths, exchange, attention)
    return _run(how, *jax.tree.map(jnp.asarray, (query, key, value, q_tokens, kv_tokens, sink)))


def cp_mesh(cp: int) -> Mesh:
    """A mesh with the one axis "cp" over the first `cp` devices.

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
    return jax.make_mesh((cp,), ("cp",), devices=devices[:cp], axis_types=(AxisType.Auto,))


class _How(NamedTuple):
    mesh: Mesh
    axis_name: str | tuple[str, str]
    head_axis: str | None
    batch_axis: str | None
    partition: SequencePartition
    lengths: tuple[int, ...] | None
    exchange: str
    attention: Attention


@partial(jax.jit, static_argnums=0)
def _run(how: _How, query, key, value, q_tokens, kv_tokens, sink):
    if how.lengths is None:
        q_order, kv_order = how.partition.order(query.shape[1]), how.partition.order(key.shape[1])
    else:
        q_order = kv_order = packed_order(how.partition, how.lengths, how.partition.cp)
    query, q_tokens = jax.tree.map(lambda x: x[:, q_order], (query, q_tokens))
    key, value, kv_tokens = jax.tree.map(lambda x: x[:, kv_order], (key, value, kv_tokens))

    def device(query, key, value, q_tokens, kv_tokens, sink):
        return attention_on_device(
            query,
            key,
            value,
            q_tokens,
            kv_tokens,
            how.attention,
            axis_name=how.axis_name,
            exchange=how.exchange,
            chunks=how.partition.chunks_per_rank,
            sink=sink,
        )

    place, array = P(how.batch_axis, how.axis_name), P(how.batch_axis, how.axis_name, how.head_axis)
    specs = (array, array, array, place, place, P(how.head_axis))
    on_mesh = jax.shard_map(device, mesh=how.mesh, in_specs=specs, out_specs=array)
    return jax.tree.map(lambda x: x[:, inverse(q_order)], on_mesh(query, key, value, q_tokens, kv_tokens, sink))
