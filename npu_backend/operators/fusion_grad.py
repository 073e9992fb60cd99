"""npu_fusion_attention_grad in our words and shapes: a block's part of the gradient."""

from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend import vendor
from npu_backend.contracts.fusion import COPIES
from npu_backend.contracts.layouts import to_sequence_order
from npu_backend.errors import InputError
from npu_backend.operators.blocks import ends
from npu_backend.operators.fusion import Carried, check_fusion_block, triangle


class BlockGradients(NamedTuple):
    """What one block of keys gives, in the dtype of the inputs."""

    query: Tensor  # [B, t, N, H]
    key: Tensor  # [B, s, K, H]
    value: Tensor  # [B, s, K, V]


def fusion_block_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    carried: Carried,
    *,
    is_causal: bool,
    scale: float,
    kv_lengths: tuple[int, ...] | None = None,
) -> BlockGradients:
    """The part of the gradient that belongs to one key chunk; one call of npu::npu_fusion_attention_grad, layout TND.

    The parts of disjoint key chunks add up: p = exp(score − maximum) / total is the probability among all keys.

    Args:
      query, key, value, is_causal, scale, kv_lengths: as `fusion_block` got them.
      dy: gradient of the output, like `carried.out`.
      carried: of these queries over all keys of all chunks, not of this one.

    Raises:
      InputError: what the operator cannot express.
    """
    batch, length, heads, _ = query.shape
    kv_lengths = (key.shape[1],) * batch if kv_lengths is None else kv_lengths
    check_fusion_block(query, key, value, scale, (length,) * batch, kv_lengths, "TND")
    _check(query, value, dy, carried)
    vendor.require("npu::npu_fusion_attention_grad", query.device)
    found = BlockGradients(*(torch.zeros_like(x) for x in (query, key, value)))
    live = [i for i in range(batch) if length and kv_lengths[i]]
    if not live:
        return found
    q_live, kv_live = [length] * len(live), [kv_lengths[i] for i in live]
    # A row that saw no key has (0, −inf, 0), of which the operator would make NaN. With the largest maximum p is 0.
    seen = carried.total > 0
    maximum = torch.where(seen, carried.maximum, torch.finfo(torch.float32).max)
    total = torch.where(seen, carried.total, 1)
    grads = torch.ops.npu.npu_fusion_attention_grad(
        query[live].flatten(0, 1),
        *(torch.cat([x[i, : kv_lengths[i]] for i in live]) for x in (key, value)),
        dy[live].flatten(0, 1),
        heads,
        "TND",
        atten_mask=triangle(query.device) if is_causal else None,
        softmax_max=_statistic(maximum[live]),
        softmax_sum=_statistic(total[live]),
        attention_in=carried.out[live].flatten(0, 1),
        scale_value=scale,
        actual_seq_qlen=ends(q_live),
        actual_seq_kvlen=ends(kv_live),
        sparse_mode=3 if is_causal else 0,
    )
    for result, packed, lengths in zip(found, grads, (q_live, kv_live, kv_live), strict=False):
        for i, part in zip(live, packed.split(lengths), strict=True):
            result[i, : len(part)] = part
    return found


def _statistic(x: Tensor) -> Tensor:
    """`[b, t, N]` as the packed operator keeps it in memory."""
    packed = x.flatten(0, 1)[..., None].expand(-1, -1, COPIES)
    return to_sequence_order(packed, [x.shape[1]] * x.shape[0])


def _check(query: Tensor, value: Tensor, dy: Tensor, carried: Carried) -> None:
    shape = (*query.shape[:3], value.shape[3])
    for name, x in (("dy", dy), ("carried.out", carried.out)):
        if x.shape != shape or x.dtype != query.dtype:
            raise InputError(f"{name} is {tuple(x.shape)} {x.dtype}; it must be {shape} {query.dtype}")
    for name, x in (("maximum", carried.maximum), ("total", carried.total)):
        if x.shape != shape[:3] or x.dtype != torch.float32:
            raise InputError(f"carried.{name} is {tuple(x.shape)} {x.dtype}; it must be {shape[:3]} float32")
    # NaN must not look like "no key".
    if not bool(((carried.total >= 0) & (carried.total < torch.inf) & (carried.maximum < torch.inf)).all()):
        raise InputError("carried has a maximum or a total that is infinite, negative or NaN")
