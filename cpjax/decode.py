"""Decode with global arrays: queries go to every rank, each key to the rank whose cache holds it.

key[B, S, K, H]  ─shard_map─▶  run of the text  ─moves─▶  cache of the rank  ─exchange─▶  out, the same on every rank

A server never moves its cache: new keys are written where they stay. `in_partition_order` says that keys lie there.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from cpjax.attention import Attention
from cpjax.checks import check_axes, check_precision, check_sink, current_mesh, ranks
from cpjax.errors import InputError
from cpjax.exchange.blocks import delivered
from cpjax.exchange.decode import decode_attention
from cpjax.exchange.moving import moved
from cpjax.inputs import check_inputs
from cpjax.mapping import mapped
from cpjax.mask import PAD, Mask, Tokens
from cpjax.partial import Partial
from cpjax.partition.cached import Cached
from cpjax.partition.moves import Round, moves
from cpjax.precision import Precision, precision_of


def context_parallel_decode(
    query: Array | np.ndarray,
    key: Array | np.ndarray,
    value: Array | np.ndarray,
    q_tokens: Tokens,
    kv_tokens: Tokens,
    *,
    partition: Cached | None = None,
    owner: np.ndarray | None = None,
    in_partition_order: bool = False,
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str | tuple[str, ...] = "cp",
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Array | np.ndarray | None = None,
    precision: Precision | str | None = None,
) -> Partial:
    """Attention of new tokens over a cache that the devices of `mesh` share by tokens.

    Args:
      query, key, value: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`, of one float dtype, N a multiple of K; the new
        tokens' own keys and values are among the S.
      q_tokens, kv_tokens: their places; several requests are segments of a row.
      partition: whose cache holds which key: `Blocks` (MindIE), `Interleaved` (vLLM) or `Pages` of `cpjax.partition`;
        one row of requests 0, 1, … without pads.
      owner: instead of a partition, the rank whose cache holds each of the S keys. Keys are sent to their ranks inside
        the program, which is compiled for this placement.
      in_partition_order: key, value and kv_tokens are the ranks' caches already, laid one after the other, as many
        slots each, the unused ones pads: nothing is moved, and neither partition nor owner is wanted.
      mesh: a mesh with axis `axis_name`, Auto or Explicit; None: the one that is set.
      axis_name: the axis, or axes (outermost first), over which the cache is cut.
      mask: None is causal: a query sees the cache up to its own position.
      scale: None is 1/√H.
      softcap: logits become softcap · tanh(logit / softcap).
      sink: per query head, the logit of one more key with value 0.
      precision: a profile or its name; None follows from the dtype of the arrays: float16 decode_fp16_lse, bfloat16
        flash_bf16, float32 and float64 what they say. float64 needs `jax_enable_x64`.

    Returns:
      `out` `[B, T, N, V]` in the profile's out dtype, `lse` `[B, T, N]` in its compute dtype, the same on every rank.

    Raises:
      InputError: arrays that do not fit together, an axis that the mesh has not, owners that are no ranks; not exactly
        one of partition, owner and in_partition_order; caches of unequal size.

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
    cp, length = ranks(mesh, axis_name), key.shape[1]
    owners = _owners(partition, owner, in_partition_order, q_tokens, kv_tokens, length, cp)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    check_sink(sink, query.shape[2])
    attention = Attention(Mask() if mask is None else mask, scale, precision, softcap)
    how = _How(mesh, axis_name, attention, owners)
    return _run(how, *jax.tree.map(jnp.asarray, (query, key, value, q_tokens, kv_tokens, sink)))


def _owners(
    partition: Cached | None,
    owner: Any,
    in_partition_order: bool,
    q_tokens: Tokens,
    kv_tokens: Tokens,
    length: int,
    cp: int,
) -> tuple[int, ...] | None:
    """The rank of each key; None where keys lie there already."""
    if (partition is not None) + (owner is not None) + in_partition_order != 1:
        raise InputError(
            "give one of partition, owner (the rank of each key) and in_partition_order=True: it says where keys are"
        )
    if in_partition_order:
        if length % cp:
            raise InputError(f"{length} slots are no multiple of {cp} caches; give each as many, the unused ones pads")
        return None
    if partition is None:
        return tuple(checked_owner(np.asarray(owner), length, cp).tolist())
    if partition.cp != cp:
        raise InputError(f"the partition is over {partition.cp} ranks, the mesh over {cp}; make them equal")
    segments = np.asarray(q_tokens.segment), np.asarray(kv_tokens.segment)
    partition.check(*segments)
    return tuple((partition.kv_chunks(segments[0][0], segments[1][0]) % cp).tolist())


def checked_owner(owner: np.ndarray, length: int, cp: int) -> Int[np.ndarray, " S"]:
    """The rank of each key.

    >>> checked_owner(np.array([0, 1, 0]), 3, cp=2)
    array([0, 1, 0])

    Raises:
      InputError: not one owner a key, or one that is no rank.
    """
    if owner.shape != (length,):
        raise InputError(f"owner has shape {owner.shape}; it must be ({length},), one rank for each key")
    if owner.dtype.kind not in "iu":
        raise InputError(f"owner is of dtype {owner.dtype}; ranks are integers")
    if length and not (owner.min() >= 0 and owner.max() < cp):
        raise InputError(f"owners are from {owner.min()} to {owner.max()}; they must be ranks, 0 to {cp - 1}")
    return owner


class CacheMoves(NamedTuple):
    """From runs of the text to the ranks' caches. Runs get pads at their ends so that all caches have as many slots."""

    run: int
    """Tokens of a run; the last runs of the text may be shorter, and are filled up."""
    slots: int
    """Of each cache, at least a run."""
    rounds: tuple[Round, ...]


@lru_cache(maxsize=64)
def cache_moves(owner: tuple[int, ...], cp: int) -> CacheMoves:
    """How keys of these owners come to their caches, each rank's in the order of the text, pads last.

    >>> how = cache_moves((0, 1, 0, 0), cp=2)
    >>> how.run, how.slots, [(step.pairs, step.send.tolist()) for step in how.rounds]
    (2, 3, [((), [[0], [2]]), (((0, 1), (1, 0)), [[1, 2], [0, 1]])])
    """
    run = -(-len(owner) // cp)
    held = [np.flatnonzero(np.array(owner) == rank) for rank in range(cp)]
    slots = max(run, *map(len, held))
    place = np.arange(run * cp).reshape(cp, run)  # which token lies in a run, and where, once it is filled up
    place = (place // run * slots + place % run).ravel()
    pads = np.setdiff1d(np.arange(cp * slots), place[: len(owner)])
    short = [slots - len(mine) for mine in held]
    # A rank keeps its own pads as far as it can: these cost no transfer.
    spare = [pads[pads // slots == rank] for rank in range(cp)]
    own = [mine[:n] for mine, n in zip(spare, short, strict=True)]
    others = np.concatenate([mine[n:] for mine, n in zip(spare, short, strict=True)])
    still = [n - len(mine) for n, mine in zip(short, own, strict=True)]
    given = np.split(others, np.cumsum(still)[:-1])
    order = [x for mine, *fill in zip(held, own, given, strict=True) for x in (place[mine], *fill)]
    return CacheMoves(run, slots, moves(np.concatenate(order), cp))


class _How(NamedTuple):
    """What is no operand. Another value is another program."""

    mesh: Mesh | AbstractMesh
    axis_name: str | tuple[str, ...]
    attention: Attention
    owner: tuple[int, ...] | None


@partial(jax.jit, static_argnums=0)
def _run(how: _How, query, key, value, q_tokens, kv_tokens, sink):
    cp = ranks(how.mesh, how.axis_name)
    there = None if how.owner is None else cache_moves(how.owner, cp)
    if there is not None:  # adds nothing where the text can be cut in equal runs
        key, value, kv_tokens = _filled(key, value, kv_tokens, there.run * cp)

    def device(query, q_tokens, sink, key, value, kv_tokens):
        if there is not None:
            mine = _filled(key, value, kv_tokens, there.slots)
            key, value, kv_tokens = moved(mine, there.rounds, how.axis_name)
        attention, axis_name = how.attention, how.axis_name
        result = decode_attention(query, key, value, q_tokens, kv_tokens, attention, axis_name=axis_name, sink=sink)
        return delivered(result, how.attention.precision)

    # Every rank merges the same partials in the same order, which JAX cannot see: the merge varies over the mesh.
    cut = P(None, how.axis_name)
    specs = (P(), P(), P(), cut, cut, cut)
    return mapped(device, how.mesh, specs, P(), check_vma=False)(query, q_tokens, sink, key, value, kv_tokens)


def _filled(key: Array, value: Array, kv_tokens: Tokens, length: int) -> tuple[Array, Array, Tokens]:
    """With pads at the end, so many that there are `length`."""
    more = length - key.shape[1]
    if more == 0:
        return key, value, kv_tokens
    fill = lambda x, with_: jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), constant_values=with_)  # noqa: E731
    return fill(key, 0), fill(value, 0), Tokens(fill(kv_tokens.position, 0), fill(kv_tokens.segment, PAD))
