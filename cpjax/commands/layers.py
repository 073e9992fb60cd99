"""How `cpjax judge` shows verdicts on layers: a line for each stage, then what is wrong."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cpjax.commands.common import console, progress

if TYPE_CHECKING:
    from cpjax.crosscheck.layer.session import JudgedLayer
    from cpjax.crosscheck.layer.verdict import StageVerdict

COLOURS = {"agrees": "green", "WRONG": "red", "not judgeable": "yellow"}


def judge_layer_folder(cases: Path, results: Path, as_json: bool) -> None:
    """Judge, print, and exit 1 unless every stage of all that is supported agrees."""
    from cpjax.crosscheck.layer.session import judge_layers, read_layer_cases

    found = read_layer_cases(cases)
    with progress() as advance:
        judged = list(judge_layers(found, results, advance))
    outcomes = {one.outcome for one in judged}
    passed = "pass" in outcomes and outcomes <= {"pass", "unsupported"}
    summary = _summary(judged)
    if as_json:
        report = {"passed": passed, "summary": summary, "results": [one.as_json() for one in judged]}
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        for one in judged:
            _show(one)
        console().print(summary, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(0 if passed else 1)


def _show(one: "JudgedLayer") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = console()
    if one.verdict is None:
        word = "unsupported" if one.outcome == "unsupported" else "ERROR"
        said = f"{one.case}, {one.backend}: {word}: {one.unsupported or one.error}"
        shown.print(said, highlight=False, markup=False, soft_wrap=True)
        return
    title = f"{one.case}, {one.backend}: each stage from the result's own earlier tensors, in float64"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("stage", "kind"):
        table.add_column(heading, no_wrap=True)
    for heading in ("of bound", "z", "not nearest", "expected at most"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for stage in one.verdict.stages:
        table.add_row(*_cells(stage))
    shown.print(table)
    for sentence in one.verdict.sentences():
        shown.print(f"{one.case}, {one.backend}: {sentence}", highlight=False, markup=False, soft_wrap=True)


def _cells(stage: "StageVerdict") -> list[str]:
    from cpjax.crosscheck.layer.lattice import LEAST_Z

    ratio = f"{stage.ratio:.0%}" if stage.ratio < 100 else f"{stage.ratio:.2g}×"
    counts = [f"{stage.moved:,}", f"{stage.allowed:,.1f}"] if stage.allowed or stage.moved else ["–", "–"]
    if stage.outcome == "not judgeable":
        ratio, counts = "–", ["–", "–"]
    z = f"{stage.z:.2f}" if stage.outcome != "not judgeable" and stage.z > LEAST_Z else "–"
    colour = COLOURS[stage.outcome]
    return [stage.stage, stage.kind, ratio, z, *counts, f"[{colour}]{stage.outcome}[/]"]


def _summary(judged: list["JudgedLayer"]) -> str:
    bad = [one for one in judged if one.outcome in ("fail", "error")]
    if bad:
        return f"{len(bad)} of {len(judged)} results do not agree: {', '.join(dict.fromkeys(x.case for x in bad))}."
    good = [one for one in judged if one.outcome == "pass"]
    if not good:
        return "Nothing was judged: no backend supports any of the cases."
    return f"Every stage of {len(good)} of {len(judged)} results is what correct arithmetic in its precision gives."
