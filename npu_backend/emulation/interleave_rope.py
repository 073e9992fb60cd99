"""npu::npu_interleave_rope on a CPU: pairs (0, 1), (2, 3), … are turned and come out as halves.

cos and sin have the dtype of x, so their rounding is part of the result. Products and their sum are float32, then one
cast (op_kernel of interleave_rope, ops-transformer).
"""

import torch
from torch import Tensor

from npu_backend.contracts.interleave_rope import check
from npu_backend.emulation.mode import is_exact


@torch.no_grad()
def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The CPU kernel: `[B, N, S, 64]`, first numbers of all pairs first.

    Raises:
      RuntimeError: see `npu_backend.contracts.interleave_rope`.
    """
    check(x, cos, sin)
    return turned(x, cos, sin).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation before its cast, float32 or in the exact arithmetic float64."""
    wide, cos, sin = (part.to(torch.float64 if is_exact() else torch.float32) for part in (x, cos, sin))
    first, second = wide[..., 0::2], wide[..., 1::2]
    return torch.cat([first, second], dim=-1) * cos + torch.cat([-second, first], dim=-1) * sin
