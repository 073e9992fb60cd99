"""A device: its peak rates, its memory and its links, each from a source that the data file names."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from cpjax.errors import InputError
from cpjax.plan.facts import Fact, checked, read_toml, shipped, tables

Positive = Annotated[float, Field(gt=0)]


class Device(Fact):
    """What computes, as programs see it: one GPU, one NPU, one of the two devices of a TPU7x chip.

    Rates of links are of one direction. `ring_link`: what one neighbour receives from one other. `all_links`: what one
    device receives in a gather or reduction, through all links that it has to the others of its node.

    >>> devices()["h100"].peak(8) / devices()["h100"].peak(16) > 2
    True
    """

    about: str
    source: str
    read: str  # the date, or what is known of it
    assumed: tuple[str, ...] = Field(default=(), strict=False)  # which of the numbers no source says, and why so
    tflops_16bit: Positive  # TFLOP/s, dense, FP16 or BF16
    tflops_8bit: Positive | None = None  # TFLOP/s, dense, FP8 or INT8; None: it has no faster 8-bit product
    memory_gb: Positive  # 1e9 bytes
    memory_gb_s: Positive  # GB/s
    ring_link_gb_s: Positive
    all_links_gb_s: Positive
    network_gb_s: Positive  # GB/s a device, one direction, beyond the node
    latency_us: Annotated[float, Field(ge=0)]  # µs for each transfer
    network_latency_us: Annotated[float, Field(ge=0)]
    node: Annotated[int, Field(ge=1)]  # devices that are joined by links

    def peak(self, bits: int) -> float:
        """FLOP/s of dense products of numbers with so many bits."""
        eight = self.tflops_16bit if self.tflops_8bit is None else self.tflops_8bit
        return (eight if bits <= 8 else self.tflops_16bit) * 1e12

    def ring(self, cards: int) -> tuple[float, float]:
        """Bytes/s and seconds of latency of a transfer to the next rank, where a group spans so many cards."""
        return self._link(cards, self.ring_link_gb_s)

    def collective(self, cards: int) -> tuple[float, float]:
        """The same of what a device receives in a gather or a reduction."""
        return self._link(cards, self.all_links_gb_s)

    def _link(self, cards: int, inside: float) -> tuple[float, float]:
        if cards <= self.node:
            return inside * 1e9, self.latency_us * 1e-6
        # A ring is as fast as its slowest link.
        return min(inside, self.network_gb_s) * 1e9, max(self.latency_us, self.network_latency_us) * 1e-6


def devices(path: Path | None = None) -> dict[str, Device]:
    """All devices by name; those of a user's file replace ours of the same name.

    A user's table may have `like = "h100"`, and then only what differs.

    Raises:
      InputError: the file is wrong; the line says where.
    """
    ours = shipped("devices")["devices"]
    found = {name: checked(Device, table, f"devices.{name}") for name, table in ours.items()}
    if path is None:
        return found
    given = tables(read_toml(path), "devices", str(path))
    if not given:
        raise InputError(f"{path} has no device; write a table [devices.NAME], as docs/plan.md shows")
    for name, table in given.items():
        where = f"{path}: devices.{name}"
        if not isinstance(table, dict):
            raise InputError(f"{where} is {table!r:.40}; it must be a table")
        like = table.get("like")
        if like is not None and (not isinstance(like, str) or like not in found):
            raise InputError(f"{where}: like is {like!r:.40}; known are {', '.join(found)}")
        base = {} if like is None else found[like].model_dump()
        found[name] = checked(Device, base | {key: value for key, value in table.items() if key != "like"}, where)
    return found


def device_of(name: str, known: dict[str, Device]) -> Device:
    """The device of a name.

    Raises:
      InputError: none has it.
    """
    if name.lower() not in known:
        raise InputError(f"device {name!r:.40} is not known; known are {', '.join(known)}, or describe it: --devices")
    return known[name.lower()]
