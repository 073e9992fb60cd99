"""npu::npu_gather_pa_kv_cache on a CPU: the tokens of each request, copied out of the blocks of a cache, bit by bit."""

from typing import Any

import torch
from torch import Tensor

from npu_backend.contracts.gather_pa_kv_cache import Call, check


@torch.no_grad()
def npu_gather_pa_kv_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key: Tensor,
    value: Tensor,
    **options: Any,
) -> None:
    """The CPU kernel: writes `key` `[Σ lengths, h, dk]` and `value` `[Σ lengths, h, dv]`, request after request.

    Raises:
      RuntimeError: see `npu_backend.contracts.gather_pa_kv_cache`.
    """
    call = check("npu_gather_pa_kv_cache", key_cache, value_cache, block_tables, seq_lens, key, value, **options)
    _gather(key_cache, call, key)
    _gather(value_cache, call, value)


@torch.no_grad()
def npu_gather_pa_kv_cache_functional(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    key: Tensor,
    value: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The same into copies of `key` and `value`, which are returned."""
    operator = "npu_gather_pa_kv_cache_functional"
    call = check(operator, key_cache, value_cache, block_tables, seq_lens, key, value, **options)
    return _gather(key_cache, call, key.clone()), _gather(value_cache, call, value.clone())


def _gather(cache: Tensor, call: Call, result: Tensor) -> Tensor:
    start = 0
    for used, length in zip(call.blocks, call.lengths, strict=True):
        result[start : start + length] = cache[used].flatten(0, 1)[:length] if length else 0
        start += length
    return result
