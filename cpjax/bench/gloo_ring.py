"""ring-attention-pytorch over gloo: one process a rank, each with one thread, as a contender among others.

The package is lucidrains', 0.5.20. Each rank has one run of the text: its striped layout would balance causal
attention, but it computes hidden tiles like all others, so that there is nothing to balance.
"""

import tempfile
import time
import warnings
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import numpy as np

from cpjax.bench.setting import Setting

BUCKET = 512
"""Keys that a rank takes at a time: the fastest of 256, 512, 1,024 and 2,048 on two cores."""


class GlooRing:
    """The ranks, and what they have computed last.

    Attributes:
      out: `[1, T, N, V]` in the ranks' order of tokens, in memory that all ranks write.
      cpu_seconds: of all ranks together, since they were started.

    Raises:
      ImportError: without torch or ring-attention-pytorch.
      ValueError: fewer key/value heads, another dim of values, or one new token: the package has none of these.
      RuntimeError: a rank ended.
    """

    def __init__(self, setting: Setting):
        """Start the ranks and wait until each has its shard."""
        import torch.multiprocessing

        _refuse(setting)
        spawn = torch.multiprocessing.get_context("spawn")
        self.out = torch.zeros(1, setting.tokens, setting.heads, setting.value_dim).share_memory_()
        self.cpu_seconds = 0.0
        self._ranks: list[Connection] = []
        with tempfile.TemporaryDirectory() as folder:  # where the ranks meet, once
            meeting = Path(folder, "meeting").as_uri()
            for rank in range(setting.cores):
                here, there = spawn.Pipe()
                spawn.Process(target=_serve, args=(setting, rank, meeting, self.out, there), daemon=True).start()
                there.close()
                self._ranks.append(here)
            self._answers()

    def run(self):
        """All ranks compute once."""
        for rank in self._ranks:
            rank.send(True)
        self._answers()
        return self.out

    def _answers(self) -> None:
        """Of every rank its CPU time. Where one ends, gloo ends the others."""
        total = 0.0
        for rank in self._ranks:
            try:
                answer = rank.recv()
            except EOFError:
                raise RuntimeError("a rank of the ring ended") from None
            if isinstance(answer, str):
                raise RuntimeError(answer)
            total += answer
        self.cpu_seconds = total


def _package() -> ModuleType:
    with warnings.catch_warnings():  # of its type hints
        warnings.simplefilter("ignore")
        return import_module("ring_attention_pytorch")


def _refuse(setting: Setting) -> None:
    _package()  # what is missing is said here and not in a rank
    if setting.kv_heads != setting.heads or setting.value_dim != setting.head_dim or setting.direction == "decode":
        raise ValueError("it has as many key/value heads as query heads, one head dim, and as many queries as keys")
    if setting.dtype != "float32":
        raise ValueError("its sums are in the dtype of its inputs; only float32 is timed")


def _serve(setting: Setting, rank: int, meeting: str, out, parent: Connection) -> None:
    import torch

    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=setting.cores)
        size = setting.tokens // setting.cores
        shard = slice(rank * size, (rank + 1) * size)
        arrays = [torch.from_numpy(np.ascontiguousarray(x[:, shard])) for x in setting.arrays()]
        backward = setting.direction == "both"
        query, key, value = (x.requires_grad_(backward) for x in arrays[:3])
        attention = _package().ring_flash_attn
        parent.send(time.process_time())
        while parent.recv():
            result = attention(query, key, value, None, setting.is_causal, BUCKET, True)
            if backward:
                torch.autograd.grad(result, (query, key, value), arrays[3])
            out[:, shard].copy_(result.detach())
            parent.send(time.process_time())
    except EOFError:  # the bench is over
        return
    except (ValueError, RuntimeError, AssertionError) as error:
        parent.send(f"rank {rank}: {error}")
