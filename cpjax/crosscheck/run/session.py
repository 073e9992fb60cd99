"""Cases and results judged: one line for every result that should be there, and what it says to a person."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cpjax.crosscheck.conformance.explain import read
from cpjax.crosscheck.files.case import Case, read_case
from cpjax.crosscheck.files.checksums import verify
from cpjax.crosscheck.files.latent import check_expanded
from cpjax.crosscheck.files.note import read_note
from cpjax.crosscheck.files.result import Result, read_result
from cpjax.crosscheck.judge import judge
from cpjax.crosscheck.judging.problem import question
from cpjax.crosscheck.judging.verdict import Verdict, malformed
from cpjax.crosscheck.report.figures import Figures, figures
from cpjax.errors import InputError
from cpjax.mask import PAD

Progress = Callable[[str, int, int], None]
"""Called with what is judged, rows done, and their total."""

Outcome = Literal["pass", "fail", "unsupported", "error"]

BACKENDS = {"spec": "specification", "npu": "NPU backend", "sdpa": "PyTorch SDPA"}


@dataclass(frozen=True)
class Judged:
    """One result and the verdict on it; `problem` or `unsupported` where there is no result that could be judged."""

    case: str
    backend: str
    precision: str | None
    order: str | None
    seconds_per_step: list[list[float]] | None
    verdict: Verdict | None
    problem: str | None = None
    """What went wrong before there was a result."""
    unsupported: str | None = None
    """Why the backend does not compute this case."""
    remarks: tuple[str, ...] = ()
    """What a diagnostic case says of the result (`cpjax.crosscheck.conformance.explain`)."""
    about: dict[str, Any] | None = None
    """Provenance, as the result states it."""
    figures: Figures | None = None
    """What a report draws; only if asked for."""

    @property
    def outcome(self) -> Outcome:
        """Exactly one of four; only a verdict passes."""
        if self.verdict is not None:
            return "pass" if self.verdict.passed else "fail"
        return "unsupported" if self.unsupported is not None and self.problem is None else "error"

    @property
    def passed(self) -> bool:
        """Only a verdict passes."""
        return self.verdict is not None and self.verdict.passed

    @property
    def reasons(self) -> list[str]:
        """Why not."""
        if self.verdict is not None:
            return self.verdict.reasons
        return [self.problem or self.unsupported or "there is no result"]

    def as_json(self) -> dict[str, Any]:
        """An object for machines; numbers that are not finite are null or "inf"."""
        numbers: dict[str, Any] = {}
        if self.verdict is not None:
            numbers = {k: v for k, v in asdict(replace(self.verdict, search=None)).items() if k != "search"}
            weights = self.verdict.chunk_weights
            numbers |= {
                "diagnosis": self.verdict.diagnosis,
                "chunk_weights": None if weights is None else weights.tolist(),
            }
        return {
            "case": self.case,
            "backend": self.backend,
            "compared_with": "dense (float64)",
            "precision": self.precision,
            "order": self.order,
            "outcome": self.outcome,
            "passed": self.passed,
            "reasons": self.reasons,
            "remarks": list(self.remarks),
            "seconds_per_step": _plain(self.seconds_per_step),
            "about": _plain(self.about),
            "verdict": _plain(numbers) if numbers else None,
        }


def judge_result(
    case: Case, path: Path, progress: Progress = lambda what, done, total: None, *, draw: bool = False
) -> Judged:
    """Judge the result of a case at `path`; whatever is wrong with the file is an error, never an exception.

    A note in its place (`path` with the suffix .json) says why there is none.
    """
    backend, note = path.parent.name, path.with_suffix(".json")
    try:
        if note.exists() and path.exists():
            raise InputError(f"is there, and a note that there is none ({note.name}); remove one of them")
        if note.exists():
            return _without_result(case, note)
        result = read_result(path, case)
    except InputError as error:
        return Judged(case.name, backend, None, None, None, None, f"{path.name} {error}")
    said: dict[str, Any] = how(case) | {"precision": result.precision, "order": result.order}
    try:
        verdict, remarks = _verdict(case, result, said, lambda done, total: progress(result.backend, done, total))
    except ValueError as error:  # the case itself cannot be judged
        return Judged(case.name, result.backend, result.precision, result.order, None, None, str(error))
    drawn = None
    if draw and "form" not in verdict.failed_tests:
        drawn = figures(question(case.query, *computed_on(case, result), **said), result.out)
    return Judged(
        case.name,
        result.backend,
        result.precision,
        result.order,
        result.about.get("seconds_per_step"),
        verdict,
        remarks=(*remarks, *read(case, result)),
        about=result.about,
        figures=drawn,
    )


def _verdict(
    case: Case, result: Result, said: dict[str, Any], progress: Callable[[int, int], None]
) -> tuple[Verdict, list[str]]:
    """The verdict on a result, and remarks. Keys and values that it made of a latent must be right too.

    Attention is judged on these, so that each of the two is right or wrong for itself.
    """
    key, value = computed_on(case, result)
    if case.latent is None or result.key_value is None:
        return judge(case.query, key, value, result.out, result.lse, **said, progress=progress), []
    is_real = np.asarray(case.kv_tokens.segment) != PAD
    found = check_expanded(case.latent, key, value, is_real)
    if not all(np.isfinite(x[is_real]).all() for x in (key, value)):
        reason = next(iter(found.reasons), "its keys or values are infinite: the product leaves what FP16 can hold")
        verdict = malformed(question(case.query, case.key, case.value, **said), reason)
        return replace(verdict, failed_tests=("expansion", "form")), []
    verdict = judge(case.query, key, value, result.out, result.lse, **said, progress=progress)
    remark = f"{found.differing:.2%} of its keys and values are not the FP16 number next to the exact product"
    if not found.reasons:
        return verdict, [remark]
    reasons, tests = [*found.reasons, *verdict.reasons], ("expansion", *verdict.failed_tests)
    return replace(verdict, passed=False, judgeable=True, reasons=reasons, failed_tests=tests), [remark]


def computed_on(case: Case, result: Result) -> tuple[np.ndarray, np.ndarray]:
    """The keys and values with which a result was computed: its own, if it made them of a latent."""
    return (case.key, case.value) if result.key_value is None else result.key_value


def how(case: Case) -> dict[str, Any]:
    """What the judge has to know of a case besides its arrays: arguments of `cpjax.crosscheck.judge`."""
    return {
        "scale": case.scale,
        "is_causal": case.is_causal,
        "q_positions": case.q_tokens.position,
        "kv_positions": case.kv_tokens.position,
        "segment_ids": (case.q_tokens.segment, case.kv_tokens.segment),
        "cp": case.cp,
        "layout": case.layout,
        "window": case.window,
    }


def _without_result(case: Case, path: Path) -> Judged:
    try:
        backend, note = read_note(path, case)
    except InputError as error:
        return Judged(case.name, path.parent.name, None, None, None, None, f"{path.name} {error}")
    problem, unsupported = (note.reason, None) if note.outcome == "error" else (None, note.reason)
    return Judged(case.name, backend, case.precision.get(backend), None, None, None, problem, unsupported)


def read_cases(folder: Path) -> list[Case]:
    """All cases of a folder, or one case file. Checksums (`SHA256SUMS`) are verified where the folder has some.

    Raises:
      InputError: there is none, or one of them is wrong.
    """
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give a folder of cases or one case file")
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if not paths:
        raise InputError(f"{folder} holds no case (*.safetensors)")
    verify(paths[0].parent)
    return [read_case(path) for path in paths]


def result_folders(results: Path) -> list[Path]:
    """The folders with results: `results` itself, or its subfolders, one a backend.

    Raises:
      InputError: it is no folder.
    """
    if not results.is_dir():
        raise InputError(f"{results} is no folder; give the folder that the results were written to")
    kinds = ("*.safetensors", "*.json")
    folders = [
        folder
        for folder in sorted(results.iterdir())
        if folder.is_dir() and any(path for kind in kinds for path in folder.glob(kind))
    ]
    return folders if folders and not any(results.glob("*.safetensors")) else [results]


def judge_folder(cases: list[Case], results: Path, progress: Progress, *, draw: bool = False) -> Iterator[Judged]:
    """Judge every case's result in every folder of results; a missing one is a failure."""
    for folder in result_folders(results):
        for case in cases:
            yield judge_result(case, folder / f"{case.name}.safetensors", progress, draw=draw)


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
    of_out = [f"{verdict.max_error:.2g}", _share(verdict.hard_ratio), f"{verdict.z:.2f}"]
    if math.isnan(verdict.lse_max_error):
        return [*of_out, "–", "–", "–"]
    return [*of_out, f"{verdict.lse_max_error:.2g}", _share(verdict.lse_hard_ratio), f"{verdict.lse_z:.2f}"]


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
    for outcome, are in (("fail", "NOT what correct arithmetic in their precision gives"), ("error", "errors")):
        if of[outcome]:
            names = ", ".join(sorted({one.case for one in of[outcome]}))
            said.append(f"{len(of[outcome])} of {len(judged)} results are {are}: {names}.")
    if said:
        return " ".join(said)
    if not of["pass"]:
        return "Nothing was judged: no backend supports any of the cases."
    names = sorted({BACKENDS.get(one.backend, one.backend) for one in of["pass"]}, reverse=True)
    agree = {1: "agrees", 2: "both agree"}.get(len(names), "all agree")
    where = f" in {len(of['pass'])} of {len(judged)} cases; the rest is unsupported" if of["unsupported"] else ""
    return (
        f"The {' and the '.join(names)} {agree} with dense attention, within what their rounding explains and no "
        f"more{where}."
    )


def all_passed(judged: list[Judged]) -> bool:
    """Whether everything that is supported passed, and something did."""
    outcomes = {one.outcome for one in judged}
    return "pass" in outcomes and outcomes <= {"pass", "unsupported"}


def _share(ratio: float) -> str:
    return f"{ratio:.0%}" if math.isfinite(ratio) and ratio < 100 else f"{ratio:.2g}×"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, and "inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value
