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
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.ring_mla import MASK_PITCH, Call, check, check_outputs
from npu_backend.emulation.flash import EXACT, ROWS, Hide, Stages, attend, finish, heads_first
from npu_backend.emulation.mode import is_exact


@torch.no_grad()
def npu_ring_mla(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The CPU kernel: `out` `[T, N, 128]` in the dtype of q_nope and `lse` `[N, T]` float32, natural logarithm.

    Arguments as in the operator's schema (`npu_backend.schemas`). Rows of a request without queries or without keys
    stay unwritten, as on the NPU; here they hold NaN.

    Raises:
      RuntimeError: see `npu_backend.contracts.ring_mla`.
    """
    call = check(*args, **options)
    tokens, heads, _ = call.query[0].shape
    out = torch.full_like(call.query[0], torch.nan, memory_format=torch.contiguous_format)
    return _compute(call, out, torch.full((heads, tokens), torch.nan))


@torch.no_grad()
def npu_ring_mla_out(*args: Any, output: Tensor, softmax_lse: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The same into given tensors, which may be `pre_out` and `prev_lse`: then unwritten rows keep what was before."""
    call = check(*args, **options)
    check_outputs(call, output, softmax_lse)
    return _compute(call, output, softmax_lse)


def _compute(call: Call, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    q_start = kv_start = 0
    for q_length, kv_length in zip(call.q_lengths, call.kv_lengths, strict=True):
        q_rows, kv_rows = slice(q_start, q_start + q_length), slice(kv_start, kv_start + kv_length)
        if q_length and kv_length:
            _request(call, q_rows, kv_rows, out, lse)
        q_start, kv_start = q_rows.stop, kv_rows.stop
    return out, lse


def _request(call: Call, q_rows: slice, kv_rows: slice, out: Tensor, lse: Tensor) -> None:
    """One request of the pack; writes its rows of `out` and `lse`."""
    query = heads_first(torch.cat([x[q_rows] for x in call.query], dim=-1))  # [N, m, 192]
    key = heads_first(torch.cat([x[kv_rows] for x in call.key], dim=-1))  # [K, n, 192]
    value = heads_first(call.value[kv_rows])  # [K, n, 128]
    stages = _stages(value.dtype)
    key_count = key.shape[1]

    def columns_of(rows: slice) -> tuple[int, int]:
        # Under the mask no key beyond the diagonal block is read.
        return 0, key_count if call.mask is None else min(rows.start + ROWS, key_count)

    new_out, new_lse = finish(attend(query, key, value, call.scale, stages, columns_of, _hide(call.mask)))
    if stages is not EXACT:
        new_out = new_out.to(value.dtype)  # a block's out is stored before it is merged
    if call.previous is not None:
        pre_out, prev_lse = call.previous
        before = pre_out[q_rows].transpose(0, 1), prev_lse[:, q_rows]
        new_out, new_lse = merge(*(x.to(stages.compute) for x in (*before, new_out, new_lse)))
    out[q_rows], lse[:, q_rows] = new_out.transpose(0, 1).to(out.dtype), new_lse.to(lse.dtype)


def _stages(dtype: torch.dtype) -> Stages:
    if is_exact():
        return EXACT
    return Stages(torch.float32, torch.float16 if dtype == torch.float16 else torch.float32, dtype)


def _hide(mask: Tensor | None) -> Hide:
    """The stored 512x512 triangle laid over the scores, top-left: row i of the request against its column j."""

    def hide(score: Tensor, rows: slice, columns: slice) -> Tensor:
        offset = rows.start - columns.start
        if mask is None or offset >= MASK_PITCH:
            return score
        tile = mask[offset : offset + rows.stop - rows.start, : columns.stop - columns.start]
        return score.add_(tile) if mask.dtype == torch.float16 else score.add_(tile.to(score.dtype) * -3e38)

    return hide


def merge(pre_out: Tensor, prev_lse: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) over the keys of both; outs `[N, rows, 128]`, lses `[N, rows]`. Two lses of −inf give NaN."""
    maximum = torch.maximum(prev_lse, lse)
    previous, new = (prev_lse - maximum).exp(), (lse - maximum).exp()
    total = previous + new
    merged = previous[..., None] * pre_out + new[..., None] * out
    return merged / total[..., None], maximum + total.log()
