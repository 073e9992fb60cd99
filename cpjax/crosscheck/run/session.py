"""Cases and results judged: one entry for every result that should be there."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cpjax.crosscheck.conformance.explain import read
from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.files.folders import result_folders
from cpjax.crosscheck.files.note import note_beside, read_note
from cpjax.crosscheck.files.result import Result, read_result
from cpjax.crosscheck.judge import judge_problem
from cpjax.crosscheck.judging.expansion import check_expanded
from cpjax.crosscheck.judging.problem import Problem, checked_problem
from cpjax.crosscheck.judging.verdict import Verdict, malformed
from cpjax.crosscheck.run.workers import each
from cpjax.errors import InputError
from cpjax.mask import PAD

Progress = Callable[[str, int, int], None]
"""Called with what is judged, rows done, and their total."""

FEW = 8
"""Results a process, at least, where the number of processes is not said: to start one takes a second."""

Outcome = Literal["pass", "fail", "unsupported", "error"]


class Shown(NamedTuple):
    """What figures and error budgets are made of."""

    problem: Problem
    out: np.ndarray
    lse: np.ndarray | None


@dataclass(frozen=True)
class Judged:
    """One result and the verdict on it; `error` or `unsupported` where there is no result that could be judged."""

    case: str
    backend: str
    precision: str | None = None
    order: str | None = None
    seconds_per_step: list[list[float]] | None = None
    verdict: Verdict | None = None
    error: str | None = None
    """What went wrong before there was a result."""
    unsupported: str | None = None
    """Why the backend does not compute this case."""
    remarks: tuple[str, ...] = ()
    """What was seen and does not count; what a diagnostic case says (`cpjax.crosscheck.conformance.explain`)."""
    about: dict[str, Any] | None = None
    """Provenance, as the result states it."""
    shown: Shown | None = None
    """Only if asked for, and if `out` has the right form."""

    @property
    def outcome(self) -> Outcome:
        """Exactly one of four; only a verdict passes."""
        if self.verdict is not None:
            return "pass" if self.verdict.passed else "fail"
        return "unsupported" if self.unsupported is not None and self.error is None else "error"

    @property
    def passed(self) -> bool:
        """Only a verdict passes."""
        return self.verdict is not None and self.verdict.passed

    @property
    def reasons(self) -> list[str]:
        """Why not."""
        if self.verdict is not None:
            return self.verdict.reasons
        return [self.error or self.unsupported or "there is no result"]

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
    backend = path.parent.name
    try:
        note = note_beside(path)
        if note is not None:
            return _without_result(case, note)
        result = read_result(path, case)
    except InputError as error:
        return Judged(case.name, backend, error=f"{path.name} {error}")
    try:
        problem, verdict, remarks = _verdict(case, result, lambda done, total: progress(result.backend, done, total))
    except ValueError as error:  # the case itself cannot be judged
        return Judged(case.name, result.backend, result.precision, result.order, error=str(error))
    return Judged(
        case.name,
        result.backend,
        result.precision,
        result.order,
        seconds_per_step=result.about.get("seconds_per_step"),
        verdict=verdict,
        remarks=(*remarks, *verdict.remarks, *read(case, result)),
        about=result.about,
        shown=Shown(problem, result.out, result.lse) if draw and "form" not in verdict.failed_tests else None,
    )


def problem_of(case: Case, result: Result) -> Problem:
    """What a result answers: the case, with the keys and values with which the result was computed.

    Raises:
      ValueError: the case cannot be judged.
    """
    key, value = (case.key, case.value) if result.key_value is None else result.key_value
    return _asked(case, key, value, result)


def _asked(case: Case, key: np.ndarray, value: np.ndarray, result: Result) -> Problem:
    return checked_problem(case.query, key, value, **how(case), precision=result.precision, order=result.order)


def how(case: Case) -> dict[str, Any]:
    """What the judge has to know of a case besides its arrays: arguments of `cpjax.crosscheck.judge`."""
    return {
        "scale": case.scale,
        "is_causal": case.is_causal,
        "q_positions": case.q_tokens.position,
        "kv_positions": case.kv_tokens.position,
        "segment_ids": (case.q_tokens.segment, case.kv_tokens.segment),
        "partition": case.partition,
        "window": case.window,
        **case.logit_options,
    }


def _verdict(
    case: Case, result: Result, progress: Callable[[int, int], None]
) -> tuple[Problem, Verdict, tuple[str, ...]]:
    """The problem, the verdict, and remarks. Keys and values that were made of a latent must be right too.

    Attention is judged on these, so that each of the two is right or wrong for itself.
    """
    if case.latent is None or result.key_value is None:
        problem = problem_of(case, result)
        return problem, judge_problem(problem, result.out, result.lse, progress=progress), ()
    is_real = np.asarray(case.kv_tokens.segment) != PAD
    found = check_expanded(case.latent, *result.key_value, is_real)
    if not all(np.isfinite(x[is_real]).all() for x in result.key_value):
        reason = next(iter(found.reasons), "its keys or values are infinite: the product leaves what FP16 can hold")
        problem = _asked(case, case.key, case.value, result)
        return problem, replace(malformed(problem, reason), failed_tests=("expansion", "form")), ()
    problem = problem_of(case, result)
    verdict = judge_problem(problem, result.out, result.lse, progress=progress)
    remarks = (f"{found.differing:.2%} of its keys and values are not the FP16 number next to the exact product",)
    if not found.reasons:
        return problem, verdict, remarks
    reasons, tests = [*found.reasons, *verdict.reasons], ("expansion", *verdict.failed_tests)
    return problem, replace(verdict, passed=False, judgeable=True, reasons=reasons, failed_tests=tests), remarks


def _without_result(case: Case, path: Path) -> Judged:
    try:
        backend, note = read_note(path, case)
    except InputError as error:
        return Judged(case.name, path.parent.name, error=f"{path.name} {error}")
    why: dict[str, Any] = {note.outcome: note.reason}  # "error" or "unsupported"
    return Judged(case.name, backend, case.precision.get(backend), **why)


def judge_folder(
    cases: list[Case], results: Path, progress: Progress, *, draw: bool = False, workers: int | None = None
) -> Iterator[Judged]:
    """Judge every case's result in every folder of results, in this order; a missing one is a failure.

    Args:
      workers: processes that judge; None is all processors, or one where there is little to judge.
    """
    asked = [(case, folder / f"{case.name}.safetensors") for folder in result_folders(results) for case in cases]
    if workers is None:
        workers = max(1, min(os.cpu_count() or 1, len(asked) // FEW))
    if workers == 1 or len(asked) == 1:
        for case, path in asked:
            yield judge_result(case, path, progress, draw=draw)
        return
    found: dict[int, Judged] = {}
    for number, judged in each(partial(_judge_numbered, draw), list(enumerate(asked)), workers):
        found[number] = judged
        progress(f"results, by {workers}", len(found), len(asked))
    yield from (found[number] for number in range(len(asked)))


def _judge_numbered(draw: bool, numbered: tuple[int, tuple[Case, Path]]) -> tuple[int, Judged]:
    """In another process. The diagnosis is made there, too: a search cannot be sent, what it found can."""
    number, (case, path) = numbered
    judged = judge_result(case, path, draw=draw)
    if judged.verdict is None or judged.verdict.search is None:
        return number, judged
    explained = replace(judged.verdict, search=partial(_found, judged.verdict.explanation))
    return number, replace(judged, verdict=explained)


def _found(explanation: Any) -> Any:
    return explanation


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, and "inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value
