"""What npu::npu_rms_norm and npu::npu_add_rms_norm accept (aclnnRmsNorm.md, aclnnAddRmsNorm.md of ops-nn, 2026)."""

import torch
from torch import Tensor

from npu_backend.contracts.refuse import Refusal

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check(operator: str, x: Tensor, gamma: Tensor, epsilon: float) -> None:
    """`gamma` covers the last dims of `x`.

    Raises:
      RuntimeError: what the vendor refuses; mixed dtypes, which newer documents allow, are not computed here.
    """
    refusal = Refusal(operator)
    require = refusal.parameter
    require(x.dtype in FLOATS, f"x is {x.dtype}, must be float16, bfloat16 or float32")
    require(1 <= x.dim() <= 8, f"x has {x.dim()} dims, must have 1 to 8")
    fits = 1 <= gamma.dim() <= x.dim() and gamma.shape == x.shape[x.dim() - gamma.dim() :]
    require(fits, f"gamma {tuple(gamma.shape)} must be the last dims of x {tuple(x.shape)}")
    require(epsilon >= 0, f"epsilon is {epsilon:g}, must not be negative")
    refusal.not_implemented(gamma.dtype == x.dtype, f"gamma in {gamma.dtype} beside x in {x.dtype}")


def check_sum(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> None:
    """The same of the sum of two.

    Raises:
      RuntimeError: what the vendor refuses.
    """
    operator = "npu_add_rms_norm"
    fits = x1.shape == x2.shape and x1.dtype == x2.dtype
    shapes = f"x1 {tuple(x1.shape)} {x1.dtype} and x2 {tuple(x2.shape)} {x2.dtype}"
    Refusal(operator).parameter(fits, f"{shapes} must be alike")
    check(operator, x1, gamma, epsilon)
