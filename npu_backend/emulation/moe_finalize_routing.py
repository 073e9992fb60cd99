"""npu::npu_moe_finalize_routing on a CPU: skip1 + skip2 + Σ scale · row over the k rows of a token, in this order.

Each product and each sum is rounded to the dtype of the rows; only of BF16 rows the kernel keeps float32 up to one cast
(op_kernel of moe_finalize_routing_v2, ops-transformer). So whoever wants a float32 sum gives float32 rows.
"""

import torch
from torch import Tensor

from npu_backend.contracts.moe_finalize_routing import check
from npu_backend.emulation.mode import is_exact


@torch.no_grad()
def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """The CPU kernel: `[T, H]`.

    `expanded_src_to_dst_row` says where the row of choice j of token t stands, at j·T + t, or with drop_pad_mode 2 at
    t·k + j.

    Raises:
      RuntimeError: see `npu_backend.contracts.moe_finalize_routing`.
    """
    rows, mode = expanded_permuted_rows, drop_pad_mode or 0
    tokens, k = check(rows, skip1, skip2, bias, scales, expanded_src_to_dst_row, mode, k or 1)
    shape = (k, tokens) if mode == 0 else (tokens, k)
    where = expanded_src_to_dst_row.long().reshape(shape)
    where = where if mode == 0 else where.T
    narrow = torch.float32 if rows.dtype == torch.bfloat16 else rows.dtype
    wide = torch.float64 if is_exact() else narrow
    total = skip1 if skip2 is None or skip1 is None else skip1.to(wide) + skip2.to(wide)
    for j in range(k):
        part = rows[where[j]].to(wide)
        part = part if scales is None else part * scales[:, j, None].to(wide)
        total = part if total is None else total.to(wide) + part
    assert total is not None
    return total.to(rows.dtype)
