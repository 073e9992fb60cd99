"""What npu::npu_interleave_rope accepts (op-plugin docs/context/torch_npu-npu_interleave_rope.md, 2026)."""

import torch
from torch import Tensor

from npu_backend.contracts.refuse import Refusal

ROPE = 64
"""The only width of the rotated part."""
_refusal = Refusal("npu_interleave_rope")


def check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`x` is `[B, N, S, 64]`; `cos` and `sin` are `[B, 1, S, 64]`, or `[B, 1, 1, 64]`: the same at all S.

    Raises:
      RuntimeError: what the vendor refuses.
    """
    require = _refusal.parameter
    floats = (torch.float16, torch.bfloat16)
    require(x.dtype in floats, f"x is {x.dtype}, must be float16 or bfloat16")
    require(x.dim() == 4 and x.shape[3] == ROPE, f"x is {tuple(x.shape)}, must be [B, N, S, {ROPE}]")
    for name, angle in (("cos", cos), ("sin", sin)):
        require(angle.dtype == x.dtype, f"{name} is {angle.dtype}, must be {x.dtype} as x is")
        shapes = tuple((x.shape[0], 1, length, ROPE) for length in (x.shape[2], 1))
        require(tuple(angle.shape) in shapes, f"{name} is {tuple(angle.shape)}, must be one of {shapes}")
        require(angle.shape == cos.shape, f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be alike")
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        require(tensor.is_contiguous(), f"{name} must be contiguous")
