"""What was found: JSON, tables for people, and the arrays of a few alarms. Written again and again while it runs."""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cpjax.trial.cuda.judging import Answer
from cpjax.trial.cuda.planted import FAULTS, is_named
from cpjax.trial.cuda.tasks import STAGES, Task
from cpjax.trial.false_alarms import rate_bound
from cpjax.trial.tables import markdown

MOST_ARRAYS = 5
"""Alarms whose arrays are handed over."""

MOST_ALARMS = 200
"""Alarms that are told one by one."""

LARGEST = 16 * 2**20
"""Bytes of one file of arrays."""


@dataclass
class Findings:
    """Everything that is known so far."""

    seed: int
    asked_seconds: float
    machine: dict[str, Any]
    left_out: dict[str, str]
    answers: list[Answer] = field(default_factory=list)
    refused: dict[tuple[str, str, str, str], list[int]] = field(default_factory=dict)
    """(stage, kernel, dtype, message) → numbers of the tasks."""
    handed_over: Counter[str] = field(default_factory=Counter)
    """Results that were handed to the judge, by stage."""
    seconds: float = 0.0
    ended: str = "still running"

    def refuse(self, task: Task, message: str) -> bool:
        """The kernel did not compute this one. Returns whether that is the first of its kind."""
        numbers = self.refused.setdefault((task.stage, task.kernel, task.dtype, message), [])
        numbers.append(task.number)
        return len(numbers) == 1

    @property
    def correct(self) -> list[Answer]:
        """Answers on results that are right."""
        return [one for one in list(self.answers) if one.task.fault not in FAULTS]

    @property
    def alarms(self) -> list[Answer]:
        """Correct results that were called wrong."""
        found = [one for one in self.correct if one.is_alarm]
        return sorted(found, key=lambda one: (STAGES.index(one.task.stage), one.task.number))

    @property
    def line(self) -> str:
        """How far it is."""
        done = Counter(one.task.stage for one in list(self.answers))
        stages = ", ".join(f"{stage} {done[stage]}/{self.handed_over[stage]}" for stage in STAGES)
        refused = sum(map(len, list(self.refused.values())))
        return f"{self.seconds:5.0f} s  judged {stages}; {len(self.alarms)} called wrong, {refused} refused by kernels"


def rows(found: list[Answer]) -> list[dict[str, Any]]:
    """One for each stage, kernel and dtype: counts, and the largest of each measure."""
    groups: dict[tuple[str, str, str, str], list[Answer]] = {}
    for one in found:
        groups.setdefault((one.task.stage, one.task.kernel, one.task.dtype, one.precision), []).append(one)
    order = sorted(groups, key=lambda group: (STAGES.index(group[0]), *group[1:]))
    return [_row(group, groups[group]) for group in order]


def _row(group: tuple[str, str, str, str], some: list[Answer]) -> dict[str, Any]:
    judged = [one for one in some if one.judgeable and not one.error]
    z = np.array([one.z for one in judged if np.isfinite(one.z[0])] or [[0.0]])
    with np.errstate(invalid="ignore"):
        most = np.where(np.isnan(z), 0.0, z).max(axis=0)
    scale = [one.scale_z_score for one in judged if np.isfinite(one.scale_z_score)]
    return {
        **dict(zip(("stage", "kernel", "dtype", "judged_as"), group, strict=True)),
        "results": len(some),
        "alarms": sum(one.is_alarm for one in some),
        "not_judgeable": sum(not one.judgeable for one in some),
        "median_z": [float(x) for x in np.median(np.where(np.isnan(z), 0.0, z), axis=0)],
        "z": [float(x) for x in most],
        "bound": max((one.of_bound for one in judged if np.isfinite(one.of_bound)), default=0.0),
        "scale": max(scale, default=0.0),
        "judge_seconds": round(sum(one.seconds for one in some), 1),
    }


