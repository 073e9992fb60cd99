"""PyTorch's attention kernels by name, called such that they hand over lse where they have one.

All take query `[B, N, T, H]`, key `[B, N, S, H]`, value `[B, N, S, V]` on a device (flash also `[B, K, S, H]` with N a
multiple of K), `seen` `[B, 1, T, S]` bool or None, and `is_causal` of as many queries as keys. They return out
`[B, N, T, V]` in the dtype of the inputs and lse `[B, N, T]` float32, natural logarithm, or None. autograd goes through
all of them.
"""

from typing import Any

ALIGNED = 16
"""Elements to which the rows of a bias must be aligned for the memory-efficient kernel."""


def flash(query: Any, key: Any, value: Any, seen: Any, is_causal: bool, scale: float) -> tuple[Any, Any]:
    """FlashAttention-2 as PyTorch ships it; no mask but a causal one."""
    import torch

    if seen is not None:
        raise ValueError("the flash kernel takes no mask")
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p=0.0, is_causal=is_causal, return_debug_mask=False, scale=scale
    )
    return found[0], _lse(found[1], query)


def efficient(query: Any, key: Any, value: Any, seen: Any, is_causal: bool, scale: float) -> tuple[Any, Any]:
    """The memory-efficient kernel (xFormers'); it pads lse to a multiple of 32 queries."""
    import torch

    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, _bias(query, seen), True, dropout_p=0.0, is_causal=is_causal, scale=scale
    )
    return found[0], _lse(found[1], query)


def cudnn(query: Any, key: Any, value: Any, seen: Any, is_causal: bool, scale: float) -> tuple[Any, Any]:
    """cuDNN's kernel; no mask but a causal one. Its lse is `[B, N, T, 1]`."""
    import torch

    if seen is not None:
        raise ValueError("cuDNN is given no mask here")
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, dropout_p=0.0, is_causal=is_causal, return_debug_mask=False, scale=scale
    )
    return found[0], _lse(found[1], query)


def math(query: Any, key: Any, value: Any, seen: Any, is_causal: bool, scale: float) -> tuple[Any, Any]:
    """PyTorch's own products and softmax; of half inputs it computes in float32, unless it is allowed not to."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=is_causal, scale=scale
        )
    return out, None


def eager(query: Any, key: Any, value: Any, seen: Any, is_causal: bool, scale: float) -> tuple[Any, Any]:
    """softmax(q @ k.T * scale) @ v, each a tensor in the dtype of the inputs; the softmax computes in float32."""
    import torch

    score = (query @ key.transpose(2, 3)) * scale
    if is_causal:
        seen = torch.ones(score.shape[2:], dtype=torch.bool, device=score.device).tril()[None, None]
    if seen is not None:
        score = score.masked_fill(~seen, -torch.inf)
    return torch.softmax(score, dim=-1, dtype=torch.float32).to(query.dtype) @ value, None


def eager_without_half_sums(query: Any, key: Any, value: Any, seen: Any, is_causal: bool, scale: float) -> Any:
    """As `eager`, and cuBLAS may not add up parts of a product in half precision, which by default it may."""
    import torch

    flags = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(flags, name) for name in names}
    try:
        for name in names:
            setattr(flags, name, False)
        return eager(query, key, value, seen, is_causal, scale)
    finally:
        for name, value_before in before.items():
            setattr(flags, name, value_before)


def _bias(query: Any, seen: Any) -> Any:
    """0 where seen, else −inf, `[B, N, T, S]` in the dtype of the inputs, its rows aligned in memory."""
    import torch

    if seen is None:
        return None
    batch, _, length, keys = seen.shape
    room = torch.zeros((batch, 1, length, -(-keys // ALIGNED) * ALIGNED), dtype=query.dtype, device=query.device)
    bias = room[..., :keys]
    bias.masked_fill_(~seen, -torch.inf)
    return bias.expand(batch, query.shape[1], length, keys)


def _lse(lse: Any, query: Any) -> Any:
    """`[B, N, T]` of what a kernel calls logsumexp: `[B, N, T]`, `[B, N, T, 1]`, or with more queries than there are.

    Raises:
      ValueError: another shape.
    """
    batch, heads, length = query.shape[:3]
    if lse.ndim == 4 and lse.shape[3] == 1:
        lse = lse[..., 0]
    if lse.ndim != 3 or lse.shape[:2] != (batch, heads) or lse.shape[2] < length:
        raise ValueError(f"logsumexp has shape {tuple(lse.shape)}, of queries {tuple(query.shape)}")
    return lse[..., :length]
