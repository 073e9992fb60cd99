"""A function of one device, run on all devices of a mesh whose axes are Auto, Explicit or cut by a caller already."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array


def mapped(
    device: Callable[..., Any],
    mesh: Mesh | AbstractMesh,
    in_specs: tuple[P, ...],
    out_specs: Any,
    *,
    check_vma: bool = True,
) -> Callable[..., Any]:
    """`jax.shard_map` over every axis of the mesh that no `shard_map` around has cut.

    Args:
      device: what one device does with its parts of the operands.
      in_specs: one for each operand, for all arrays of it.
      check_vma: False where JAX cannot see that results are equal on all devices (docs of `jax.shard_map`).

    >>> from cpjax.parallel import cp_mesh
    >>> mapped(lambda x: 2 * x, cp_mesh(2), (P("cp"),), P("cp"))(jax.numpy.arange(4))
    Array([0, 2, 4, 6], dtype=int32)
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    here = {axis for axis, kind in kinds.items() if kind != AxisType.Manual}

    def everywhere(*operands: Any) -> Any:
        if AxisType.Explicit in kinds.values():
            operands = tuple(jax.tree.map(partial(_typed, mesh, s), x) for x, s in zip(operands, in_specs, strict=True))
        options = {"in_specs": in_specs, "out_specs": out_specs, "axis_names": here, "check_vma": check_vma}
        return jax.shard_map(device, mesh=mesh, **options)(*operands)

    return everywhere


def _typed(mesh: Mesh | AbstractMesh, spec: P, x: Array) -> Array:
    """`x` sharded as `spec` says over the Explicit axes of the mesh, which are part of its type."""
    explicit = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    names = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec]
    typed = P(*(tuple(name for name in entry if name in explicit) or None for entry in names))
    return jax.reshard(x, NamedSharding(mesh, typed) if isinstance(mesh, Mesh) else typed)
