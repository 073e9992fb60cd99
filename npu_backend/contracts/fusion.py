"""What npu::npu_fusion_attention accepts.

Sources: op-plugin FlashAttentionKernelNpuOpApi.cpp and torch_npu-npu_fusion_attention.md of 2026. From the latter are:
a mask for each head; with packed tokens one mask of the longest request, of which every request reads its corner; that
sparse_mode counts for nothing without a mask; trailing zeros in the lengths of a pack, whose requests are not computed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend.contracts.full_mask import Pairs, fusion_mask
from npu_backend.contracts.layouts import ends_to_lengths, tokens_first
from npu_backend.contracts.refuse import Refusal
from npu_backend.contracts.sparse import FAR, Sparse, check_sparse

COPIES = 8
"""The softmax maximum and sum are stored eight times each: one 32-byte block."""
DIMS = {"BSH": 3, "SBH": 3, "BSND": 4, "BNSD": 4, "TND": 3}


class Call(NamedTuple):
    """A checked call."""

    query: Tensor  # [B, S, N, D], or packed [T, N, D]; also the next
    key: Tensor
    value: Tensor
    q_lengths: list[int]
    kv_lengths: list[int]
    layout: str
    sparse: Sparse
    scale: float
    zeroes_rows: bool  # inner_precise 2: rows that see nothing have probabilities 0
    is_natural: bool  # softmax_layout "TND"

    @property
    def is_packed(self) -> bool:
        """Whether requests lie one after the other, without pads."""
        return self.layout == "TND"


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = FAR,
    next_tockens: int = FAR,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
    operator: str = "npu_fusion_attention",
) -> Call:
    """The call, checked; arguments as in the schema ("tockens" is the vendor's spelling), and who makes it.

    Raises:
      RuntimeError: what the vendor refuses, and what is not implemented here.
    """
    del gen_mask_parallel, sync, seed, offset  # only dropout reads them, and there is none with keep_prob 1
    refusal, is_packed = Refusal(operator), input_layout == "TND"
    refusal.require(head_num > 0, f"head_num must > 0, but got {head_num}")
    refusal.require(0 < keep_prob <= 1, f"The keep_prob value must be in range of (0, 1], but got {keep_prob}")
    refusal.require(padding_mask is None, "padding_mask must be None: it is reserved")
    refusal.require(input_layout in DIMS, f"The input_layout should be BSH/SBH/BNSD/BSND/TND, but got {input_layout}")
    if is_packed:
        known = sparse_mode in (0, 1, 2, 3, 4, 6, 7, 8)
        refusal.require(known, f"The sparse_mode value must be in range of [0,5) or (5,8], but got {sparse_mode}")
    else:
        refusal.require(
            0 <= sparse_mode <= 6, f"The sparse_mode value must be in range of [0,6], but got {sparse_mode}"
        )
    refusal.not_implemented(sparse_mode <= 4, f"sparse_mode {sparse_mode}")
    refusal.not_implemented(keep_prob == 1, "dropout")
    refusal.only_defaults({"pse": pse, "prefix": prefix, "sink": sink, "dropout_mask": dropout_mask})
    refusal.parameter(inner_precise in (0, 1, 2), f"inner_precise is {inner_precise}, must be 0, 1 or 2")  # 1 is 0
    refusal.parameter(softmax_layout in ("", "TND"), f"softmax_layout {softmax_layout!r}, must be empty or TND")
    parts = _check_tensors(refusal, query, key, value, head_num, input_layout)
    lengths = _packed(refusal, parts, actual_seq_qlen, actual_seq_kvlen) if is_packed else _padded(refusal, parts)
    if atten_mask is not None:
        refusal.parameter(
            atten_mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {atten_mask.dtype}, must be bool or uint8"
        )
    else:
        sparse_mode = 0  # without a mask the mode counts for nothing, and everything is computed

    def full(mask: Tensor) -> Tensor:
        pairs = Pairs(len(lengths[0]), max(lengths[0]), max(lengths[1]))
        return fusion_mask(refusal, mask, pairs, head_num, is_packed)

    sparse = check_sparse(refusal, sparse_mode, atten_mask, pre_tockens, next_tockens, full)
    return Call(*parts, *lengths, input_layout, sparse, scale, inner_precise == 2, softmax_layout == "TND")


def _check_tensors(
    refusal: Refusal, query: Tensor, key: Tensor, value: Tensor, heads: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    dims = DIMS[layout]
    floats = (torch.float16, torch.bfloat16, torch.float32)
    for name, x in (("query", query), ("key", key), ("value", value)):
        refusal.parameter(x.dim() == dims, f"{name} has {x.dim()} dims, layout {layout} has {dims}")
        refusal.parameter(x.dtype in floats, f"{name} is {x.dtype}, must be float16, bfloat16 or float32")
        refusal.parameter(x.dtype == query.dtype, f"{name} is {x.dtype}, query {query.dtype}: must be the same dtype")
    if layout in ("BSH", "SBH"):
        refusal.parameter(query.shape[2] % heads == 0, f"H of query is {query.shape[2]}, no multiple of {heads} heads")
        width = query.shape[2] // heads
        refusal.parameter(
            width > 0 and key.shape[2] % width == 0, f"H of key is {key.shape[2]}, no multiple of {width}"
        )
        kv_heads = key.shape[2] // width
        refusal.parameter(
            kv_heads > 0 and value.shape[2] % kv_heads == 0, f"H of value is {value.shape[2]}, of {kv_heads} heads"
        )
    else:
        kv_heads = key.shape[{"BSND": 2, "BNSD": 1, "TND": 1}[layout]]
    q, k, v = (tokens_first(x, layout, n) for x, n in ((query, heads), (key, kv_heads), (value, kv_heads)))
    width, v_width = q.shape[-1], v.shape[-1]
    refusal.parameter(q.shape[-2] == heads, f"query has {q.shape[-2]} heads, head_num is {heads}")
    refusal.parameter(
        kv_heads > 0 and heads % kv_heads == 0 and heads <= 256, f"{heads} heads on {kv_heads}, at most 256"
    )
    refusal.parameter(
        k.shape[-1] == width and 1 <= v_width <= width <= 768, f"head dims {width}, {k.shape[-1]}, {v_width}"
    )
    refusal.parameter(k.shape[:-1] == v.shape[:-1], "key and value must have the same tokens and heads")
    return q, k, v


def _padded(refusal: Refusal, parts: tuple[Tensor, Tensor, Tensor]) -> tuple[list[int], list[int]]:
    query, key, _ = parts
    batch = query.shape[0]
    refusal.parameter(key.shape[0] == batch, f"{batch} requests in query, {key.shape[0]} in key")
    return [query.shape[1]] * batch, [key.shape[1]] * batch


def _packed(
    refusal: Refusal, parts: tuple[Tensor, Tensor, Tensor], q_ends: list[int] | None, kv_ends: list[int] | None
) -> tuple[list[int], list[int]]:
    if not q_ends or not kv_ends:
        raise RuntimeError(f"{refusal.operator}: the size of actual_seq_qlen and actual_seq_kvlen cannot be empty.")
    lengths = []
    for name, ends, x in (("actual_seq_qlen", q_ends, parts[0]), ("actual_seq_kvlen", kv_ends, parts[1])):
        used = _without_trailing_zeros(list(ends))
        counts = ends_to_lengths(used)
        refusal.parameter(all(n >= 0 for n in counts), f"{name} {list(ends)} must not decrease: it is cumulative")
        is_cut = len(used) < len(ends)  # then the tokens of the requests that are left out follow
        fits = sum(counts) <= x.shape[0] if is_cut else sum(counts) == x.shape[0]
        refusal.parameter(fits, f"{name} {list(ends)} must end at the {x.shape[0]} tokens given")
        lengths.append(counts + [0] * (len(ends) - len(used)))
    refusal.parameter(len(lengths[0]) == len(lengths[1]), "actual_seq_qlen and actual_seq_kvlen differ in length")
    return lengths[0], lengths[1]


def _without_trailing_zeros(ends: list[int]) -> list[int]:
    """Requests at the end of a pack that are not to be computed have 0 for their ends."""
    while len(ends) > 1 and ends[-1] == 0:
        ends = ends[:-1]
    return ends
