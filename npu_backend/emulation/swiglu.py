"""npu::npu_swiglu on a CPU: silu(first half) · second half, in float32, one cast (op_kernel of swi_glu, ops-nn)."""

import torch
from torch import Tensor

from npu_backend.contracts.swiglu import check
from npu_backend.emulation.mode import is_exact


@torch.no_grad()
def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """The CPU kernel: x / (1 + e^−x) of the first half, times the second.

    Raises:
      RuntimeError: see `npu_backend.contracts.swiglu`.
    """
    check(x, dim)
    gate, up = x.to(torch.float64 if is_exact() else torch.float32).chunk(2, dim=dim)
    return (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)
