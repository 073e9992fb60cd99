"""What npu::npu_ring_attention_update accepts (op-plugin RingAttentionUpdateKernelNpuOpApi.cpp; torch_npu ≥ 2.13)."""

import torch
from torch import Tensor

from npu_backend.contracts.fusion import COPIES
from npu_backend.contracts.layouts import ends_to_lengths
from npu_backend.contracts.refuse import Refusal

_refusal = Refusal("npu_ring_attention_update")


def check(
    outs: tuple[Tensor, Tensor],
    statistics: tuple[Tensor, Tensor, Tensor, Tensor],
    actual_seq_qlen: Tensor | None,
    input_layout: str,
    input_softmax_layout: str,
) -> list[int] | None:
    """Lengths of the sequences of packed tokens; None in layout SBH.

    Args:
      outs: attention outs, previous and current.
      statistics: softmax maxima and sums, previous and current.
      actual_seq_qlen, input_layout, input_softmax_layout: as in the schema.

    Raises:
      RuntimeError: what the vendor refuses.
    """
    require, (out, other) = _refusal.require, outs
    require(input_layout in ("SBH", "TND"), f"input_layout only supports 'SBH' or 'TND', but got {input_layout}.")
    require(input_softmax_layout in ("", "SBH", "TND"), "input_softmax_layout only supports '', 'SBH' or 'TND'.")
    require(out.shape == other.shape, "prev_attn_out and cur_attn_out must have the same shape.")
    require(out.dtype == other.dtype, "prev_attn_out and cur_attn_out must have the same dtype.")
    floats = (torch.float16, torch.float32, torch.bfloat16)
    require(out.dtype in floats, "attn_out dtype only supports float16, float32 or bfloat16.")
    first = statistics[0]
    require(all(x.shape == first.shape for x in statistics), "softmax tensors must keep the same shape.")
    require(all(x.dtype == torch.float32 for x in statistics), "softmax tensors must use float32.")
    require(first.dim() > 0 and first.shape[-1] == COPIES, "softmax tensors require the last dimension to be 8.")
    require(out.dim() == 3, "attention tensors must be 3D.")
    if actual_seq_qlen is not None:
        require(actual_seq_qlen.dtype == torch.int64, "actual_seq_qlen must use int64 dtype.")
    if input_layout == "SBH":
        require(first.dim() == 4, "softmax tensors must be 4D when input_layout is 'SBH'.")
        batch, heads, length, _ = first.shape
        fits = out.shape[:2] == (length, batch) and heads > 0 and out.shape[2] % heads == 0
        _refusal.parameter(fits, f"out {tuple(out.shape)} is not [S, B, N·D] of softmax {tuple(first.shape)}")
        return None
    if actual_seq_qlen is None:
        raise RuntimeError(f"{_refusal.operator}: actual_seq_qlen is required when input_layout is 'TND'.")
    require(first.dim() == 3, "softmax tensors must be 3D when input_layout is 'TND'.")
    _refusal.parameter(out.shape[:2] == first.shape[:2], f"out {tuple(out.shape)}, softmax {tuple(first.shape)}")
    heads, width = out.shape[1:]
    _refusal.parameter(width % 64 == 0 and width <= 768, f"head dim {width}, must be a multiple of 64 up to 768")
    _refusal.parameter(heads <= 256, f"{heads} heads, at most 256")
    ends = actual_seq_qlen.tolist()  # with or without a leading 0: that is a sequence without tokens
    lengths = ends_to_lengths(ends)
    is_cumulative = all(n >= 0 for n in lengths) and sum(lengths) == out.shape[0]
    _refusal.parameter(is_cumulative, f"actual_seq_qlen {ends} must rise to the {out.shape[0]} tokens given")
    return lengths
