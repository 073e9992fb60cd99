"""A user's own measurements: efficiencies and links in place of ours, and times to compare with."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from cpjax.plan.constants import Constants
from cpjax.plan.facts import Fact, checked, read_toml
from cpjax.plan.hardware import Device

Positive = Annotated[float, Field(gt=0)]


class Efficiency(Fact):
    """Parts of the peak, each if it was measured."""

    attention: Annotated[float, Field(gt=0, le=1)] | None = None
    products: Annotated[float, Field(gt=0, le=1)] | None = None


class Links(Fact):
    """Numbers of a device, each if it was measured: the names and units of devices.toml."""

    memory_gb_s: Positive | None = None
    ring_link_gb_s: Positive | None = None
    all_links_gb_s: Positive | None = None
    network_gb_s: Positive | None = None
    latency_us: Annotated[float, Field(ge=0)] | None = None
    network_latency_us: Annotated[float, Field(ge=0)] | None = None


class Time(Fact):
    """A prompt that ran alone."""

    cp: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    seconds: Positive


class Measured(Fact):
    """The file: `[efficiency]`, `[device]`, and `[[times]]`, all optional."""

    efficiency: Efficiency = Efficiency()
    device: Links = Links()
    times: tuple[Time, ...] = Field(default=(), strict=False)

    def constants(self, ours: Constants) -> Constants:
        """Ours, where nothing else was measured."""
        return ours.model_copy(update=self.efficiency.model_dump(exclude_none=True))

    def on(self, device: Device) -> Device:
        """The device with what was measured of it."""
        return device.model_copy(update=self.device.model_dump(exclude_none=True))


def read_measured(path: Path) -> Measured:
    """Read it.

    Raises:
      InputError: it is not there, or says what is not understood.
    """
    return checked(Measured, read_toml(path), str(path))
