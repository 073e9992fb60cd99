"""What npu::npu_gather_pa_kv_cache accepts (aclnnGatherPaKvCache.md of ops-transformer, August 2026; Atlas A2 and A3).

It has taken the place of atb::npu_paged_cache_load in vLLM-Ascend. A cache in NZ format is told by the format of the
NPU's tensor, which a CPU tensor does not have: here caches are `[blocks, block, heads, dim]`.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend.contracts.pages import used_blocks
from npu_backend.contracts.refuse import Refusal

TOKEN_BYTES = 148 * 1024
"""Most bytes of a token, all heads."""


class Call(NamedTuple):
    """A checked call: per request its number of tokens and the blocks that hold them, in order."""

    lengths: list[int]
    blocks: list[list[int]]


def check(
    operator: str,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    seq_offset: Tensor | None = None,
    is_seq_lens_cumsum: bool = False,
) -> Call:
    """The call, checked; caches are `[blocks, block, h, d]`, key and value `[Σ lengths, h, d]`.

    Raises:
      RuntimeError: what the vendor refuses; and ids of blocks that are not there, of which its document says nothing
        for A2 (for Ascend 950 its test expects zeros).
    """
    refusal = Refusal(operator)
    require = refusal.parameter
    _check_caches(refusal, key_cache, value_cache)
    require(block_tables.dim() == 2, f"block_tables has {block_tables.dim()} dims, must have 2")
    require(seq_lens.dim() == 1, f"seq_lens has {seq_lens.dim()} dims, must have 1")
    batch = block_tables.shape[0]
    require(batch > 0 and block_tables.shape[1] > 0, f"block_tables {tuple(block_tables.shape)} must not be empty")
    numbers = (("block_tables", block_tables), ("seq_lens", seq_lens), ("seq_offset", seq_offset))
    for name, x in numbers:
        require(x is None or x.dtype == torch.int32, f"{name} is {None if x is None else x.dtype}, must be int32")
    lengths = _lengths(refusal, seq_lens.tolist(), batch, is_seq_lens_cumsum)
    offsets = [0] * batch
    if seq_offset is not None:
        require(seq_offset.shape == (batch,), f"seq_offset is {tuple(seq_offset.shape)}, must be [{batch}]")
        offsets = seq_offset.tolist()
        require(all(n >= 0 for n in offsets), f"seq_offset {offsets} must not be negative")
    for name, x, cache in (("key", key, key_cache), ("value", value, value_cache)):
        shape = (sum(lengths), *cache.shape[2:])
        fits = x.shape == shape and x.dtype == cache.dtype
        require(fits, f"{name} is {tuple(x.shape)} {x.dtype}, must be {shape} {cache.dtype}")
    count, block = key_cache.shape[:2]
    # Whole blocks are skipped; the remainder of an offset is dropped.
    blocks = used_blocks(block_tables, lengths, block, [n // block for n in offsets])
    for used, length, offset in zip(blocks, lengths, offsets, strict=True):
        held = len(used) * block >= length
        require(held, f"{length} tokens from {offset} on, block_tables holds {block_tables.shape[1]} blocks of {block}")
        is_there = all(0 <= i < count for i in used)
        refusal.require(is_there, f"block_tables {used}, ids must be 0 to {count - 1} (unsafe)")
    return Call(lengths, blocks)


def _check_caches(refusal: Refusal, key_cache: Tensor, value_cache: Tensor) -> None:
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        refusal.parameter(cache.dim() == 4, f"{name} has {cache.dim()} dims, must have 4")
        dtypes = (torch.int8, torch.float16, torch.bfloat16)
        refusal.parameter(cache.dtype in dtypes, f"{name} is {cache.dtype}, must be int8, float16 or bfloat16")
        size = cache.shape[2] * cache.shape[3] * cache.element_size()
        refusal.parameter(size <= TOKEN_BYTES, f"a token of {name} has {size} bytes, at most {TOKEN_BYTES}")
    same = key_cache.shape[:2] == value_cache.shape[:2] and key_cache.dtype == value_cache.dtype
    refusal.parameter(same, "key_cache and value_cache must have the same blocks and dtype")


def _lengths(refusal: Refusal, given: list[int], batch: int, is_cumulative: bool) -> list[int]:
    refusal.parameter(
        len(given) == batch + is_cumulative,
        f"seq_lens has {len(given)} numbers, must have {batch + is_cumulative} for {batch} requests",
    )
    refusal.parameter(not is_cumulative or given[0] == 0, f"cumulative seq_lens {given} must start with 0")
    lengths = [b - a for a, b in pairwise(given)] if is_cumulative else given
    refusal.parameter(all(n >= 0 for n in lengths), f"seq_lens {given} has a negative length")
    return lengths
