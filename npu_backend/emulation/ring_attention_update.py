"""npu::npu_ring_attention_update on a CPU: two partials in (out, softmax max, softmax sum), merged.

m = max(pm, cm), p = ps e^(pm − m), c = cs e^(cm − m), s = p + c, out = po (p / s) + co (c / s); everything in float32,
out then cast. A row that neither has seen, with sums of +3.4e38, gives 0 and a sum of +inf.
"""

import torch
from torch import Tensor

from npu_backend.contracts.layouts import from_sequence_order
from npu_backend.contracts.ring_attention_update import check
from npu_backend.emulation.mode import is_exact


@torch.no_grad()
def npu_ring_attention_update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    *,
    actual_seq_qlen: Tensor | None = None,
    input_layout: str = "SBH",
    input_softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU kernel: out, max and sum, shaped and ordered as they came.

    SBH: outs `[S, B, N·D]`, statistics `[B, N, S, 8]`. TND: `[T, N, D]` and `[T, N, 8]`, in memory a block
    `[N, S_i, 8]` per sequence unless input_softmax_layout is "TND".

    Raises:
      RuntimeError: see `npu_backend.contracts.ring_attention_update`.
    """
    statistics = prev_softmax_max, prev_softmax_sum, cur_softmax_max, cur_softmax_sum
    lengths = check((prev_attn_out, cur_attn_out), statistics, actual_seq_qlen, input_layout, input_softmax_layout)
    compute = torch.float64 if is_exact() else torch.float32
    prev_max, prev_sum, cur_max, cur_sum = (x.to(compute) for x in statistics)
    maximum = torch.maximum(prev_max, cur_max)
    previous, current = prev_sum * (prev_max - maximum).exp(), cur_sum * (cur_max - maximum).exp()
    total = previous + current

    def weight(part: Tensor) -> Tensor:
        x = part / total
        if lengths is None:
            x = x.permute(2, 0, 1, 3)  # [S, B, N, 8]
        elif input_softmax_layout != "TND":
            x = from_sequence_order(x.contiguous(), lengths)
        return x[..., :1]  # eight copies of the same

    shape = (*prev_attn_out.shape[:2], weight(total).shape[-2], -1)  # heads apart
    outs = (x.to(compute).reshape(shape if lengths is None else x.shape) for x in (prev_attn_out, cur_attn_out))
    merged = sum(x * weight(part) for x, part in zip(outs, (previous, current), strict=True))
    assert isinstance(merged, Tensor)
    out = merged.reshape(prev_attn_out.shape).to(prev_attn_out.dtype)
    return out, maximum.to(torch.float32), total.to(torch.float32)
