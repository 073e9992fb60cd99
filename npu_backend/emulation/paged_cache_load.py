"""atb::npu_paged_cache_load on a CPU: the tokens of each request, copied out of the blocks of a cache, bit by bit."""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.paged_cache_load import Call, check, check_outputs


@torch.no_grad()
def npu_paged_cache_load(
    key_cache: Tensor, value_cache: Tensor, block_table: Tensor, context_lens: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """The CPU kernel: `key` `[Σ lengths, h, dk]` and `value` `[Σ lengths, h, dv]`, request after request.

    Raises:
      RuntimeError: see `npu_backend.contracts.paged_cache_load`.
    """
    call = check(key_cache, value_cache, block_table, context_lens, **options)
    return _load(key_cache, call), _load(value_cache, call)


@torch.no_grad()
def npu_paged_cache_load_out(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The same into given tensors."""
    call = check(key_cache, value_cache, block_table, context_lens, **options)
    check_outputs(call, (key_cache, value_cache), (key, value))
    return key.copy_(_load(key_cache, call)), value.copy_(_load(value_cache, call))


def _load(cache: Tensor, call: Call) -> Tensor:
    parts = [cache[used].flatten(0, 1)[:n] for used, n in zip(call.blocks, call.lengths, strict=True) if n]
    return torch.cat(parts) if parts else cache.new_empty(0, *cache.shape[2:])
