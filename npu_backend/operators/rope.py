"""Rotary embedding of queries and of the latent: npu::npu_interleave_rope, npu::npu_kv_rmsnorm_rope_cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend import vendor
from npu_backend.contracts.interleave_rope import ROPE
from npu_backend.contracts.kv_rmsnorm_rope_cache import LATENT
from npu_backend.errors import InputError
from npu_backend.operators.norms import norm

BLOCK = 128
"""Tokens of a cache block: what MindIE and vLLM-Ascend use."""


class Angles(NamedTuple):
    """Cosines and sines of T tokens, `[T, 64]` in the dtype of what they turn: 32 angles, twice beside each other."""

    cos: Tensor
    sin: Tensor


class Latent(NamedTuple):
    """What stays of T tokens: `c_kv` `[T, C]` after its norm, `k_rope` `[T, 64]` turned, as two halves."""

    c_kv: Tensor
    k_rope: Tensor


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Pairs (0, 1), (2, 3), … of `[T, N, 64]` turned, first numbers of all pairs first; one npu::npu_interleave_rope.

    Raises:
      InputError: another width than 64, or tensors that do not fit.
    """
    if x.dim() != 3 or x.shape[2] != ROPE:
        raise InputError(f"rotary part is {tuple(x.shape)}; npu_interleave_rope takes [T, N, {ROPE}]")
    _check(angles, x)
    vendor.require("npu::npu_interleave_rope", x.device)
    # A token is a request of the operator, its heads are heads: the call of vLLM-Ascend.
    cos, sin = (part[:, None, None].contiguous() for part in angles)
    return torch.ops.npu.npu_interleave_rope(x[:, :, None].contiguous(), cos, sin)[:, :, 0]


def latent_of(kv: Tensor, weight: Tensor, angles: Angles, eps: float) -> Latent:
    """The latents of `[T, C + 64]`.

    With C = 512 it is one call of npu::npu_kv_rmsnorm_rope_cache, over an empty cache in blocks. That operator knows no
    other width: then npu_rms_norm and npu_interleave_rope compute the same, rounded at the same places.

    Raises:
      InputError: no latent beside 64 rotary numbers, or tensors that do not fit.
    """
    tokens, latent = kv.shape[0], kv.shape[1] - ROPE
    if latent < 1 or weight.shape != (latent,):
        raise InputError(f"{tuple(kv.shape)} with a norm {tuple(weight.shape)}; it must be [T, C + {ROPE}] and [C]")
    _check(angles, kv)
    if latent != LATENT:
        c_kv = norm(kv[:, :latent].contiguous(), weight, eps)
        k_rope = rotate(kv[:, None, latent:], angles)[:, 0]
        return Latent(c_kv, k_rope)
    vendor.require("npu::npu_kv_rmsnorm_rope_cache", kv.device)
    cos, sin = (part[None, None].contiguous() for part in angles)
    blocks = -(-tokens // BLOCK)
    _, _, k_rope, c_kv = torch.ops.npu.npu_kv_rmsnorm_rope_cache(
        kv[None, None].contiguous(),
        weight,
        cos,
        sin,
        torch.arange(tokens, dtype=torch.int64, device=kv.device),
        kv.new_zeros(blocks, BLOCK, 1, ROPE),
        kv.new_zeros(blocks, BLOCK, 1, LATENT),
        epsilon=eps,
        cache_mode="PA_BNSD",
        is_output_kv=True,
    )
    return Latent(c_kv[0, 0], k_rope[0, 0])


def _check(angles: Angles, x: Tensor) -> None:
    for name, part in angles._asdict().items():
        if part.shape != (x.shape[0], ROPE) or part.dtype != x.dtype:
            raise InputError(f"{name} is {tuple(part.shape)} {part.dtype}; it must be [{x.shape[0]}, {ROPE}] {x.dtype}")
