"""One rank, one case: read it, compute the rank's share, join all shares on rank 0, write the result.

Every rank runs this, whether the ranks were started by `workers.py` or by torchrun; data moves through files and
torch.distributed only.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from npu_backend.decode import Decoding, decode_attention
from npu_backend.errors import InputError, LinkError, RankError
from npu_backend.exchange import Held, Link, Report
from npu_backend.families import FAMILIES, Family, precision_of
from npu_backend.files import Case, RankResult, read_case, write_result
from npu_backend.latent import PREFIX, Made, check_same, digests, in_order, latents_of, up_projection
from npu_backend.operators import Partial
from npu_backend.packing import held_rows
from npu_backend.prefix import gather_prefix, owned
from npu_backend.profile import profile_of, time_exchange
from npu_backend.provenance import provenance
from npu_backend.ring import Ring, ring_attention
from npu_backend.schedule import Exchange, check_exchange
from npu_backend.shard import Shard, check_computable, requests_of, shard

BACKENDS = {"cpu": "gloo", "npu": "cpu:gloo,npu:hccl"}
"""torch.distributed backends by device; with npu, objects in host memory still go through gloo."""


class Settings(NamedTuple):
    """How cases are to be computed; the same on every rank."""

    exchange: Exchange = Exchange()
    operators: str = "ring_mla"
    profile: bool = False
    decoding: Decoding = Decoding()


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


def compute_case(
    case_path: Path,
    result_path: Path,
    device: torch.device,
    report: Report,
    settings: Settings = Settings(),  # noqa: B008
) -> None:
    """Compute one case together with the other ranks; rank 0 writes the result.

    Raises:
      InputError: the case cannot be read or computed, or another result is in the way.
      RankError: a wrong block; ranks that work on different cases.
      LinkError: a transfer failed.
    """
    rank, cp = dist.get_rank(), dist.get_world_size()
    family = FAMILIES[settings.operators]
    report("read", 0)
    case = read_case(case_path)
    check_computable(case, family)
    check_exchange(settings.exchange, cp)
    if case.cp != cp:
        raise RankError(f"{case.name} is for {case.cp} ranks, there are {cp}")
    report("wait", 0)
    _meet(case, cp)
    if case.layout == "decode":
        _decode(case, result_path, device, report, settings)
        return
    up = None if case.up is None else up_projection(*(torch.from_numpy(x).to(device) for x in case.up))
    ring = Ring(rank, cp, case.is_causal, case.scale, requests_of(case), case.digest, settings.exchange, family, up)
    mine = shard(case, rank)
    alone = time_exchange(ring, mine, device, report) if settings.profile else None
    partial, clock, made = ring_attention(ring, mine, device, report, _prefix(ring, case, device, report))
    report("wait", cp)
    _compare(made, cp)
    share = (_share(partial, mine), clock.step, None if alone is None else profile_of(clock, alone))
    shares = _on_first_rank(share)
    if shares is not None:
        report("write", cp)
        results, seconds, profiles = zip(*shares, strict=True)
        about = provenance(device, family, settings.exchange)
        about |= {"seconds_per_step": seconds, "seconds": max(map(sum, seconds))}
        if settings.profile:
            about["profile"] = [profile._asdict() for profile in profiles]
        order = settings.exchange.order
        write_result(
            result_path,
            case,
            list(results),
            precision=precision_of(family, case.cp),
            order=order,
            about=about,
            key_value=_stated(made, ring, case) if made else None,
        )


def _compare(made: Made, cp: int) -> None:
    """Compare what this rank has made of latents with what the others have; nothing if keys and values travelled."""
    if made:
        everybody: list[Any] = [None] * cp
        _collective(dist.all_gather_object, everybody, digests(made))
        check_same(everybody)


def _stated(made: Made, ring: Ring, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What was made of latents, in the case's order of tokens."""
    places = {latents_of(rank): held_rows(rank, ring.cp, ring.requests.chunk_lengths) for rank in range(ring.cp)}
    return in_order(made, places | {PREFIX: np.arange(case.query.shape[1], case.kv_position.shape[1])})


