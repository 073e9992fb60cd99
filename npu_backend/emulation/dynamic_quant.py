"""npu::npu_dynamic_quant on a CPU: s = max |x| / 127 of each token, and round(x / s), in float32 as documented.

Kernels of this family were read that multiply by 127 / max |x| instead, and store max |x| · (1/127): on hardware a
scale may differ in its last bit, and an integer at a tie. A token of zeros divides by 0; what comes out is not
documented: scale 0 and integers 0 here. Integers and scales are the same in both arithmetics.
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.dynamic_quant import check
from npu_backend.emulation.integers import to_int8


@torch.no_grad()
def npu_dynamic_quant(x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The CPU kernel: int8 in the shape of x, and float32 without its last axis.

    Raises:
      RuntimeError: see `npu_backend.contracts.dynamic_quant`.
    """
    check(x, **options)
    return per_token(x)


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and scales of tokens."""
    x = x.float()
    scale = x.abs().amax(dim=-1) / 127
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return to_int8(x / divisor[..., None]), scale
