"""Three families of operators that can fold blocks into a result: who uses them, what they carry, how they round.

ring_mla   MindIE          npu_ring_mla merges each block with (out, lse) so far; out is FP16 after each
fia        vLLM-Ascend     npu_fused_infer_attention_score per block, npu_attention_update over all of them
fusion     MindSpeed       npu_fusion_attention per block, npu_ring_attention_update with (out, max, sum) so far
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from npu_backend.operators import (
    Carried,
    Partial,
    fused_infer_block,
    fusion_block,
    fusion_update,
    merge_partials,
    ring_mla_block,
)
from npu_backend.operators.attention_update import PARTIALS


class Family(NamedTuple):
    """How one family folds. `attend` takes what was carried, or None, and gives what is carried on."""

    name: str
    operators: tuple[str, ...]
    precision: str  # profile of docs/precision.md in which results are judged
    kernel_type: str
    dims: str  # the head dims that the family takes, in words
    takes: Callable[[int, int], bool]  # those of (query, value)
    attend: Callable[..., Any]  # (carried, query, key, value, *, is_causal, scale, kv_lengths) → carried
    finish: Callable[[Any], Partial]


def _ring_mla(carried: Partial | None, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Partial:
    return ring_mla_block(query, key, value, previous=carried, **options)


def _fia(carried: tuple[Partial, ...] | None, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple:
    return (*(carried or ()), fused_infer_block(query, key, value, **options))


def merge_all(carried: tuple[Partial, ...]) -> Partial:
    """One merge of all blocks; of more than the operator takes, groups of 15 into what is merged so far."""
    merged = merge_partials(carried[:PARTIALS])
    for start in range(PARTIALS, len(carried), PARTIALS - 1):
        merged = merge_partials((merged, *carried[start : start + PARTIALS - 1]))
    return merged


def _fusion(carried: Carried | None, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Carried:
    block = fusion_block(query, key, value, **options)
    return block if carried is None else fusion_update(carried, block)


def _latent_or_equal(width: int, v_width: int) -> bool:
    return (width, v_width) == (192, 128) or (width == v_width and width % 16 == 0 and width <= 512)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "ring_mla",
            ("atb::npu_ring_mla",),
            "ring_mla_fp16",
            "kernel_type_high_precision",
            "192 and 128",
            lambda width, v_width: (width, v_width) == (192, 128),
            _ring_mla,
            lambda carried: carried,
        ),
        Family(
            "fia",
            ("npu::npu_fused_infer_attention_score_v2", "npu::npu_attention_update"),
            "fia_fp16",
            "inner_precise 0",
            "192 and 128, or equal ones, a multiple of 16 up to 512",
            _latent_or_equal,
            _fia,
            merge_all,
        ),
        Family(
            "fusion",
            ("npu::npu_fusion_attention", "npu::npu_ring_attention_update"),
            "flash_fp16",
            "inner_precise 0",
            "V at most H, H at most 768, V a multiple of 64",
            lambda width, v_width: v_width <= width <= 768 and v_width % 64 == 0,
            _fusion,
            lambda carried: carried.partial(),
        ),
    )
}


def precision_of(family: Family, cp: int) -> str:
    """The profile in which a prefill over `cp` ranks is judged.

    FIA's blocks are merged in float32 at once, if the operator takes all of them; what is merged group by group is
    rounded after each, as in FlashAttention.

    >>> precision_of(FAMILIES["fia"], 8), precision_of(FAMILIES["fia"], 16)
    ('fia_fp16', 'flash_fp16')
    """
    return "flash_fp16" if family.precision == "fia_fp16" and 2 * cp > PARTIALS else family.precision
