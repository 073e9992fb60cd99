"""What is asked, and who sees whom. Written apart from `cpjax.mask`, so that an error there is not repeated here."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

LARGEST = {"float16": 60000.0}
"""Data beyond this is clipped: a result that leaves the format's range is not judgeable, and none is meant to."""


class Result(NamedTuple):
    """Somebody's answer: `out` `[B, T, N, V]` as it is handed over, `lse` `[B, T, N]`, natural logarithm."""

    out: Float[np.ndarray, "B T N V"]
    lse: Float[np.ndarray, "B T N"]


@dataclass(frozen=True)
class Problem:
    """Inputs of attention in global token order; N is a multiple of K.

    `q_positions`, `kv_positions`: None is 0, 1, 2, …. `segments`: of queries and keys alike, None is one request, −1 a
    pad, which sees and is seen by nobody. `window` counts keys, the query's own included, to either side. `softcap`,
    `alibi` slopes and `bias` make the logits, `sink` is the logit of one more key of value 0 (`judge` says how).
    """

    query: Float[np.ndarray, "B T N H"]
    key: Float[np.ndarray, "B S K H"]
    value: Float[np.ndarray, "B S K V"]
    scale: float
    is_causal: bool = False
    q_positions: Int[np.ndarray, "B T"] | None = None
    kv_positions: Int[np.ndarray, "B S"] | None = None
    segments: Int[np.ndarray, "B S"] | None = None
    window: int | None = None
    cp: int = 1
    cuts: int = 0
    """Runs of keys that one device computes one after the other, and merges; 0 is as `cp` says."""
    softcap: float | None = None
    sink: Float[np.ndarray, " N"] | None = None
    alibi: Float[np.ndarray, "B N"] | None = None
    bias: Float[np.ndarray, "#B #N T S"] | None = None

    @property
    def chunk_count(self) -> int:
        """Keys are cut in this many chunks, and so are the queries; one device does not cut, unless `cuts` says so."""
        return self.cuts or (2 * self.cp if self.cp > 1 else 1)

    def cast(self, dtype: str) -> "Problem":
        """The same problem with its arrays in `dtype`, clipped so that nothing becomes infinite."""
        most = LARGEST.get(dtype, np.inf)
        arrays = {name: np.clip(getattr(self, name), -most, most).astype(dtype) for name in ("query", "key", "value")}
        return replace(self, **arrays)

    def judge_arguments(self) -> dict[str, Any]:
        """The keyword arguments with which `cpjax.crosscheck.judge` is asked about this problem."""
        return {
            "scale": self.scale,
            "is_causal": self.is_causal,
            "q_positions": self.q_positions,
            "kv_positions": self.kv_positions,
            "segment_ids": self.segments,
            "window": self.window,
            **({"partition": "contiguous", "cp": self.cuts} if self.cuts else {"cp": self.cp}),
            "softcap": self.softcap,
            "sink": self.sink,
            "alibi": self.alibi,
            "bias": self.bias,
        }


def visible(problem: Problem, keys: Int[np.ndarray, " n"]) -> Bool[np.ndarray, "B T n"]:
    """Which of the keys with these indices each query sees; index −1 is no key and is seen by nobody."""
    batch, length = problem.query.shape[:2]
    here = np.arange(length)[None] if problem.q_positions is None else problem.q_positions
    there = np.arange(problem.key.shape[1])[None] if problem.kv_positions is None else problem.kv_positions
    ahead = here[:, :, None] - there[:, None, keys]
    seen = np.broadcast_to(keys >= 0, ahead.shape)
    if problem.is_causal:
        seen = seen & (ahead >= 0)
    if problem.window is not None:
        seen = seen & (np.abs(ahead) < problem.window)
    if problem.segments is not None:
        mine, theirs = problem.segments[:, :, None], problem.segments[:, None, keys]
        seen = seen & (mine == theirs) & (mine >= 0)
    return np.broadcast_to(seen, (batch, length, len(keys)))


def places(problem: Problem) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B S"]]:
    """The positions of queries and keys."""
    (batch, length), keys = problem.query.shape[:2], problem.key.shape[1]
    here = np.arange(length)[None] if problem.q_positions is None else problem.q_positions
    there = np.arange(keys)[None] if problem.kv_positions is None else problem.kv_positions
    return np.broadcast_to(here, (batch, length)), np.broadcast_to(there, (batch, keys))
