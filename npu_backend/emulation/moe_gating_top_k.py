"""npu::npu_moe_gating_top_k on a CPU: which experts a token goes to, and with which weights.

    score    sigmoid(x), or softmax(x) with norm_type 0
    choice   score + bias                              the bias only chooses
    group    the best choice in it, or with group_select_mode 1 the sum of the two best; all but k_group are out
    chosen   the k largest choices that are left, in falling order; of equal ones the lower number first
    weight   factor · score / (Σ score of the chosen + ε); with norm_type 0 factor · score

All in float32. Order and ties are those of the code that op-plugin's page gives as equivalent.
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.moe_gating_top_k import check
from npu_backend.emulation.mode import is_exact


@torch.no_grad()
def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    **more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU kernel: weights `[T, k]` in the dtype of x, experts `[T, k]` int32, and scores `[T, E]` float32.

    Without out_flag the scores are not written: NaN here.

    Raises:
      RuntimeError: see `npu_backend.contracts.moe_gating_top_k`.
    """
    groups = {"k_group": k_group, "group_count": group_count, "group_select_mode": group_select_mode}
    check(x, k, bias=bias, norm_type=norm_type, **groups, **more)
    wide = x.to(torch.float64 if is_exact() else torch.float32)
    score = 1 / (1 + torch.exp(-wide)) if norm_type == 1 else torch.softmax(wide, dim=-1)
    choice = score if bias is None else score + bias.to(wide.dtype)
    choice = _best_groups(choice.unflatten(1, (group_count, -1)), k_group, group_select_mode).flatten(1)
    chosen = _largest(choice, k)
    weight = score.gather(1, chosen)
    if norm_type == 1:
        weight = weight / (weight.sum(dim=-1, keepdim=True) + eps)
    weight = weight * routed_scaling_factor
    scores = score.float() if out_flag else torch.full(x.shape, torch.nan)
    return weight.to(x.dtype), chosen.to(torch.int32), scores


def _largest(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest of the last dim, in falling order; of equal ones the lower index first."""
    return torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k]


def _best_groups(choice: Tensor, k_group: int, group_select_mode: int) -> Tensor:
    """`[T, groups, E / groups]` with −∞ in all groups but the best."""
    of_group = choice.topk(1 + group_select_mode, dim=-1).values.sum(dim=-1)
    is_in = torch.zeros_like(of_group, dtype=torch.bool).scatter(1, _largest(of_group, k_group), True)
    return choice.masked_fill(~is_in[..., None], -torch.inf)
