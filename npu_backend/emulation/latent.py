"""atb::npu_multi_head_latent_attention on a CPU: decode, one query token per request over a paged cache of latents.

    q·c + q_rope·k_r, × scale, row maximum, exp, row sum   float32
    probabilities, times c                                 the dtype of the inputs
    p·c, rescaling, division                               float32, then the dtype of the inputs
    lse = ln Σ + m                                         float32, then the dtype of the inputs

The lse is FP16 or BF16: three decimal digits at magnitude 10, an error of up to 2⁻⁸ relative in the weights of a merge.
Keys are taken 512 at a time, which is assumed. Rows of a request without keys are not written; here they hold NaN.
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.latent import Call, check, check_outputs
from npu_backend.emulation.flash import EXACT, Stages, attend, finish
from npu_backend.emulation.mode import is_exact


def npu_multi_head_latent_attention(*args: Any, **options: Any) -> Tensor:
    """The CPU kernel: `[B, H, 512]`.

    Raises:
      RuntimeError: see `npu_backend.contracts.latent`.
    """
    return npu_multi_head_latent_attention_lse(*args, **options)[0]


def npu_multi_head_latent_attention_lse(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The same and, for calc_type_ring, the lse `[B, H, 1]` in the inputs' dtype; else an undefined tensor (None)."""
    call = check(*args, **options)
    q = call.query[0]
    out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
    return _compute(call, out, q.new_full((*q.shape[:2], 1), torch.nan) if call.has_lse else None)


def npu_multi_head_latent_attention_out(*args: Any, output: Tensor, **options: Any) -> Tensor:
    """The same into a given tensor, whose unwritten rows stay."""
    call = check(*args, **options)
    check_outputs(call, output, None)
    return _compute(call, output, None)[0]


def npu_multi_head_latent_attention_lse_out(
    *args: Any, output: Tensor, lse: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The same into given tensors; `lse` is written for calc_type_ring only."""
    call = check(*args, **options)
    check_outputs(call, output, lse)
    _compute(call, output, lse if call.has_lse else None)
    return output, lse


@torch.no_grad()
def _compute(call: Call, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = out.dtype
    stages = EXACT if is_exact() else Stages(torch.float32, torch.float32, dtype)
    for request, (length, blocks) in enumerate(zip(call.lengths, call.blocks, strict=True)):
        if not length:
            continue
        latent, rope = (x[blocks].flatten(0, 1)[:length].transpose(0, 1) for x in call.cache)  # [1, n, …]
        query = torch.cat([x[request] for x in call.query], dim=-1)[:, None]  # [H, 1, 576]
        key = torch.cat([latent, rope], dim=-1)
        state = attend(query, key, latent, call.scale, stages, lambda _, n=length: (0, n), lambda score, *_: score)
        new_out, new_lse = finish(state)
        out[request] = new_out[:, 0].to(dtype)
        if lse is not None:
            lse[request] = new_lse.to(torch.float32).to(dtype) if stages is not EXACT else new_lse.to(dtype)
    return out, lse
