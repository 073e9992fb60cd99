"""What npu::npu_moe_finalize_routing accepts (op-plugin docs/context/torch_npu-npu_moe_finalize_routing.md, 2026)."""

import torch
from torch import Tensor

from npu_backend.contracts.refuse import Refusal
from npu_backend.contracts.rms_norm import FLOATS

_refusal = Refusal("npu_moe_finalize_routing")


def check(
    rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    src_to_dst: Tensor,
    drop_pad_mode: int,
    k: int,
) -> tuple[int, int]:
    """`rows` is `[T·k, H]`; the number of tokens, and k.

    Raises:
      RuntimeError: what the vendor refuses; and dropped or padded rows and a bias, which are not computed here.
    """
    require, parameter, not_implemented = _refusal.require, _refusal.parameter, _refusal.not_implemented
    parameter(drop_pad_mode in (0, 1, 2, 3), f"drop_pad_mode is {drop_pad_mode}, must be from 0 to 3")
    not_implemented(drop_pad_mode in (0, 2), f"drop_pad_mode {drop_pad_mode}")
    not_implemented(bias is None, "bias")
    parameter(rows.dtype in FLOATS, f"expanded_permuted_rows is {rows.dtype}, must be float16, bfloat16 or float32")
    parameter(rows.dim() == 2, f"expanded_permuted_rows has {rows.dim()} dims, must have 2")
    if scales is not None:
        parameter(scales.dim() == 2, f"scales has {scales.dim()} dims, must have 2")
        parameter(scales.dtype == rows.dtype, f"scales is {scales.dtype}, must be {rows.dtype} as the rows are")
        k = scales.shape[1]
    parameter(k >= 1 and len(rows) % k == 0, f"{len(rows)} rows do not come in {k} a token")
    tokens = len(rows) // k
    parameter(scales is None or len(scales) == tokens, f"scales of {tokens} tokens are needed")
    parameter(src_to_dst.dtype == torch.int32, f"expanded_src_to_dst_row is {src_to_dst.dtype}, must be int32")
    parameter(src_to_dst.shape == (len(rows),), f"expanded_src_to_dst_row must be [{len(rows)}]")
    is_there = bool(((src_to_dst >= 0) & (src_to_dst < len(rows))).all())
    parameter(is_there, f"expanded_src_to_dst_row must be from 0 to {len(rows) - 1}")
    require(skip1 is not None or skip2 is None, "skip2 must be None where skip1 is")
    for name, skip in (("skip1", skip1), ("skip2", skip2)):
        fits = skip is None or (skip.shape == (tokens, rows.shape[1]) and skip.dtype == rows.dtype)
        parameter(fits, f"{name} must be [{tokens}, {rows.shape[1]}] {rows.dtype}")
    return tokens, k
