"""The judge's answer to one result. Runs in processes that never touch CUDA, and never raises."""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpjax.crosscheck import GradientVerdict, Verdict, judge, judge_gradients
from cpjax.trial.cuda.compute import Job
from cpjax.trial.cuda.planted import FAULTS, is_named
from cpjax.trial.cuda.tasks import Task
from cpjax.trial.gradients import OF_DTYPE, asked

MOST_BYTES = 15 * 2**20
"""Of arrays that are kept; inputs that would not fit follow from seed and task."""


class Answer(NamedTuple):
    """What the judge said of one result; z are those of out and lse, or of dq, dk and dv."""

    task: Task
    precision: str
    queries: int
    keys: int
    passed: bool
    judgeable: bool
    of_bound: float
    z: tuple[float, ...]
    scale_z_score: float
    failed_tests: tuple[str, ...]
    sentences: tuple[str, ...]
    """Of a result that did not pass: why, and what the diagnosis says."""
    named: bool
    """The diagnosis names the planted fault."""
    seconds: float
    error: str = ""
    """The judge itself failed."""

    @property
    def is_alarm(self) -> bool:
        """A correct result was called wrong, or the judge failed."""
        return bool(self.error) or (self.task.fault not in FAULTS and self.judgeable and not self.passed)


def answer(job: Job, folder: Path | None = None) -> Answer:
    """Judge a result; the arrays of an alarm are left in the folder."""
    started = time.monotonic()
    try:
        one = _of_gradients(job) if job.gradients else _of_out(job)
    # One result that breaks the judge is a finding, and must not stop the trial of the others.
    except Exception as error:
        nan = float("nan")
        said = f"{type(error).__name__}: {error}"[:2000]
        shape = (job.problem.query.shape[1], job.problem.key.shape[1])
        one = Answer(job.task, "", *shape, False, True, nan, (nan,), nan, ("error",), (), False, 0.0, said)
    one = one._replace(seconds=round(time.monotonic() - started, 2))
    if one.is_alarm and folder is not None:
        keep(job, folder / f"{job.task.stage}-{job.task.number}.npz")
    return one


def _of_out(job: Job) -> Answer:
    p = job.problem
    words = {**p.judge_arguments(), "layout": "contiguous", "precision": job.precision}
    verdict = judge(p.query, p.key, p.value, job.out, job.lse, **words)
    diagnosis = [] if verdict.passed or not verdict.judgeable else verdict.diagnosis
    answered = _answered(job, verdict, verdict.hard_ratio, (verdict.z, verdict.lse_z), (*verdict.reasons, *diagnosis))
    named = is_named(job.task.fault, diagnosis)
    return answered._replace(scale_z_score=abs(verdict.scale_z_score), named=named)


def _of_gradients(job: Job) -> Answer:
    p = job.problem
    profile = OF_DTYPE[job.task.dtype]
    tensors = (p.query, p.key, p.value, job.out, job.lse, job.dout, *job.gradients)
    how = {"rounded_every": job.rounded_every, "ds": job.ds}
    verdict = judge_gradients(*tensors, precision=profile, **asked(p), **how)
    wrong = () if verdict.passed else tuple(one.sentence for one in verdict.tensors if not one.passed)
    of_bound, z = max(one.of_bound for one in verdict.tensors), tuple(one.z for one in verdict.tensors)
    return _answered(job, verdict, of_bound, z, (*wrong, *verdict.causes))


def _answered(
    job: Job,
    verdict: Verdict | GradientVerdict,
    of_bound: float,
    z: tuple[float, ...],
    sentences: tuple[str, ...],
) -> Answer:
    """What both kinds of verdict say alike; no z of the scale, no fault named, and no seconds yet."""
    return Answer(
        task=job.task,
        precision=verdict.precision,
        queries=job.problem.query.shape[1],
        keys=job.problem.key.shape[1],
        passed=verdict.passed,
        judgeable=verdict.judgeable,
        of_bound=of_bound,
        z=z,
        scale_z_score=float("nan"),
        failed_tests=verdict.failed_tests,
        sentences=sentences,
        named=False,
        seconds=0.0,
    )


def keep(job: Job, path: Path) -> None:
    """The result, and the inputs if there is room, as plain arrays: BF16 as its bits, uint16, named "…:bfloat16"."""
    p = job.problem
    names = ("dq", "dk", "dv")
    result = {"out": job.out, "lse": job.lse, **dict(zip(names, job.gradients, strict=False))}
    inputs = {"query": p.query, "key": p.key, "value": p.value, "dout": job.dout}
    places = {"q_positions": p.q_positions, "kv_positions": p.kv_positions, "segments": p.segments}
    size = sum(x.nbytes for some in (result, inputs) for x in some.values() if x is not None)
    some = {**result, **places, **(inputs if size < MOST_BYTES else {})}
    arrays: dict[str, Any] = {
        (f"{name}:bfloat16" if x.dtype.name == "bfloat16" else name): (
            x.view(np.uint16) if x.dtype.name == "bfloat16" else x
        )
        for name, x in some.items()
        if x is not None
    }
    words = {"scale": p.scale, "is_causal": p.is_causal, "window": -1 if p.window is None else p.window}
    arrays |= {name: np.array(x) for name, x in words.items()}
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(unfinished, path)
