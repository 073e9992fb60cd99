"""npu::npu_quant_matmul on a CPU: exact integers, then float32, in this order, and one cast.

    sums (+ bias in int32)  →  · scale  →  · pertoken_scale  (+ bias in float)  →  cast

A static scale of an FP16 product counts with its top 19 bits, whether it comes as int64 or as float32, which op-plugin
sends through npu_trans_quant_param; that the product also ignores the lower bits of an int64 that nobody has treated is
an inference. With pertoken_scale or BF16 all bits count. How int32 becomes float32 is not documented: to the nearest.
In the exact arithmetic all bits count, and everything after the sums is float64.
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.quant_matmul import check
from npu_backend.emulation.integers import product, scale_of_bits, top_19_bits
from npu_backend.emulation.mode import is_exact


@torch.no_grad()
def npu_quant_matmul(x1: Tensor, x2: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """The CPU kernel: `[…, m, n]` in output_dtype.

    Raises:
      RuntimeError: see `npu_backend.contracts.quant_matmul`.
    """
    out = check(x1, x2, scale, **options)
    bias, per_token = options.get("bias"), options.get("pertoken_scale")
    sums = product(x1, x2)
    if bias is not None and bias.dtype == torch.int32:
        sums, bias = sums + bias, None
    if out == torch.int32:
        return sums
    wide = torch.float64 if is_exact() else torch.float32
    result = sums.to(wide) * _scale(scale, per_token, out).to(wide)
    if per_token is not None:
        result = result * per_token.to(wide)[:, None]
    if bias is not None:
        result = result + bias.to(wide)
    return result.to(out)


def _scale(scale: Tensor, per_token: Tensor | None, out: torch.dtype) -> Tensor:
    scale = scale_of_bits(scale) if scale.dtype == torch.int64 else scale.float()
    is_static = per_token is None and out == torch.float16
    return top_19_bits(scale) if is_static and not is_exact() else scale
