"""What was judged, as a table and a sentence."""

import math
from typing import get_args

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cpjax.crosscheck.judging.asked import sentences
from cpjax.crosscheck.judging.verdict import Verdict
from cpjax.crosscheck.run.session import Judged, Outcome
from cpjax.wording import counted, share

MOST_QUESTIONS, MOST_NAMED = 4, 3
"""Questions that are printed, and results that are named beside one."""

BACKENDS = {
    "spec": "specification",
    "npu": "NPU backend",
    "npu-fia": "NPU backend, fia",
    "npu-fusion": "NPU backend, fusion",
    "sdpa": "PyTorch SDPA",
}


NOT_RIGHT: dict[Outcome, tuple[str, str]] = {
    "fail": (
        "is NOT what correct arithmetic in its precision gives",
        "are NOT what correct arithmetic in their precision gives",
    ),
    "error": ("is an error", "are errors"),
}
"""What is said of one result, and of several."""


def table_of(judged: list[Judged]) -> Table:
    """One row a result."""
    names = sorted({one.case for one in judged})
    title = f"{names[0] if len(names) == 1 else f'{len(names)} cases'}, held against dense attention in float64"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("case", "computed by", "precision")[len(names) == 1 :]:
        table.add_column(heading, overflow="fold", min_width=13)
    for heading in ("max error", "of bound", "z", "lse error", "of bound", "z"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for one in judged:
        cells = [one.case, BACKENDS.get(one.backend, one.backend), one.precision or "–"][len(names) == 1 :]
        table.add_row(*cells, *_numbers(one.verdict), _word(one))
    return table


def _numbers(verdict: Verdict | None) -> list[str]:
    if verdict is None:
        return ["–"] * 6
    of_out = [f"{verdict.max_error:.2g}", share(verdict.hard_ratio), f"{verdict.z:.2f}"]
    if math.isnan(verdict.lse_max_error):
        return [*of_out, "–", "–", "–"]
    return [*of_out, f"{verdict.lse_max_error:.2g}", share(verdict.lse_hard_ratio), f"{verdict.lse_z:.2f}"]


def _word(one: Judged) -> str:
    if one.outcome in ("unsupported", "error"):
        return {"unsupported": "[cyan]unsupported[/]", "error": "[red]ERROR[/]"}[one.outcome]
    if one.verdict is not None and not one.verdict.judgeable:
        return "[yellow]not judgeable[/]"
    return "[green]agrees[/]" if one.passed else "[red]WRONG[/]"


def sentence(judged: list[Judged]) -> str:
    """The last line: what all this means."""
    of = {outcome: [one for one in judged if one.outcome == outcome] for outcome in get_args(Outcome)}
    if not judged:
        return "Nothing was judged."
    said = []
    for outcome in NOT_RIGHT:
        if of[outcome]:
            names = ", ".join(sorted({one.case for one in of[outcome]}))
            count = len(of[outcome])
            said.append(f"{count} of {counted(len(judged), 'result')} {NOT_RIGHT[outcome][count > 1]}: {names}.")
    if said:
        return " ".join(said)
    if not of["pass"]:
        return "Nothing was judged: no backend supports any of the cases."
    names = sorted({BACKENDS.get(one.backend, one.backend) for one in of["pass"]}, reverse=True)
    agree = {1: "agrees", 2: "both agree"}.get(len(names), "all agree")
    where = (
        f" in {len(of['pass'])} of {counted(len(judged), 'case')}; the rest is unsupported" if of["unsupported"] else ""
    )
    return (
        f"The {' and the '.join(names)} {agree} with dense attention, within what their rounding explains and no "
        f"more{where}."
    )


def all_passed(judged: list[Judged]) -> bool:
    """Whether everything that is supported passed, and something did."""
    outcomes = {one.outcome for one in judged}
    return "pass" in outcomes and outcomes <= {"pass", "unsupported"}


def questions(judged: list[Judged]) -> list[str]:
    """What the verdicts answer: which attention was asked about, and what was assumed.

    Results of one question share its line. Of many questions those come first whose result did not pass.
    """
    together: dict[tuple[str, str], list[Judged]] = {}
    for one in sorted(judged, key=lambda one: one.passed):
        if one.verdict is None:
            continue
        layout = (one.about or {}).get("layout")  # a dump's
        asked, assumed = sentences(({"layout": layout} if layout else {}) | one.verdict.asked)
        together.setdefault((asked, assumed), []).append(one)
    assumptions = {assumed for _, assumed in together}
    lines = []
    for (asked, assumed), group in list(together.items())[:MOST_QUESTIONS]:
        whose = ", ".join(dict.fromkeys(f"{one.case}, {one.backend}" for one in group[:MOST_NAMED]))
        more = f" and {len(group) - MOST_NAMED} more" if len(group) > MOST_NAMED else ""
        prefix = f"{whose}{more}: " if len(judged) > 1 else ""
        lines.append(f"{prefix}{asked}")
        lines += [f"{prefix}{assumed}"] if len(assumptions) > 1 else []
    if len(together) > MOST_QUESTIONS:
        rest = counted(len(together) - MOST_QUESTIONS, "other question")
        lines.append(f"asked: {rest}, which --json and --report print")
    return lines + (sorted(assumptions) if len(assumptions) == 1 else [])
