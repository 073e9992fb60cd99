"""What npu::npu_kv_rmsnorm_rope_cache accepts (README of kv_rms_norm_rope_cache, ops-transformer, 2026).

Of its cache modes the emulation has "PA" and "PA_BNSD", which differ in nothing here, and "Norm".
"""

import torch
from torch import Tensor

from npu_backend.contracts.refuse import Refusal

LATENT, ROPE = 512, 64
"""C and R, of DeepSeek-V3: the vendor's kernel knows no other widths in this form."""
PAGED = ("PA", "PA_BNSD")
_refusal = Refusal("npu_kv_rmsnorm_rope_cache")


def check(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    cache_mode: str = "Norm",
) -> None:
    """`kv` is `[B, 1, S, 576]`, caches `[blocks, block, 1, …]` and index `[B·S]`; or `[B, 1, length, …]` and `[B, S]`.

    Raises:
      RuntimeError: what the vendor refuses, and an index that is out of the cache or there twice.
    """
    require, parameter = _refusal.require, _refusal.parameter
    require(kv.dim() == 4, "4D tensor expected for input kv")
    require(gamma.dim() == 1, "1D tensor expected for input gamma")
    require(cos.dim() == 4, "4D tensor expected for input cos")
    modes = ("Norm", *PAGED, "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ")
    parameter(cache_mode in modes, f"cache_mode is {cache_mode!r}, must be one of {modes}")
    _refusal.not_implemented(cache_mode in ("Norm", *PAGED), f"cache_mode {cache_mode}")
    quantised = {"k_rope_scale": k_rope_scale, "c_kv_scale": c_kv_scale}
    quantised |= {"k_rope_offset": k_rope_offset, "c_kv_offset": c_kv_offset}
    _refusal.only_defaults(quantised | {"v": v})
    batch, heads, length, width = kv.shape
    parameter(kv.dtype in (torch.float16, torch.bfloat16), f"kv is {kv.dtype}, must be float16 or bfloat16")
    parameter((heads, width) == (1, LATENT + ROPE), f"kv is {tuple(kv.shape)}, must be [B, 1, S, {LATENT + ROPE}]")
    parameter(gamma.shape == (LATENT,), f"gamma is {tuple(gamma.shape)}, must be [{LATENT}]")
    for name, angle in (("cos", cos), ("sin", sin)):
        parameter(angle.shape == (batch, 1, length, ROPE), f"{name} {tuple(angle.shape)} must be [B, 1, S, {ROPE}]")
    for name, x in (("gamma", gamma), ("cos", cos), ("sin", sin), ("k_cache", k_cache), ("ckv_cache", ckv_cache)):
        parameter(x.dtype == kv.dtype, f"{name} is {x.dtype}, must be {kv.dtype} as kv is")
    _check_caches(k_cache, ckv_cache, cache_mode, batch, length)
    _check_index(index, k_cache, cache_mode, batch, length)


def _check_caches(k_cache: Tensor, ckv_cache: Tensor, cache_mode: str, batch: int, length: int) -> None:
    parameter = _refusal.parameter
    for name, cache, width in (("k_cache", k_cache, ROPE), ("ckv_cache", ckv_cache, LATENT)):
        parameter(
            cache.dim() == 4 and cache.shape[3] == width, f"{name} {tuple(cache.shape)} must have {width} columns"
        )
    parameter(k_cache.shape[:3] == ckv_cache.shape[:3], "k_cache and ckv_cache must hold as many tokens")
    if cache_mode == "Norm":
        fits = k_cache.shape[:2] == (batch, 1) and k_cache.shape[2] >= length
        parameter(fits, f"k_cache {tuple(k_cache.shape)} must be [B, 1, at least S, {ROPE}]")
        return
    blocks, block = k_cache.shape[:2]
    parameter(k_cache.shape[2] == 1, f"k_cache {tuple(k_cache.shape)} must be [blocks, block, 1, {ROPE}]")
    parameter(block % 16 == 0, f"blocks of {block} tokens, must be a multiple of 16")
    parameter(blocks >= -(-length // block) * batch, f"{blocks} blocks of {block} are too few for {batch} × {length}")


def _check_index(index: Tensor, k_cache: Tensor, cache_mode: str, batch: int, length: int) -> None:
    parameter = _refusal.parameter
    wanted = (batch, length) if cache_mode == "Norm" else (batch * length,)
    parameter(index.dtype == torch.int64, f"index is {index.dtype}, must be int64")
    parameter(tuple(index.shape) == wanted, f"index is {tuple(index.shape)}, must be {wanted}")
    room = k_cache.shape[2] if cache_mode == "Norm" else k_cache.shape[0] * k_cache.shape[1]
    for row in index.reshape(batch if cache_mode == "Norm" else 1, -1).tolist():
        parameter(all(-1 <= i < room for i in row), f"index {row} must be from -1 to {room - 1}")
        written = [i for i in row if i >= 0]
        _refusal.require(
            len(written) == len(set(written)), f"unsafe: index {row} names a place twice, which is undefined"
        )
