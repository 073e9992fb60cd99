"""npu::npu_rms_norm and npu::npu_add_rms_norm on a CPU, rounded where the vendor's kernels round.

    stage                     npu_rms_norm            npu_add_rms_norm          (op_kernel of both, ops-nn)
    x1 + x2                   –                       the dtype of the inputs
    mean x², 1/√(mean + ε)    float32                 float32, of the rounded sum
    x · (1/√…)                float32                 float32, then the dtype of the inputs
    · gamma                   float32, one cast       the dtype of the inputs

So the second norm of an FP16 tensor has two roundings where the first has one. Of BF16 one of the three kernels of
npu_add_rms_norm takes the norm of the sum before it is rounded; here it is that of the rounded sum, as in the others.
"""

import torch
from torch import Tensor

from npu_backend.contracts.rms_norm import check, check_sum
from npu_backend.emulation.mode import is_exact


@torch.no_grad()
def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The CPU kernel: gamma · x / √(mean x² + ε) in the dtype of x, and 1/√… float32, 1 in the dims of gamma.

    Raises:
      RuntimeError: see `npu_backend.contracts.rms_norm`.
    """
    check("npu_rms_norm", x, gamma, epsilon)
    scaled, rstd = _scaled(x, gamma.dim(), epsilon)
    return (scaled * gamma.to(scaled.dtype)).to(x.dtype), rstd


@torch.no_grad()
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU kernel: the norm of x1 + x2, 1/√…, and the sum itself.

    Raises:
      RuntimeError: see `npu_backend.contracts.rms_norm`.
    """
    check_sum(x1, x2, gamma, epsilon)
    total = (x1.double() + x2.double()).to(x1.dtype) if is_exact() else x1 + x2
    scaled, rstd = _scaled(total, gamma.dim(), epsilon)
    scaled = scaled if is_exact() else scaled.to(x1.dtype)
    return (scaled * gamma.to(scaled.dtype)).to(x1.dtype), rstd, total


def _scaled(x: Tensor, dims: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / √(mean x² + ε) over the last dims, not rounded, and 1/√… float32."""
    wide = x.to(torch.float64 if is_exact() else torch.float32)
    rstd = 1 / torch.sqrt((wide * wide).mean(dim=tuple(range(-dims, 0)), keepdim=True) + epsilon)
    return wide * rstd, rstd.float()
