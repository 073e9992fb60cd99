"""Kernels that are compiled for each shape, so that few shapes are asked of them: flex_attention, jax.nn.

Arguments and answers as in `fused`, but jax.nn's are NumPy arrays `[B, T, N, H]`.
"""

from functools import cache
from typing import Any

import numpy as np


@cache
def _compiled_flex() -> Any:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@cache
def _causal_blocks(length: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)


def flex(query: Any, key: Any, value: Any, seen: Any, is_causal: bool, scale: float) -> tuple[Any, Any]:
    """PyTorch's flex_attention, compiled to a Triton kernel; heads may share keys."""
    if seen is not None:
        raise ValueError("flex_attention is given no mask here but a causal one")
    out, lse = _compiled_flex()(
        query,
        key,
        value,
        block_mask=_causal_blocks(query.shape[2], str(query.device)) if is_causal else None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_lse=True,
    )
    return out, lse


def jax_nn(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, is_causal: bool, scale: float, implementation: str
) -> np.ndarray:
    """`jax.nn.dot_product_attention` on JAX's first device; implementation "cudnn" or "xla"."""
    import jax

    with jax.numpy_dtype_promotion("standard"):
        out = _jitted(is_causal, float(scale), implementation)(*map(jax.numpy.asarray, (query, key, value)))
    return np.asarray(out)


@cache
def _jitted(is_causal: bool, scale: float, implementation: Any) -> Any:
    import jax

    return jax.jit(
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=is_causal, implementation=implementation
        )
    )
