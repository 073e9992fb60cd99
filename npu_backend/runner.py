"""Many cases, one after the other: what is finished is not computed again, what is in the way is not overwritten.

Alone, this process starts the ranks of each case itself (one pool per cp). Under torchrun it *is* one of the ranks.
"""

import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch
import torch.distributed as dist

from npu_backend import vendor
from npu_backend.errors import InputError, RankError
from npu_backend.families import FAMILIES
from npu_backend.files import finished, read_case
from npu_backend.progress import Advance, progress
from npu_backend.provenance import SOCS
from npu_backend.rank import Settings, check_decoding, compute_case, decode_operators, join
from npu_backend.schedule import check_exchange
from npu_backend.shard import check_computable
from npu_backend.workers import Listener, Workers


class Job(NamedTuple):
    """One case to compute, and where its result goes."""

    name: str
    cp: int
    case: Path
    result: Path
    is_finished: bool
    operators: tuple[str, ...]


class Outcome(NamedTuple):
    """What became of a job. Seconds are those of the ring on its slowest rank; None if it failed."""

    name: str
    cp: int
    seconds: float | None
    seconds_per_step: list[list[float]] | None  # per rank, per ring step
    result: str | None
    error: str | None = None


def plan(cases: Path, results: Path, settings: Settings = Settings()) -> list[Job]:  # noqa: B008
    """Read and check every case in folder (or file) `cases`; nothing is computed.

    Raises:
      InputError: the first thing that is wrong.
    """
    if not cases.exists():
        raise InputError(f"{cases} does not exist; give a folder of cases or one case file")
    paths = sorted(cases.glob("*.safetensors")) if cases.is_dir() else [cases]
    if not paths:
        raise InputError(f"{cases} holds no case (*.safetensors)")
    if results.exists() and not results.is_dir():
        raise InputError(f"{results} is no folder; results go into a folder")
    return [_job(path, results / f"{path.stem}.safetensors", settings) for path in paths]


def _job(path: Path, result: Path, settings: Settings) -> Job:
    case = read_case(path)
    check_computable(case, FAMILIES[settings.operators])
    check_exchange(settings.exchange, case.cp)
    operators = FAMILIES[settings.operators].operators
    if case.layout == "decode":
        check_decoding(case, settings)
        operators = decode_operators(FAMILIES[settings.operators], settings.decoding)
    return Job(case.name, case.cp, path, result, finished(result, case.digest) is not None, operators)


def check_device(device: str, ranks: int, operators: tuple[str, ...]) -> None:
    """Refuse a device that is not there, or on which the operators are not.

    Raises:
      InputError: no torch_npu, one without the operators, an NPU without them, or fewer NPUs than ranks of this host.
    """
    if device != "npu":
        return
    if vendor.TORCH_NPU_PROBLEM is not None:
        raise InputError(f"device npu: {vendor.TORCH_NPU_PROBLEM}; use --device cpu, or install CANN and torch_npu")
    for operator in operators:
        vendor.require(operator, torch.device("npu"))
    npu = torch.get_device_module("npu")
    count = npu.device_count()
    if count < ranks:
        need = "1 rank needs an NPU" if ranks == 1 else f"{ranks} ranks need as many NPUs"
        raise InputError(f"device npu: {need}, this host has {count}")
    soc = npu.get_device_name(0)
    if not soc.startswith(SOCS):
        raise InputError(
            f"device npu: {soc} does not support {operators[0]}; the vendor's context parallelism runs on "
            f"Atlas 800I A2 and A3 ({', '.join(SOCS)})"
        )


def run(
    cases: Path,
    results: Path,
    *,
    device: str,
    timeout: float,
    settings: Settings = Settings(),  # noqa: B008
) -> list[Outcome]:
    """Compute all cases that are not finished, in this order: smallest cp first, then by name.

    Raises:
      InputError: before anything is computed.
      RankError: under torchrun only; alone, a failed case is an outcome with an error, and the others go on.
    """
    jobs = sorted(plan(cases, results, settings), key=lambda job: (job.cp, job.name))
    todo = [job for job in jobs if not job.is_finished]
    distributed = under_torchrun()
    if distributed:
        _check_world(jobs)
    ranks = int(os.environ["LOCAL_WORLD_SIZE"]) if distributed else max(job.cp for job in jobs)
    operators = tuple(dict.fromkeys(name for job in jobs for name in job.operators))
    check_device(device, ranks, operators)
    try:
        results.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=results):  # else a folder that cannot be written is only noticed after the computing
            pass
    except OSError as error:
        raise InputError(f"{results} cannot be made or written ({error.strerror}); choose another folder") from None
    compute = _as_one_rank if distributed else _alone
    errors = compute(todo, device, timeout, settings)
    return [_outcome(job, errors.get(job.name)) for job in jobs] if is_first_rank() else []


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def is_first_rank() -> bool:
    """Whether this process speaks to the user."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def _check_world(jobs: list[Job]) -> None:
    world = int(os.environ["WORLD_SIZE"])
    for job in jobs:
        if job.cp != world:
            raise InputError(
                f"{job.name} is for {job.cp} ranks but torchrun has started {world}; start as many as its cp"
            )


def _alone(todo: list[Job], device: str, timeout: float, settings: Settings) -> dict[str, str]:
    """Errors by case name."""
    errors: dict[str, str] = {}
    done = 0
    with progress(sum(job.cp for job in todo)) as advance:
        for cp in sorted({job.cp for job in todo}):
            with Workers(cp, device=device, timeout=timeout, settings=settings) as workers:
                for job in (job for job in todo if job.cp == cp):
                    try:
                        workers.run(job.case, job.result, _listener(advance, job.name, done))
                    except RankError as error:
                        errors[job.name] = str(error)
                    done += job.cp
                    advance(job.name, done)
    return errors


def _listener(advance: Advance, name: str, done: int) -> Listener:
    def listen(rank: int, what: str, step: int) -> None:
        if rank == 0 and what == "wait":
            advance(name, done + step)

    return listen


def _as_one_rank(todo: list[Job], device: str, timeout: float, settings: Settings) -> dict[str, str]:
    rank = int(os.environ["RANK"])
    place = join(device, int(os.environ["LOCAL_RANK"]), timeout=timeout)
    # Rank 0 decides what is left to do: another rank may look when a result has just been written.
    agreed = [todo]
    dist.broadcast_object_list(agreed, src=0)
    todo = agreed[0]
    with progress(sum(job.cp for job in todo), visible=rank == 0) as advance:
        for number, job in enumerate(todo):
            _my_share(job, rank, place, _listener(advance, job.name, number * job.cp), settings)
            advance(job.name, (number + 1) * job.cp)
    dist.destroy_process_group()
    return {}


def _my_share(job: Job, rank: int, place: torch.device, listener: Listener, settings: Settings) -> None:
    last = ("start", 0)

    def listen(what: str, step: int) -> None:
        nonlocal last
        last = what, step
        listener(rank, what, step)

    try:
        compute_case(job.case, job.result, place, listen, settings)
    except (RankError, OSError) as error:
        raise RankError(f"{job.name}: rank {rank}: {error} (last heard: {last[0]}, step {last[1]})") from error


def _outcome(job: Job, error: str | None) -> Outcome:
    if error is not None:
        return Outcome(job.name, job.cp, None, None, None, error)
    about = finished(job.result, read_case(job.case).digest)
    if about is None:
        return Outcome(job.name, job.cp, None, None, None, "the result file has disappeared")
    return Outcome(job.name, job.cp, about.get("seconds"), about.get("seconds_per_step"), str(job.result))
