"""The devices of a TPU topology that is not here: what the compiler needs to know about it."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import Any

from cpjax.errors import InputError
from cpjax.mesh import ring_order

EXAMPLES = "v5e:8x8, v5p:4x4x4, v6e:16x16, tpu7x:2x2x1"


@dataclass(frozen=True)
class Topology:
    """Chips, and what is published about them; the compiler's text says neither rates nor clocks."""

    name: str
    devices: tuple[Any, ...]
    """In ring order: neighbours are one hop apart."""
    sides: tuple[int, ...]
    """Chips along each axis."""
    link_bytes_per_second: float | None
    """One link, one direction."""
    cycles_per_second: float | None

    def hops(self, source: int, target: int) -> int:
        """Links between two devices, given by their place in the ring; every axis may be closed."""
        a, b = (self.devices[place].coords for place in (source, target))
        far = (abs(x - y) for x, y in zip(a, b, strict=True))
        return sum(min(d, side - d) for d, side in zip(far, self.sides, strict=True))

    def link_cycles(self, size: int) -> int | None:
        """Cycles that so many bytes need on one link; None where a rate is not known."""
        if self.link_bytes_per_second is None or self.cycles_per_second is None:
            return None
        return round(size / self.link_bytes_per_second * self.cycles_per_second)


GIGABIT = 1e9 / 8
RATES = {
    "v4": (2400 / 6 * GIGABIT, 275e12 / (2 * 8 * 128**2)),
    "v5e": (1600 / 4 * GIGABIT, 197e12 / (2 * 4 * 128**2)),
    "v5p": (4800 / 6 * GIGABIT, 459e12 / (2 * 8 * 128**2)),
}
"""Bytes a second of a link, and cycles a second, from Google's pages "TPU v4", "TPU v5e", "TPU v5p" (Cloud TPU).

A link: the published interconnect bandwidth of a chip, over its links: four on a 2-D torus, six on a 3-D one. A clock:
the published bfloat16 peak over two operations for each of the chip's 128×128 multipliers, of which v5e has four units,
v4 and v5p eight. Of newer chips no clock follows from what is published, so nothing is said: for v6e the page "TPU v6e"
has two units of 256×256, with which 918 TFLOP/s would be 3.5 GHz, but by the compiler's own cycles a chip multiplies
faster than two such units can (docs/scale.md); of TPU7x no page says the number of units.
"""


def topology(name: str, given_order: bool = False) -> Topology:
    """The topology by libtpu's name: a generation and chips along each axis.

    Args:
      given_order: leave the devices in libtpu's order instead of that of `cpjax.mesh.ring_order`.

    Raises:
      InputError: libtpu is not installed, or does not know the name; JAX has begun with other settings.
    """
    prepare()
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"topology {name!r} is unknown to the TPU compiler ({said:.200}); examples: {EXAMPLES}"
        ) from None
    sides = tuple(max(d.coords[axis] for d in devices) + 1 for axis in range(3))
    link, clock = RATES.get(name.partition(":")[0], (None, None))
    return Topology(name, tuple(devices if given_order else ring_order(devices)), sides, link, clock)


def prepare() -> None:
    """Say to libtpu and JAX that there is no TPU here; without it they look for one and print what they miss.

    Raises:
      InputError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler is not installed; install the extra: pip install 'cpjax[tpu]'")
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    quiet |= {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
    # libtpu's lock is for a TPU, which one process may have; here several may compile.
    quiet |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if "jax" not in sys.modules:
        quiet["JAX_PLATFORMS"] = "cpu"
    for word, value in quiet.items():
        os.environ.setdefault(word, value)
