"""FIA's paged cache: how it lies, how large its blocks are, and which of them a request has.

The cache lies in any of three ways (contracts/pages.py) whatever the layout of the query, since
aclnnFusedInferAttentionScoreV4 of August 2026; in torch_npu's own document of 2026 queries in BSH and BSND still take
`[blocks, block, K·D]` only. The sizes of blocks are those of the former:

    rope; or head dims all 64 or all 128; or packed tokens    a multiple of 16, up to 1024
    other head dims, one query a request                      a multiple of 16, up to 512
    other head dims, more queries                             a multiple of 128, up to 1024 (torch_npu: up to 512)
"""

import torch
from torch import Tensor

from npu_backend.contracts.fused_infer_dims import V4, Parts
from npu_backend.contracts.layouts import tokens_first
from npu_backend.contracts.pages import SLICE, from_nz, used_blocks
from npu_backend.contracts.refuse import Refusal

WIDEST = 65535
"""Most numbers of a token, all heads, in a cache `[blocks, block, K·D]`."""


def tokens_of_cache(refusal: Refusal, name: str, x: Tensor, kv_heads: int) -> Tensor:
    """A cache as `[blocks, block, K, D]`.

    Raises:
      RuntimeError: it lies in none of the three ways.
    """
    dims = x.dim()
    refusal.require(dims in (3, 4, 5), f"when Page Attention enabled, {name}'s dim should be 3/4/5, but got {dims}")
    if dims == 3:
        fits = x.shape[2] % kv_heads == 0
        refusal.parameter(fits, f"{name} has {x.shape[2]} numbers a token, no multiple of {kv_heads} kv heads")
        refusal.parameter(
            x.shape[2] <= WIDEST, f"{name} has {x.shape[2]} numbers a token, at most {WIDEST}: heads first ({V4})"
        )
        return tokens_first(x, "BSH", kv_heads)
    if dims == 4:
        return tokens_first(x, "BNSD", kv_heads)
    slices = f"{name} is {tuple(x.shape)}, in NZ format it must be [blocks, {kv_heads}, D/{SLICE}, block, {SLICE}]"
    refusal.parameter(x.shape[4] == SLICE and x.shape[1] == kv_heads, slices)
    return from_nz(x)


def check_pages(
    refusal: Refusal, table: Tensor, block_size: int, parts: Parts, kv_lengths: list[int],
    is_packed: bool, one_token: bool,
) -> None:  # fmt: skip
    """The block table and the blocks.

    Raises:
      RuntimeError: what the vendor refuses, and ids of blocks that are not there, at which it does not look.
    """
    blocks, size = parts.value.shape[:2]
    refusal.parameter(table.dtype == torch.int32 and table.dim() == 2, "block_table must be int32 [B, blocks]")
    requests = len(kv_lengths)
    refusal.parameter(table.shape[0] == requests, f"block_table has {table.shape[0]} rows for {requests} requests")
    refusal.parameter(block_size == size, f"block_size {block_size}, the cache has blocks of {size}")
    unit, largest = _sizes(parts, is_packed, one_token)
    refusal.parameter(
        block_size % unit == 0 and unit <= block_size <= largest,
        f"block_size {block_size}: a multiple of {unit} up to {largest} ({V4})",
    )
    for used in used_blocks(table, kv_lengths, block_size):
        # unsafe: the vendor does not look at block ids.
        is_there = all(0 <= i < blocks for i in used)
        refusal.require(is_there, f"block_table {used} outside of {blocks} blocks (unsafe)")


def _sizes(parts: Parts, is_packed: bool, one_token: bool) -> tuple[int, int]:
    """Of what a block is a multiple, and the largest."""
    if parts.has_rope or is_packed or parts.dims in ((64, 64), (128, 128)):
        return 16, 1024
    return (16, 512) if one_token else (128, 1024)
