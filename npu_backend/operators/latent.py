"""Decode over DeepSeek's latent, and the paged cache it lies in: what surrounds family 1."""

import torch
from torch import Tensor

from npu_backend import vendor
from npu_backend.contracts.latent import BLOCK, HEADS, LATENT, ROPE
from npu_backend.errors import InputError
from npu_backend.operators.partial import Partial, nothing, where


def latent_decode(
    query: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    block_table: Tensor,
    *,
    kv_lengths: tuple[int, ...],
    scale: float,
) -> Partial:
    """Attention of one token per request over its cached latents; one call of atb::npu_multi_head_latent_attention.

    Args:
      query: `[B, 1, N, 576]` float16 or bfloat16, absorbed; the last 64 are the rotary part; N is 8, 16, 32, 64 or 128.
      latent_cache, rope_cache: `[blocks, block, 1, 512]`, `[blocks, block, 1, 64]`, blocks of at most 128 tokens.
      block_table: `[B, …]` int32, the blocks of each request in order.
      kv_lengths: cached tokens per request.
      scale: multiplies q·k, above 0 and at most 1.

    Returns:
      The partial, out `[B, 1, N, 512]`. The operator stores its lse in the inputs' dtype: eleven bits in FP16.

    Raises:
      InputError: what the operator cannot express.
    """
    _check(query, latent_cache, rope_cache, block_table, kv_lengths, scale)
    vendor.require("atb::npu_multi_head_latent_attention.lse", query.device)
    empty = nothing(query, LATENT)
    if not any(kv_lengths):
        return empty
    tokens = query[:, 0]
    out, lse = torch.ops.atb.npu_multi_head_latent_attention.lse(
        tokens[..., :LATENT].contiguous(),
        tokens[..., LATENT:].contiguous(),
        latent_cache,
        rope_cache,
        block_table,
        list(kv_lengths),
        query.shape[2],
        scale,
        1,
        True,
        calc_type="calc_type_ring",
    )
    new = Partial(out[:, None], lse.float().squeeze(-1)[:, None])
    has_keys = torch.tensor(kv_lengths, device=query.device)[:, None, None] > 0
    return where(has_keys, new, empty)  # without keys the operator writes nothing


def paged_latent(
    latent_cache: Tensor, rope_cache: Tensor, block_table: Tensor, kv_lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The cached tokens of each request, one request after the other; one call of atb::npu_paged_cache_load.

    Args:
      latent_cache, rope_cache, block_table, kv_lengths: as in `latent_decode`.

    Returns:
      `[Σ kv_lengths, 1, 512]` and `[Σ kv_lengths, 1, 64]`, bit by bit what the cache holds.

    Raises:
      InputError: what the operator cannot express.
    """
    _check_pages(latent_cache, block_table, kv_lengths)
    vendor.require("atb::npu_paged_cache_load", latent_cache.device)
    lengths = torch.tensor(kv_lengths, dtype=torch.int32, device=latent_cache.device)
    return torch.ops.atb.npu_paged_cache_load(latent_cache, rope_cache, block_table, lengths)


def _check(
    query: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    block_table: Tensor,
    kv_lengths: tuple[int, ...],
    scale: float,
) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"query is {query.dtype}; the operator takes float16 or bfloat16: convert it")
    if query.dim() != 4 or query.shape[1] != 1 or query.shape[2] not in HEADS or query.shape[3] != LATENT + ROPE:
        raise InputError(f"query is {tuple(query.shape)}; it must be [B, 1, N, 576], one token each, N of {HEADS}")
    blocks = latent_cache.shape[:2]
    for name, cache, width in (("latent_cache", latent_cache, LATENT), ("rope_cache", rope_cache, ROPE)):
        if cache.shape != (*blocks, 1, width) or cache.dtype != query.dtype:
            raise InputError(
                f"{name} is {tuple(cache.shape)} {cache.dtype}; it must be [blocks, block, 1, {width}] {query.dtype}"
            )
    if not 1 <= latent_cache.shape[1] <= BLOCK:
        raise InputError(f"blocks of {latent_cache.shape[1]} tokens; the operator takes 1 to {BLOCK}")
    if not 0 < scale <= 1:
        raise InputError(f"scale {scale:g}; the operator takes more than 0 and at most 1")
    if len(kv_lengths) != query.shape[0]:
        raise InputError(f"kv_lengths {kv_lengths} for {query.shape[0]} requests; there must be one each")
    _check_pages(latent_cache, block_table, kv_lengths)


def _check_pages(cache: Tensor, block_table: Tensor, kv_lengths: tuple[int, ...]) -> None:
    count, block = cache.shape[:2]
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.shape[0] != len(kv_lengths):
        raise InputError(f"block_table is {tuple(block_table.shape)} {block_table.dtype}; it must be int32 [B, blocks]")
    for row, length in zip(block_table.tolist(), kv_lengths, strict=True):
        used = row[: -(-length // block)]
        if length < 0 or len(used) * block < length or any(not 0 <= i < count for i in used):
            raise InputError(f"{length} tokens in blocks {used} of {block}; there are blocks 0 to {count - 1}")
