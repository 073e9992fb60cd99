"""What npu::npu_fused_infer_attention_score and _v2 accept, under the argument names of v2.

Sources: op-plugin FusedInferAttentionScore{,V2}KernelNpuOpApi.cpp, its meta functions and documents. Where documents of
different years differ the newest are followed: FP16 with packed tokens is accepted for as many key as query heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from npu_backend.contracts.layouts import PACKED, ends_to_lengths, tokens_first
from npu_backend.contracts.refuse import Refusal
from npu_backend.contracts.sparse import FAR, Sparse, check_sparse

ROPE = 64
LAYOUTS = {  # name: input layout, output layout, dims of query
    "BSH": ("BSH", "BSH", 3),
    "BSND": ("BSND", "BSND", 4),
    "BNSD": ("BNSD", "BNSD", 4),
    "TND": ("TND", "TND", 3),
    "BNSD_BSND": ("BNSD", "BSND", 4),
    "BSH_NBSD": ("BSH", "NBSD", 3),
    "BSND_NBSD": ("BSND", "NBSD", 4),
    "BNSD_NBSD": ("BNSD", "NBSD", 4),
    "BSH_BNSD": ("BSH", "BNSD", 3),
    "BSND_BNSD": ("BSND", "BNSD", 4),
    "TND_NTD": ("TND", "NTD", 3),
    "NTD_TND": ("NTD", "TND", 3),
}
LATENT_LAYOUTS = ("BSH", "BSND", "BNSD", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD", "TND", "TND_NTD")
PREFILL_LAYOUTS = ("BSH", "BSND", "BNSD", "TND", "BSH_BNSD", "BSND_BNSD", "BNSD_BSND", "NTD_TND")
PACKED_DIMS = ((128, 128), (192, 128), (192, 192), (64, 64))
NAMES_OF_V1 = {
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
    "num_heads": "num_query_heads",
    "scale": "softmax_scale",
    "softmax_lse_flag": "return_softmax_lse",
}


class Call(NamedTuple):
    """A checked call. Requests are `[q_lengths[b], …]` and so on; padded batches have rows beyond their lengths."""

    query: tuple[Tensor, ...]  # main and perhaps rope, [B, S, N, D] or packed [T, N, D]
    key: tuple[Tensor, ...]  # alike; paged: [blocks, block, K, D]
    value: Tensor
    block_table: Tensor | None
    q_lengths: list[int]
    kv_lengths: list[int]
    is_packed: bool
    out_layout: str
    sparse: Sparse
    scale: float
    is_half_score: bool  # inner_precise bit 0: scores in FP16
    repairs_rows: bool  # inner_precise bit 1: rows that the mask empties give (0, +inf)
    returns_lse: bool


def check(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    block_table: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = FAR,
    next_tokens: int = FAR,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    **others: Any,
) -> Call:
    """The call, checked; arguments by the names of v2.

    Raises:
      RuntimeError: what the vendor refuses, the unsafe rest, and what is not implemented here.
    """
    refusal = Refusal(operator)
    heads, kv_heads = num_query_heads, num_key_value_heads or num_query_heads
    refusal.require(heads > 0, f"numHeads should be greater than 0, but got {heads}")
    refusal.require(input_layout in LAYOUTS, f"layout only support BSH, BSND, TND, NTD, …, but got {input_layout}")
    refusal.only_defaults(others)
    in_layout, out_layout, dims = LAYOUTS[input_layout]
    refusal.require(
        query.dim() == dims, f"query's dim should be consistent with that of Layout {input_layout}, got {query.dim()}"
    )
    refusal.parameter(
        kv_heads > 0 and heads % kv_heads == 0, f"{heads} heads must be a multiple of {kv_heads} kv heads"
    )
    refusal.parameter(
        heads // kv_heads <= 64 and heads <= 256, f"{heads} heads, {kv_heads} kv heads: ratio over 64, or more than 256"
    )
    is_paged, is_packed = block_table is not None, in_layout in PACKED
    _check_value_dims(refusal, query, key, value, is_paged)
    queries = tuple(tokens_first(x, in_layout, heads) for x in (query, query_rope) if x is not None)
    keys = tuple(_tokens_of_kv(x, in_layout, kv_heads, is_paged) for x in (key, key_rope) if x is not None)
    values = _tokens_of_kv(value, in_layout, kv_heads, is_paged)
    _check_heads_and_types(refusal, queries, keys, values, heads, kv_heads)
    refusal.require((query_rope is None) == (key_rope is None), "query_rope and key_rope must both be given or neither")
    is_half = bool(inner_precise & 1)
    refusal.parameter(0 <= inner_precise <= 3, f"inner_precise is {inner_precise}, must be 0 to 3")
    refusal.parameter(not is_half or query.dtype == torch.float16, "inner_precise 1 and 3 are for float16 only")
    _check_dims(refusal, queries, keys, values, input_layout, is_paged, inner_precise)
    one_token = not is_packed and queries[0].shape[1] == 1
    q_lengths, kv_lengths = _lengths(
        refusal, queries[0], keys[0], block_table, is_packed, actual_seq_qlen, actual_seq_kvlen
    )
    if block_table is not None:
        _check_pages(
            refusal, block_table, block_size, keys[0], kv_lengths, one_token or len(queries) == 2, in_layout, key
        )
    shape = None if is_packed else (queries[0].shape[0], queries[0].shape[1], keys[0].shape[1])
    _check_mode(refusal, sparse_mode, queries[0].shape[-1], len(queries) == 2)
    is_full_mask = sparse_mode in (0, 1) and atten_mask is not None
    refusal.not_implemented(not (is_paged and is_full_mask), "a mask of every pair with paging")
    is_empty = 0 in queries[0].shape or 0 in keys[0].shape
    refusal.parameter(not (is_empty and query_rope is not None), "empty tensors with rope")
    if one_token and query_rope is None and sparse_mode in (2, 3, 4):
        sparse_mode, atten_mask = 0, None  # the incremental kernel does not look at sparse_mode
    if one_token and sparse_mode == 0 and atten_mask is not None:
        # The kernel has been seen to ignore such a mask beyond key 512 (vllm-ascend issue 15503).
        refusal.require(keys[0].shape[1] <= 512, "atten_mask for one query and more than 512 keys is misread (unsafe)")
    return Call(
        queries, keys, values, block_table, q_lengths, kv_lengths, is_packed, out_layout,
        check_sparse(refusal, sparse_mode, atten_mask, pre_tokens, next_tokens, shape),
        softmax_scale, is_half, bool(inner_precise & 2), return_softmax_lse,
    )  # fmt: skip


def _check_value_dims(refusal: Refusal, query: Tensor, key: Tensor, value: Tensor, is_paged: bool) -> None:
    if is_paged:
        refusal.require(
            value.dim() in (3, 4, 5), f"when Page Attention enabled, value's dim should be 3/4/5, but got {value.dim()}"
        )
        refusal.not_implemented(value.dim() < 5, "a cache in NZ format")
    else:
        refusal.require(
            value.dim() == query.dim(), "when Page Attention not enabled, value'dim should equal to query's dim!"
        )
    refusal.parameter(key.dim() == value.dim(), f"key has {key.dim()} dims, value {value.dim()}: must be the same")


def _tokens_of_kv(x: Tensor, layout: str, kv_heads: int, is_paged: bool) -> Tensor:
    """Key or value tokens first; a cache is `[blocks, block, K·D]` or `[blocks, K, block, D]`."""
    if not is_paged:
        return tokens_first(x, layout, kv_heads)
    return tokens_first(x, "BSH" if x.dim() == 3 else "BNSD", kv_heads)


def _check_heads_and_types(
    refusal: Refusal, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], value: Tensor, heads: int, kv_heads: int
) -> None:
    dtype = queries[0].dtype
    refusal.not_implemented(dtype in (torch.float16, torch.bfloat16), f"query of {dtype}")
    named = [("query", queries, heads), ("key", keys, kv_heads), ("value", (value,), kv_heads)]
    for name, parts, count in named:
        for x in parts:
            refusal.not_implemented(x.dtype == dtype, f"{name} of {x.dtype} beside query of {dtype}")
            refusal.parameter(x.shape[-2] == count, f"{name} has {x.shape[-2]} heads, the arguments say {count}")
            refusal.parameter(x.shape[:-2] == parts[0].shape[:-2], f"{name} and {name}_rope differ in their tokens")
    refusal.parameter(keys[0].shape[:-2] == value.shape[:-2], "key and value must have the same tokens")


def _check_dims(
    refusal: Refusal, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], value: Tensor,
    input_layout: str, is_paged: bool, inner_precise: int,
) -> None:  # fmt: skip
    heads, width = queries[0].shape[-2:]
    kv_heads, v_width = value.shape[-2:]
    refusal.parameter(keys[0].shape[-1] == width, f"head dims of query and key are {width} and {keys[0].shape[-1]}")
    refusal.parameter(width <= 512 and width % 16 == 0, f"head dim {width}, must be a multiple of 16 up to 512")
    if len(queries) == 2:
        ropes = queries[1].shape[-1], keys[1].shape[-1]
        refusal.parameter(ropes == (ROPE, ROPE), f"rope dims are {ropes}, must be {ROPE}")
        refusal.parameter(
            width in (128, 512) and v_width == width, f"with rope head dims must be 128 or 512, got {width}, {v_width}"
        )
        layouts = LATENT_LAYOUTS if width == 512 else PREFILL_LAYOUTS
        refusal.parameter(input_layout in layouts, f"layout {input_layout} with rope and head dim {width}")
        if width == 512:
            refusal.parameter(kv_heads == 1, f"head dim 512 needs 1 kv head, got {kv_heads}")
            refusal.parameter(heads in (1, 2, 4, 8, 16, 32, 64, 128), f"head dim 512 with {heads} heads")
    elif input_layout in ("TND", "TND_NTD", "NTD_TND") and width != 512:
        refusal.parameter((width, v_width) in PACKED_DIMS, f"packed tokens with head dims {width}, {v_width}")
        refusal.parameter(width != 64 or heads == kv_heads, "packed tokens of head dim 64 need as many kv heads")
        is_plain = input_layout == "TND" and heads == kv_heads and not is_paged
        refusal.parameter((width, v_width) != (192, 192) or is_plain, "head dims 192, 192 with GQA, paging or NTD")
        is_half = queries[0].dtype == torch.float16
        refusal.parameter(not is_half or heads == kv_heads, "packed float16 tokens need as many kv heads as heads")
        refusal.parameter(
            inner_precise in ((0, 1) if is_half else (0,)), f"packed tokens with inner_precise {inner_precise}"
        )
    else:
        refusal.parameter(v_width == width, f"head dims of key and value are {width} and {v_width}, must be equal")


def _lengths(
    refusal: Refusal, query: Tensor, key: Tensor, block_table: Tensor | None, is_packed: bool,
    q_given: list[int] | None, kv_given: list[int] | None,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Tokens per request of query and key."""
    if is_packed:
        if q_given is None or kv_given is None:
            raise RuntimeError(
                f"{refusal.operator}: 161002 (bad parameter): packed tokens need actual_seq_qlen and _kvlen"
            )
        q_lengths = _from_ends(refusal, "actual_seq_qlen", q_given, query.shape[0])
        kv_lengths = (
            list(kv_given)
            if block_table is not None
            else _from_ends(refusal, "actual_seq_kvlen", kv_given, key.shape[0])
        )
    else:
        refusal.parameter(block_table is None or kv_given is not None, "paging needs actual_seq_kvlen")
        batch, count = query.shape[:2]
        refusal.parameter(block_table is not None or key.shape[0] == batch, f"{batch} queries, {key.shape[0]} keys")
        q_lengths = [count] * batch if q_given is None or count == 1 else list(q_given)
        kv_lengths = [key.shape[1]] * batch if kv_given is None else list(kv_given)
        q_lengths, kv_lengths = (x * batch if len(x) == 1 else x for x in (q_lengths, kv_lengths))
        refusal.parameter(all(0 <= n <= count for n in q_lengths), f"actual_seq_qlen {q_lengths} of {count} tokens")
        refusal.parameter(len(q_lengths) == batch, f"actual_seq_qlen has {len(q_lengths)} numbers for {batch} requests")
    limit = key.shape[1] * block_table.shape[1] if block_table is not None else key.shape[0 if is_packed else 1]
    refusal.parameter(
        len(kv_lengths) == len(q_lengths),
        f"actual_seq_kvlen has {len(kv_lengths)} numbers for {len(q_lengths)} requests",
    )
    refusal.parameter(all(0 <= n <= limit for n in kv_lengths), f"actual_seq_kvlen {kv_lengths} of {limit} tokens")
    return q_lengths, kv_lengths


