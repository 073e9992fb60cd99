"""atb::npu_ring_mla on a CPU: the documented mathematics, rounded where the vendor's kernels round.

    stage                        FP16 tensors            BF16 tensors          (the vendor's .cce kernels)
    q·k over all 192             float32, then FP16      float32
    × scale, + mask              FP16, scale too         float32
    running row maximum m, s − m FP16                    float32
    exp, row sum                 float32                 float32
    probabilities p for p·v      FP16                    BF16
    p·v, rescaling e^(m − m')    float32                 float32
    out of this block            FP16                    BF16
    lse = ln Σ + m               float32                 float32
    merge with previous          float32 on the rounded outs; result rounded to FP16 or BF16

Blocks are the vendor's, 128 query rows by 512 key columns, because p is rounded relative to the maximum so far. Sums
inside one block may be taken in any order. All rounding is to nearest, ties to even, which is assumed of the hardware.
A FP16 tensor in PyTorch computes each single operation in float32 and rounds once, so `.half()` arithmetic is staged.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend.contract import MASK_PITCH, Call, check

ROWS, COLUMNS = 128, 512


class Running(NamedTuple):
    """The state between two column blocks, per head and query row."""

    maximum: Tensor  # [N, rows, 1], in the format of the scores
    total: Tensor  # [N, rows, 1] float32
    weighted: Tensor  # [N, rows, 128] float32


@torch.no_grad()
def npu_ring_mla(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    mask: Tensor,
    seqlen: Tensor,
    head_num: int,
    kv_head_num: int,
    *,
    pre_out: Tensor | None = None,
    prev_lse: Tensor | None = None,
    qk_scale: float = 1.0,
    kernel_type: str | None = None,
    mask_type: str | None = None,
    input_layout: str | None = None,
    calc_type: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The CPU kernel: `out` `[T, N, 128]` in the dtype of q_nope and `lse` `[N, T]` float32, natural logarithm.

    Rows of a request without queries or without keys stay unwritten, as on the NPU; here they hold NaN.

    Raises:
      RuntimeError: see `npu_backend.contract`.
    """
    options = {"kernel_type": kernel_type, "mask_type": mask_type, "input_layout": input_layout, "calc_type": calc_type}
    tensors = (q_nope, q_rope, k_nope, k_rope, value, mask, seqlen)
    call = check(*tensors, head_num, kv_head_num, pre_out=pre_out, prev_lse=prev_lse, qk_scale=qk_scale, **options)
    out = torch.full_like(q_nope, torch.nan)
    lse = torch.full((head_num, q_nope.shape[0]), torch.nan)
    q_start = kv_start = 0
    for q_length, kv_length in zip(call.q_lengths, call.kv_lengths, strict=True):
        q_rows, kv_rows = slice(q_start, q_start + q_length), slice(kv_start, kv_start + kv_length)
        if q_length and kv_length:
            _request(call, q_rows, kv_rows, out, lse)
        q_start, kv_start = q_rows.stop, kv_rows.stop
    return out, lse


def _request(call: Call, q_rows: slice, kv_rows: slice, out: Tensor, lse: Tensor) -> None:
    """One request of the pack; writes its rows of `out` and `lse`."""
    query = _heads_first(torch.cat([x[q_rows] for x in call.query], dim=-1))  # [N, m, 192] float32
    key = _heads_first(torch.cat([x[kv_rows] for x in call.key], dim=-1))  # [K, n, 192]
    value = _heads_first(call.value[kv_rows])  # [K, n, 128]
    for start in range(0, query.shape[1], ROWS):
        stop = min(start + ROWS, query.shape[1])
        rows = slice(q_rows.start + start, q_rows.start + stop)
        new_out, new_lse = _query_block(call, query[:, start:stop], key, value, start)
        if call.previous is not None:
            pre_out, prev_lse = call.previous
            new_out, new_lse = merge(pre_out[rows].transpose(0, 1), prev_lse[:, rows], new_out, new_lse)
        out[rows], lse[:, rows] = new_out.transpose(0, 1), new_lse


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).float().contiguous()


def _query_block(call: Call, query: Tensor, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Query rows start … of one request against its keys; under the mask none beyond the diagonal is read."""
    dtype = call.value.dtype
    heads, rows, _ = query.shape
    state = Running(
        torch.full((heads, rows, 1), -torch.inf, dtype=_score_dtype(dtype)),
        torch.zeros(heads, rows, 1),
        torch.zeros(heads, rows, value.shape[-1]),
    )
    end = key.shape[1] if call.mask is None else min(start + ROWS, key.shape[1])
    for column in range(0, end, COLUMNS):
        columns = slice(column, min(column + COLUMNS, end))
        score = scores(query, key[:, columns], call.scale, dtype)
        if call.mask is not None and start - column < MASK_PITCH:
            # Top-left: row i of the request against column j, both counted from the start of what was passed.
            tile = call.mask[start - column : start - column + rows, : columns.stop - column]
            score += tile if dtype == torch.float16 else tile.float() * -3e38
        state = accumulate(state, score, value[:, columns], dtype)
    return finish(state, dtype)


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype == torch.float16 else torch.float32


def scores(query: Tensor, key: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`scale · q·k` `[N, rows, columns]`; query `[N, rows, 192]` and key `[K, columns, 192]` in float32, exact."""
    raw = _by_kv_head(query, key.transpose(1, 2)).to(_score_dtype(dtype))
    return raw.mul_(torch.tensor(scale, dtype=torch.float32).to(raw.dtype))


def accumulate(state: Running, score: Tensor, value: Tensor, dtype: torch.dtype) -> Running:
    """The state after one more block: m' = max(m, max s), l' = l e^(m − m') + Σ e^(s − m'), weighted alike."""
    maximum = torch.maximum(state.maximum, score.amax(dim=-1, keepdim=True))
    # −inf − (−inf) is NaN; e^(−inf − 0) is the 0 that is meant where a row has seen no finite score yet.
    base = torch.where(torch.isneginf(maximum), 0, maximum)
    p = (score - base).float().exp_()
    rescale = (state.maximum - base).float().exp_()
    weighted = _by_kv_head(p.to(dtype).float(), value)
    return Running(
        maximum,
        state.total * rescale + p.sum(dim=-1, keepdim=True),
        state.weighted * rescale + weighted,
    )


def finish(state: Running, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`out` `[N, rows, 128]`, rounded to `dtype`, `lse` `[N, rows]`; (0, −inf) where every score is −inf."""
    out = state.weighted / torch.where(state.total == 0, 1, state.total)
    base = torch.where(torch.isneginf(state.maximum), 0, state.maximum)
    return out.to(dtype), (state.total.log() + base.float()).squeeze(-1)


def merge(pre_out: Tensor, prev_lse: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over the keys of both; outs `[N, rows, 128]`, lses `[N, rows]`. Two lses of −inf give NaN."""
    maximum = torch.maximum(prev_lse, lse)
    previous, new = (prev_lse - maximum).exp(), (lse - maximum).exp()
    total = previous + new
    merged = previous[..., None] * pre_out.float() + new[..., None] * out.float()
    return (merged / total[..., None]).to(out.dtype), maximum + total.log()


def _by_kv_head(left: Tensor, right: Tensor) -> Tensor:
    """`left` `[N, rows, x]` times `right` `[K, x, y]`; consecutive groups of N/K heads share one right side."""
    heads, rows, _ = left.shape
    grouped = left.reshape(right.shape[0], -1, left.shape[2])
    return torch.bmm(grouped, right).reshape(heads, rows, right.shape[2])
