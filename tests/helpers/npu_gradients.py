"""One rank of tests/npu/test_npu_ring_backward.py, in a process of its own: both ways of several problems."""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from npu_backend.emulation.mode import Mode, arithmetic
from npu_backend.families import FAMILIES
from npu_backend.packing import held_rows
from npu_backend.rank import join
from npu_backend.ring import Ring
from npu_backend.ring_backward import ring_backward, ring_forward
from npu_backend.schedule import chunk_count
from npu_backend.shard import PAD, Requests, Shard

SCALE = 0.25


class Training(NamedTuple):
    """A case with a gradient of its output; in pads everything is NaN."""

    tensors: tuple[np.ndarray, ...]  # query, key, value, dy, `[B, T, …]`
    segment: np.ndarray  # [B, T]; requests of a row one after the other
    requests: Requests
    is_causal: bool
    cp: int
    mode: Mode = "staged"
    sums: str = "float32"

    @property
    def position(self) -> np.ndarray:
        """Of every token in its request, `[B, T]`."""
        position = [np.arange(chunk_count(self.cp) * chunk) for chunk in self.requests.chunk_lengths]
        return np.broadcast_to(np.concatenate(position), self.segment.shape).astype(np.int32)


def rank_of(p: Training, rank: int) -> tuple[Ring, Shard, np.ndarray]:
    """What a rank is given: the ring, its shard, its rows of dy."""
    held = held_rows(rank, p.cp, p.requests.chunk_lengths)
    real = (p.segment[:, held] != PAD)[..., None, None]
    query, key, value = (np.where(real, x[:, held], 0).astype(x.dtype) for x in p.tensors[:3])
    ring = Ring(rank, p.cp, p.is_causal, SCALE, p.requests, "0" * 64, family=FAMILIES["fusion"])
    return ring, Shard(query, (key, value), p.position[:, held], p.segment[:, held]), p.tensors[3][:, held]


def gradients(p: Training, rank: int) -> tuple[np.ndarray, ...]:
    """The rank's out, dq, dk and dv."""
    ring, shard, dy = rank_of(p, rank)
    device, report = torch.device("cpu"), lambda what, step: None
    with arithmetic(p.mode):
        carried = ring_forward(ring, shard, device, report)
        grads = ring_backward(
            ring, shard, carried, torch.from_numpy(dy), device, report, sums=getattr(torch, p.sums)
        )  # fmt: skip
    return tuple(x.numpy() for x in (carried.out, *grads))


def main(folder: str, rank: int, cp: int) -> None:
    join("cpu", rank, timeout=60, init_method=Path(folder, "ranks").as_uri(), rank=rank, cp=cp)
    problems = torch.load(Path(folder, "problems"), weights_only=False)
    torch.save([gradients(p, rank) for p in problems], Path(folder, f"rank{rank}"))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
