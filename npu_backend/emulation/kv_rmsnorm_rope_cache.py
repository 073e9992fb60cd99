"""npu::npu_kv_rmsnorm_rope_cache on a CPU: the latent's norm, its rotary part turned, both written into a cache.

All of it in float32, x / √(mean x² + ε) · gamma with one cast (unlike npu_rms_norm), the rotation as in
npu_interleave_rope (op_kernel of kv_rms_norm_rope_cache, ops-transformer).
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.kv_rmsnorm_rope_cache import LATENT, PAGED, check
from npu_backend.emulation.interleave_rope import turned
from npu_backend.emulation.mode import is_exact


@torch.no_grad()
def npu_kv_rmsnorm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The CPU kernel: both caches, which it has written into, then k_rope `[B, 1, S, 64]` and c_kv `[B, 1, S, 512]`.

    Without is_output_kv, and in cache mode "Norm", the last two are not written: NaN here. A token whose index is −1
    goes into no cache.

    Raises:
      RuntimeError: see `npu_backend.contracts.kv_rmsnorm_rope_cache`.
    """
    check(kv, gamma, cos, sin, index, k_cache, ckv_cache, cache_mode=cache_mode, **options)
    wide = kv[..., :LATENT].to(torch.float64 if is_exact() else torch.float32)
    size = torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + epsilon)
    c_kv = (wide / size * gamma.to(wide.dtype)).to(kv.dtype)
    k_rope = turned(kv[..., LATENT:], cos, sin).to(kv.dtype)
    for cache, tokens in ((k_cache, k_rope), (ckv_cache, c_kv)):
        _write(cache, tokens, index, cache_mode)
    if not (is_output_kv and cache_mode in PAGED):
        c_kv, k_rope = torch.full_like(c_kv, torch.nan), torch.full_like(k_rope, torch.nan)
    return k_cache, ckv_cache, k_rope, c_kv


def _write(cache: Tensor, tokens: Tensor, index: Tensor, cache_mode: str) -> None:
    if cache_mode == "Norm":
        for request, row, places in zip(cache, tokens, index, strict=True):
            request[0, places[places >= 0]] = row[0, places >= 0]
        return
    block = cache.shape[1]
    is_kept = index >= 0
    places = index[is_kept]
    cache[places // block, places % block, 0] = tokens.flatten(0, 2)[is_kept]
