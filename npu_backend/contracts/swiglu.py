"""What npu::npu_swiglu accepts (aclnnSwiGlu.md of ops-nn, 2026)."""

from torch import Tensor

from npu_backend.contracts.refuse import Refusal
from npu_backend.contracts.rms_norm import FLOATS

_refusal = Refusal("npu_swiglu")


def check(x: Tensor, dim: int) -> None:
    """`x` is cut into halves along `dim`.

    Raises:
      RuntimeError: what the vendor refuses.
    """
    require = _refusal.parameter
    require(x.dtype in FLOATS, f"x is {x.dtype}, must be float16, bfloat16 or float32")
    require(1 <= x.dim() <= 8, f"x has {x.dim()} dims, must have 1 to 8")
    require(-x.dim() <= dim < x.dim(), f"dim is {dim}, must be from {-x.dim()} to {x.dim() - 1}")
    require(x.shape[dim] % 2 == 0, f"x has {x.shape[dim]} in dim {dim}, must be even")
