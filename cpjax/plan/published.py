"""What others have published, beside what the model predicts: every error, row by row, and no average."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from cpjax.plan.constants import Constants
from cpjax.plan.facts import Fact, checked, shipped
from cpjax.plan.hardware import devices
from cpjax.plan.model import models
from cpjax.plan.setting import Setting
from cpjax.plan.time import attention_layer, ideal_layer, predict

Measured = Literal["prompt", "attention layer", "equal parts of an attention layer"]


class Publication(Fact):
    """Several points of one kind. `points`: pairs of tokens and what `unit` says. No `measured`: not predictable here.

    `not_counted` says why the errors are no errors of the model; `misses` why the model is off by more than 15 %.
    """

    about: str
    source: str
    assumed: tuple[str, ...] = Field(default=(), strict=False)
    measured: Measured | None = None
    model: str | None = None
    device: str | None = None
    cp: int = 1
    tp: int = 1
    partition: str = "zigzag"
    exchange: str = "ring"
    chunk: int | None = None
    unit: Literal["s", "ms", "1/s"] = "s"
    points: tuple[Annotated[tuple[int, float], Field(strict=False)], ...] = Field(default=(), strict=False)
    not_counted: str | None = None
    misses: str | None = None

    def setting(self) -> Setting | None:
        """What ran, where enough of it is known."""
        if self.measured is None or self.model is None or self.device is None:
            return None
        model, device = models()[self.model], devices()[self.device]
        return Setting(
            model, device, self.cp, self.tp, partition=self.partition, exchange=self.exchange, chunk=self.chunk
        )

    def seconds(self, value: float) -> float:
        """A point's value in seconds."""
        return {"s": value, "ms": value / 1000, "1/s": 1 / value if value else 0.0}[self.unit]


@dataclass(frozen=True)
class Row:
    """One published time and its prediction, in seconds; `error` is predicted / published − 1."""

    name: str
    publication: Publication
    tokens: int
    published: float
    predicted: float | None
    fitted: bool

    @property
    def error(self) -> float | None:
        """Relative; None where nothing is predicted."""
        return None if self.predicted is None else self.predicted / self.published - 1

    @property
    def counted(self) -> bool:
        """Whether the error says something of the model: predicted, not fitted, no queueing in it."""
        return self.predicted is not None and not self.fitted and self.publication.not_counted is None


def publications() -> dict[str, Publication]:
    """All, by name."""
    found = shipped("published")["published"]
    return {name: checked(Publication, table, f"published.{name}") for name, table in found.items()}


def predicted(publication: Publication, constants: Constants, tokens: int) -> float | None:
    """Seconds of one point."""
    setting = publication.setting()
    if setting is None:
        return None
    if publication.measured == "prompt":
        return predict(setting, constants, tokens).seconds
    if publication.measured == "attention layer":
        return attention_layer(setting, constants, tokens)
    return ideal_layer(setting, constants, tokens)


def rows(constants: Constants) -> Iterator[Row]:
    """Every published point, in the order of the data file."""
    fitted = set(shipped("constants")["points"].values())
    for name, publication in publications().items():
        for tokens, value in publication.points:
            yield Row(
                name, publication, tokens, publication.seconds(value), predicted(publication, constants, tokens),
                f"{name} {tokens}" in fitted,
            )  # fmt: skip
