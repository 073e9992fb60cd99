"""npu::npu_grouped_matmul on a CPU: each group of rows by its own matrix.

    floats   float32 sums, one cast
    W8A8     (Σ a·w + bias) · scale · per_token_scale: exact sums, then float32 in this order, one cast
    W4A8     a = 16·hi + lo + 8, hi = ⌊a / 16⌋, lo = (a mod 16) − 8: two products of 4-bit integers. Each is dequantised
             to FP16 with the top 19 bits of the scale, and summed in FP16 over groups of k; then
             (16·HI + LO + bias) · per_token_scale in float32, one cast. A bias of 8 Σ w·scale undoes the −8.

W4A8 is that of the kernel (grouped_matmul_antiquant_a8w4_msd, ops-transformer c29bc10) and of op-plugin's golden code.
In the exact arithmetic everything after the sums is float64 and all bits of the scale count. x is not cut in halves
then, so there is no −8, and the bias, which is rounded and only there to undo it, is not used.
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.grouped_matmul import Call, check
from npu_backend.emulation.integers import product, scale_of_bits, top_19_bits, unpack_int4
from npu_backend.emulation.mode import is_exact


@torch.no_grad()
def npu_grouped_matmul(x: list[Tensor], weight: list[Tensor], **options: Any) -> list[Tensor]:
    """The CPU kernel: one tensor `[m, n]`.

    Raises:
      RuntimeError: see `npu_backend.contracts.grouped_matmul`.
    """
    call = check(x, weight, **options)
    compute = _floats if call.scale is None else _w8a8 if call.weight.dtype == torch.int8 else _w4a8
    ends = torch.tensor(call.lengths).cumsum(0).tolist()
    groups = [(e, slice(end - n, end)) for e, (n, end) in enumerate(zip(call.lengths, ends, strict=True))]
    return [torch.cat([compute(call, e, rows) for e, rows in groups]).to(call.out)]


def _wide() -> torch.dtype:
    return torch.float64 if is_exact() else torch.float32


def _floats(call: Call, group: int, rows: slice) -> Tensor:
    return (call.x[rows].to(_wide()) @ call.weight[group].to(_wide())).to(call.out)


def _w8a8(call: Call, group: int, rows: slice) -> Tensor:
    assert call.scale is not None
    assert call.per_token is not None
    sums = product(call.x[rows], call.weight[group])
    sums = sums if call.bias is None else sums + call.bias[group]
    return sums.to(_wide()) * call.scale[group].to(_wide()) * call.per_token[rows, None].to(_wide())


def _w4a8(call: Call, group: int, rows: slice) -> Tensor:
    assert call.scale is not None
    assert call.per_token is not None
    assert call.bias is not None
    a, weight = call.x[rows], unpack_int4(call.weight[group])
    scales, per_token = scale_of_bits(call.scale[group]), call.per_token[rows, None].to(_wide())
    if is_exact():
        return _dequantised(a, weight, scales, torch.float64) * per_token
    halves = (_dequantised(part, weight, top_19_bits(scales), torch.float16) for part in (a >> 4, (a & 15) - 8))
    high, low = (half.float() for half in halves)
    return (16 * high + low + call.bias[group]) * per_token


def _dequantised(a: Tensor, weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ a·w·scale over the groups of k that `scales` `[G, n]` has; each group's product and each sum in this dtype."""
    each = len(weight) // len(scales)
    total = None
    for a_part, w_part, scale in zip(a.split(each, dim=1), weight.split(each), scales, strict=True):
        part = (product(a_part, w_part).to(_wide()) * scale.to(_wide())).to(dtype)
        total = part if total is None else total + part
    assert total is not None
    return total
