"""A deployment as a `jax.sharding.Mesh`: axes dp, cp and tp, devices in the order of the vendor's ranks."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from cpjax.errors import InputError
from cpjax.mindie.deployment import Sizes


def mesh(sizes: Sizes, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh in which rank r is device r: rank = (dp index · cp + cp index) · tp + tp index.

    A sequence-parallel (sp) group is a tp group: the cache is sharded over `("cp", "tp")`.

    Args:
      devices: of JAX; None: the first of `jax.devices()`.

    Raises:
      InputError: too few devices, or sizes that do not fill the world.
    """
    count = sizes.dp * sizes.cp * sizes.tp
    if count != sizes.world_size:
        raise InputError(f"dp · cp · tp is {count} but worldSize is {sizes.world_size}; see cpjax mindie check")
    devices = jax.devices() if devices is None else devices
    if len(devices) < count:
        raise InputError(
            f"the deployment has {count} cards but JAX sees {len(devices)} device(s); on a CPU call "
            f"jax.config.update('jax_num_cpu_devices', {count}) before JAX is first used"
        )
    grid = np.array(devices[:count], dtype=object).reshape(sizes.dp, sizes.cp, sizes.tp)
    return Mesh(grid, ("dp", "cp", "tp"), axis_types=(AxisType.Auto,) * 3)
