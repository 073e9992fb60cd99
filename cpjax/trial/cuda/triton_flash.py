"""A user's kernel: FlashAttention-2's forward pass in Triton, written from scratch. Imported where Triton is installed.

Exponentials are to base two: one float32 number, scale · log2(e), multiplies the scores; p is rounded to the dtype of
the inputs as the factor of v, the row sum takes the unrounded p; out is rounded once. A query at position p sees the
keys 0 … p.
"""

# Triton comes with PyTorch for CUDA only.
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import Any

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


INTEGERS = [
    *("qb", "qn", "qt", "kb", "kn", "ks", "vb", "vn", "vs", "ob", "on", "ot", "lb", "ln", "pb"),
    *("heads", "group", "length", "keys", "head_dim", "value_dim"),
]
"""Compiled once for all their values: a trial has hundreds of shapes."""


@triton.jit(do_not_specialize=INTEGERS)
def _forward(
    Q, K, V, Out, Lse, Positions,
    qb, qn, qt, kb, kn, ks, vb, vn, vs, ob, on, ot, lb, ln, pb,
    scale_log2, heads, group, length, keys, head_dim, value_dim,
    width: tl.constexpr, value_width: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """One program: `rows` queries of one head, keys `tile` at a time; strides of B, N and tokens, elements are next."""
    b, n = tl.program_id(1) // heads, tl.program_id(1) % heads
    b, n, shared = b.to(tl.int64), n.to(tl.int64), (n // group).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    is_row = row < length
    d, e = tl.arange(0, width), tl.arange(0, value_width)
    q = tl.load(
        Q + b * qb + n * qn + row[:, None] * qt + d[None, :],
        mask=is_row[:, None] & (d[None, :] < head_dim), other=0.0,
    )  # fmt: skip
    position = tl.load(Positions + b * pb + row, mask=is_row, other=-1)
    m = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, value_width], tl.float32)
    end = tl.minimum(keys, tl.max(position, axis=0) + 1)
    for start in range(0, end, tile):
        at = start + tl.arange(0, tile)
        is_key = at < keys
        k = tl.load(
            K + b * kb + shared * kn + at[None, :] * ks + d[:, None],
            mask=is_key[None, :] & (d[:, None] < head_dim), other=0.0,
        )  # fmt: skip
        score = tl.dot(q, k, input_precision="ieee") * scale_log2
        score = tl.where(is_key[None, :] & (at[None, :] <= position[:, None]), score, float("-inf"))
        highest = tl.maximum(m, tl.max(score, axis=1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(score - base[:, None])
        shrink = tl.exp2(m - base)
        v = tl.load(
            V + b * vb + shared * vn + at[:, None] * vs + e[None, :],
            mask=is_key[:, None] & (e[None, :] < value_dim), other=0.0,
        )  # fmt: skip
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = highest
    out = acc / total[:, None]
    tl.store(
        Out + b * ob + n * on + row[:, None] * ot + e[None, :],
        out.to(Out.dtype.element_ty),
        mask=is_row[:, None] & (e[None, :] < value_dim),
    )
    tl.store(Lse + b * lb + n * ln + row, (m + tl.log2(total)) * 0.6931471805599453, mask=is_row)


def attention(query: Any, key: Any, value: Any, positions: Any, scale: float) -> tuple[Any, Any]:
    """query `[B, N, T, H]`, key `[B, K, S, H]`, value `[B, K, S, V]`, positions `[B, T]` int32, contiguous elements.

    Returns out `[B, N, T, V]` in the dtype of the inputs, lse `[B, N, T]` float32. Positions are 0 or more.
    """
    import torch

    batch, heads, length, head_dim = query.shape
    keys, value_dim = key.shape[2], value.shape[3]
    out = torch.empty((batch, heads, length, value_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
    width, value_width = (max(64, triton.next_power_of_2(x)) for x in (head_dim, value_dim))
    rows, tile = (64, 64) if max(width, value_width) <= 128 else (32, 32)
    if query.dtype == torch.float32:  # of which products are unrolled: compiling is slow
        rows, tile = 32, 16
    _forward[(triton.cdiv(length, rows), batch * heads)](
        query, key, value, out, lse, positions,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        positions.stride(0),
        scale * LOG2_E, heads, heads // key.shape[1], length, keys, head_dim, value_dim,
        width=width, value_width=value_width, rows=rows, tile=tile, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, lse
