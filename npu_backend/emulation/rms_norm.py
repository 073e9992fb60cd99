"""npu::npu_rms_norm and npu::npu_add_rms_norm on a CPU, rounded where the vendor's kernels round.

    stage                          FP16, BF16 tensors          float32 tensors      (op_kernel of rms_norm, ops-nn)
    x1 + x2, of add_rms_norm       the dtype of the inputs     float32
    mean x², 1/√(mean + ε)         float32                     float32
    x · (1/√…)                     float32, then the dtype     float32
    · gamma                        the dtype of the inputs     float32

So a norm of FP16 tensors has two roundings, the second in the product with gamma. The norm of a sum is that of the
rounded sum: in FP16 the kernel reads it back; in BF16 this is an assumption.
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
    return _norm(x, gamma, epsilon)


@torch.no_grad()
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU kernel: the norm of x1 + x2, 1/√…, and the sum itself.

    Raises:
      RuntimeError: see `npu_backend.contracts.rms_norm`.
    """
    check_sum(x1, x2, gamma, epsilon)
    total = (x1.double() + x2.double()).to(x1.dtype) if is_exact() else x1 + x2
    y, rstd = _norm(total, gamma, epsilon)
    return y, rstd, total


def _norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.float64 if is_exact() else torch.float32)
    dims = tuple(range(-gamma.dim(), 0))
    rstd = 1 / torch.sqrt((wide * wide).mean(dim=dims, keepdim=True) + epsilon)
    y = (wide * rstd * gamma.to(wide.dtype)).to(x.dtype) if is_exact() else (wide * rstd).to(x.dtype) * gamma
    return y, rstd.float()
