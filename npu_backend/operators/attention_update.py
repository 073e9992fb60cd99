"""npu::npu_attention_update in our words and shapes: all partials of a row of queries, merged in one call."""

from collections.abc import Sequence

import torch

from npu_backend import vendor
from npu_backend.errors import InputError
from npu_backend.operators.partial import Partial, where

PARTIALS = 16
"""Most partials of a call: what the vendor documents. Its kernels take more, but then treat −inf in another way."""


def merge_partials(partials: Sequence[Partial]) -> Partial:
    """Attention over the union of the partials' keys; one call of npu::npu_attention_update.

    Args:
      partials: 1 to 16 over disjoint sets of keys, outs `[B, t, N, V]` of one dtype, V a multiple of 8 up to 512.

    Returns:
      The merged partial; (0, −inf) for rows that saw no key in any of them.

    Raises:
      InputError: what the operator cannot express.
    """
    _check(partials)
    shape = partials[0].out.shape
    vendor.require("npu::npu_attention_update", partials[0].out.device)
    out, lse = torch.ops.npu.npu_attention_update(
        [p.lse.flatten().contiguous() for p in partials],
        [p.out.flatten(0, 2).contiguous() for p in partials],
        1,
    )
    merged = Partial(out.unflatten(0, shape[:3]), lse.unflatten(0, shape[:3]))
    # Where nobody saw a key the operator gives NaN.
    saw_a_key = torch.stack([p.lse for p in partials]).amax(dim=0) > -torch.inf
    return where(saw_a_key, merged, Partial(torch.zeros_like(merged.out), torch.full_like(merged.lse, -torch.inf)))


def _check(partials: Sequence[Partial]) -> None:
    if not 1 <= len(partials) <= PARTIALS:
        raise InputError(f"{len(partials)} partials; npu_attention_update takes 1 to {PARTIALS}: merge in groups")
    like = partials[0].out
    if like.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise InputError(f"partials are {like.dtype}; npu_attention_update takes float16, bfloat16 and float32")
    if like.dim() != 4 or like.shape[3] % 8 or not 8 <= like.shape[3] <= 512:
        raise InputError(f"out is {tuple(like.shape)}; it must be [B, t, N, V] with V a multiple of 8 from 8 to 512")
    for out, lse in partials:
        if (out.shape, out.dtype, lse.shape, lse.dtype) != (like.shape, like.dtype, like.shape[:3], torch.float32):
            raise InputError(
                f"a partial has out {tuple(out.shape)} {out.dtype}, lse {tuple(lse.shape)} {lse.dtype}; all must have "
                f"{tuple(like.shape)} {like.dtype} and {tuple(like.shape[:3])} float32"
            )
        # NaN must not look like "no key" below.
        if not bool((lse < torch.inf).all()):
            raise InputError("an lse is +inf or NaN; a query without keys has lse −inf, and everything else is finite")
