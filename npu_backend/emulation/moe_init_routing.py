"""npu::npu_moe_init_routing_v2 on a CPU: a row for each token and each of its experts, sorted by expert.

The sort is stable: rows of one expert stand in the order of tokens. Row t·k + j of the unsorted ones belongs to
choice j of token t. With quant_mode 1 rows are quantised as by npu_dynamic_quant.
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.moe_init_routing import check
from npu_backend.emulation.dynamic_quant import per_token


@torch.no_grad()
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    row_idx_type: int = 0,
    **more: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The CPU kernel: rows `[T·k, H]`; where each stands, `[T·k]` int32; tokens of each expert; scales `[T·k]` float32.

    With row_idx_type 0 the second has for each unsorted row its place among the sorted ones, with 1 for each sorted row
    the unsorted one. Tokens are counted (expert_tokens_num_type 1) or counted up (0), int64, and without
    expert_tokens_num_flag not given: a tensor without dims. Scales that nobody gave or made are NaN.

    Raises:
      RuntimeError: see `npu_backend.contracts.moe_init_routing`.
    """
    numbers = {"expert_num": expert_num, "expert_tokens_num_type": expert_tokens_num_type}
    check(x, expert_idx, scale=scale, quant_mode=quant_mode, row_idx_type=row_idx_type, **numbers, **more)
    order = torch.sort(expert_idx.flatten(), stable=True).indices
    tokens = order // expert_idx.shape[1]
    rows, scales = x[tokens], torch.full((len(order),), torch.nan)
    if quant_mode == 1:
        rows, scales = per_token(rows)
    elif scale is not None:
        scales = scale[tokens]
    where = order if row_idx_type == 1 else torch.argsort(order)
    counts = torch.bincount(expert_idx.flatten(), minlength=expert_num)
    counts = counts if expert_tokens_num_type == 1 else counts.cumsum(0)
    return rows, where.to(torch.int32), counts if expert_tokens_num_flag else counts.new_empty(()), scales
