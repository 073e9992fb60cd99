"""What npu::npu_attention_update accepts (op-plugin AttentionUpdateKernelNpuOpApi.cpp; aclnn checks, error 161002)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_backend.contracts.refuse import Refusal

LISTS = 128
"""Most partials of a call on A2 and A3. The documents still say 16, and the wrapper keeps to that."""
_refusal = Refusal("npu_attention_update")


def check(lse: Sequence[Tensor], local_out: Sequence[Tensor], update_type: int) -> None:
    """Arguments as in the schema: K lses `[n]` float32, K outs `[n, H]` of one dtype.

    Raises:
      RuntimeError: what the operator refuses.
    """
    require = _refusal.parameter
    require(update_type in (0, 1), f"update_type is {update_type}, must be 0 or 1")
    require(len(lse) == len(local_out), f"{len(lse)} lse and {len(local_out)} local_out, must be as many")
    require(1 <= len(lse) <= LISTS, f"{len(lse)} partials, must be 1 to {LISTS}")
    like = local_out[0]
    floats = (torch.float32, torch.float16, torch.bfloat16)
    require(like.dtype in floats, f"local_out is {like.dtype}, must be float32, float16 or bfloat16")
    for i, (weight, out) in enumerate(zip(lse, local_out, strict=True)):
        require(weight.dim() == 1, f"lse[{i}] has {weight.dim()} dims, must be 1")
        require(out.dim() == 2, f"local_out[{i}] has {out.dim()} dims, must be 2")
        require(weight.dtype == torch.float32, f"lse[{i}] is {weight.dtype}, must be float32")
        require(out.dtype == like.dtype, f"local_out[{i}] is {out.dtype}, others {like.dtype}: must be the same dtype")
        require(
            out.shape == like.shape and weight.shape == like.shape[:1],
            f"lse[{i}] {tuple(weight.shape)} and local_out[{i}] {tuple(out.shape)} must be {tuple(like.shape[:1])} "
            f"and {tuple(like.shape)}",
        )
    width = like.shape[1]
    require(width % 8 == 0 and 8 <= width <= 512, f"head dim {width}, must be a multiple of 8 from 8 to 512")
