"""What npu::npu_fused_infer_attention_score and _v2 accept, under the argument names of v2.

Sources: op-plugin FusedInferAttentionScore{,V2}KernelNpuOpApi.cpp, its meta functions and documents, and
aclnnFusedInferAttentionScoreV4.md of ops-transformer. Where they differ the newest is followed, of August 2026;
refusals that come from it say so. What belongs together is in files of its own:

    fused_infer_dims.py    head dims, numbers of heads, layouts, inner_precise
    fused_infer_pages.py   paged caches
    full_mask.py           shapes of a mask of every pair
    sparse.py              sparse modes
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from npu_backend.contracts.full_mask import Pairs, fused_infer_mask
from npu_backend.contracts.fused_infer_dims import V4, Parts, check_dims, check_heads, check_types
from npu_backend.contracts.fused_infer_pages import check_pages, tokens_of_cache
from npu_backend.contracts.layouts import PACKED, ends_to_lengths, tokens_first
from npu_backend.contracts.refuse import Refusal
from npu_backend.contracts.sparse import FAR, Sparse, check_sparse

LAYOUTS = {  # name: input layout, output layout, dims of query
    "BSH": ("BSH", "BSH", 3),
    "BSND": ("BSND", "BSND", 4),
    "BNSD": ("BNSD", "BNSD", 4),
    "TND": ("TND", "TND", 3),
    "NTD": ("NTD", "NTD", 3),
    "BNSD_BSND": ("BNSD", "BSND", 4),
    "BSH_NBSD": ("BSH", "NBSD", 3),
    "BSND_NBSD": ("BSND", "NBSD", 4),
    "BNSD_NBSD": ("BNSD", "NBSD", 4),
    "BSH_BNSD": ("BSH", "BNSD", 3),
    "BSND_BNSD": ("BSND", "BNSD", 4),
    "TND_NTD": ("TND", "NTD", 3),
    "NTD_TND": ("NTD", "TND", 3),
}
PLAIN_LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND")
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
    is_half_score: bool  # inner_precise bit 0, where the tiling looks at it: scores in FP16
    repairs_rows: bool  # inner_precise bit 1: rows that the mask empties give (0, +inf)
    returns_lse: bool

    @property
    def one_token(self) -> bool:
        """One query for each request of a padded batch: on the NPU a kernel of its own, the incremental one."""
        return not self.is_packed and self.query[0].shape[1] == 1


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
    check_heads(refusal, heads, kv_heads)
    refusal.require((query_rope is None) == (key_rope is None), "query_rope and key_rope must both be given or neither")
    is_paged, is_packed = block_table is not None, in_layout in PACKED
    parts = _parts(refusal, (query, query_rope), (key, key_rope), value, in_layout, (heads, kv_heads), is_paged)
    check_types(refusal, parts, heads, kv_heads)
    refusal.parameter(0 <= inner_precise <= 3, f"inner_precise is {inner_precise}, must be 0 to 3")
    is_half = bool(inner_precise & 1)
    refusal.parameter(not is_half or query.dtype == torch.float16, "inner_precise 1 and 3 are for float16 only")
    check_dims(refusal, parts, input_layout, is_paged, inner_precise)
    one_token = not is_packed and parts.query[0].shape[1] == 1
    lengths = _lengths(refusal, parts, block_table, is_packed, (actual_seq_qlen, actual_seq_kvlen))
    if block_table is not None:
        check_pages(refusal, block_table, block_size, parts, lengths[1], is_packed, one_token)
    is_empty = 0 in parts.query[0].shape or 0 in parts.key[0].shape
    refusal.parameter(not (is_empty and parts.has_rope), "empty tensors with rope")
    _check_mode(refusal, sparse_mode, parts, is_packed)
    is_latent = parts.has_rope and parts.dims[0] == 512
    is_incremental = one_token and not parts.has_rope and parts.dims[0] == parts.dims[1]
    if is_incremental and sparse_mode in (2, 3, 4):
        sparse_mode, atten_mask = 0, None  # the incremental kernel does not look at sparse_mode
    if one_token and sparse_mode == 0 and atten_mask is not None:
        # The kernel has been seen to ignore such a mask beyond key 512 (vllm-ascend issue 15503).
        most = max(lengths[1], default=0) if is_paged else parts.key[0].shape[1]
        refusal.require(most <= 512, "atten_mask for one query and more than 512 keys is misread (unsafe)")

    def full(mask: Tensor) -> Tensor:
        if is_packed:
            raise RuntimeError(
                f"{operator}: 161002 (bad parameter): packed tokens take sparse_mode {sparse_mode} only without mask"
            )
        batch, rows = parts.query[0].shape[:2]
        paged = None if block_table is None else _paged_keys(block_table, block_size, lengths[1], one_token)
        two_dims = input_layout in PLAIN_LAYOUTS and not parts.has_rope and parts.dims[0] == parts.dims[1]
        return fused_infer_mask(refusal, mask, Pairs(batch, rows, parts.key[0].shape[1]), paged, two_dims)

    return Call(
        *parts, block_table, *lengths, is_packed, out_layout,
        check_sparse(refusal, sparse_mode, atten_mask, pre_tokens, next_tokens, full),
        softmax_scale, is_half and not is_incremental and not is_latent, bool(inner_precise & 2), return_softmax_lse,
    )  # fmt: skip


def check_outputs(operator: str, results: tuple[Tensor, Tensor], given: list[Tensor]) -> None:
    """What `.out` writes to: attention_out and softmax_lse, shaped as they are when they are returned.

    Raises:
      RuntimeError: there are not two, or a shape or dtype is not that of a result.
    """
    refusal = Refusal(operator)
    refusal.require(len(given) == 2, f"out has {len(given)} tensors, must have 2: attention_out and softmax_lse")
    for name, x, like in zip(("attention_out", "softmax_lse"), given, results, strict=True):
        if name == "softmax_lse" and like.shape == (0,):
            continue  # not asked for: any tensor may stand in its place, and stays as it is
        refusal.parameter(
            x.shape == like.shape and x.dtype == like.dtype,
            f"{name} is {tuple(x.shape)} {x.dtype}, must be {tuple(like.shape)} {like.dtype}",
        )


def _parts(
    refusal: Refusal, queries: tuple[Tensor | None, ...], keys: tuple[Tensor | None, ...], value: Tensor,
    layout: str, heads: tuple[int, int], is_paged: bool,
) -> Parts:  # fmt: skip
    """The tensors tokens first; a main query and key may have another of rope beside them."""

    def of_key(name: str, x: Tensor) -> Tensor:
        if is_paged:
            return tokens_of_cache(refusal, name, x, heads[1])
        fits = queries[0] is not None and x.dim() == queries[0].dim()
        refusal.require(fits, f"when Page Attention not enabled, {name}'dim should equal to query's dim!")
        if layout == "BSH":
            fits = x.shape[2] % heads[1] == 0
            refusal.parameter(fits, f"{name} has {x.shape[2]} numbers a token, no multiple of {heads[1]} kv heads")
        return tokens_first(x, layout, heads[1])

    (q, q_rope), (k, k_rope) = queries, keys
    values = of_key("value", value)
    for name, x, like in (("query_rope", q_rope, q), ("key", k, value), ("key_rope", k_rope, value)):
        if x is not None and like is not None:
            refusal.parameter(x.dim() == like.dim(), f"{name} has {x.dim()} dims, must have {like.dim()}")
    key_parts = tuple(of_key("key" if i == 0 else "key_rope", x) for i, x in enumerate(keys) if x is not None)
    fits = is_paged or layout != "BSH" or all(x is None or x.shape[2] % heads[0] == 0 for x in queries)
    refusal.parameter(fits, f"query has no multiple of {heads[0]} heads a token")
    return Parts(tuple(tokens_first(x, layout, heads[0]) for x in queries if x is not None), key_parts, values)


def _paged_keys(table: Tensor, block_size: int, kv_lengths: list[int], one_token: bool) -> int:
    """How many keys a mask has to cover: all that the table can name; of more queries, what the longest request has."""
    blocks = table.shape[1] if one_token else max(-(-n // block_size) for n in kv_lengths)
    return blocks * block_size


def _lengths(
    refusal: Refusal, parts: Parts, block_table: Tensor | None, is_packed: bool,
    given: tuple[list[int] | None, list[int] | None],
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Tokens per request of query and key."""
    query, key = parts.query[0], parts.key[0]
    q_given, kv_given = given
    if is_packed:
        if q_given is None or kv_given is None:
            raise RuntimeError(
                f"{refusal.operator}: 161002 (bad parameter): packed tokens need actual_seq_qlen and _kvlen"
            )
        q_lengths = _from_ends(refusal, "actual_seq_qlen", q_given, query.shape[0])
        is_paged = block_table is not None
        kv_lengths = list(kv_given) if is_paged else _from_ends(refusal, "actual_seq_kvlen", kv_given, key.shape[0])
    else:
        refusal.parameter(block_table is None or kv_given is not None, "paging needs actual_seq_kvlen")
        batch, count = query.shape[:2]
        refusal.parameter(block_table is not None or key.shape[0] == batch, f"{batch} queries, {key.shape[0]} keys")
        q_lengths = [count] * batch if q_given is None or count == 1 else _per_request(q_given, batch)
        kv_lengths = [key.shape[1]] * batch if kv_given is None else _per_request(kv_given, batch)
        refusal.parameter(all(0 <= n <= count for n in q_lengths), f"actual_seq_qlen {q_lengths} of {count} tokens")
        refusal.parameter(len(q_lengths) == batch, f"actual_seq_qlen has {len(q_lengths)} numbers for {batch} requests")
    limit = key.shape[1] * block_table.shape[1] if block_table is not None else key.shape[0 if is_packed else 1]
    refusal.parameter(
        len(kv_lengths) == len(q_lengths),
        f"actual_seq_kvlen has {len(kv_lengths)} numbers for {len(q_lengths)} requests",
    )
    refusal.parameter(all(0 <= n <= limit for n in kv_lengths), f"actual_seq_kvlen {kv_lengths} of {limit} tokens")
    return q_lengths, kv_lengths


def _per_request(given: list[int], batch: int) -> list[int]:
    """One number is for all requests; of more than there are requests the first ones count."""
    return list(given) * batch if len(given) == 1 else list(given)[:batch]


def _from_ends(refusal: Refusal, name: str, ends: list[int], tokens: int) -> list[int]:
    lengths = ends_to_lengths(list(ends))
    refusal.parameter(all(n >= 0 for n in lengths), f"{name} {list(ends)} must not decrease: it is cumulative")
    refusal.parameter(sum(lengths) == tokens, f"{name} {list(ends)} must end at the {tokens} tokens given")
    return lengths


def _check_mode(refusal: Refusal, mode: int, parts: Parts, is_packed: bool) -> None:
    refusal.not_implemented(mode != 9, "sparse_mode 9 (tree mask)")
    refusal.parameter(0 <= mode <= 4, f"sparse_mode is {mode}, must be 0 to 4")
    is_latent = parts.has_rope and parts.dims[0] == 512
    refusal.parameter(not is_latent or mode in (0, 3, 4), f"head dim 512 with sparse_mode {mode} ({V4})")
    refusal.parameter(not is_packed or mode in (0, 3, 4), f"packed tokens with sparse_mode {mode}: 0, 3, 4 ({V4})")
