"""One rank, one case: read it, compute the rank's share, join all shares on rank 0, write the result.

Every rank runs this, whether the ranks were started by `workers.py` or by torchrun; data moves through files and
torch.distributed only.
"""

import importlib
import platform
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from npu_backend import vendor
from npu_backend.errors import LinkError, RankError
from npu_backend.files import Case, RankResult, read_case, write_result
from npu_backend.operators import Partial
from npu_backend.ring import Report, Ring, ring_attention
from npu_backend.shard import PRECISION, Shard, check_computable, real_lengths, shard

BACKENDS = {"cpu": "gloo", "npu": "cpu:gloo,npu:hccl"}
"""torch.distributed backends by device; with npu, objects in host memory still go through gloo."""


def join(
    device: str, local_rank: int, *, timeout: float, init_method: str = "env://", rank: int = -1, cp: int = -1
) -> torch.device:
    """Join the process group; the device of this rank. By default torchrun's environment says who and where.

    A transfer that takes longer than `timeout` seconds fails.
    """
    place = torch.device(device, local_rank) if device == "npu" else torch.device(device)
    if device == "npu":
        torch.get_device_module(place).set_device(place)
    limit = timedelta(seconds=timeout)
    dist.init_process_group(BACKENDS[device], init_method=init_method, timeout=limit, rank=rank, world_size=cp)
    return place


def compute_case(case_path: Path, result_path: Path, device: torch.device, report: Report) -> None:
    """Compute one case together with the other ranks; rank 0 writes the result.

    Raises:
      InputError: the case cannot be read or computed, or another result is in the way.
      RankError: a wrong block; ranks that work on different cases.
      LinkError: a transfer failed.
    """
    rank, cp = dist.get_rank(), dist.get_world_size()
    report("read", 0)
    case = read_case(case_path)
    check_computable(case)
    if case.cp != cp:
        raise RankError(f"{case.name} is for {case.cp} ranks, there are {cp}")
    report("wait", 0)
    _meet(case, cp)
    ring = Ring(rank, cp, case.is_causal, case.scale, real_lengths(case))
    mine = shard(case, rank)
    partial, seconds = ring_attention(ring, mine, device, report)
    report("wait", cp)
    shares: list[Any] | None = [None] * cp if rank == 0 else None
    _collective(dist.gather_object, (_share(partial, mine), seconds), shares, dst=0)
    if shares is not None:
        report("write", cp)
        results, seconds_per_step = zip(*shares, strict=True)
        about = provenance(device) | {"seconds_per_step": seconds_per_step, "seconds": max(map(sum, seconds_per_step))}
        write_result(result_path, case, list(results), precision=PRECISION, order="ring", about=about)


def _meet(case: Case, cp: int) -> None:
    """Wait until every rank has read the case, so that step 0 is not timed with it; all must have read the same one."""
    digests: list[Any] = [None] * cp
    _collective(dist.all_gather_object, digests, case.digest)
    if len(set(digests)) > 1:
        raise RankError(f"ranks have read different files as case {case.name}: digests {[d[:8] for d in digests]}")


def _collective(function: Any, *args: Any, **kwargs: Any) -> None:
    try:
        function(*args, **kwargs)
    except RuntimeError as error:
        raise LinkError(f"{function.__name__} failed ({next(iter(str(error).splitlines()), '')})") from error


def _share(partial: Partial, mine: Shard) -> RankResult:
    return RankResult(partial.out.cpu().numpy(), partial.lse.cpu().contiguous().numpy(), mine.position, mine.segment)


def provenance(device: torch.device) -> dict[str, Any]:
    """What computed: versions and device, as JSON can hold it."""
    torch_npu = importlib.import_module("torch_npu") if vendor.TORCH_NPU_PROBLEM is None else None
    name = torch.get_device_module(device).get_device_name(device) if device.type == "npu" else platform.machine()
    return {
        "torch": torch.__version__,
        "torch_npu": getattr(torch_npu, "__version__", None),
        "python": sys.version.split()[0],
        "device": f"{device.type} ({name})",
        "operator": "atb::npu_ring_mla",
    }
