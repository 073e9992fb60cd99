"""FlashAttention-2 in the vendor's tiles, every stage rounded to the format it is given.

    raw = q·k  → score        p = exp(s − m)   → probability, as the factor of v; the row sum takes it unrounded
    s   = raw·scale → score   weighted, total  in compute, rescaled by exp(m − m') whenever the maximum grows
    m, s − m   → score

Tiles are 128 query rows by 512 key columns, as in npu_ring_mla; p is rounded relative to the maximum so far. Sums
inside one tile may be taken in any order. Rounding is to nearest even, which is assumed of the hardware. A FP16 tensor
in PyTorch computes each single operation in float32 and rounds once, so `.half()` arithmetic is staged.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ROWS, COLUMNS = 128, 512


class Stages(NamedTuple):
    """Which quantity lives in which format."""

    compute: torch.dtype
    score: torch.dtype
    probability: torch.dtype
    saturates: bool = False  # scores that overflow become the largest number, not infinity


EXACT = Stages(torch.float64, torch.float64, torch.float64)


class Running(NamedTuple):
    """What is known of some query rows after some key columns."""

    maximum: Tensor  # [N, rows, 1], in the format of the scores
    total: Tensor  # [N, rows, 1] in `compute`, as the next
    weighted: Tensor  # [N, rows, V]


Hide = Callable[[Tensor, slice, slice], Tensor]
"""(scores, rows, columns) → scores in which what may not be seen is small enough to vanish."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    stages: Stages,
    columns_of: Callable[[slice], tuple[int, int]],
    hide: Hide,
) -> Running:
    """All query rows; of the key columns those that `columns_of` names for each block of rows, a half-open range.

    Args:
      query, key, value: `[N, m, H]`, `[K, n, H]`, `[K, n, V]`; N is a multiple of K; any floating dtype.
      scale: multiplies q·k, in the format of the scores.
      stages: the formats.
      columns_of, hide: the mask.
    """
    query, key, value = (x.to(stages.compute) for x in (query, key, value))
    heads, length = query.shape[:2]
    blocks = []
    for start in range(0, length, ROWS):
        rows = slice(start, min(start + ROWS, length))
        state = _nothing(heads, rows.stop - start, value.shape[2], stages)
        first, last = columns_of(rows)
        for column in range(first - first % COLUMNS, last, COLUMNS):
            columns = slice(column, min(column + COLUMNS, last))
            score = hide(_scores(query[:, rows], key[:, columns], scale, stages), rows, columns)
            state = _accumulate(state, score, value[:, columns], stages)
        blocks.append(state)
    return Running(*(torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True)))


def _nothing(heads: int, rows: int, width: int, stages: Stages) -> Running:
    return Running(
        torch.full((heads, rows, 1), -torch.inf, dtype=stages.score),
        torch.zeros(heads, rows, 1, dtype=stages.compute),
        torch.zeros(heads, rows, width, dtype=stages.compute),
    )


def _scores(query: Tensor, key: Tensor, scale: float, stages: Stages) -> Tensor:
    """`scale · q·k` `[N, rows, columns]`."""
    limit = torch.finfo(stages.score).max
    raw = by_kv_head(query, key.transpose(1, 2))
    raw = (raw.clamp_(-limit, limit) if stages.saturates else raw).to(stages.score)
    scaled = raw.mul_(torch.tensor(scale, dtype=stages.compute).to(stages.score))
    return scaled.clamp_(-limit, limit) if stages.saturates else scaled


def _accumulate(state: Running, score: Tensor, value: Tensor, stages: Stages) -> Running:
    """The state after one more tile: m' = max(m, max s), l' = l e^(m − m') + Σ e^(s − m'), weighted alike."""
    maximum = torch.maximum(state.maximum, score.amax(dim=-1, keepdim=True))
    # −inf − (−inf) is NaN; e^(−inf − 0) is the 0 that is meant where a row has seen no finite score yet.
    base = torch.where(torch.isneginf(maximum), 0, maximum)
    p = (score - base).to(stages.compute).exp_()
    rescale = (state.maximum - base).to(stages.compute).exp_()
    weighted = by_kv_head(p.to(stages.probability).to(stages.compute), value)
    return Running(
        maximum,
        state.total * rescale + p.sum(dim=-1, keepdim=True),
        state.weighted * rescale + weighted,
    )


def finish(state: Running) -> tuple[Tensor, Tensor]:
    """`out` `[N, rows, V]`, `lse` `[N, rows]`, unrounded; (0, −inf) where every score is −inf."""
    out = state.weighted / torch.where(state.total == 0, 1, state.total)
    base = torch.where(torch.isneginf(state.maximum), 0, state.maximum)
    return out, (state.total.log() + base.to(state.total.dtype)).squeeze(-1)


def by_kv_head(left: Tensor, right: Tensor) -> Tensor:
    """`left` `[N, rows, x]` times `right` `[K, x, y]`; consecutive groups of N/K heads share one right side."""
    heads, rows, _ = left.shape
    grouped = left.reshape(right.shape[0], -1, left.shape[2])
    return torch.bmm(grouped, right).reshape(heads, rows, right.shape[2])


def heads_first(x: Tensor) -> Tensor:
    """`[tokens, heads, dim]` → `[heads, tokens, dim]`, contiguous."""
    return x.transpose(0, 1).contiguous()
