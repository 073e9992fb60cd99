"""npu::npu_quantize on a CPU: round(x / scale + zero point), or round(x · scale + zero point), in float32.

Where the kernel rounds is documented as this formula says; a kernel that rounds before it adds a whole zero point gives
another integer at ties alone. Integers are the same in both arithmetics.
"""

import torch
from torch import Tensor

from npu_backend.contracts.quantize import check
from npu_backend.emulation.integers import to_int8


@torch.no_grad()
def npu_quantize(
    x: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """The CPU kernel: int8, in the shape of x.

    Raises:
      RuntimeError: see `npu_backend.contracts.quantize`.
    """
    check(x, scales, zero_points, dtype, axis, div_mode)
    shape = [1] * x.dim()
    shape[axis] = -1
    scale = scales.float().reshape(shape)
    scaled = x.float() / scale if div_mode else x.float() * scale
    return to_int8(scaled if zero_points is None else scaled + zero_points.float().reshape(shape))
