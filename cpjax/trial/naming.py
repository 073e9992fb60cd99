"""How often is the cause right? Reported faults in many settings are diagnosed: what the sentences say, counted.

The answer to one fault is the worst of its sentences:

    wrong          a sentence names a cause, and none of its alternatives is right
    unknown        no cause is named
    in part        what is named is right, but for some query chunks the answer is "unknown"
    among equals   a right name stands among others that the outputs cannot tell apart
    alone          every name is right

Two kinds of faults cannot be seen: "changes no bit" of what is handed to the judge, and "within rounding", where the
judge passes it. Of faults without an entry every name is wrong.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from cpjax.crosscheck import judge
from cpjax.crosscheck.diagnosis.unwritten import SAW_NOTHING
from cpjax.crosscheck.diagnosis.words import UNKNOWN
from cpjax.crosscheck.judging.verdict import Verdict
from cpjax.crosscheck.run.workers import each
from cpjax.trial.emulators import PROFILES
from cpjax.trial.fault_case import Case, Name, Reported, case_of
from cpjax.trial.faults import changes
from cpjax.trial.problem import Result
from cpjax.trial.reported_faults import REPORTED
from cpjax.trial.settings import SETTINGS, Setting, problem_of
from cpjax.trial.unnamed_faults import UNNAMED

OUTCOMES = ("wrong", "unknown", "in part", "among equals", "alone")
UNSEEN = ("within rounding", "changes no bit")

WHERE = re.compile(r"[\d,]+ of [\d,]+ judged rows (is|are) wrong: |Of \d+ columns only |At batch ")
EQUALS = re.compile(r"^one of \d+ that the outputs cannot tell apart: ")


class Task(NamedTuple):
    """One fault in one setting, judged with lse or from `out` alone."""

    fault: str
    setting: str
    with_lse: bool
    seed: int


class Answer(NamedTuple):
    """What was said of it. `told_where`: a sentence says which rows, heads, requests or chunks are wrong."""

    task: Task
    outcome: str
    told_where: bool
    sentences: tuple[str, ...]


def tasks_of(faults: Sequence[str], settings: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """All of them."""
    return [
        Task(fault, setting, with_lse, seed)
        for seed in seeds
        for setting in settings
        for fault in faults
        for with_lse in (True, False)
    ]


def answers(tasks: Sequence[Task], workers: int) -> Iterator[Answer | None]:
    """Of each task, in any order; None of a fault that its setting cannot have."""
    return each(answer_to, tasks, workers, chunk=4)


def answer_to(task: Task) -> Answer | None:
    """None where the setting has nothing that could go wrong so."""
    fault, setting = (REPORTED | UNNAMED)[task.fault], SETTINGS[task.setting]
    case = case_in(fault, setting, task)
    made = fault.make(case)
    if made is None:
        return None
    wrong = in_one_head(made.result, case) if setting.one_head else made.result
    given = wrong if task.with_lse else wrong._replace(lse=case.right.lse)
    if not changes(given, case.right):
        return Answer(task, "changes no bit", False, ())
    verdict = verdict_on(case, given, with_lse=task.with_lse)
    if verdict.passed:
        return Answer(task, "within rounding", False, ())
    if not verdict.judgeable:
        raise AssertionError(f"{task} is not judgeable: {verdict.reasons}")
    said = tuple(verdict.diagnosis)
    return Answer(task, outcome(said, made.names), any(map(tells_where, said)), said)


def case_in(fault: Reported, setting: Setting, task: Task) -> Case:
    """The setting's problem with what the fault needs."""
    rng = np.random.default_rng([task.seed, crc32(f"{task.setting}, {task.fault}".encode())])
    problem = fault.states(problem_of(setting, rng), rng)
    return case_of(setting, problem, PROFILES[setting.profile], rng)


def verdict_on(case: Case, result: Result, *, with_lse: bool) -> Verdict:
    """The judge's."""
    p, lse = case.problem, result.lse if with_lse else None
    more: dict[str, Any] = {"precision": case.setting.profile, "order": case.setting.order}
    return judge(p.query, p.key, p.value, result.out, lse, **p.judge_arguments(), **more)


def in_one_head(wrong: Result, case: Case) -> Result:
    """Wrong in the last head but one, right in the others."""
    mine = np.arange(case.setting.heads) == case.setting.heads - 2
    return Result(np.where(mine[:, None], wrong.out, case.right.out), np.where(mine, wrong.lse, case.right.lse))


def outcome(sentences: Sequence[str], names: Sequence[Name]) -> str:
    """The worst that is said.

    >>> outcome(["no causal mask was applied (leaves …)."], [Name("no causal mask")])
    'alone'
    >>> outcome(["lse has the other sign (leaves …)."], [Name("no causal mask")])
    'wrong'
    """
    bare = [sentence.removeprefix("Besides: ") for sentence in sentences]
    found, unknown = [], not bare
    for sentence in bare:
        if sentence.startswith(UNKNOWN.rstrip(".")):
            unknown = True
        elif not only_where(sentence):
            right = [is_right(one, names) for one in EQUALS.sub("", sentence).split("; or ")]
            found.append("alone" if all(right) else "among equals" if any(right) else "wrong")
    if not found:
        return "unknown"
    if "wrong" in found:
        return "wrong"
    return "in part" if unknown else min(found, key=OUTCOMES.index)


def only_where(sentence: str) -> bool:
    """Which rows are wrong, hold a NaN, or are zero for whatever reason: no cause."""
    return WHERE.match(sentence) is not None or SAW_NOTHING in sentence


def tells_where(sentence: str) -> bool:
    """Rows, heads, requests, columns, or query chunks."""
    return only_where(sentence) or (sentence.startswith(UNKNOWN.rstrip(".")) and "(query chunk" in sentence)


def is_right(said: str, names: Sequence[Name]) -> bool:
    """Whether one of the names is in what is said, its number included."""
    for name in names:
        found = re.search(name.pattern, said)
        if found and (name.number is None or abs(float(found[1]) / name.number - 1) <= name.tolerance):
            return True
    return False


def table(found: Sequence[Answer], key: str) -> dict[str, Counter]:
    """Outcomes by `fault` or by `setting`."""
    counts: dict[str, Counter] = {}
    for answer in found:
        counts.setdefault(getattr(answer.task, key), Counter())[answer.outcome] += 1
    return counts


def counts(found: Sequence[Answer]) -> Counter:
    """All outcomes."""
    return Counter(answer.outcome for answer in found)


def summary(found: Sequence[Answer]) -> str:
    """In a sentence: how many, how many of them could be seen, and what was said of these."""
    count = counts(found)
    visible = [answer for answer in found if answer.outcome not in UNSEEN]
    said = ", ".join(f"{name} {count[name]:,}" for name in OUTCOMES)
    where = sum(answer.told_where for answer in visible)
    return (
        f"{len(found):,} faults: {count['changes no bit']:,} change no bit, {count['within rounding']:,} are within "
        f"rounding; of {len(visible):,} that can be seen: {said}; where is told of {where:,}."
    )
