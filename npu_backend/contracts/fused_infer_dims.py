"""Which head dims, numbers of heads, layouts and precisions FIA takes together.

Two documents differ, and the newer is followed (V4 below); where it only narrows what the older allows, the older is:
a call is refused if neither allows it.

    V4       aclnnFusedInferAttentionScoreV4.md of ops-transformer, August 2026, tables for Atlas A2
    torch    torch_npu-npu_fused_infer_attention_score_v2.md of op-plugin, 2026

    head dims (query and key, value)     heads on key heads            layouts                        from
    512 with rope 64, 512                N of 1, 2, 4 … 128 on 1       LATENT_LAYOUTS                 V4, torch
    128 with rope 64, 128                any ratio                     PREFILL_LAYOUTS                V4; torch: ≤ 64
    packed 64, 128; 192 with 128         any ratio                     TND, NTD, NTD_TND              V4, torch
    packed 192, 192                      as many, no pages             TND                            torch
    packed D up to 256                   fewer key heads               TND, inner_precise 0           V4
    padded D up to 512                   any ratio                     all; see TURNED_LAYOUTS        V4, torch
    padded 192, 128                      any ratio                     PREFILL_LAYOUTS                V4

Packed FP16 takes fewer key heads since V4; in 2025 it was refused altogether.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend.contracts.refuse import Refusal

ROPE = 64
V4 = "aclnnFusedInferAttentionScoreV4, August 2026"
LATENT_LAYOUTS = ("BSH", "BSND", "BNSD", "BSH_NBSD", "BSND_NBSD", "BNSD_NBSD", "TND", "TND_NTD")
PREFILL_LAYOUTS = ("BSH", "BSND", "BNSD", "TND", "NTD", "BSH_BNSD", "BSND_BNSD", "BNSD_BSND", "NTD_TND")
TURNED_LAYOUTS = ("BSH_BNSD", "BSND_BNSD")
PACKED_LAYOUTS = ("TND", "NTD", "TND_NTD", "NTD_TND")
PACKED_DIMS = ((128, 128), (192, 128), (192, 192), (64, 64))
LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


class Parts(NamedTuple):
    """The tensors of a call, tokens first: `[…, heads, dim]`; query and key perhaps with a part for rope."""

    query: tuple[Tensor, ...]
    key: tuple[Tensor, ...]
    value: Tensor

    @property
    def dims(self) -> tuple[int, int]:
        """Head dims of query and key, and of value, without rope."""
        return self.query[0].shape[-1], self.value.shape[-1]

    @property
    def heads(self) -> tuple[int, int]:
        """Of query, and of key and value."""
        return self.query[0].shape[-2], self.value.shape[-2]

    @property
    def has_rope(self) -> bool:
        """Whether a rotary part comes apart."""
        return len(self.query) == 2


def check_heads(refusal: Refusal, heads: int, kv_heads: int) -> None:
    """The numbers that the arguments give.

    Raises:
      RuntimeError: what both documents refuse.
    """
    refusal.require(heads > 0, f"numHeads should be greater than 0, but got {heads}")
    refusal.parameter(
        kv_heads > 0 and heads % kv_heads == 0, f"{heads} heads must be a multiple of {kv_heads} kv heads"
    )
    refusal.parameter(heads <= 256, f"{heads} heads, at most 256")


def check_types(refusal: Refusal, parts: Parts, heads: int, kv_heads: int) -> None:
    """That the tensors have one dtype, and the heads and tokens of each other.

    Raises:
      RuntimeError: what the vendor refuses, and quantised tensors, which are not implemented here.
    """
    dtype = parts.query[0].dtype
    refusal.not_implemented(dtype in (torch.float16, torch.bfloat16), f"query of {dtype}")
    named = [("query", parts.query, heads), ("key", parts.key, kv_heads), ("value", (parts.value,), kv_heads)]
    for name, tensors, count in named:
        for x in tensors:
            refusal.not_implemented(x.dtype == dtype, f"{name} of {x.dtype} beside query of {dtype}")
            refusal.parameter(x.shape[-2] == count, f"{name} has {x.shape[-2]} heads, the arguments say {count}")
            refusal.parameter(x.shape[:-2] == tensors[0].shape[:-2], f"{name} and {name}_rope differ in their tokens")
    refusal.parameter(parts.key[0].shape[:-2] == parts.value.shape[:-2], "key and value must have the same tokens")


def check_dims(refusal: Refusal, parts: Parts, layout: str, is_paged: bool, inner_precise: int) -> None:
    """Head dims with what they go together with: the table above.

    Raises:
      RuntimeError: what neither document allows.
    """
    width, v_width = parts.dims
    key_width = parts.key[0].shape[-1]
    refusal.parameter(key_width == width, f"head dims of query and key are {width} and {key_width}")
    refusal.parameter(width <= 512 and width % 16 == 0, f"head dim {width}, must be a multiple of 16 up to 512")
    if parts.has_rope:
        _check_rope(refusal, parts, layout)
    elif layout in PACKED_LAYOUTS:
        _check_packed(refusal, parts, layout, is_paged, inner_precise)
    elif (width, v_width) == (192, 128):
        refusal.parameter(layout in PREFILL_LAYOUTS, f"layout {layout} with head dims 192, 128 ({V4})")
    else:
        refusal.parameter(v_width == width, f"head dims of key and value are {width} and {v_width}, must be equal")
        fits = layout not in TURNED_LAYOUTS or width in (64, 128)
        refusal.parameter(fits, f"layout {layout} with head dim {width}; it takes 64 and 128, and 192 with 128 ({V4})")


def _check_rope(refusal: Refusal, parts: Parts, layout: str) -> None:
    (width, v_width), (heads, kv_heads) = parts.dims, parts.heads
    ropes = parts.query[1].shape[-1], parts.key[1].shape[-1]
    refusal.parameter(ropes == (ROPE, ROPE), f"rope dims are {ropes}, must be {ROPE}")
    refusal.parameter(
        width in (128, 512) and v_width == width, f"with rope head dims must be 128 or 512, got {width}, {v_width}"
    )
    layouts = LATENT_LAYOUTS if width == 512 else PREFILL_LAYOUTS
    refusal.parameter(layout in layouts, f"layout {layout} with rope and head dim {width}")
    if width == 512:
        refusal.parameter(kv_heads == 1, f"head dim 512 needs 1 kv head, got {kv_heads}")
        fits = heads in LATENT_HEADS
        refusal.parameter(fits, f"head dim 512 with {heads} heads; it takes 1, 2, 4 … 128: pad them ({V4})")


def _check_packed(refusal: Refusal, parts: Parts, layout: str, is_paged: bool, inner_precise: int) -> None:
    (width, v_width), (heads, kv_heads) = parts.dims, parts.heads
    refusal.parameter(width != 512, f"packed tokens of head dim 512 need query_rope and key_rope ({V4})")
    is_shared = heads != kv_heads
    is_free = is_shared and layout == "TND" and width == v_width <= 256
    refusal.parameter(
        (width, v_width) in PACKED_DIMS or is_free,
        f"packed tokens with head dims {width}, {v_width}; they take 64, 128, 192 with 128 or 192, and in TND with "
        f"fewer kv heads equal ones up to 256 ({V4})",
    )
    is_plain = layout == "TND" and not is_shared and not is_paged
    fits = (width, v_width) != (192, 192) or is_free or is_plain
    refusal.parameter(fits, f"head dims 192, 192 with paging or {layout}")
    precisions = (0, 1) if parts.value.dtype == torch.float16 and not is_shared else (0,)
    refusal.parameter(
        inner_precise in precisions,
        f"packed tokens with inner_precise {inner_precise}; it is 0, or 1 in float16 with as many kv heads ({V4})",
    )
