"""What the wrappers that compute one block share: lengths of requests, and which queries saw a key."""

import math

import torch
from torch import Tensor

from npu_backend.errors import InputError


def saw_a_key(query: Tensor, is_causal: bool, q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...]) -> Tensor:
    """bool `[B, t, 1]`: whether a query sees any key; causal means j ≤ i + (keys − queries).

    It follows from the lengths alone. What operators write into other rows (+inf, −3.4e38, means of values, nothing at
    all) differs by operator and kernel, and is not asked.
    """
    i = torch.arange(query.shape[1])
    rows = [
        (i < m) & (n > 0) & ((i + n - m >= 0) | (not is_causal)) for m, n in zip(q_lengths, kv_lengths, strict=True)
    ]
    return torch.stack(rows)[..., None].to(query.device)


def ends(lengths: list[int] | tuple[int, ...]) -> list[int]:
    """Where each request ends in a pack: cumulative, without a leading 0."""
    return [sum(lengths[: i + 1]) for i in range(len(lengths))]


def check_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    q_lengths: tuple[int, ...],
    kv_lengths: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """What every block needs: `[B, t, N, H]`, `[B, s, K, H]`, `[B, s, K, V]` of one accepted dtype, and lengths.

    Raises:
      InputError: it says which rule is broken.
    """
    names = ", ".join(str(x).removeprefix("torch.") for x in dtypes)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            raise InputError(f"{name} has {x.dim()} dims; it must have 4: requests, tokens, heads, head dim")
        if x.dtype not in dtypes or x.dtype != query.dtype:
            raise InputError(f"{name} is {x.dtype}; the operator takes {names}, all three alike: convert it")
    batch, length, heads, width = query.shape
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if key.shape[:3] != value.shape[:3] or key.shape[0] != batch or key.shape[3] != width:
        raise InputError(f"query, key, value {shapes} do not fit: equal batches, tokens of key and value, head dims")
    if key.shape[2] == 0 or heads % key.shape[2] or heads > 256:
        raise InputError(f"{heads} heads on {key.shape[2]} key heads; N is a multiple of K, at most 256")
    for name, lengths, most in (("q_lengths", q_lengths, length), ("kv_lengths", kv_lengths, key.shape[1])):
        if len(lengths) != batch or any(not 0 <= n <= most for n in lengths):
            raise InputError(f"{name} {lengths} must be {batch} numbers from 0 to {most}")
    if not math.isfinite(scale):
        raise InputError(f"scale {scale:g} is not finite")
