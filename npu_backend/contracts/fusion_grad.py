"""What npu::npu_fusion_attention_grad accepts.

Sources: op-plugin FlashAttentionKernelNpuOpApi.cpp; aclnnFlashAttentionScoreGrad.md and
aclnnFlashAttentionUnpaddingScoreGrad.md of ops-transformer, August 2026. The arguments are those of
npu_fusion_attention, whose contract holds, and what that returned. The signature lets softmax_max, softmax_sum and
attention_in be left out; what would be computed then is documented nowhere, and it is refused.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from npu_backend.contracts import fusion
from npu_backend.contracts.layouts import from_sequence_order, tokens_first
from npu_backend.contracts.refuse import Refusal


class Call(NamedTuple):
    """A checked call: the forward's, and what it gave, tokens first."""

    forward: fusion.Call
    dy: Tensor  # [B, S, N, V] or packed [T, N, V], as the next
    out: Tensor
    maximum: Tensor  # [B, S, N] or [T, N], as the next
    total: Tensor


def check(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    softmax_max: Tensor | None = None,
    softmax_sum: Tensor | None = None,
    softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None,
    scale_value: float = 1.0,
    numels: int = 0,
    **forward: Any,
) -> Call:
    """The call, checked; arguments as in the schema, those of the forward by the names that it has there.

    Raises:
      RuntimeError: what the vendor refuses, what is not documented, and what is not implemented here.
    """
    del softmax_in, numels  # reserved; the length of a dropout mask
    refusal = Refusal(operator)
    call = fusion.check(query, key, value, head_num, input_layout, scale=scale_value, operator=operator, **forward)
    if softmax_max is None or softmax_sum is None or attention_in is None:
        raise RuntimeError(f"{operator}: without softmax_max, softmax_sum and attention_in of the forward (unsafe)")
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    outs = []
    for name, x in (("dy", dy), ("attention_in", attention_in)):
        refusal.parameter(x.dim() == query.dim(), f"{name} has {x.dim()} dims, query {query.dim()}")
        refusal.parameter(x.dtype == query.dtype, f"{name} is {x.dtype}, query {query.dtype}: must be the same dtype")
        fits = x.numel() == torch.Size(shape).numel() and (
            input_layout not in ("BSH", "SBH") or x.shape[2] % head_num == 0
        )
        laid = tokens_first(x, input_layout, head_num) if fits else x
        refusal.parameter(laid.shape == shape, f"{name} is {tuple(x.shape)}, must have the tokens and heads of query")
        outs.append(laid)
    statistics = (
        _statistic(refusal, name, x, call) for name, x in (("softmax_max", softmax_max), ("softmax_sum", softmax_sum))
    )
    return Call(call, *outs, *statistics)


def _statistic(refusal: Refusal, name: str, x: Tensor, call: fusion.Call) -> Tensor:
    """One of the eight copies, `[B, S, N]` or `[T, N]`."""
    *tokens, heads, _ = call.query.shape
    shape = (*tokens, heads, fusion.COPIES) if call.is_packed else (tokens[0], heads, tokens[1], fusion.COPIES)
    refusal.parameter(x.dtype == torch.float32, f"{name} is {x.dtype}, must be float32")
    refusal.parameter(x.shape == shape, f"{name} is {tuple(x.shape)}, must be {shape}")
    if not call.is_packed:
        return x[..., 0].transpose(1, 2)
    rest = x.shape[0] - sum(call.q_lengths)
    return (x if call.is_natural else from_sequence_order(x.contiguous(), [*call.q_lengths, rest]))[..., 0]
