"""Kernels of other projects, for `cpjax fingerprint examples/other_kernels.py:NAME`; cards: docs/fingerprint.md.

flex    PyTorch's flex_attention, not compiled; float16, bfloat16, float32
ring    ring-attention-pytorch's flash attention on one rank (0.5.20); float32
"""

import warnings

import torch
from torch.nn.attention.flex_attention import flex_attention

TILE = 512
"""Keys that `ring` takes at a time."""


def causal(score, batch, head, query, key):
    """Hide later keys."""
    return torch.where(query >= key, score, -float("inf"))


def flex(query, key, value, scale, is_causal):
    """Arrays are [B, T, N, H]; returns out and lse."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    hides = causal if is_causal else None
    is_grouped = q.shape[1] != k.shape[1]
    with warnings.catch_warnings():  # that it should be compiled: another kernel, with a card of its own
        warnings.simplefilter("ignore")
        out, lse = flex_attention(q, k, v, score_mod=hides, scale=scale, enable_gqa=is_grouped, return_lse=True)
    return out.transpose(1, 2), lse.transpose(1, 2)


def ring(query, key, value, scale, is_causal):
    """Its scale is head_dim^-1/2, and it knows no groups: queries are scaled before, keys are repeated."""
    with warnings.catch_warnings():  # of its type hints
        warnings.simplefilter("ignore")
        from ring_attention_pytorch import ring_flash_attn

    group = query.shape[2] // key.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (key, value))
    return ring_flash_attn(query * (scale * query.shape[-1] ** 0.5), k, v, causal=is_causal, bucket_size=TILE)
