"""What is refused before anything is traced. Every message names the value, the rule and the fix."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh

from cpjax.attention import checked_scale
from cpjax.blocks.chosen import block_of
from cpjax.errors import InputError
from cpjax.exchange.device import EXCHANGES, ORDERS
from cpjax.mask import Tokens
from cpjax.partition.contiguous import Contiguous
from cpjax.partition.packing import padded_lengths
from cpjax.partition.sequence import SequencePartition
from cpjax.partition.zigzag import Zigzag
from cpjax.precision import Precision


def check_mesh(
    query: Any,
    key: Any,
    mesh: Mesh | AbstractMesh,
    axis_name: str | tuple[str, ...],
    head_axis: str | None,
    batch_axis: str | None,
    partition: SequencePartition,
    exchange: str,
    manual: bool = False,
) -> None:
    """Refuse a mesh, a partition or an exchange that cannot share out these arrays.

    Args:
      manual: the arrays are one device's already (`manual_axes`); then only their tokens are counted together.

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
    parts = partition.cp if manual else 1
    partition.order(query.shape[1] * parts)
    partition.order(key.shape[1] * parts)
    if not manual:
        check_not_manual(head_axis, batch_axis)
    tp = 1 if head_axis is None or manual else mesh.shape[head_axis]
    dealt = {"all_to_all": partition.cp, "all_to_all_ring": mesh.shape[cp_axes[-1]]}.get(exchange, 1)
    for name, heads in (("query", query.shape[2]), ("key/value", key.shape[2])):
        if heads % (tp * dealt):
            parts = f"{tp * dealt} parts (axis {head_axis!r}: {tp}, all-to-all: {dealt})"
            raise InputError(
                f"{heads} {name} heads cannot be cut into {parts}; they must be a multiple "
                f"(repeat the key/value heads, or use fewer devices for heads)"
            )
    dp = 1 if batch_axis is None or manual else mesh.shape[batch_axis]
    if query.shape[0] % dp:
        raise InputError(f"a batch of {query.shape[0]} cannot be cut into {dp} equal parts (axis {batch_axis!r})")


