"""Folders of layer cases and their results: one entry for every result that should be there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cpjax.crosscheck.files.checksums import verify
from cpjax.crosscheck.files.folders import result_folders
from cpjax.crosscheck.files.note import note_beside, read_note
from cpjax.crosscheck.layer.case import FORMAT, LayerCase, read_layer_case
from cpjax.crosscheck.layer.judge import judge_layer
from cpjax.crosscheck.layer.result import read_layer_result
from cpjax.crosscheck.layer.verdict import LayerVerdict
from cpjax.errors import InputError

Progress = Callable[[str, int, int], None]
"""Called with what is judged, stages done, and their total."""


@dataclass(frozen=True)
class JudgedLayer:
    """One result and the verdict on it; `error` or `unsupported` where there is no result that could be judged."""

    case: str
    backend: str
    verdict: LayerVerdict | None = None
    error: str | None = None
    unsupported: str | None = None
    about: dict[str, Any] | None = None
    """Provenance, as the result states it."""

    @property
    def outcome(self) -> str:
        """pass, fail, unsupported or error; only a verdict passes."""
        if self.verdict is not None:
            return "pass" if self.verdict.passed else "fail"
        return "unsupported" if self.unsupported is not None else "error"

    def as_json(self) -> dict[str, Any]:
        """An object for machines."""
        reasons = [x for x in (self.error, self.unsupported) if x is not None]
        if self.verdict is not None:
            reasons = self.verdict.sentences()
        found = {"case": self.case, "backend": self.backend, "outcome": self.outcome}
        found |= {"passed": self.outcome == "pass", "reasons": reasons, "about": self.about}
        return found | {"verdict": None if self.verdict is None else self.verdict.as_json()}


def are_layers(cases: Path) -> bool:
    """Whether the first case of a folder, or this case, is one of a layer; what cannot be read is none."""
    paths = sorted(cases.glob("*.safetensors"))[:1] if cases.is_dir() else [cases]
    try:
        for path in paths:
            with safe_open(path, framework="numpy") as file:
                return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, TypeError, ValueError):
        pass  # whoever reads it says what is wrong with it
    return False


def read_layer_cases(cases: Path) -> list[LayerCase]:
    """All cases of a folder, or one case file. Checksums are verified where the folder has some.

    Raises:
      InputError: one of them is wrong, or no case of a layer.
    """
    paths = sorted(cases.glob("*.safetensors")) if cases.is_dir() else [cases]
    verify(paths[0].parent)
    return [read_layer_case(path) for path in paths]


def judge_layers(
    cases: list[LayerCase], results: Path, progress: Progress = lambda what, done, total: None
) -> Iterator[JudgedLayer]:
    """Judge every case's result in every folder of results, in this order; a missing one is an error.

    Raises:
      InputError: `results` is no folder.
    """
    for folder in result_folders(results):
        for case in cases:
            yield _judged(case, folder / f"{case.name}.safetensors", progress)


def _judged(case: LayerCase, path: Path, progress: Progress) -> JudgedLayer:
    backend = path.parent.name
    try:
        note = note_beside(path)
        if note is not None:
            backend, said = read_note(note, case)
            error, unsupported = (said.reason, None) if said.outcome == "error" else (None, said.reason)
            return JudgedLayer(case.name, backend, error=error, unsupported=unsupported)
        result = read_layer_result(path, case)
    except InputError as error:
        return JudgedLayer(case.name, backend, error=f"{path.name} {error}")
    verdict = judge_layer(case, result, lambda done, total: progress(f"{case.name}, {result.backend}", done, total))
    return JudgedLayer(case.name, result.backend, verdict, about=result.about)