def table(found: Findings) -> str:
    """For people: correct results, faults, alarms, what was refused."""
    head = ("stage", "kernel", "dtype", "judged as", "results", "called wrong", "not judged", "median z", "z", "bound")

    def line(row: dict[str, Any]) -> list[str]:
        z = (" ".join(f"{x:.2f}" for x in row[name]) for name in ("median_z", "z"))
        counts = (f"{row[name]:,}" for name in ("results", "alarms", "not_judgeable"))
        return [row["stage"], row["kernel"], row["dtype"], row["judged_as"], *counts, *z, f"{row['bound']:.2f}"]

    correct = found.correct
    judged = sum(one.judgeable for one in correct)
    bound = f"{rate_bound(len(found.alarms), judged):.2g}" if judged else "none"
    told = ("card", "nvidia_smi", "python", "torch", "cuda", "cudnn", "triton", "jax", "numpy", "scipy")
    parts = [
        "; ".join(f"{name} {found.machine.get(name)}" for name in told),
        f"seed {found.seed}, {found.seconds:.0f} s, {found.ended}",
        "Correct results; z of out and lse, or of dq, dk and dv, the largest",
        markdown(head, map(line, rows(correct))),
        f"{len(found.alarms)} of {judged:,} correct results were called wrong "
        f"(95 % upper limit of the rate for this mix: {bound}).",
        "\n".join(map(_alarm, found.alarms[:MOST_ALARMS])),
        "Planted faults",
        markdown(("fault", "kernel", "dtype", "causal", "the judge", "named", "it says"), map(_fault, _faults(found))),
        "Refused by the kernel, or left out",
        "\n".join(_refused(found)) or "none",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _faults(found: Findings) -> list[Answer]:
    some = [one for one in list(found.answers) if one.task.fault in FAULTS]
    return sorted(some, key=lambda one: (list(FAULTS).index(one.task.fault), one.task.number))


def _fault(one: Answer) -> list[str]:
    caught = "failed itself" if one.error else "passes" if one.passed else "caught" if one.judgeable else "not judged"
    said = next((x for x in one.sentences if is_named(one.task.fault, [x])), (one.error, *one.sentences)[-1])
    causal = "yes" if one.task.is_causal else "no"
    return [
        one.task.fault,
        one.task.kernel,
        one.task.dtype,
        causal,
        caught,
        "yes" if one.named else "",
        said[:100].replace("|", "/"),
    ]


def _alarm(one: Answer) -> str:
    t = one.task
    z = " ".join(f"{x:.3g}" for x in one.z)
    what = f"{one.queries:,} × {one.keys:,}, z {z}, bound {one.of_bound:.3g}, scale {one.scale_z_score:.3g}"
    said = "; ".join(one.sentences[:3]) or one.error
    return f"- {t.stage} {t.number}, {t.kernel}, {t.dtype}, {t.data} ({what}): {', '.join(one.failed_tests)}: {said}"


def _refused(found: Findings) -> list[str]:
    lines = [f"- {name}: {why}" for name, why in found.left_out.items()]
    for (stage, kernel, dtype, message), numbers in sorted(found.refused.copy().items()):
        lines.append(f"- {stage}, {kernel}, {dtype}, {len(numbers)} times, first number {numbers[0]}: {message}")
    return lines


def as_json(found: Findings) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "machine": found.machine,
        "seed": found.seed,
        "asked_seconds": found.asked_seconds,
        "seconds": round(found.seconds, 1),
        "ended": found.ended,
        "left_out": found.left_out,
        "refused": [
            {**dict(zip(("stage", "kernel", "dtype", "message"), key, strict=True)), "numbers": numbers[:20]}
            for key, numbers in found.refused.copy().items()
        ],
        "handed_over": dict(found.handed_over.copy()),
        "judged": dict(Counter(one.task.stage for one in list(found.answers))),
        "rows": [{name: _value(x) for name, x in row.items()} for row in rows(found.correct)],
        "alarms": [_plain(one) for one in found.alarms[:MOST_ALARMS]],
        "faults": [_plain(one) for one in _faults(found)],
        "long": [_plain(one) for one in found.correct if one.task.stage == "long"],
    }


def _plain(one: Answer) -> dict[str, Any]:
    task, rest = one.task._asdict(), one._asdict()
    del rest["task"]
    return {**task, **{name: _value(x) for name, x in rest.items()}}


def _value(x: Any) -> Any:
    """JSON has no NaN and no infinity: what was not measured is null."""
    if isinstance(x, float | np.floating):
        return float(x) if np.isfinite(x) else None
    return [_value(y) for y in x] if isinstance(x, tuple | list) else x


def write(found: Findings, folder: Path, arrays: Path) -> None:
    """report.json, table.md and at most five files of arrays, the smallest of those of different kernels first."""
    for name, text in (("report.json", json.dumps(as_json(found), indent=1)), ("table.md", table(found))):
        unfinished = folder / f"{name}.part"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, folder / name)
    there = {path.name for path in folder.glob("*.npz")}
    seen: Counter[str] = Counter()
    choice = []
    for one in found.alarms:
        path = arrays / f"{one.task.stage}-{one.task.number}.npz"
        if path.exists() and path.stat().st_size <= LARGEST:
            kind = f"{one.task.stage} {one.task.kernel}"
            choice.append((seen[kind], path.stat().st_size, path))
            seen[kind] += 1
    for _, _, path in sorted(choice):
        if len(there) < MOST_ARRAYS and path.name not in there:
            shutil.copyfile(path, folder / path.name)
            there.add(path.name)
