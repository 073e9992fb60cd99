"""Decode with global arrays: queries go to every rank, each key to the rank whose cache holds it."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from cpjax.attention import Attention
from cpjax.checks import check_axes, check_precision, current_mesh, ranks
from cpjax.errors import InputError
from cpjax.exchange.blocks import delivered
from cpjax.exchange.decode import decode_attention
from cpjax.inputs import check_inputs
from cpjax.mask import PAD, Mask, Tokens
from cpjax.partial import Partial
from cpjax.partition.cached import Cached
from cpjax.precision import Precision, precision_of


def context_parallel_decode(
    query: Array | np.ndarray,
    key: Array | np.ndarray,
    value: Array | np.ndarray,
    q_tokens: Tokens,
    kv_tokens: Tokens,
    *,
    partition: Cached | None = None,
    owner: Int[np.ndarray, " S"] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | tuple[str, ...] = "cp",
    mask: Mask | None = None,
    scale: float | None = None,
    precision: Precision | str | None = None,
) -> Partial:
    """Attention of new tokens over a cache that the devices of `mesh` share by tokens.

    Args:
      query, key, value: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`, of one float dtype, N a multiple of K; the new
        tokens' own keys and values are among the S.
      q_tokens, kv_tokens: their places; several requests are segments of a row.
      partition: whose cache holds which key: `Blocks` (MindIE), `Interleaved` (vLLM) or `Pages` of `cpjax.partition`;
        one row of requests 0, 1, … without pads.
      owner: instead of a partition, the rank whose cache holds each of the S keys.
      mesh: a mesh with axes of type Auto; None: the one that is set.
      axis_name: the axis, or axes (outermost first), over which the cache is cut.
      mask: None is causal: a query sees the cache up to its own position.
      scale: None is 1/√H.
      precision: a profile or its name; None follows from the dtype of the arrays: float16 decode_fp16_lse, bfloat16
        flash_bf16, float32 and float64 what they say. float64 needs `jax_enable_x64`.

    Returns:
      `out` `[B, T, N, V]` in the profile's out dtype, `lse` `[B, T, N]` in its compute dtype; rank 0's, which are every
      rank's.

    Raises:
      InputError: arrays that do not fit together, an axis that the mesh has not, owners that are no ranks, both
        partition and owner or none of them.

    >>> from cpjax.mask import tokens
    >>> from cpjax.parallel import cp_mesh
    >>> x, new = jnp.arange(4, dtype=jnp.float16).reshape(1, 4, 1, 1), tokens(1, 1, start=3)
    >>> owner = np.array([0, 0, 0, 1])
    >>> context_parallel_decode(0 * x[:, 3:], x, x, new, tokens(1, 4), owner=owner, mesh=cp_mesh(2)).out.item()
    1.5
    """
    check_inputs(query, key, value, q_tokens, kv_tokens)
    mesh = current_mesh(mesh)
    if precision is None and query.dtype == "float16":
        precision = "decode_fp16_lse"
    precision = precision_of(precision, query.dtype)
    check_axes(mesh, (axis_name,) if isinstance(axis_name, str) else axis_name)
    check_precision(precision)
    cp = ranks(mesh, axis_name)
    slots = cache_slots(_owners(partition, owner, q_tokens, kv_tokens, cp), key.shape[1], cp)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    attention = Attention(Mask() if mask is None else mask, scale, precision)
    how = _How(mesh, axis_name, attention)
    return _run(how, slots, *jax.tree.map(jnp.asarray, (query, key, value, q_tokens, kv_tokens)))


def _owners(partition: Cached | None, owner: Any, q_tokens: Tokens, kv_tokens: Tokens, cp: int) -> np.ndarray:
    if (partition is None) == (owner is None):
        raise InputError("give either a partition or the owner of each key: one of them says where keys are")
    if partition is None:
        return np.asarray(owner)
    if partition.cp != cp:
        raise InputError(f"the partition is over {partition.cp} ranks, the mesh over {cp}; make them equal")
    segments = np.asarray(q_tokens.segment), np.asarray(kv_tokens.segment)
    partition.check(*segments)
    return partition.kv_chunks(segments[0][0], segments[1][0]) % cp


def cache_slots(owner: Int[np.ndarray, " S"], length: int, cp: int) -> Int[np.ndarray, " slots"]:
    """Which key lies in each slot of the caches, rank after rank, as many slots a rank; −1 in a slot that is empty.

    >>> cache_slots(np.array([0, 1, 0, 0]), 4, cp=2)
    array([ 0,  2,  3,  1, -1, -1], dtype=int32)

    Raises:
      InputError: not one owner a key, or one that is no rank.
    """
    if owner.shape != (length,):
        raise InputError(f"owner has shape {owner.shape}; it must be ({length},), one rank for each key")
    if length and not (owner.min() >= 0 and owner.max() < cp):
        raise InputError(f"owners are from {owner.min()} to {owner.max()}; they must be ranks, 0 to {cp - 1}")
    held = [np.flatnonzero(owner == rank) for rank in range(cp)]
    most = max(map(len, held))
    return np.concatenate([np.append(x, np.full(most - len(x), -1)) for x in held]).astype(np.int32)


class _How(NamedTuple):
    mesh: Mesh | AbstractMesh
    axis_name: str | tuple[str, ...]
    attention: Attention


@partial(jax.jit, static_argnums=0)
def _run(how: _How, slots, query, key, value, q_tokens, kv_tokens):
    key, value, kv_tokens = jax.tree.map(lambda x: x[:, slots], (key, value, kv_tokens))
    kv_tokens = kv_tokens._replace(segment=jnp.where(slots[None] < 0, PAD, kv_tokens.segment))

    def device(query, key, value, q_tokens, kv_tokens):
        result = decode_attention(query, key, value, q_tokens, kv_tokens, how.attention, axis_name=how.axis_name)
        result = delivered(result, how.attention.precision)
        return jax.tree.map(lambda x: x[None], result)  # a rank's result is its own until somebody joins them

    cut = P(None, how.axis_name)
    specs = (P(), cut, cut, P(), cut)
    on_mesh = jax.shard_map(device, mesh=how.mesh, in_specs=specs, out_specs=P(how.axis_name))
    return jax.tree.map(lambda x: x[0], on_mesh(query, key, value, q_tokens, kv_tokens))
