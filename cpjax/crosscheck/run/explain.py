"""`cpjax judge --explain CASE,BATCH,POSITION,HEAD`: the error budget of single rows, as a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.judging.error_budget import ErrorBudget, error_budget
from cpjax.crosscheck.run.session import Judged
from cpjax.errors import InputError
from cpjax.wording import counted


class Row(NamedTuple):
    """A row of a case."""

    case: str
    batch: int
    position: int
    head: int


def checked_rows(asked: list[str], cases: list[Case]) -> list[Row]:
    """The rows that are asked about, as CASE,BATCH,POSITION,HEAD.

    Raises:
      InputError: one is not of that form, or there is no such case or row.
    """
    return [_row(text, {case.name: case for case in cases}) for text in asked]


def _row(text: str, cases: dict[str, Case]) -> Row:
    name, *numbers = text.split(",")
    if len(numbers) != 3 or not all(number.strip().isdecimal() for number in numbers):
        raise InputError(f"--explain {text!r} is not CASE,BATCH,POSITION,HEAD with whole numbers, as c,0,17,3")
    if name not in cases:
        raise InputError(f"--explain {text!r}: there is no case {name!r}; there are {', '.join(sorted(cases)[:8])}")
    row = Row(name, *map(int, numbers))
    for what, index, size in zip(Row._fields[1:], row[1:], cases[name].query.shape[:3], strict=True):
        if index >= size:
            raise InputError(f"--explain {text!r}: {what} is {index}; it must be from 0 to {size - 1}")
    return row


@dataclass(frozen=True)
class Explained:
    """The budget of a row of one backend's result."""

    case: str
    backend: str
    budget: ErrorBudget

    def as_json(self) -> dict[str, Any]:
        """An object for machines."""
        return {"case": self.case, "backend": self.backend} | self.budget.as_json()

    def table(self) -> Table:
        """What explains how much."""
        b = self.budget
        table = Table(title=_title(self), title_justify="left", box=SIMPLE_HEAD)
        for heading in ("docs/verdict.md", "σ is made of"):
            table.add_column(heading)
        for heading in ("σ of out", "share", "σ of lse", "share"):
            table.add_column(heading, justify="right")
        for share in b.terms:
            numbers = _number(share.out), _percent(share.out_share), _number(share.lse), _percent(share.lse_share)
            table.add_row(f"§{share.section}", share.name, *numbers)
        table.add_row("", "all", _number(b.sigma), "100%", _number(b.lse_sigma), "100%", end_section=True)
        for share in b.bound:
            table.add_row("§5", f"bound: {share.name}", _number(share.out), _percent(share.out_share), "", "")
        return table


def _title(one: Explained) -> str:
    b = one.budget
    where = f"{one.case}, {one.backend}: batch {b.batch}, position {b.position}, head {b.head}"
    said = f"{where} sees {counted(b.visible_keys, 'key')}. RMS error {b.error:.2g}, σ {b.sigma:.2g}"
    if b.sigma > 0:
        said += f" (z {b.error / b.sigma:.2f})"
    said += f"; largest share of the bound {b.worst_ratio:.0%}, in column {b.worst_column}"
    if np.isfinite(b.lse_error):
        said += f". Error of lse {b.lse_error:.2g}, σ {b.lse_sigma:.2g}, bound {b.lse_bound:.2g}"
    return said + ("." if b.is_judgeable else ". The row leaves the format's range and is not judged.")


def _number(x: float) -> str:
    return f"{x:.2g}" if x else "–"


def _percent(x: float) -> str:
    return "–" if not x else f"{x:.1%}" if abs(x) < 0.1 else f"{x:.0%}"


def budgets_of(judged: list[Judged], rows: list[Row]) -> Iterator[Explained]:
    """The budgets of these rows in every result that has an `out` of the right form.

    Raises:
      InputError: a row is a pad.
    """
    for row in rows:
        for one in judged:
            if one.case == row.case and one.shown is not None:
                try:
                    budget = error_budget(*one.shown, batch=row.batch, position=row.position, head=row.head)
                except ValueError as error:
                    raise InputError(f"--explain {','.join(map(str, row))}: {error}") from None
                yield Explained(one.case, one.backend, budget)
