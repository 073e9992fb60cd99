"""What atb::npu_ring_mla accepts. What it refuses is refused here with the vendor's key phrases.

Sources: op-plugin (op_plugin/ops/atb/RingMlaAtb.cpp) and ascend-transformer-boost (ring_mla_operation.cpp, which takes
masks `[maxSeqLen, maxSeqLen]` and `[batch, maxSeqLen, maxSeqLen]`; tiling). Of
what the vendor's host code lets through but its kernels misread, only the safe subset is accepted; those refusals are
marked `unsafe:` below and say so in their text. The vendor raises RuntimeError, so do we.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NOPE, ROPE, VALUE = 128, 64, 128
MASK_PITCH = 512
"""Columns of a stored mask row: the kernels fetch with this pitch whatever the shape says."""


class Call(NamedTuple):
    """A checked call. Token-packed tensors: T query tokens and S key tokens of all requests, one after the other."""

    query: tuple[Tensor, Tensor]  # nope [T, N, 128], rope [T, N, 64]
    key: tuple[Tensor, Tensor]  # nope [S, K, 128], rope [S, K, 64]
    value: Tensor  # [S, K, 128]
    mask: Tensor | None  # [512, 512], what the kernels read; or None
    q_lengths: list[int]  # per request
    kv_lengths: list[int]
    previous: tuple[Tensor, Tensor] | None  # out [T, N, 128], lse [N, T]; None: first ring
    scale: float


def check(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    mask: Tensor,
    seqlen: Tensor,
    head_num: int,
    kv_head_num: int,
    *,
    pre_out: Tensor | None = None,
    prev_lse: Tensor | None = None,
    qk_scale: float = 1.0,
    kernel_type: str | None = None,
    mask_type: str | None = None,
    input_layout: str | None = None,
    calc_type: str | None = None,
) -> Call:
    """The call, checked; arguments are the operator's own.

    Raises:
      RuntimeError: what the vendor refuses, and the unsafe rest.
    """
    kernel = _choice("kernel_type", kernel_type, "kernel_type_high_precision", "kernel_type_default")
    _choice("input_layout", input_layout, "type_bsnd")
    masked = _choice("mask_type", mask_type, "no_mask", "mask_type_triu") == "mask_type_triu"
    first = _choice("calc_type", calc_type, "calc_type_first_ring", "calc_type_default") == "calc_type_first_ring"
    _require(kernel == "kernel_type_high_precision", "Ring MLA only supports high precision kernels")
    _check_heads(q_nope, k_nope, head_num, kv_head_num)
    _check_tensors(q_nope, q_rope, k_nope, k_rope, value)
    q_lengths, kv_lengths = _lengths(seqlen, q_nope.shape[0], k_nope.shape[0])
    if mask.dim() == 3:  # its batch is compared before the mask's type is looked at
        _require(
            mask.shape[0] == len(q_lengths),
            f"batch of seqlen and mask should be the same, got {len(q_lengths)} and {mask.shape[0]} "
            "(ERROR_INVALID_TENSOR_DIM)",
        )
    if masked:
        _check_masked_lengths(q_lengths, kv_lengths)
        _check_mask(mask, q_nope.dtype)
    previous = None if first else _previous(pre_out, prev_lse, q_nope)
    return Call(
        (q_nope, q_rope), (k_nope, k_rope), value, _first(mask) if masked else None, q_lengths, kv_lengths, previous,
        qk_scale,
    )  # fmt: skip


def check_outputs(call: Call, output: Tensor, softmax_lse: Tensor) -> None:
    """What `.out` writes to.

    Raises:
      RuntimeError: a shape or dtype is not that of a result.
    """
    tokens, heads, _ = call.query[0].shape
    results = (
        ("output", output, (tokens, heads, VALUE), call.value.dtype),
        ("softmax_lse", softmax_lse, (heads, tokens), torch.float32),
    )
    for name, x, shape, dtype in results:
        _require(
            x.shape == shape and x.dtype == dtype,
            f"{name} is {tuple(x.shape)} {x.dtype}, must be {shape} {dtype} (ERROR_INVALID_TENSOR_DIM)",
        )


def _require(holds: bool, phrase: str) -> None:
    if not holds:
        raise RuntimeError(f"npu_ring_mla: {phrase}")


def _choice(name: str, given: str | None, *known: str) -> str:
    """The chosen string; the first known one is the default."""
    if given is not None and given not in known:
        raise RuntimeError(f"npu_ring_mla: Unsupported {name} value: '{given}'")
    return known[0] if given is None else given


def _check_heads(q_nope: Tensor, k_nope: Tensor, head_num: int, kv_head_num: int) -> None:
    kv_heads = kv_head_num or head_num
    _require(head_num > 0, f"Ring MLA expects headNum to be greater than 0, got {head_num}")
    _require(kv_head_num >= 0, f"Ring MLA expects kvHeadNum to be no less than 0, got {kv_head_num}")
    _require(head_num % kv_heads == 0, f"headNum {head_num} must be divisible by kvHeadNum {kv_heads}")
    _require(head_num <= 128, f"headsize is invalid: {head_num} heads, at most 128")
    for name, x, heads in (("q_nope", q_nope, head_num), ("k_nope", k_nope, kv_heads)):
        _require(x.dim() == 3, f"{name} has {x.dim()} dims, must be 3 (ERROR_INVALID_TENSOR_DIM_NUM)")
        _require(x.shape[1] == heads, f"{name} has {x.shape[1]} heads, head arguments say {heads} (invalid tensor dim)")


def _check_tensors(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> None:
    dtype = q_nope.dtype
    _require(
        dtype in (torch.float16, torch.bfloat16), f"q_nope is {dtype}, must be float16 or bfloat16 (invalid value)"
    )
    expected = (
        ("q_nope", q_nope, q_nope, NOPE),
        ("q_rope", q_rope, q_nope, ROPE),
        ("k_nope", k_nope, k_nope, NOPE),
        ("k_rope", k_rope, k_nope, ROPE),
        ("value", value, k_nope, VALUE),
    )
    for name, x, like, width in expected:
        shape = (*like.shape[:2], width)
        _require(x.dim() == 3, f"{name} has {x.dim()} dims, must be 3 (ERROR_INVALID_TENSOR_DIM_NUM)")
        _require(x.shape == shape, f"{name} is {tuple(x.shape)}, must be {shape} (ERROR_INVALID_TENSOR_DIM)")
        _require(x.dtype == dtype, f"{name} is {x.dtype}, must be q_nope's {dtype} (ERROR_INVALID_VALUE)")


def _lengths(seqlen: Tensor, q_tokens: int, kv_tokens: int) -> tuple[list[int], list[int]]:
    _require(seqlen.dim() in (1, 2), f"seqlen has {seqlen.dim()} dims, must be 1 or 2 (ERROR_INVALID_TENSOR_DIM_NUM)")
    _require(seqlen.dtype == torch.int32, f"seqlen is {seqlen.dtype}, must be int32")
    _require(seqlen.dim() == 1 or seqlen.shape[0] == 2, f"seqlen is {tuple(seqlen.shape)}, must be [B] or [2, B]")
    q_lengths, kv_lengths = (seqlen if seqlen.dim() == 2 else seqlen.expand(2, -1)).tolist()
    for name, lengths, tokens in (("q", q_lengths, q_tokens), ("kv", kv_lengths, kv_tokens)):
        _require(all(n >= 0 for n in lengths), f"{name}Seqlen min value invalid, {name}Seqlen is invalid: {lengths}")
        _require(any(lengths), f"{name}Seqlen max value invalid, blockDim cannot <= 0: {lengths}")
        # unsafe: requests lie at prefix sums of the lengths, and a row of the lse is Σ q_len long, not T.
        _require(sum(lengths) == tokens, f"{name} lengths {lengths} must add up to the {tokens} tokens given (unsafe)")
    return q_lengths, kv_lengths


def _check_masked_lengths(q_lengths: list[int], kv_lengths: list[int]) -> None:
    _require(
        all(kv == 0 or kv >= q for q, kv in zip(q_lengths, kv_lengths, strict=True)),
        f"If kvSeqLen[i] > 0, then kvSeqLen[i] must be no smaller than qSeqLen[i]: {kv_lengths}, {q_lengths}",
    )


def _check_mask(mask: Tensor, dtype: torch.dtype) -> None:
    _require(mask.dim() in (2, 3), f"mask has {mask.dim()} dims, must be 2 or 3 (ERROR_INVALID_TENSOR_DIM_NUM)")
    _require(mask.dtype == dtype, f"mask is {mask.dtype}, must be q_nope's {dtype} (ERROR_INVALID_VALUE)")
    # unsafe: other shapes pass the vendor's checks and are then read with a pitch of 512.
    safe = tuple(mask.shape[-2:]) == (MASK_PITCH, MASK_PITCH) and mask.is_contiguous()
    _require(safe, f"current mask shape is unsupported! {tuple(mask.shape)}; only contiguous 512x512 masks are safe")
    # unsafe: the kernels read the first mask of a batch for every request, so the others must say the same.
    _require(
        torch.equal(mask, _first(mask).expand_as(mask)),
        "the masks of the batch differ: only the first is read (unsafe)",
    )
    # unsafe: the FP16 kernel adds the values, the BF16 kernel multiplies them by -3e38; any others are not a mask.
    mask = _first(mask)
    above = torch.ones_like(mask, dtype=torch.bool).triu(1)
    hides = mask <= -10000 if dtype == torch.float16 else mask == 1
    rule = "at most -10000 (added to scores)" if dtype == torch.float16 else "1 (multiplied by -3e38)"
    right = torch.where(above, hides, mask == 0).all()
    _require(bool(right), f"mask values are unsafe: 0 on and below the diagonal, above it {rule} for {dtype}")


def _first(mask: Tensor) -> Tensor:
    """`[512, 512]` of a mask, or of one for each request `[B, 512, 512]`: what the kernels read."""
    return mask if mask.dim() == 2 else mask[0]


def _previous(pre_out: Tensor | None, prev_lse: Tensor | None, q_nope: Tensor) -> tuple[Tensor, Tensor]:
    if pre_out is None or prev_lse is None:
        raise RuntimeError("npu_ring_mla: calc_type_default needs pre_out and prev_lse")
    tokens, heads, _ = q_nope.shape
    expected = (
        ("pre_out", pre_out, (tokens, heads, VALUE), q_nope.dtype),
        ("prev_lse", prev_lse, (heads, tokens), torch.float32),
    )
    for name, x, shape, dtype in expected:
        _require(
            x.dim() == len(shape), f"{name} has {x.dim()} dims, must be {len(shape)} (ERROR_INVALID_TENSOR_DIM_NUM)"
        )
        _require(x.shape == shape, f"{name} is {tuple(x.shape)}, must be {shape} (ERROR_INVALID_TENSOR_DIM)")
        _require(x.dtype == dtype, f"{name} is {x.dtype}, must be {dtype} (ERROR_INVALID_VALUE)")
    return pre_out, prev_lse
