"""`python -m cpjax.trial`: the judge on trial."""

import json
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from cpjax.crosscheck.files.atomic import atomic_write
from cpjax.errors import InputError
from cpjax.trial import activations, detection, foreign, foreign_kernels, gradients, naming, tables
from cpjax.trial.cuda import card
from cpjax.trial.cuda import run as cuda_run
from cpjax.trial.cuda.report import table as cuda_table
from cpjax.trial.emulators import PROFILES
from cpjax.trial.false_alarms import SETS, is_alarm, outcomes, rate_bound, table

Item = TypeVar("Item")

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
error_console = Console(stderr=True)

Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
Seed = Annotated[int, typer.Option(min=0, help="Chooses the data; another seed, other data.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Out = Annotated[Path | None, typer.Option(help="Write the JSON to this file as well; it must not exist.")]


@app.command(epilog="Example: python -m cpjax.trial false-alarms --set held-out --count 2000")
def false_alarms(
    set_: Annotated[str, typer.Option("--set", help="Kinds of data: held-out, tuning or other logits.")] = "held-out",
    count: Annotated[int, typer.Option(min=1, help="Correct results to judge.")] = 2000,
    seed: Seed = 0,
    workers: Workers = 2,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Judge correct results of hostile kinds of data. Exit status: 0 none called wrong, 1 some, 2 bad input.

    Ctrl-C, or a termination signal, ends it early with a report about the results that were judged.
    """
    if set_ not in SETS:
        raise InputError(f"--set is {set_!r}; it must be one of {', '.join(SETS)}")
    _must_not_exist(out)
    if set_ == "held-out" and (reason := activations.missing()):
        error_console.print(f"without trained activations: {reason}", markup=False, highlight=False, soft_wrap=True)
    started = time.monotonic()
    seen = _until_stopped(_progress(outcomes(set_, seed, count, workers), count, "judged"), count)
    seconds = time.monotonic() - started
    alarms = sorted((one for one in seen if is_alarm(one)), key=lambda one: one.number)
    rows, judged = table(seen), sum(one.judgeable for one in seen)
    bound = rate_bound(len(alarms), judged)
    report = {
        "set": set_,
        "seed": seed,
        "count": len(seen),
        "asked_for": count,
        "workers": workers,
        "seconds": round(seconds, 1),
        "long_results": sum(one.keys >= 8192 for one in seen),
        "rate_bound_95": bound,
        "rows": [row._asdict() for row in rows],
        "alarms": [one._asdict() for one in alarms],
    }
    _write(out, report)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print(tables.false_alarms(rows))
        print(
            f"\n{len(alarms)} of {judged:,} correct results were called wrong; {len(seen) - judged:,} not judgeable.\n"
            f"95 % upper limit of the false-alarm rate for this mix (Clopper–Pearson): {bound:.2g}. {seconds:,.0f} s."
        )
        for one in alarms[:20]:
            print(f"  number {one.number}, {one.kind}, {one.profile}: {', '.join(one.failed_tests)}")
    sys.exit(1 if alarms else 0)


@app.command("foreign", epilog="Example: python -m cpjax.trial foreign --count 3000")
def of_foreign_kernels(
    count: Annotated[int, typer.Option(min=1, help="Correct results to judge; kernels and dtypes take turns.")] = 3000,
    seed: Seed = 0,
    workers: Workers = 2,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Judge correct results of kernels that are not ours. Exit status: 0 none called wrong, 1 some, 2 bad input.

    The judge is told what an honest user would say. Kernels whose package is not installed are left out, and named.
    Ctrl-C, or a termination signal, ends it early with a report about the results that were judged.
    """
    _must_not_exist(out)
    if absent := foreign_kernels.missing():
        error_console.print(f"left out, not installed: {', '.join(absent)}", markup=False, highlight=False)
    started = time.monotonic()
    seen = _until_stopped(_progress(foreign.outcomes(seed, count, workers), count, "judged"), count)
    seconds = time.monotonic() - started
    alarms = sorted((one for one in seen if one.judgeable and not one.passed), key=lambda one: one.number)
    rows = foreign.table(seen)
    report = {
        "seed": seed,
        "count": len(seen),
        "asked_for": count,
        "seconds": round(seconds, 1),
        "left_out": absent,
        "rows": [row._asdict() for row in rows],
        "alarms": [_without_nan(one._asdict()) for one in alarms],
    }
    _write(out, report)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print(tables.foreign(rows))
        print(f"\n{len(alarms)} of {len(seen):,} correct results were called wrong. {seconds:,.0f} s.")
        for one in alarms[:20]:
            print(f"  number {one.number}, {one.kernel}, {one.dtype}, {one.kind}: {', '.join(one.failed_tests)}")
    sys.exit(1 if alarms else 0)


@app.command("detection", epilog="Example: python -m cpjax.trial detection --profile flash_fp16 --keys 1024")
def detect(
    profile: Annotated[list[str] | None, typer.Option(help="Profiles; may be repeated.")] = None,
    keys: Annotated[list[int] | None, typer.Option(min=64, help="Numbers of keys; may be repeated.")] = None,
    seed: Seed = 0,
    workers: Workers = 2,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Judge wrong results: the smallest fault that is caught, and what the rules of others say. Exit status 0."""
    profiles = tuple(profile or ("flash_fp16", "ring_mla_fp16"))
    for name in profiles:
        if name not in PROFILES:
            raise InputError(f"--profile is {name!r}; it must be one of {', '.join(PROFILES)}")
    lengths = tuple(keys or detection.KEYS)
    if any(length % 4 for length in lengths):
        raise InputError(f"--keys {lengths}: each must be a multiple of 4, the number of chunks")
    _must_not_exist(out)
    started = time.monotonic()
    parts = detection.detections(profiles, lengths, seed, workers)
    found = [one for part in _progress(parts, len(detection.settings(profiles, lengths)), "settings") for one in part]
    found.sort(key=lambda one: one.setting)
    seconds = time.monotonic() - started
    report = {"seed": seed, "seconds": round(seconds, 1), "found": [_plain(one) for one in found]}
    _write(out, report)
    if as_json:
        print(json.dumps(report, indent=1))
        return
    for name, length in tables.settings_of(found):
        print(f"\n{name}, {length:,} keys: smallest size caught from out alone / with lse too (a test that fails)\n")
        print(tables.detection(found, name, length))
        print("\nand what others say, lse included\n")
        print(tables.rules(found, name, length))
    print(f"\nFaults caught at any size\n\n{tables.summary(found)}\n\n{seconds:,.0f} s.")


@app.command("gradients", epilog="Example: python -m cpjax.trial gradients --count 1500 --keys 1024")
def of_gradients(
    count: Annotated[int, typer.Option(min=1, help="Correct gradients of the emulators.")] = 1500,
    of_kernels: Annotated[int, typer.Option(min=1, help="Gradients of PyTorch's and JAX's kernels.")] = 180,
    keys: Annotated[int, typer.Option(min=64, help="Keys of the faulty ones.")] = 1024,
    seed: Seed = 0,
    workers: Workers = 2,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Judge correct and faulty gradients. Exit status: 0 no correct ones called wrong, 1 some, 2 bad input.

    Ctrl-C, or a termination signal, ends the emulators' part early; the others follow, and the report is about what was
    judged.
    """
    _must_not_exist(out)
    started = time.monotonic()
    seen = _until_stopped(_progress(gradients.outcomes(seed, count, workers), count, "emulators"), count)
    seen += _progress(gradients.foreign(seed, of_kernels), of_kernels, "kernels")
    some = [one for profile in gradients.JUDGED_IN for one in gradients.faults(profile, keys, seed)]
    alarms = [one for one in seen if one.judgeable and not one.passed]
    rows = gradients.table(seen)
    report = {
        "seed": seed,
        "keys": keys,
        "seconds": round(time.monotonic() - started, 1),
        "rows": [row._asdict() for row in rows],
        "faults": [one._asdict() for one in some],
        "alarms": [one._asdict() for one in alarms],
    }
    _write(out, report)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        print(f"{tables.gradients(rows)}\n\nFaults at {keys:,} keys\n\n{tables.gradient_faults(some)}")
        for one in alarms[:20]:
            print(f"  number {one.number}, {one.who}, {one.kind}, {one.profile}: {', '.join(one.failed_tests)}")
    sys.exit(1 if alarms else 0)


@app.command("named", epilog="Example: python -m cpjax.trial named --setting text --setting packed --workers 2")
def of_names(
    without_entry: Annotated[bool, typer.Option(help="Faults that the dictionary does not have.")] = False,
    fault: Annotated[list[str] | None, typer.Option(help="Only this fault; may be repeated.")] = None,
    setting: Annotated[list[str] | None, typer.Option(help="Only this setting; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of each fault in each setting.")] = 1,
    every: Annotated[int, typer.Option(min=1, help="Only one in so many.")] = 1,
    seed: Seed = 0,
    workers: Workers = 2,
    as_json: AsJson = False,
    out: Out = None,
) -> None:
    """Diagnose reported faults in many settings: is the name right? Exit status: 0 none wrong, 1 some, 2 bad input.

    Ctrl-C, or a termination signal, ends it early with a report about the faults that were diagnosed.
    """
    _must_not_exist(out)
    faults, settings = list(naming.UNNAMED if without_entry else naming.REPORTED), list(naming.SETTINGS)
    for option, asked, known in (("--fault", fault, faults), ("--setting", setting, settings)):
        for one in asked or []:
            if one not in known:
                raise InputError(f"{option} is {one!r}; it must be one of: {'; '.join(known)}")
    tasks = naming.tasks_of(fault or faults, setting or settings, range(seed, seed + seeds))[::every]
    started = time.monotonic()
    answers = _until_stopped(_progress(naming.answers(tasks, workers), len(tasks), "diagnosed"), len(tasks))
    seen = [one for one in answers if one is not None]
    seen.sort(key=lambda one: one.task)
    wrong = [one for one in seen if one.outcome == "wrong"]
    report = {
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "counts": naming.counts(seen),
        "by_fault": naming.table(seen, "fault"),
        "by_setting": naming.table(seen, "setting"),
        "answers": [{**one._asdict(), "task": one.task._asdict()} for one in seen],
    }
    _write(out, report)
    if as_json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        print(f"{tables.named(seen, 'fault')}\n\n{tables.named(seen, 'setting')}\n\n{naming.summary(seen)}")
        for one in wrong:
            print(f"  wrong: {one.task}: {' '.join(one.sentences)}")
    sys.exit(1 if wrong else 0)


@app.command("cuda", epilog="Example: python -m cpjax.trial cuda --folder found --seconds 240 --workers 16")
def of_a_gpu(
    folder: Annotated[Path, typer.Option(help="report.json, table.md and arrays go here; it must be there.")],
    seconds: Annotated[float, typer.Option(min=5, help="When to end, judging included.")] = 240,
    workers: Annotated[int, typer.Option(min=0, help="Judging processes; 0 judges between two kernel calls.")] = 2,
    device: Annotated[str, typer.Option(help="cuda; or cpu, for those kernels that run there too.")] = "cuda",
    seed: Seed = 0,
) -> None:
    """Judge correct and faulty results of a GPU's kernels. Exit status: 0 none called wrong, 1 some, 2 bad input.

    Kernels compute in this process, the judge answers in others. Without a CUDA device it says so, and exits with 0.
    Ctrl-C, or a termination signal, ends it early with a report about the results that were judged.
    """
    if device not in ("cuda", "cpu"):
        raise InputError(f"--device is {device!r}; it must be cuda or cpu")
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; make it, or name another with --folder")
    if device == "cuda" and (reason := card.missing()):
        print(f"left out, no CUDA device: {reason}")
        return
    found = cuda_run.run(folder, seconds=seconds, workers=workers, device=device, seed=seed)
    print(f"\n{cuda_table(found)}")
    sys.exit(1 if found.alarms else 0)


def _without_nan(one: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what was not measured is null."""
    return {name: None if isinstance(x, float) and not np.isfinite(x) else x for name, x in one.items()}


def _plain(one: detection.Caught) -> dict[str, Any]:
    """JSON has no NaN: a rule that refuses correct results has "refuses all"."""
    rules = {name: "refuses all" if x is not None and np.isnan(x) else x for name, x in one.rules.items()}
    return {**one._asdict(), "setting": one.setting._asdict(), "rules": rules}


def _progress(items: Iterable[Item], total: int, what: str) -> Iterable[Item]:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console) as progress:
        yield from progress.track(items, total=total, description=what)


def _until_stopped(items: Iterable[Item], total: int) -> list[Item]:
    """All items, or those that are there when Ctrl-C or a termination signal comes."""
    seen: list[Item] = []
    # SIGINT is ignored by what a shell starts in the background; SIGTERM is not.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        seen.extend(items)
    except KeyboardInterrupt:
        error_console.print(f"interrupted after {len(seen):,} of {total:,} results; the report is about these")
    finally:
        signal.signal(signal.SIGTERM, before)
    return seen


def _must_not_exist(path: Path | None) -> None:
    if path is not None and path.exists():
        raise InputError(f"{path} exists; nothing is overwritten: name another file with --out")
    if path is not None and not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder; make it, or name another file with --out")


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is None:
        return
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1))


def main() -> None:
    """Run the command; a one-line message and status 2 for bad input."""
    try:
        app()
    except InputError as error:
        error_console.print(f"cpjax.trial: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
