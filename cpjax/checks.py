"""What is refused before anything is traced. Every message names the value, the rule and the fix."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from cpjax.errors import InputError
from cpjax.exchange.device import EXCHANGES
from cpjax.mask import Tokens
from cpjax.partition.packing import packed_tokens
from cpjax.partition.sequence import SequencePartition
from cpjax.precision import Precision


def check_mesh(
    query: Any,
    key: Any,
    mesh: Mesh,
    axis_name: str | tuple[str, str],
    head_axis: str | None,
    batch_axis: str | None,
    partition: SequencePartition,
    exchange: str,
) -> None:
    """Refuse a mesh, a partition or an exchange that cannot share out these arrays.

    Raises:
      InputError: unknown names, axes the mesh has not, and numbers that do not divide.
    """
    if exchange not in EXCHANGES:
        raise InputError(f"unknown exchange {exchange!r}; known are {', '.join(EXCHANGES)}")
    cp_axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    wanted = 2 if exchange == "all_to_all_ring" else 1
    if len(cp_axes) != wanted:
        raise InputError(
            f"axis_name is {axis_name!r}; exchange {exchange!r} takes "
            + ("two axes, (ring, all-to-all)" if wanted == 2 else "one axis; for two see exchange 'all_to_all_ring'")
        )
    axes = [axis for axis in (*cp_axes, head_axis, batch_axis) if axis is not None]
    check_axes(mesh, axes)
    if len(set(axes)) != len(axes):
        raise InputError(f"axes {axes} are not all different; tokens, heads and batch each need an axis of their own")
    partition.order(query.shape[1])
    partition.order(key.shape[1])
    tp = 1 if head_axis is None else mesh.shape[head_axis]
    dealt = {"all_to_all": partition.cp, "all_to_all_ring": mesh.shape[cp_axes[-1]]}.get(exchange, 1)
    for name, heads in (("query", query.shape[2]), ("key/value", key.shape[2])):
        if heads % (tp * dealt):
            parts = f"{tp * dealt} parts (axis {head_axis!r}: {tp}, all-to-all: {dealt})"
            raise InputError(
                f"{heads} {name} heads cannot be cut into {parts}; they must be a multiple "
                f"(repeat the key/value heads, or use fewer devices for heads)"
            )
    dp = 1 if batch_axis is None else mesh.shape[batch_axis]
    if query.shape[0] % dp:
        raise InputError(f"a batch of {query.shape[0]} cannot be cut into {dp} equal parts (axis {batch_axis!r})")


def check_axes(mesh: Mesh, axes: Sequence[str]) -> None:
    """Raise InputError for an axis that the mesh has not."""
    for axis in axes:
        if axis not in mesh.shape:
            raise InputError(f"the mesh has axes {tuple(mesh.shape)}, none is {axis!r}; name axes that it has")


def ranks(mesh: Mesh, axis_name: str | tuple[str, ...]) -> int:
    """Over how many ranks tokens are sharded."""
    return math.prod(mesh.shape[axis] for axis in ((axis_name,) if isinstance(axis_name, str) else axis_name))


def check_packed(
    query: Any,
    key: Any,
    mesh: Mesh,
    axis_name: str | tuple[str, str],
    lengths: tuple[int, ...],
    q_tokens: Tokens | None,
    kv_tokens: Tokens | None,
) -> Tokens:
    """The places of the tokens of a packed batch.

    Raises:
      InputError: places given twice, or arrays of another length than the padded requests together.
    """
    if q_tokens is not None or kv_tokens is not None:
        raise InputError("lengths and tokens are both given; lengths say where the tokens are, leave tokens out")
    check_axes(mesh, (axis_name,) if isinstance(axis_name, str) else axis_name)
    places = packed_tokens(lengths, ranks(mesh, axis_name))
    for name, x in (("query", query), ("key", key)):
        if x.shape[:2] != places.position.shape:
            raise InputError(
                f"{name} has batch and length {x.shape[:2]}; requests of lengths {lengths}, padded, make "
                f"{places.position.shape}: use cpjax.partition.packing.pack"
            )
    return places


def check_precision(precision: Precision) -> None:
    """Refuse float64 where JAX would silently compute in float32."""
    if precision.compute == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise InputError("precision float64 needs float64 in JAX; call jax.config.update('jax_enable_x64', True) first")


def check_sink(sink: Any, heads: int) -> None:
    """Refuse a sink that is not one logit a head."""
    if sink is not None and sink.shape != (heads,):
        raise InputError(f"sink has shape {sink.shape}; it must be ({heads},), one logit for each query head")