def _from_ends(refusal: Refusal, name: str, ends: list[int], tokens: int) -> list[int]:
    lengths = ends_to_lengths(list(ends))
    refusal.parameter(all(n >= 0 for n in lengths), f"{name} {list(ends)} must not decrease: it is cumulative")
    refusal.parameter(sum(lengths) == tokens, f"{name} {list(ends)} must end at the {tokens} tokens given")
    return lengths


def _check_pages(
    refusal: Refusal, table: Tensor, block_size: int, cache: Tensor, kv_lengths: list[int],
    is_fine: bool, in_layout: str, key: Tensor,
) -> None:  # fmt: skip
    refusal.parameter(table.dtype == torch.int32 and table.dim() == 2, "block_table must be int32 [B, blocks]")
    refusal.parameter(
        table.shape[0] == len(kv_lengths), f"block_table has {table.shape[0]} rows for {len(kv_lengths)} requests"
    )
    refusal.parameter(
        block_size == cache.shape[1], f"block_size {block_size}, the cache has blocks of {cache.shape[1]}"
    )
    unit, largest = (16, 1024) if is_fine or in_layout == "TND" else (128, 512)
    refusal.parameter(
        block_size % unit == 0 and unit <= block_size <= largest,
        f"block_size {block_size}: a multiple of {unit} up to {largest}",
    )
    refusal.parameter(
        key.dim() == 3 or in_layout not in ("BSH", "BSND"), f"{in_layout} needs a cache [blocks, block, H]"
    )
    for row, length in zip(table.tolist(), kv_lengths, strict=True):
        used = row[: -(-length // block_size)]
        # unsafe: the vendor does not look at block ids.
        refusal.require(
            all(0 <= i < cache.shape[0] for i in used),
            f"block_table {used} outside of {cache.shape[0]} blocks (unsafe)",
        )


def _check_mode(refusal: Refusal, mode: int, width: int, has_rope: bool) -> None:
    refusal.not_implemented(mode != 9, "sparse_mode 9 (tree mask)")
    refusal.parameter(0 <= mode <= 4, f"sparse_mode is {mode}, must be 0 to 4")
    refusal.parameter(not (has_rope and width == 512) or mode in (0, 3, 4), f"head dim 512 with sparse_mode {mode}")
