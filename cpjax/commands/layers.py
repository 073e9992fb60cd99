"""How `cpjax judge` shows verdicts on layers: a line for each stage, then what is wrong."""

import json
from pathlib import Path

import typer

from cpjax.commands.common import console, progress


def judge_layer_folder(cases: Path, results: Path, as_json: bool) -> None:
    """Judge, print, and exit 1 unless every stage of all that is supported agrees."""
    from cpjax.crosscheck.layer.session import judge_layers, read_layer_cases
    from cpjax.crosscheck.layer.table import all_passed, summary_of, table_of

    found = read_layer_cases(cases)
    with progress() as advance:
        judged = list(judge_layers(found, results, advance))
    passed, summary = all_passed(judged), summary_of(judged)
    if as_json:
        report = {"passed": passed, "summary": summary, "results": [one.as_json() for one in judged]}
        print(json.dumps(report, indent=2, allow_nan=False))
        raise typer.Exit(0 if passed else 1)
    shown = console()
    for one in judged:
        who = f"{one.case}, {one.backend}"
        if one.verdict is None:
            said = [f"unsupported: {one.unsupported}" if one.outcome == "unsupported" else f"ERROR: {one.error}"]
        else:
            shown.print(table_of(one.verdict, f"{who}: each stage from the result's own earlier tensors"))
            said = one.verdict.sentences()
        for sentence in said:
            shown.print(f"{who}: {sentence}", highlight=False, markup=False, soft_wrap=True)
    shown.print(summary, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(0 if passed else 1)
