"""Kernels compute in this process, the judge answers in others, until there is nothing more to do or the clock ends it.

The judging processes start before CUDA does, are told that there is none, and import neither torch nor JAX.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpjax.crosscheck.run.workers import THREADS
from cpjax.trial.cuda import card, kernels, report
from cpjax.trial.cuda.compute import Job, computed
from cpjax.trial.cuda.judging import Answer, answer
from cpjax.trial.cuda.tasks import Task, tasks

COMPUTED = 0.92
"""Share of the time after which nothing new is computed: the rest is for what is still to be judged."""

COMPILED = 0.45
"""Share of the time after which nothing more is compiled for one shape."""

EVERY = 10.0
"""Seconds between two reports."""

GRACE = 20.0
"""Seconds past the end after which a kernel that hangs is left, and the process ended."""

Give = Callable[[Job], None]


def run(
    folder: Path,
    *,
    seconds: float,
    workers: int,
    device: str = "cuda",
    seed: int = 0,
    given: Iterable[Task] | None = None,
    say: Callable[[str], None] = print,
) -> report.Findings:
    """Try the kernels, and write what is found into the folder, also when it is stopped early.

    Args:
      workers: processes that judge; 0 is none but this one.
      device: "cuda", or "cpu" for those kernels that run there too.
      given: what to do, for tests; None is everything, without end.
    """
    started = time.monotonic()
    absent = kernels.missing(device)
    names = [name for name in kernels.KERNELS if name not in absent]
    found = report.Findings(seed, seconds, {}, absent)
    with tempfile.TemporaryDirectory() as spool, _judges(workers, found, Path(spool), say) as (give, waiting, end):
        stop = threading.Event()

        def tell() -> None:
            found.seconds = time.monotonic() - started
            report.write(found, folder, Path(spool))
            say(found.line)

        def watch() -> None:
            while not stop.wait(EVERY):
                if time.monotonic() - started > seconds + GRACE:
                    found.ended = "ended: something hung"
                    try:
                        tell()
                        end()
                        sys.stdout.flush()
                    finally:
                        os._exit(3)
                tell()

        # JAX would take most of the card's memory for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        found.machine = card.described(device)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            found.ended = _compute(
                tasks(names, with_long=device == "cuda") if given is None else given,
                found,
                give,
                waiting,
                started,
                seconds,
                device,
                workers,
                say,
            )
            while waiting() and time.monotonic() - started < seconds:
                time.sleep(0.05)
            if left := waiting():
                found.ended += f"; {left} results were not judged in time"
        except KeyboardInterrupt:
            found.ended = "interrupted"
        finally:
            signal.signal(signal.SIGTERM, before)
            stop.set()
            watcher.join()
            end()
            tell()
    return found


def _compute(
    some: Iterable[Task],
    found: report.Findings,
    give: Give,
    waiting: Callable[[], int],
    started: float,
    seconds: float,
    device: str,
    workers: int,
    say: Callable[[str], None],
) -> str:
    """Compute until the end of the tasks or of the time; returns which it was."""
    most_waiting = 6 * max(workers, 1)
    not_compiled: dict[tuple[str, str, bool], str] = {}
    for task in some:
        # Short ones wait for the judges; long ones and those of one shape are a queue that keeps them busy.
        while task.stage in ("drawn", "gradients") and waiting() >= most_waiting and _left(started, seconds) > 0:
            time.sleep(0.005)
        if _left(started, seconds) <= 0:
            return "ended by the clock"
        case = (task.kernel, task.dtype, task.is_causal)
        if task.stage == "compiled" and case in not_compiled:
            found.refuse(task, not_compiled[case])
            continue
        if task.stage == "compiled" and _left(started, seconds) < seconds * (COMPUTED - COMPILED):
            found.refuse(task, "not tried: no time left to compile")
            continue
        try:
            job = computed(found.seed, task, device)
        # Whatever a kernel raises, the others are tried.
        except Exception as error:
            message = card.first_line(error)
            if found.refuse(task, message):
                say(f"refused: {task.stage} {task.number}, {task.kernel}, {task.dtype}: {message}")
            not_compiled[case] = message
            if broken := _broken(device):
                return f"ended: CUDA answers no more after {task.kernel}, {task.stage} {task.number}: {broken}"
            continue
        if job is not None:
            found.handed_over[task.stage] += 1
            give(job)
    return "all tasks were done"


def _left(started: float, seconds: float) -> float:
    return started + seconds * COMPUTED - time.monotonic()


def _broken(device: str) -> str:
    """What CUDA says after an error that it does not recover from, or nothing."""
    if device != "cuda":
        return ""
    try:
        import torch

        torch.cuda.synchronize()
    except Exception as error:
        return card.first_line(error)
    return ""


@contextmanager
def _judges(
    workers: int, found: report.Findings, arrays: Path, say: Callable[[str], None]
) -> Iterator[tuple[Give, Callable[[], int], Callable[[], None]]]:
    """Hand over a job; how many are not answered; end it all."""
    if workers == 0:
        yield lambda job: found.answers.append(answer(job, arrays)), lambda: 0, lambda: None
        return
    with _environment(dict.fromkeys(THREADS, "1") | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}):
        context = multiprocessing.get_context("spawn")
        pool = context.Pool(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    given = [0, 0]

    def answered(one: Answer) -> None:
        found.answers.append(one)
        given[1] += 1
        if one.error and sum(bool(x.error) for x in found.answers) <= 3:
            say(f"the judge failed: {one.task}: {one.error}")

    def failed(error: BaseException) -> None:
        say(f"a judging process failed: {card.first_line(error)}")
        given[1] += 1

    def give(job: Job) -> None:
        given[0] += 1
        pool.apply_async(answer, (job, arrays), callback=answered, error_callback=failed)

    try:
        yield give, lambda: given[0] - given[1], pool.terminate
    finally:
        pool.terminate()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables, for the processes that are started meanwhile."""
    before: dict[str, Any] = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
