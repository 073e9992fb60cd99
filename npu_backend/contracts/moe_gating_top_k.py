"""What npu::npu_moe_gating_top_k accepts (op-plugin docs/context/torch_npu-npu_moe_gating_top_k.md, 2026)."""

from typing import Any

from torch import Tensor

from npu_backend.contracts.refuse import Refusal
from npu_backend.contracts.rms_norm import FLOATS

EXPERTS = 2048
"""Most experts, each group's number rounded up to 32."""
_refusal = Refusal("npu_moe_gating_top_k")


def check(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    **more: Any,
) -> None:
    """`x` is `[T, E]`.

    Raises:
      RuntimeError: what the vendor refuses, and what is not computed here.
    """
    require, parameter = _refusal.require, _refusal.parameter
    require(x.dim() == 2, f"the x shape support only 2d, got {x.dim()}")
    require(bias is None or bias.dim() == 1, "the bias shape support only 1d")
    _refusal.only_defaults({name: more.get(name) for name in ("input_ids", "tid2eid")})
    experts = x.shape[1]
    parameter(x.dtype in FLOATS, f"x is {x.dtype}, must be float16, bfloat16 or float32")
    if bias is not None:
        parameter(bias.shape == (experts,), f"bias is {tuple(bias.shape)}, must be [{experts}]")
        parameter(bias.dtype == x.dtype, f"bias is {bias.dtype}, must be {x.dtype} as x is")
    parameter(group_count >= 1 and experts % group_count == 0, f"{experts} experts in {group_count} groups")
    each = experts // group_count
    parameter(each > 2, f"{each} experts in a group, must be more than 2")
    parameter(-(-each // 32) * 32 * group_count <= EXPERTS, f"{experts} experts, too many")
    parameter(1 <= k_group <= group_count, f"k_group is {k_group}, must be from 1 to {group_count}")
    parameter(1 <= k <= each * k_group, f"k is {k}, must be from 1 to {each * k_group}")
    parameter(group_select_mode in (0, 1), f"group_select_mode is {group_select_mode}, must be 0 or 1")
    parameter(norm_type in (0, 1), f"norm_type is {norm_type}, must be 0 or 1")
    parameter(renorm == 0, f"renorm is {renorm}, must be 0")
