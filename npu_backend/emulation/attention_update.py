"""npu::npu_attention_update on a CPU: partials over disjoint sets of keys, merged (kernel decode_update.h).

Everything in float32, then one cast: m = max lse, lse' = m + ln Σ e^(lse − m), out = Σ out e^(lse − lse'). An lse of
+inf, which FIA gives to a row without keys, counts as −inf. All lses −inf: NaN, because −inf − (−inf) is. Of more than
16 partials 15 at a time are merged with an accumulator that starts as (0, −1e38), so there all −inf gives 0, not NaN.
Sums are taken in the order of the lists; the documents do not say in which order the kernel takes them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_backend.contracts.attention_update import check
from npu_backend.emulation.mode import is_exact

GROUP = 16


@torch.no_grad()
def npu_attention_update(
    lse: Sequence[Tensor], local_out: Sequence[Tensor], update_type: int
) -> tuple[Tensor, Tensor | None]:
    """The CPU kernel: `out` `[n, H]` in the dtype of local_out and, for update_type 1, `lse` `[n]` float32.

    For update_type 0 the second result is an undefined tensor, which Python sees as None.

    Raises:
      RuntimeError: see `npu_backend.contracts.attention_update`.
    """
    check(lse, local_out, update_type)
    compute = torch.float64 if is_exact() else torch.float32
    lses = [torch.where(torch.isposinf(x), -torch.inf, x).to(compute) for x in lse]
    outs = [x.to(compute) for x in local_out]
    if len(lses) <= GROUP:
        out, total = _merge(lses, outs)
    else:
        out, total = torch.zeros_like(outs[0]), torch.full_like(lses[0], -1e38)
        for start in range(0, len(lses), GROUP - 1):
            some = slice(start, start + GROUP - 1)
            out, total = _merge([total, *lses[some]], [out, *outs[some]])
    return out.to(local_out[0].dtype), total.to(torch.float32) if update_type == 1 else None


def _merge(lses: list[Tensor], outs: list[Tensor]) -> tuple[Tensor, Tensor]:
    maximum = torch.stack(lses).amax(dim=0)
    total = torch.zeros_like(maximum)
    for lse in lses:
        total = total + (lse - maximum).exp()
    merged = maximum + total.log()
    out = torch.zeros_like(outs[0])
    for lse, part in zip(lses, outs, strict=True):
        out = out + part * (lse - merged).exp()[:, None]
    return out, merged
