"""A layer's experts in our words: npu::npu_moe_gating_top_k, …_init_routing_v2, npu_grouped_matmul, …_finalize_routing.

route    which k experts a token goes to, with which weights
spread   a row for each token and choice, sorted by expert: what grouped products want
grouped  each expert's rows by its matrix
gather   rows back in the order [T, k], or summed with their weights
"""

from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend import vendor
from npu_backend.errors import InputError
from npu_backend.operators.quantized import Activations


class Choice(NamedTuple):
    """Experts `[T, k]` int32 and their weights `[T, k]` float32, the largest choice first."""

    expert: Tensor
    weight: Tensor


class Rows(NamedTuple):
    """Rows `[T·k, …]` sorted by expert."""

    values: Tensor  # [T·k, H], of integers with token_scale
    token_scale: Tensor | None  # [T·k] float32
    place: Tensor  # [T·k] int32: where the row of token t and choice j stands, at t·k + j
    counts: Tensor  # [E] int64, rows of each expert


class PackedExperts(NamedTuple):
    """W4A8 of E experts, or of one matrix with E = 1, as the operator takes them."""

    weight: Tensor  # [E, k, n / 8] int32, eight numbers of 4 bits each, the lowest bits first
    scale: Tensor  # [E, G, n] int64 with the bits of a float32, one scale for each of G groups of k
    bias: Tensor  # [E, n] float32, 8 Σ w·scale


def route(logits: Tensor, bias: Tensor, *, top_k: int, groups: int, chosen_groups: int, factor: float) -> Choice:
    """The k experts of each token and their weights, of sigmoid scores; one call of npu::npu_moe_gating_top_k.

    The bias only chooses. A group counts as the sum of its two best choices. Weights are divided by their sum and
    multiplied by `factor`; the operator does nothing else with sigmoid scores.

    Args:
      logits: `[T, E]` float32.
      bias: `[E]` float32.

    Raises:
      InputError: what the operator cannot express: groups of 2 experts, more chosen than there are.
    """
    experts = logits.shape[1]
    if experts % groups or experts // groups <= 2:
        raise InputError(f"{experts} experts in {groups} groups; npu_moe_gating_top_k wants more than 2 in a group")
    if not 1 <= top_k <= experts // groups * chosen_groups:
        raise InputError(f"{top_k} experts a token cannot be chosen of {chosen_groups} groups of {experts // groups}")
    vendor.require("npu::npu_moe_gating_top_k", logits.device)
    weight, expert, _ = torch.ops.npu.npu_moe_gating_top_k(
        logits,
        top_k,
        bias=bias,
        k_group=chosen_groups,
        group_count=groups,
        group_select_mode=1,
        norm_type=1,
        routed_scaling_factor=factor,
        eps=1e-20,
    )
    return Choice(expert, weight)


def spread(x: Tensor, expert: Tensor, experts: int, token_scale: Tensor | None = None) -> Rows:
    """A row of `x` `[T, H]` for each of the k choices of its token; one call of npu::npu_moe_init_routing_v2."""
    vendor.require("npu::npu_moe_init_routing_v2", x.device)
    values, place, counts, scale = torch.ops.npu.npu_moe_init_routing_v2(
        x,
        expert,
        scale=token_scale,
        active_num=expert.numel(),
        expert_num=experts,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, experts],
        quant_mode=-1,
        row_idx_type=0,
    )
    return Rows(values, None if token_scale is None else scale, place, counts)


def grouped_linear(rows: Rows, weight: Tensor) -> Tensor:
    """Each expert's rows by its matrix of `[E, k, n]`, in one dtype; one call of npu::npu_grouped_matmul."""
    return _grouped(rows, weight)


def grouped_dynamic_linear(rows: Rows, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The same of integers: `weight` `[E, k, n]` int8, `weight_scale` `[E, n]` float32; `[T·k, n]` float16."""
    return _grouped(rows, weight, scale=[weight_scale], output_dtype=torch.float16)


def grouped_packed_linear(rows: Rows, packed: PackedExperts) -> Tensor:
    """The same with weights of 4 bits; `[T·k, n]` float16."""
    options = {"scale": [packed.scale], "bias": [packed.bias], "output_dtype": torch.float16}
    return _grouped(rows, packed.weight, **options)


def packed_linear(a: Activations, packed: PackedExperts) -> Tensor:
    """One matrix with weights of 4 bits, `[T, n]` float16: a grouped product with one group.

    Raises:
      InputError: activations without a scale a token.
    """
    if a.token_scale is None:
        raise InputError("activations have no scale a token; quantise them with quantize_per_token")
    count = torch.tensor([len(a.integers)], dtype=torch.int64, device=a.integers.device)
    return grouped_packed_linear(Rows(a.integers, a.token_scale, count, count), packed)


def _grouped(rows: Rows, weight: Tensor, **options: object) -> Tensor:
    vendor.require("npu::npu_grouped_matmul", weight.device)
    if rows.token_scale is not None:
        options["per_token_scale"] = [rows.token_scale]
    # Ends of rows and not counts: a list of one count is refused, a list of one end is not.
    ends = {"group_list": rows.counts.cumsum(0), "group_list_type": 0}
    return torch.ops.npu.npu_grouped_matmul([rows.values], [weight], split_item=2, group_type=0, **ends, **options)[0]


def in_token_order(values: Tensor, place: Tensor, top_k: int) -> Tensor:
    """Sorted rows `[T·k, n]` as `[T, k, n]`; no arithmetic."""
    return values[place.long()].unflatten(0, (-1, top_k))


def weighted_sum(values: Tensor, weight: Tensor) -> Tensor:
    """Σⱼ weight · row over `[T, k, n]`, in float32, then one cast; one call of npu::npu_moe_finalize_routing.

    Given float16, the operator would round every product and every sum to it, and the weights first of all.
    """
    vendor.require("npu::npu_moe_finalize_routing", values.device)
    rows = values.flatten(0, 1)
    place = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    total = torch.ops.npu.npu_moe_finalize_routing(
        rows.float(), None, None, None, weight.float().contiguous(), place, None, 2
    )
    return total.to(values.dtype)
