"""What npu::npu_dynamic_quant accepts (shape inference of torch_npu 2.13.0): int8, a scale a token."""

import torch
from torch import Tensor

from npu_backend.contracts.dtypes import dtype_of
from npu_backend.contracts.refuse import Refusal

_refusal = Refusal("npu_dynamic_quant")


def check(
    x: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> None:
    """`x` is `[…, k]`.

    Raises:
      RuntimeError: what the vendor refuses, and what is not computed here.
    """
    require = _refusal.parameter
    require(x.dtype in (torch.float16, torch.bfloat16), f"input is {x.dtype}, must be float16 or bfloat16")
    require(x.dim() >= 2 and x.shape[-1] > 0, f"input is {tuple(x.shape)}, must be [..., k]")
    require(quant_mode in ("pertoken", "perchannel", "pertensor"), f"quant_mode is {quant_mode!r}")
    _refusal.not_implemented(quant_mode == "pertoken", f"quant_mode {quant_mode}")
    _refusal.not_implemented(dtype_of(dst_type, torch.int8) == torch.int8, f"dst_type {dst_type}, only int8")
    _refusal.only_defaults({"smooth_scales": smooth_scales, "group_index": group_index, "dst_type_max": dst_type_max})
