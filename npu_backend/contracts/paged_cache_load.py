"""What atb::npu_paged_cache_load accepts (PagedCacheLoadAtb.cpp of op-plugin, paged_cache_load of ATB)."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend.contracts.refuse import Refusal

_refusal = Refusal("npu_paged_cache_load")


class Call(NamedTuple):
    """A checked call: per request its number of tokens and the blocks that hold them, in order."""

    lengths: list[int]
    blocks: list[list[int]]


def check(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    seq_starts: Tensor | None = None,
    cumsum: bool = False,
) -> Call:
    """The call, checked; caches are `[blocks, block, h, d]`.

    Raises:
      RuntimeError: what the vendor refuses, and unsafe block ids, which it does not look at.
    """
    require = _refusal.require
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        _refusal.not_implemented(cache.dim() == 4, f"{name} of {cache.dim()} dims")
        dtypes = (torch.int8, torch.float16, torch.bfloat16)
        require(cache.dtype in dtypes, f"{name} is {cache.dtype}, must be int8, float16 or bfloat16")
        row = cache.shape[2] * cache.shape[3] * cache.element_size()
        require(row % 32 == 0, f"a token of {name} has {row} bytes, must be a multiple of 32")
    require(
        key_cache.shape[:3] == value_cache.shape[:3], "key_cache and value_cache must have the same blocks and heads"
    )
    require(key_cache.dtype == value_cache.dtype, "key_cache and value_cache must have the same dtype")
    for name, x, dims in (("block_table", block_table, 2), ("context_lens", context_lens, 1)):
        require(x.dtype == torch.int32 and x.dim() == dims, f"{name} must be int32 and have {dims} dims")
    batch, block = block_table.shape[0], key_cache.shape[1]
    lengths = _lengths(context_lens, batch, cumsum)
    starts = [0] * batch
    if seq_starts is not None:
        require(seq_starts.dtype == torch.int32 and seq_starts.shape == (batch,), f"seq_starts must be int32 [{batch}]")
        starts = seq_starts.tolist()
        require(all(n >= 0 for n in starts), f"seq_starts {starts} must not be negative")
    blocks = []
    for row, start, length in zip(block_table.tolist(), starts, lengths, strict=True):
        first = start // block  # whole blocks; the remainder is dropped
        used = row[first : first - (-length // block)]
        require(
            len(used) * block >= length,
            f"{length} tokens from {start} on, block_table holds {len(row)} blocks of {block}",
        )
        # unsafe: the vendor's kernel casts ids to unsigned offsets, so −1 is a place far away.
        require(all(0 <= i < key_cache.shape[0] for i in used), f"block ids {used} of {key_cache.shape[0]} (unsafe)")
        blocks.append(used)
    return Call(lengths, blocks)


def _lengths(context_lens: Tensor, batch: int, cumsum: bool) -> list[int]:
    given = context_lens.tolist()
    _refusal.require(len(given) == batch + cumsum, f"context_lens has {len(given)} numbers for {batch} requests")
    lengths = [b - a for a, b in pairwise(given)] if cumsum else given
    negative = any(n < 0 for n in (*given, *lengths))
    _refusal.require(not negative, "Invalid context_lens: negative value encountered")
    _refusal.require(
        sum(lengths) < 2**31, "Integer overflow in accumulation: sum exceeds int32_t max in npu_paged_cache_load"
    )
    _refusal.require(not cumsum or given[0] == 0, f"cumulative context_lens {given} must start with 0")
    return lengths


def check_outputs(call: Call, caches: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> None:
    """What `.out` writes to.

    Raises:
      RuntimeError: a shape or dtype is not that of a result.
    """
    for name, cache, x in zip(("key", "value"), caches, outputs, strict=True):
        shape = (sum(call.lengths), *cache.shape[2:])
        _refusal.require(
            x.shape == shape and x.dtype == cache.dtype,
            f"{name} is {tuple(x.shape)} {x.dtype}, must be {shape} {cache.dtype}",
        )
