"""How much of the transfers was hidden behind the computing: the exchange is run once more, alone."""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from npu_backend.exchange import Link, Report, travel
from npu_backend.ring import Clock, Ring, held_by
from npu_backend.shard import Shard


class Profile(NamedTuple):
    """Seconds of one rank, per step. Waiting includes waiting for a rank that is slower."""

    compute: list[float]
    waited: list[float]  # for keys and values, while computing could not go on
    transfer_alone: list[float]  # for the same keys and values, when nothing is computed
    hidden: float | None  # 1 − Σ waited / Σ transfer_alone, at least 0; None where nothing is transferred


def time_exchange(ring: Ring, shard: Shard, device: torch.device, report: Report) -> list[float]:
    """Seconds of each wait of the ring's exchange, when nothing is computed meanwhile."""
    link = Link(ring.rank, ring.cp, report, ring.digest)
    if ring.cp > 1:
        dist.barrier()
    waits = []
    arrivals = travel(ring.exchange, link, held_by(shard, device))
    for _ in range(ring.cp):
        started = time.perf_counter()
        next(arrivals)
        waits.append(time.perf_counter() - started if link.waited else 0.0)
    return waits


def profile_of(clock: Clock, alone: list[float]) -> Profile:
    """The profile of a run, given the transfers alone."""
    total = sum(alone)
    hidden = max(0.0, 1 - sum(clock.waited) / total) if total > 0 else None
    return Profile(clock.compute, clock.waited, alone, hidden)
