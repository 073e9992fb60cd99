"""npu::npu_fusion_attention_grad on a CPU; flash_backward.py says what is computed in which format.

A row that sees no key has p = 1/n, the mean that its forward gave, unless that was zeroed (inner_precise 2, or a band
without keys), where p is 0. In the former case the vendor's formula is not the derivative of the forward: the scores it
replaced do not depend on the query, the formula gives it a gradient all the same. Of requests without keys nothing is
documented; their rows hold NaN, as in the forward.
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.fusion_grad import Call, check
from npu_backend.contracts.layouts import laid_out
from npu_backend.emulation.flash import EXACT, Stages, heads_first
from npu_backend.emulation.flash_backward import Forward, Gradients, attend_backward
from npu_backend.emulation.fusion import LOWEST
from npu_backend.emulation.mode import is_exact

Gradient3 = tuple[Tensor, Tensor, Tensor]


def npu_fusion_attention_grad(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The CPU kernel: dq, dk, dv in the layout and dtype of query, key, value; of pse undefined; of sink `[0]`.

    Raises:
      RuntimeError: see `npu_backend.contracts.fusion_grad`.
    """
    return *gradients(check("npu_fusion_attention_grad", *args, **options)), None, torch.empty(0)


@torch.no_grad()
def gradients(call: Call) -> Gradient3:
    """dq, dk, dv of a checked call of any version."""
    forward = call.forward
    tensors = forward.query, forward.key, forward.value
    grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors)
    if forward.is_packed:
        for x, lengths in zip(grads, (forward.q_lengths, forward.kv_lengths, forward.kv_lengths), strict=True):
            x[sum(lengths) :] = torch.nan
    q_start = kv_start = 0
    for request, (length, count) in enumerate(zip(forward.q_lengths, forward.kv_lengths, strict=True)):
        q_rows = slice(q_start, q_start + length) if forward.is_packed else request
        kv_rows = slice(kv_start, kv_start + count) if forward.is_packed else request
        if length and count and forward.value.numel():
            results = _request(call, q_rows, kv_rows, request)
            for x, rows, result in zip(grads, (q_rows, kv_rows, kv_rows), results, strict=True):
                x[rows] = result.transpose(0, 1).to(x.dtype)
        elif length and forward.is_packed:
            grads[0][q_rows] = torch.nan
        q_start, kv_start = q_start + length, kv_start + count
    dq, dk, dv = (laid_out(x, forward.layout) for x in grads)
    return dq, dk, dv


def _request(call: Call, q_rows: Any, kv_rows: Any, request: int) -> Gradients:
    forward = call.forward
    tensors = forward.query[q_rows], forward.key[kv_rows], forward.value[kv_rows]
    rows, count = tensors[0].shape[0], tensors[1].shape[0]
    visible = forward.sparse.visible(request, rows, count)
    stages = EXACT if is_exact() else Stages(torch.float32, torch.float32, forward.query.dtype)
    left = Forward(
        heads_first(call.out[q_rows]), *(x[q_rows].T[..., None].contiguous() for x in (call.maximum, call.total))
    )
    # Where a row sees nothing, keys beyond the band had a part in its forward too.
    is_whole = bool(((left.maximum == LOWEST) & (left.total != -LOWEST)).any())

    def columns_of(block: slice) -> tuple[int, int]:
        return (0, count) if is_whole else visible.columns(block, count)

    def hide(score: Tensor, block: slice, columns: slice) -> Tensor:
        hidden = visible.hides(block, columns)
        return score if hidden is None else score.masked_fill_(hidden, LOWEST)

    q, k, v = (heads_first(x) for x in tensors)
    return attend_backward((q, k, v), heads_first(call.dy[q_rows]), left, forward.scale, stages, columns_of, hide)
