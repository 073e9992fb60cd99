"""npu_fusion_attention_v2 and _v3 with their gradients, on a CPU: the kernels of v1 under other names and types.

v2 spells pre_tokens and next_tokens, and can do what v1 cannot (a rotary part of its own, other kinds of pse, which are
not implemented here); it gives back the seed and the offset it was given. v3 takes lengths as tensors of int64, and
gives its seed and offset as tensors, which only dropout fills: here they are 0.
"""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts import fusion, fusion_grad
from npu_backend.contracts.refuse import Refusal
from npu_backend.emulation.fusion import Result, attention
from npu_backend.emulation.fusion_grad import gradients

SPELLINGS = {"pre_tokens": "pre_tockens", "next_tokens": "next_tockens"}
NEW_IN_V2 = ("query_rope", "key_rope", "q_start_idx", "kv_start_idx")


def npu_fusion_attention_v2(*args: Any, **options: Any) -> Result:
    """The CPU kernel of v2.

    Raises:
      RuntimeError: see `npu_backend.contracts.fusion`; and for what v1 does not have.
    """
    name = "npu_fusion_attention_v2"
    results = attention(fusion.check(*args, operator=name, **_as_v1(name, options)))
    return *results[:4], options.get("seed", 0), options.get("offset", 0), results[6]


def npu_fusion_attention_grad_v2(
    *args: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value; `[0]` of pse and of the rotary parts; undefined of sink."""
    name = "npu_fusion_attention_grad_v2"
    dq, dk, dv = gradients(fusion_grad.check(name, *args, **_as_v1(name, options)))
    return dq, dk, dv, dq.new_empty(0), dq.new_empty(0), dq.new_empty(0), None


def npu_fusion_attention_v3(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *args: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The CPU kernel of v3, whose positional arguments are v1's up to sink."""
    name = "npu_fusion_attention_v3"
    given = dict(zip(POSITIONAL_OF_V3, args, strict=False)) | options
    call = fusion.check(query, key, value, head_num, input_layout, operator=name, **_lists(name, given))
    seed, offset = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
    return *attention(call)[:4], seed, offset


def npu_fusion_attention_grad_v3(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value; `[0]` of pse; a scalar of sink."""
    name = "npu_fusion_attention_grad_v3"
    given = {key: x for key, x in options.items() if key not in ("seed", "offset")}  # only dropout reads them
    dq, dk, dv = gradients(fusion_grad.check(name, *args, **_lists(name, given)))
    return dq, dk, dv, dq.new_empty(0), torch.zeros([])


POSITIONAL_OF_V3 = (
    "pse", "padding_mask", "atten_mask", "scale", "keep_prob", "pre_tockens", "next_tockens", "inner_precise", "prefix",
    "actual_seq_qlen", "actual_seq_kvlen", "sparse_mode", "gen_mask_parallel", "sync", "softmax_layout", "sink",
)  # fmt: skip


def _as_v1(operator: str, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of v2 by v1's names, without those that v1 does not have."""
    Refusal(operator).only_defaults({name: options.get(name) for name in NEW_IN_V2})
    return {
        SPELLINGS.get(name, name): x for name, x in options.items() if name not in (*NEW_IN_V2, "pse_type")
    }  # pse_type says what pse means, which is refused


def _lists(operator: str, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of v3 with lengths as v1 takes them."""
    given = dict(options)
    for name in ("actual_seq_qlen", "actual_seq_kvlen"):
        x = given.get(name)
        if x is not None:
            fits = x.dtype == torch.int64 and x.dim() == 1
            Refusal(operator).parameter(fits, f"{name} is {tuple(x.shape)} {x.dtype}, must be int64 with one dim")
            given[name] = x.tolist()
    return given
