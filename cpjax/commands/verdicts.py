"""How the commands that judge show their verdicts: on the terminal, as JSON, as a page."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpjax.commands.common import console

if TYPE_CHECKING:
    from cpjax.crosscheck.gradients.verdict import GradientVerdict

JUDGED = (
    "Exit status: 0 everything agrees, 1 something is WRONG, not judgeable, or there is no result, 2 bad input (one "
    "line says what and how to mend it)."
)


Report = Annotated[
    Path | None, typer.Option(help="write a page, DIR/index.html; nothing is overwritten", metavar="DIR")
]


def free(report: Path | None) -> None:
    """Refuse a report that would overwrite something before anything is computed."""
    if report is not None:
        from cpjax.crosscheck.report.page import check_free

        check_free(report)


def report_to(report: Path | None, judged: list, title: str) -> None:
    """Write the page and say where it lies; nothing without --report."""
    if report is not None:
        from cpjax.crosscheck.report.page import write_report

        print(f"cpjax: report: {write_report(report, judged, title)}", file=sys.stderr)


def show(
    judged: list,
    as_json: bool,
    compared: list | None = None,
    budgets: list | None = None,
    *,
    asked: bool = False,
    provenance: bool = False,
    backward: "GradientVerdict | None" = None,
) -> None:
    """Print everything and exit 1 unless everything that is supported passed, and agrees with each other.

    `backward` is the verdict on the gradients of the one result, if it has any.
    """
    from cpjax.crosscheck.run.compare import between_sentence
    from cpjax.crosscheck.run.summary import all_passed, questions, sentence, table_of

    pairs = compared or []
    passed = all_passed(judged) and all(one.agreement.agrees for one in pairs) and (backward is None or backward.passed)
    summary = f"{sentence(judged)} {between_sentence(pairs)}".rstrip()
    if as_json:
        report = {"passed": passed, "summary": summary, "results": [one.as_json() for one in judged]}
        report["between"] = [one.as_json() for one in pairs]
        report["explained"] = [one.as_json() for one in budgets or []]
        report |= {} if backward is None else {"gradients": backward.as_json()}
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        shown = console()
        shown.print(table_of(judged))
        for one in judged:
            whose = f"{one.case}, {one.backend}: " if len(judged) > 1 else ""  # the table has one row
            for reason in one.reasons if one.outcome in ("fail", "error") else []:
                shown.print(f"{whose}{reason}", highlight=False, markup=False)
            for remark in one.remarks:
                shown.print(f"{whose}{remark}", highlight=False, markup=False)
            for cause in one.verdict.diagnosis if one.verdict is not None else []:
                shown.print(f"{whose}diagnosis: {cause}", highlight=False, markup=False)
        for line in backward.text.splitlines() if backward is not None else []:
            shown.print(line, highlight=False, markup=False, soft_wrap=True)
        for line in questions(judged) if asked else []:
            shown.print(line, highlight=False, markup=False, soft_wrap=True)
        for one in judged if provenance else []:
            for name, digest in one.about["files"].items():
                shown.print(f"file: {name}, SHA-256 {digest}", highlight=False, markup=False, soft_wrap=True)
            versions = ", ".join(f"{name} {x}" for name, x in one.about["versions"].items())
            shown.print(f"judged: {one.about['date']}, {versions}", highlight=False, markup=False)
        for backend, reason in dict.fromkeys((x.backend, x.unsupported) for x in judged if x.outcome == "unsupported"):
            which = [x.case for x in judged if (x.backend, x.unsupported) == (backend, reason)]
            names = ", ".join(which[:3]) + (f" and {len(which) - 3} more" if len(which) > 3 else "")
            shown.print(f"unsupported by {backend}: {reason} ({names})", highlight=False, markup=False)
        for one in budgets or []:
            shown.print(one.table())
        shown.print(summary, highlight=False, markup=False)
    raise typer.Exit(0 if passed else 1)