def current_mesh(mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh:
    """The mesh that is given, or that of `jax.set_mesh` or of the `jax.shard_map` around.

    Raises:
      InputError: there is none, or one that is set is another than the one given.
    """
    around = jax.sharding.get_abstract_mesh()
    if around.empty:
        if mesh is None:
            raise InputError("no mesh is given and none is set; give mesh=cp_mesh(ranks), or call jax.set_mesh(mesh)")
        return mesh
    if mesh is None:
        return around
    given = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
    if dict(given.shape) != dict(around.shape):
        raise InputError(f"mesh has axes {dict(given.shape)}, the one that is set {dict(around.shape)}; leave mesh out")
    if around.manual_axes:
        return around
    if given.axis_types != around.axis_types:
        kinds = [", ".join(kind.name for kind in x.axis_types) for x in (given, around)]
        raise InputError(f"the axes of mesh are {kinds[0]}, those of the one that is set {kinds[1]}; leave mesh out")
    return mesh


def manual_axes(axes: Sequence[str]) -> bool:
    """Whether arrays are this device's already: a `jax.shard_map` around is over these axes.

    Raises:
      InputError: it is over some of them only.
    """
    around = jax.sharding.get_abstract_mesh()
    manual = [axis for axis in axes if axis in around.manual_axes]
    if manual and len(manual) < len(axes):
        raise InputError(f"the shard_map around is over {manual} but not over all of {list(axes)}; make it over all")
    return bool(manual)


def check_not_manual(head_axis: str | None, batch_axis: str | None) -> None:
    """Raise InputError for an axis over which a `jax.shard_map` around has cut the arrays already."""
    around = jax.sharding.get_abstract_mesh()
    for name, axis in (("head_axis", head_axis), ("batch_axis", batch_axis)):
        if axis in around.manual_axes:
            raise InputError(f"the shard_map around is over {axis!r}, so arrays are cut already; leave {name} out")


def check_axes(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> None:
    """Raise InputError for an axis that the mesh has not."""
    for axis in axes:
        if axis not in mesh.shape:
            raise InputError(f"the mesh has axes {tuple(mesh.shape)}, none is {axis!r}; name axes that it has")


def ranks(mesh: Mesh | AbstractMesh, axis_name: str | tuple[str, ...]) -> int:
    """Over how many ranks tokens are sharded."""
    return math.prod(mesh.shape[axis] for axis in ((axis_name,) if isinstance(axis_name, str) else axis_name))


def checked_lengths(lengths: Any) -> tuple[int, ...]:
    """The lengths of requests as Python's integers.

    Raises:
      InputError: they are traced, or no sequence of integers.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(lengths)):
        raise InputError("lengths are traced; they decide the shapes of a program, so give Python integers")
    found = np.asarray(lengths)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputError(f"lengths are {lengths!r}; they must be a sequence of integers, one for each request")
    return tuple(int(x) for x in found)


def check_packed(
    query: Any,
    key: Any,
    cp: int,
    parts: int,
    lengths: tuple[int, ...],
    q_tokens: Tokens | None,
    kv_tokens: Tokens | None,
) -> None:
    """Refuse arrays that are no packed batch of these lengths; `parts` of them make the whole.

    Raises:
      InputError: places given twice, or arrays of another length than the padded requests together.
    """
    if q_tokens is not None or kv_tokens is not None:
        raise InputError("lengths and tokens are both given; lengths say where the tokens are, leave tokens out")
    whole = (1, sum(padded_lengths(lengths, cp)))
    for name, x in (("query", query), ("key", key)):
        if (x.shape[0], x.shape[1] * parts) != whole:
            raise InputError(
                f"{name} has batch and length {x.shape[:2]}; requests of lengths {lengths}, padded, make "
                f"{whole}" + (f" in {parts} parts" if parts > 1 else "") + ": use cpjax.partition.packing.pack"
            )


def check_scale(scale: Any) -> Any:
    """A float, or the array that is traced.

    Raises:
      InputError: not a finite number; an array with axes, or of integers.
    """
    if isinstance(scale, Tracer):
        if scale.shape != () or not jax.numpy.issubdtype(scale.dtype, jax.numpy.floating):
            raise InputError(f"scale is traced as {scale.dtype}{list(scale.shape)}; it must be one floating number")
        return scale
    found = np.asarray(scale)
    if found.shape != () or found.dtype.kind not in "iufV":
        raise InputError(f"scale is {scale!r}; it must be one finite number, usually 1/sqrt(head_dim)")
    return checked_scale(float(found))


def check_order(order: str | None, exchange: str) -> None:
    """Refuse an order of merging that the exchange does not have.

    Raises:
      InputError: it names the one that it has.
    """
    found = ORDERS.get(exchange, order)
    if order not in (None, "unknown", found):
        raise InputError(f"order is {order!r}, but exchange {exchange!r} merges in order {found!r}; say that one")


def check_precision(precision: Precision) -> None:
    """Refuse float64 where JAX would silently compute in float32."""
    if precision.compute == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise InputError("precision float64 needs float64 in JAX; call jax.config.update('jax_enable_x64', True) first")


def check_kernel(
    attend: str,
    mesh: Mesh | AbstractMesh,
    partition: SequencePartition,
    lengths: tuple[int, ...] | None,
    q_tokens: Tokens | None,
    kv_tokens: Tokens | None,
) -> None:
    """Refuse what a platform's block cannot compute of a whole text; `check_block` refuses the rest.

    Raises:
      InputError: another platform; shards that are no runs of one text, or may be none.
    """
    block = block_of(attend)
    here = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    if here not in block.platforms:
        raise InputError(
            f"attend={attend!r} is for devices of {' and '.join(block.platforms)}, and the mesh is of {here}; leave "
            f"attend out there"
        )
    if not isinstance(partition, Contiguous | Zigzag):
        raise InputError(
            f"partition is {partition.name!r}, whose shards are no runs of the text, so that no pair of them is whole, "
            f"hidden or a causal triangle; attend={attend!r} takes zigzag and contiguous"
        )
    if lengths is not None:
        raise InputError(
            f"lengths are given; attend={attend!r} computes one text a batch row: leave lengths or attend out"
        )
    for name, places in (("q_tokens", q_tokens), ("kv_tokens", kv_tokens)):
        if places is not None:
            raise InputError(
                f"{name} are given; the masks of attend={attend!r} are compiled into it, so tokens must be 0, 1, 2, … "
                f"of one text: leave {name} out (a causal mask hides pads at the end), or leave attend out"
            )


def check_sink(sink: Any, heads: int) -> None:
    """Refuse a sink that is not one logit a head."""
    if sink is not None and sink.shape != (heads,):
        raise InputError(f"sink has shape {sink.shape}; it must be ({heads},), one logit for each query head")
