"""The gradient of FlashAttention-2, from what its forward left, tile by tile.

    p     = exp(q·k · scale − m) / l        compute; hidden scores replaced as in the forward
    dp    = dy·v                            compute
    delta = Σ dy out                        compute, over the head dim, of the out that was stored
    ds    = p (dp − delta)                  compute
    dv    = Σ p dy                          p rounded to `probability`, the sum in compute
    dq    = scale Σ ds k                    ds rounded to `probability`, the sum in compute, then × scale
    dk    = scale Σ ds q                    the same

That is the vendor's order (docs/FAG算子设计介绍.md of flash_attention_score_grad in ops-transformer; its
kernels' vec_op.h stores p and ds in the dtype of the inputs for the cube, and everything else in float32). m and l are
those of all keys, so of any part of the keys the part of the gradient comes out: a ring need only add its blocks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend.emulation.flash import COLUMNS, ROWS, Hide, Stages, by_kv_head


class Gradients(NamedTuple):
    """Of query, key and value, heads first, in `compute`."""

    query: Tensor
    key: Tensor
    value: Tensor


class Forward(NamedTuple):
    """What the forward left: `out` `[N, m, V]`, row maximum and sum `[N, m, 1]`."""

    out: Tensor
    maximum: Tensor
    total: Tensor


def attend_backward(
    tensors: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    forward: Forward,
    scale: float,
    stages: Stages,
    columns_of: Callable[[slice], tuple[int, int]],
    hide: Hide,
) -> Gradients:
    """The gradients of one request.

    Args:
      tensors: query, key, value `[N, m, H]`, `[K, n, H]`, `[K, n, V]`, as in `flash.attend`.
      dy: the gradient of out, `[N, m, V]`.
      forward: what it left.
      scale, stages, columns_of, hide: as in `flash.attend`.
    """
    query, key, value = (x.to(stages.compute) for x in tensors)
    dy, out, maximum, total = (x.to(stages.compute) for x in (dy, *forward))
    factor = torch.tensor(scale, dtype=stages.compute)
    delta = (dy * out).sum(dim=-1, keepdim=True)
    grads = Gradients(*(torch.zeros_like(x) for x in (query, key, value)))
    for start in range(0, query.shape[1], ROWS):
        rows = slice(start, min(start + ROWS, query.shape[1]))
        first, last = columns_of(rows)
        for column in range(first - first % COLUMNS, last, COLUMNS):
            columns = slice(column, min(column + COLUMNS, last))
            score = hide(by_kv_head(query[:, rows], key[:, columns].transpose(1, 2)).mul_(factor), rows, columns)
            p = (score - maximum[:, rows]).exp_().div_(total[:, rows])
            dp = by_kv_head(dy[:, rows], value[:, columns].transpose(1, 2))
            ds = (p * (dp - delta[:, rows])).to(stages.probability).to(stages.compute)
            p = p.to(stages.probability).to(stages.compute)
            grads.query[:, rows] += by_kv_head(ds, key[:, columns])
            grads.key[:, columns] += _over_rows(ds, query[:, rows], key.shape[0])
            grads.value[:, columns] += _over_rows(p, dy[:, rows], key.shape[0])
    return Gradients(grads.query * factor, grads.key * factor, grads.value)


def _over_rows(left: Tensor, right: Tensor, kv_heads: int) -> Tensor:
    """`left` `[N, rows, columns]`ᵀ times `right` `[N, rows, x]`, summed over the heads that share a key head."""
    left, right = (x.reshape(kv_heads, -1, x.shape[2]) for x in (left, right))
    return torch.bmm(left.transpose(1, 2), right)
