"""Results of several backends held against each other, once each has passed against dense."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.files.result import Result, read_result
from cpjax.crosscheck.judging.pairwise import Agreement, agreement
from cpjax.crosscheck.run.session import Judged, Progress, problem_of
from cpjax.wording import counted


@dataclass(frozen=True)
class Compared:
    """Two backends' results of a case."""

    case: str
    backends: tuple[str, str]
    agreement: Agreement

    def as_json(self) -> dict[str, Any]:
        """An object for machines; what is not finite is null."""
        numbers = {k: None if x != x or x == float("inf") else x for k, x in asdict(self.agreement).items()}
        return {"case": self.case, "backends": list(self.backends)} | numbers


def compare_folder(
    cases: list[Case], results: Path, judged: list[Judged], progress: Progress = lambda what, done, total: None
) -> Iterator[Compared]:
    """Each pair of results of a case that passed; the others are wrong already."""
    for case in cases:
        passed = [one.backend for one in judged if one.case == case.name and one.passed]
        read = {name: read_result(results / name / f"{case.name}.safetensors", case) for name in passed}
        for one, two in combinations(passed, 2):
            report = partial(progress, f"{one} beside {two}")
            yield Compared(case.name, (one, two), compare(case, read[one], read[two], report))


def compare(
    case: Case, one: Result, two: Result, progress: Callable[[int, int], None] = lambda done, total: None
) -> Agreement:
    """Are two results of a case consistent with each other?

    Raises:
      ValueError: the case itself cannot be judged.
    """
    problem, other = problem_of(case, one), problem_of(case, two)
    own_keys = case.latent is not None
    return agreement(problem, other, (one.out, one.lse), (two.out, two.lse), own_keys=own_keys, progress=progress)


def between_sentence(compared: list[Compared]) -> str:
    """What all comparisons mean; empty where there was nothing to compare."""
    if not compared:
        return ""
    apart = [one for one in compared if not one.agreement.agrees]
    if apart:
        said = (f"{one.case}, {' and '.join(one.backends)}: {one.agreement.reasons[0]}" for one in apart)
        return (
            f"{len(apart)} of {counted(len(compared), 'pair')} {'does' if len(apart) == 1 else 'do'} NOT "
            f"agree with each other. {'; '.join(said)}."
        )
    worst = max(one.agreement.z for one in compared)
    return f"Held against each other, they differ by what their rounding explains and no more (z at most {worst:.2f})."
