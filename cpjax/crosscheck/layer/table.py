"""Verdicts on layers as tables and sentences."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cpjax.crosscheck.layer.lattice import LEAST_Z
from cpjax.crosscheck.layer.session import JudgedLayer
from cpjax.crosscheck.layer.verdict import LayerVerdict, StageVerdict
from cpjax.wording import counted, share

NOTHING = ("–", "–", "–", "–")

COLOURS = {"agrees": "green", "WRONG": "red", "not judgeable": "yellow"}


def table_of(verdict: LayerVerdict, title: str) -> Table:
    """One row a stage."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("stage", "kind"):
        table.add_column(heading, no_wrap=True)
    for heading in ("of bound", "z-score", "not rounded to nearest", "allowed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for stage in verdict.stages:
        table.add_row(*_cells(stage))
    return table


def _cells(stage: StageVerdict) -> list[str]:
    word = f"[{COLOURS[stage.outcome]}]{stage.outcome}[/]"
    if stage.outcome == "not judgeable":
        return [stage.stage, stage.kind, *NOTHING, word]
    z = f"{stage.z:.2f}" if stage.z > LEAST_Z else "–"
    counts = [f"{stage.moved:,}", f"{stage.allowed:,.1f}"] if stage.allowed or stage.moved else ["–", "–"]
    return [stage.stage, stage.kind, share(stage.ratio), z, *counts, word]


def summary_of(judged: list[JudgedLayer]) -> str:
    """The last line: what all this means."""
    bad = [one for one in judged if one.outcome in ("fail", "error")]
    results = counted(len(judged), "result")
    if bad:
        verb = "does" if len(bad) == 1 else "do"
        return f"{len(bad)} of {results} {verb} not agree: {', '.join(dict.fromkeys(one.case for one in bad))}."
    good = [one for one in judged if one.outcome == "pass"]
    if not good:
        return "Nothing was judged: no backend supports any of the cases."
    return f"Every stage of {len(good)} of {results} is what correct arithmetic in its precision gives."


def all_passed(judged: list[JudgedLayer]) -> bool:
    """Whether everything that is supported passed, and something did."""
    outcomes = {one.outcome for one in judged}
    return "pass" in outcomes and outcomes <= {"pass", "unsupported"}
