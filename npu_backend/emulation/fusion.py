"""npu::npu_fusion_attention on a CPU: training's flash attention, which returns softmax maximum and sum.

    q·k, × scale, row maximum, exp, row sum   float32
    probabilities, times v                    the dtype of the inputs
    p·v, rescaling, division                  float32, then the dtype of the inputs

That is what is documented; tiles of 512 keys are assumed. Hidden scores are replaced by −3.4e38, so a row whose mask
hides every key is the mean of all values, with maximum −3.4e38 and sum n; under inner_precise 2 it is 0, −3.4e38 and
+3.4e38. Rows that the band alone leaves without a key get the same unasked: where the operator can tell that there are
such rows it turns inner_precise 2 on by itself (its document of 2026, with sparse_mode 3 and more queries than keys as
example). Without any key, or any query, a kernel of its own writes zeros. Of a packed sequence without keys beside
others that have some nothing is documented; here its rows hold NaN, as do tokens of a pack that no request computes.
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.fusion import COPIES, Call, check
from npu_backend.contracts.layouts import laid_out, to_sequence_order
from npu_backend.contracts.sparse import Visible
from npu_backend.emulation.flash import EXACT, Running, Stages, attend, finish, heads_first
from npu_backend.emulation.mode import is_exact

LOWEST = torch.finfo(torch.float32).min
Result = tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]


def npu_fusion_attention(*args: Any, **options: Any) -> Result:
    """The CPU kernel: out in the layout of the inputs, softmax max and sum, an empty tensor, seed, offset, numels.

    Max and sum are float32 `[B, N, S, 8]`, eight copies; of packed tokens `[T, N, 8]` whose memory holds a block
    `[N, S_i, 8]` per sequence, unless softmax_layout is "TND". max is of the scaled scores; lse = max + ln sum.

    Raises:
      RuntimeError: see `npu_backend.contracts.fusion`.
    """
    return attention(check(*args, **options))


@torch.no_grad()
def attention(call: Call) -> Result:
    """A checked call of any version, computed."""
    query, value = call.query, call.value
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    maximum, total = torch.zeros(query.shape[:-1]), torch.zeros(query.shape[:-1])  # [B, S, N] or [T, N]
    if call.is_packed:
        for x in (out, maximum, total):
            x[sum(call.q_lengths) :] = torch.nan
    q_start = kv_start = 0
    for request, (length, count) in enumerate(zip(call.q_lengths, call.kv_lengths, strict=True)):
        q_rows = (slice(q_start, q_start + length),) if call.is_packed else (request,)
        kv_rows = (slice(kv_start, kv_start + count),) if call.is_packed else (request,)
        if length and value.numel():
            results = _request(call, query[q_rows], call.key[kv_rows], value[kv_rows], request)
            out[q_rows], maximum[q_rows], total[q_rows] = results
        q_start, kv_start = q_start + length, kv_start + count
    out = laid_out(out, call.layout)
    return out, _stored(call, maximum), _stored(call, total), query.new_empty(0), 0, 0, 0


def _request(call: Call, query: Tensor, key: Tensor, value: Tensor, request: int) -> tuple[Tensor, Tensor, Tensor]:
    """`out` `[m, N, V]`, maximum and sum `[m, N]` of one request."""
    (rows, heads, _), count = query.shape, key.shape[0]
    if count == 0:
        shape = rows, heads, value.shape[2]
        return torch.full(shape, torch.nan), torch.full(shape[:2], torch.nan), torch.full(shape[:2], torch.nan)
    visible = call.sparse.visible(request, rows, count)
    dtype = value.dtype
    stages = EXACT if is_exact() else Stages(torch.float32, torch.float32, dtype)
    sees_nothing = _sees_nothing(visible, rows, count)

    def columns_of(block: slice) -> tuple[int, int]:
        return (0, count) if sees_nothing[..., block].any() else visible.columns(block, count)

    def hide(score: Tensor, block: slice, columns: slice) -> Tensor:
        hidden = visible.hides(block, columns)
        return score if hidden is None else score.masked_fill_(hidden, LOWEST)

    q, k, v = (heads_first(x) for x in (query, key, value))
    state = attend(q, k, v, call.scale, stages, columns_of, hide)
    return _results(state, sees_nothing if call.zeroes_rows else visible.blind(rows, count), dtype)


def _sees_nothing(visible: Visible, rows: int, count: int) -> Tensor:
    """bool `[rows]`, or `[N, rows]` if the heads have masks of their own."""
    if visible.hidden is None:
        return visible.blind(rows, count)
    hidden = visible.hides(slice(0, rows), slice(0, count))
    assert hidden is not None
    return hidden.all(dim=-1)


def _results(state: Running, zeroed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    out, _ = finish(state)
    maximum, total = (x.squeeze(-1).T for x in (state.maximum, state.total))
    rows = zeroed.T if zeroed.dim() == 2 else zeroed[:, None]  # [m, N or 1]
    return (
        torch.where(rows[..., None], 0, out.transpose(0, 1)).to(dtype),
        torch.where(rows, LOWEST, maximum).float(),
        torch.where(rows, -LOWEST, total).float(),
    )


def _stored(call: Call, statistic: Tensor) -> Tensor:
    """`[B, S, N]` or `[T, N]` as the operator stores it."""
    copies = statistic[..., None].expand(*statistic.shape, COPIES)
    if not call.is_packed:
        return copies.transpose(1, 2).contiguous()
    rest = copies.shape[0] - sum(call.q_lengths)
    return copies.contiguous() if call.is_natural else to_sequence_order(copies, [*call.q_lengths, rest])
