"""npu::npu_fused_infer_attention_score_v2 in our words and shapes: vLLM-Ascend's context parallelism, per block."""

import functools
from typing import Literal

import torch
from torch import Tensor

from npu_backend import vendor
from npu_backend.contracts.fused_infer_dims import PACKED_DIMS, ROPE
from npu_backend.contracts.layouts import laid_out, tokens_first
from npu_backend.contracts.sparse import TRIANGLE
from npu_backend.errors import InputError
from npu_backend.operators.blocks import check_block, ends, saw_a_key
from npu_backend.operators.partial import Partial, nothing, where

Layout = Literal["BSH", "BSND", "BNSD", "TND"]


def fused_infer_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float,
    q_lengths: tuple[int, ...] | None = None,
    kv_lengths: tuple[int, ...] | None = None,
    layout: Layout = "BSND",
) -> Partial:
    """Attention of one query chunk over one key chunk; one call of npu::npu_fused_infer_attention_score_v2.

    Args:
      query: `[B, t, N, H]` float16 or bfloat16.
      key, value: `[B, s, K, H]`, `[B, s, K, V]`; N is a multiple of K. (H, V) is (192, 128):
        DeepSeek's heads, the last 64 of 192 rotary; (576, 512) with K = 1: its latent, alike; or any D twice, a
        multiple of 16.
      is_causal: query i sees key j iff j ≤ i + (keys − queries), counted per request: the last query sees every key.
      scale: multiplies q·k, in float32.
      q_lengths, kv_lengths: the first so many tokens of each request count, the others are pads; None: all.
      layout: how the tokens go to the operator; TND packs them without pads.

    Returns:
      The partial; (0, −inf) for queries that see no key, pads included.

    Raises:
      InputError: what the operator cannot express.
    """
    batch, length = query.shape[:2]
    q_lengths = (length,) * batch if q_lengths is None else q_lengths
    kv_lengths = (key.shape[1],) * batch if kv_lengths is None else kv_lengths
    _check(query, key, value, is_causal, scale, q_lengths, kv_lengths, layout)
    vendor.require("npu::npu_fused_infer_attention_score_v2", query.device)
    empty = nothing(query, value.shape[3])
    if not any(kv_lengths) or not any(q_lengths):
        return empty
    is_packed = layout == "TND"
    parts = [_lay_out(x, q_lengths, layout) for x in _split(query, value)]
    key_parts = [_lay_out(x, kv_lengths, layout) for x in _split(key, value)]
    out, lse = torch.ops.npu.npu_fused_infer_attention_score_v2(
        parts[0],
        key_parts[0],
        _lay_out(value, kv_lengths, layout),
        query_rope=parts[1] if len(parts) == 2 else None,
        key_rope=key_parts[1] if len(parts) == 2 else None,
        atten_mask=_triangle(query.device) if is_causal else None,
        actual_seq_qlen=ends(q_lengths) if is_packed else list(q_lengths),
        actual_seq_kvlen=ends(kv_lengths) if is_packed else list(kv_lengths),
        num_query_heads=query.shape[2],
        num_key_value_heads=key.shape[2],
        softmax_scale=scale,
        input_layout=layout,
        sparse_mode=3 if is_causal else 0,
        return_softmax_lse=True,
    )
    if is_packed:
        new = Partial(_unpack(out, q_lengths, length), _unpack(lse.squeeze(-1), q_lengths, length))
    else:
        new = Partial(tokens_first(out, layout, query.shape[2]), lse.squeeze(-1).transpose(1, 2))
    return where(saw_a_key(query, is_causal, q_lengths, kv_lengths), new, empty)


def _split(x: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Head dims as the operator takes them: the rotary 64 apart, if there are any."""
    width = value.shape[3]
    return (x,) if x.shape[3] == width else (x[..., :width], x[..., width:])


def _lay_out(x: Tensor, lengths: tuple[int, ...], layout: Layout) -> Tensor:
    if layout == "TND":
        return torch.cat([request[:n] for request, n in zip(x, lengths, strict=True)])
    return laid_out(x, layout)


def _unpack(x: Tensor, lengths: tuple[int, ...], length: int) -> Tensor:
    """Packed tokens as `[B, length, …]`; pads are 0."""
    result = x.new_zeros(len(lengths), length, *x.shape[1:])
    for request, tokens in zip(result, x.split(list(lengths)), strict=True):
        request[: len(tokens)] = tokens
    return result


@functools.cache
def _triangle(device: torch.device) -> Tensor:
    """1 where a key is hidden, whatever the lengths."""
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.int8, device=device).triu(1)


def _check(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float,
    q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...], layout: Layout,
) -> None:  # fmt: skip
    check_block(query, key, value, scale, q_lengths, kv_lengths, (torch.float16, torch.bfloat16))
    heads, width = query.shape[2:]
    kv_heads, v_width = value.shape[2:]
    if not (width == v_width and width % 16 == 0 and width <= 512) and (width, v_width) not in ((192, 128), (576, 512)):
        raise InputError(
            f"head dims {width} and {v_width}; the operator takes equal ones, a multiple of 16 up to 512, or {ROPE} "
            f"rotary more in query and key: 192 and 128, 576 and 512"
        )
    if v_width == 512 and width == 576 and (kv_heads != 1 or heads & (heads - 1) or heads > 128):
        raise InputError(f"latent attention (576, 512) of {heads} heads on {kv_heads}; K = 1, N a power of 2 up to 128")
    if layout not in ("BSH", "BSND", "BNSD", "TND"):
        raise InputError(f"layout {layout!r} is none of BSH, BSND, BNSD, TND")
    if layout == "TND" and width == v_width:
        _check_packed(query, kv_heads, is_causal)


def _check_packed(query: Tensor, kv_heads: int, is_causal: bool) -> None:
    """Packed tokens without a rotary part; the contract differs between CANN versions, this is what all accept."""
    heads, width = query.shape[2:]
    if (width, width) not in PACKED_DIMS or (width != 128 and heads != kv_heads):
        raise InputError(f"layout TND takes head dims 128, or with as many key heads 64 and 192, got {width}; use BSND")
    if query.dtype == torch.float16 and heads != kv_heads:
        raise InputError(f"layout TND takes float16 only with as many key heads, got {heads} on {kv_heads}; use BSND")
    if query.dtype == torch.float16 and not is_causal:
        # vllm-ascend issue 13699, still open.
        raise InputError("layout TND in float16 without a mask is known to return plain means of values; use BSND")
