"""What atb::npu_multi_head_latent_attention accepts.

Sources: op-plugin MultiHeadLatentAttentionAtb.cpp; ATB's host checks, multi_latent_attention_operation.cpp. Of the
cache modes krope_ctkv lies `[blocks, block, 1, 512]` and `[blocks, block, 1, 64]`, nzcache `[blocks, 32, block, 16]`
and `[blocks, 4, block, 16]`: the same numbers, in the queries' dtype, in another order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from npu_backend.contracts.pages import SLICE, from_nz
from npu_backend.contracts.refuse import Refusal

LATENT, ROPE, BLOCK = 512, 64, 128
HEADS = (8, 16, 32, 64, 128)
_refusal = Refusal("npu_multi_head_latent_attention")


class Call(NamedTuple):
    """A checked call: one query token per request, and the blocks of the cache that hold its keys."""

    query: tuple[Tensor, Tensor]  # [B, H, 512], [B, H, 64]
    cache: tuple[Tensor, Tensor]  # [blocks, block, 1, 512], [blocks, block, 1, 64]
    lengths: list[int]
    blocks: list[list[int]]
    scale: float
    has_lse: bool


def check(
    q_nope: Tensor,
    q_rope: Tensor,
    ctkv: Tensor,
    k_rope: Tensor,
    block_tables: Tensor,
    context_lens: list[int],
    q_headnum: int,
    qk_scale: float,
    kv_headnum: int,
    return_lse: bool = False,
    *,
    mask: Tensor | None = None,
    mask_type: str | None = None,
    calc_type: str | None = None,
    cache_mode: str | None = None,
    workspace: Tensor | None = None,
    **others: Any,
) -> Call:
    """The call, checked; arguments as in the schema. The lse is computed for calc_type_ring, whatever return_lse says.

    Raises:
      RuntimeError: what the vendor refuses, the unsafe rest, and what is not implemented here.
    """
    del return_lse, workspace
    masks = ("undefined", "mask_type_spec", "mask_type_free")
    calcs = ("calc_type_undefined", "calc_type_spec", "calc_type_ring")
    caches = ("krope_ctkv", "int8_nzcache", "nzcache")
    choices = (("mask_type", mask_type, masks), ("calc_type", calc_type, calcs), ("cache_mode", cache_mode, caches))
    for name, given, known in choices:
        _refusal.require(given is None or given in known, f"Unsupported {name} value: '{given}'")
    _refusal.not_implemented(calc_type != "calc_type_spec", "calc_type_spec")
    _refusal.not_implemented(cache_mode != "int8_nzcache", "cache_mode int8_nzcache")
    _refusal.only_defaults(others)
    is_unmasked = mask is None and mask_type in (None, "undefined")
    _refusal.require(is_unmasked, "mask and mask_type are for calc_type_spec only")
    _refusal.require(q_headnum in HEADS, f"headNum is {q_headnum}, must be one of {HEADS}")
    _refusal.require(kv_headnum == 1, f"kvHeadNum is {kv_headnum}, must be 1")
    _refusal.require(0 < qk_scale <= 1, f"qkScale is {qk_scale}, must be in (0, 1]")
    is_nz = cache_mode == "nzcache"
    _check_tensors(q_nope, q_rope, ctkv, k_rope, q_headnum, is_nz)
    cache = (from_nz(ctkv)[:, :, None], from_nz(k_rope)[:, :, None]) if is_nz else (ctkv, k_rope)
    blocks = _blocks(block_tables, list(context_lens), q_nope.shape[0], cache[0])
    has_lse = calc_type == "calc_type_ring"
    return Call((q_nope, q_rope), cache, list(context_lens), blocks, qk_scale, has_lse)


def _check_tensors(q_nope: Tensor, q_rope: Tensor, ctkv: Tensor, k_rope: Tensor, heads: int, is_nz: bool) -> None:
    dtype = q_nope.dtype
    _refusal.not_implemented(dtype != torch.int8, "int8")
    _refusal.require(dtype in (torch.float16, torch.bfloat16), f"q_nope is {dtype}, must be float16 or bfloat16")
    for name, x, dims in (("q_nope", q_nope, 3), ("ctkv", ctkv, 4)):
        _refusal.require(x.dim() == dims, f"{name} has {x.dim()} dims, must be {dims} (ERROR_INVALID_TENSOR_DIM_NUM)")
    tokens, blocks, block = q_nope.shape[0], ctkv.shape[0], ctkv.shape[2 if is_nz else 1]
    _refusal.require(1 <= block <= BLOCK, f"block size {block}, at most {BLOCK}")

    def stored(width: int) -> tuple[int, ...]:
        return (blocks, width // SLICE, block, SLICE) if is_nz else (blocks, block, 1, width)

    expected = (
        ("q_nope", q_nope, (tokens, heads, LATENT)),
        ("q_rope", q_rope, (tokens, heads, ROPE)),
        ("ctkv", ctkv, stored(LATENT)),
        ("k_rope", k_rope, stored(ROPE)),
    )
    for name, x, shape in expected:
        _refusal.require(x.shape == shape, f"{name} is {tuple(x.shape)}, must be {shape} (ERROR_INVALID_TENSOR_DIM)")
        _refusal.require(x.dtype == dtype, f"{name} is {x.dtype}, must be q_nope's {dtype} (ERROR_INVALID_VALUE)")


def _blocks(table: Tensor, lengths: list[int], requests: int, cache: Tensor) -> list[list[int]]:
    count, block = cache.shape[:2]
    _refusal.require(table.dtype == torch.int32 and table.dim() == 2, "block_tables must be int32 [B, blocks]")
    fits = len(lengths) == table.shape[0] == requests <= 8192
    _refusal.require(
        fits, f"{requests} tokens, {table.shape[0]} rows of block_tables, {len(lengths)} contextLens; at most 8192"
    )
    _refusal.require(all(n >= 0 for n in lengths), f"contextLens {lengths} must not be negative")
    rows = []
    for row, length in zip(table.tolist(), lengths, strict=True):
        used = row[: -(-length // block)]
        is_there = len(used) * block >= length and all(0 <= i < count for i in used)
        _refusal.require(is_there, f"block ids {used} for {length} keys, of {count} blocks (unsafe)")
        rows.append(used)
    return rows


def check_outputs(call: Call, output: Tensor, lse: Tensor | None) -> None:
    """What `.out` and `.lse_out` write to.

    Raises:
      RuntimeError: a shape or dtype is not that of a result.
    """
    like = call.query[0]
    for name, x, shape in (("output", output, tuple(like.shape)), ("lse", lse, (*like.shape[:2], 1))):
        if x is not None:
            _refusal.require(
                x.shape == shape and x.dtype == like.dtype,
                f"{name} is {tuple(x.shape)} {x.dtype}, must be {shape} {like.dtype}",
            )