def _decode(case: Case, result_path: Path, device: torch.device, report: Report, settings: Settings) -> None:
    """Every rank has every result; all are written, so that a rank that merged otherwise is seen."""
    rank, family = dist.get_rank(), FAMILIES[settings.operators]
    partial, computing, waiting = decode_attention(case, rank, family, settings.decoding, device, report)
    report("wait", case.cp)
    result = RankResult(
        partial.out.cpu().contiguous().numpy(), partial.lse.cpu().contiguous().numpy(), case.q_position, case.q_segment
    )
    shares = _on_first_rank((result, [computing + waiting]))
    if shares is not None:
        report("write", case.cp)
        results, seconds = zip(*shares, strict=True)
        about = provenance(device, family, Exchange("gather"))
        about |= {"seconds_per_step": seconds, "seconds": max(map(sum, seconds)), "decode": settings.decoding._asdict()}
        about["operators"] = list(decode_operators(family, settings.decoding))
        precision = decode_precision(family, settings.decoding)
        # `ascending` names MindIE's chunks (docs/formats.md).
        order = "ascending" if settings.decoding.engine == "mindie" else "unknown"
        write_result(result_path, case, list(results), precision=precision, order=order, about=about)


def decode_precision(family: Family, decoding: Decoding) -> str:
    """The profile of docs/precision.md; MindIE's operator stores its lse in FP16 itself."""
    return "decode_fp16_lse" if family.name == "ring_mla" or decoding.lse == "float16" else family.precision


def decode_operators(family: Family, decoding: Decoding) -> tuple[str, ...]:
    """What decode calls; the merge without a maximum is no operator that torch_npu offers."""
    block = "atb::npu_multi_head_latent_attention.lse" if family.name == "ring_mla" else family.operators[0]
    return (block, "npu::npu_attention_update") if decoding.merge == "attention-update" else (block,)


def check_decoding(case: Case, settings: Settings) -> None:
    """Refuse what does not go with decode, before anything is started.

    Raises:
      InputError: --profile, options that do not go together, a profile of precision that they do not have.
    """
    if settings.profile:
        raise InputError(f"{case.name}: --profile times the steps of prefill; decode has one exchange, leave it out")
    decoding, heads = settings.decoding, case.query.shape[2]
    if decoding.engine == "vllm-ascend":
        if settings.operators != "fia" or decoding[:2] != Decoding()[:2]:
            raise InputError(
                f"{case.name}: --engine vllm-ascend goes with --operators fia, and merges float32 by attention-update; "
                f"not with {settings.operators}, lse {decoding.lse}, merge {decoding.merge}: leave these out"
            )
        if heads % case.cp:
            raise InputError(
                f"{case.name}: {heads} heads; --engine vllm-ascend deals them out to {case.cp} ranks: take a multiple"
            )
    if decoding.interleave < 1:
        raise InputError(f"{case.name}: --interleave {decoding.interleave}; it is a number of tokens, 1 or more")
    computes = decode_precision(FAMILIES[settings.operators], settings.decoding)
    wanted = case.precision.get("npu", computes)
    if wanted != computes:
        raise InputError(
            f"{case.name}: precision {str(wanted)[:40]!r} is wanted of backend npu; operators {settings.operators} "
            f"with lse in {settings.decoding.lse} compute in {computes}"
        )


def _on_first_rank(share: Any) -> list[Any] | None:
    shares: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    _collective(dist.gather_object, share, shares, dst=0)
    return shares


def _prefix(ring: Ring, case: Case, device: torch.device, report: Report) -> tuple[Tensor, ...] | None:
    """The cached prefixes of a pack, each rank giving the blocks that it owns; None if there are none."""
    lengths, tokens = ring.requests.prefix_lengths, case.query.shape[1]
    if not any(lengths):
        return None
    rows = tokens + owned(lengths, ring.rank, ring.cp)
    places = np.stack([case.kv_position[:, rows], case.kv_segment[:, rows]])
    places, *held = (torch.from_numpy(x).to(device) for x in (places, *(x[:, rows] for x in case.rows)))
    mine = Held(tuple(held), places)
    return gather_prefix(Link(ring.rank, ring.cp, report, ring.digest), mine, lengths)


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
