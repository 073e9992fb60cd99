"""atb::npu_ring_mla in our words and shapes: MindIE's context parallelism, out and lse carried by the operator."""

import functools

import torch
from torch import Tensor

from npu_backend.contracts.ring_mla import MASK_PITCH, NOPE, ROPE, VALUE
from npu_backend.errors import InputError
from npu_backend.operators.partial import Partial, nothing, where


def ring_mla_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float,
    kv_lengths: tuple[int, ...] | None = None,
    previous: Partial | None = None,
) -> Partial:
    """Attention of one query chunk over one key chunk, merged with `previous`; one call of atb::npu_ring_mla.

    Args:
      query: `[B, t, N, 192]` float16; the last 64 of the 192 are the rotary part.
      key, value: `[B, s, K, 192]`, `[B, s, K, 128]` float16; N is a multiple of K.
      is_causal: query i of the chunk sees key j of the chunk iff j ≤ i. The two chunks are then the same tokens.
      scale: multiplies q·k. The operator rounds it to FP16.
      kv_lengths: the first so many keys of each request count, the others are pads; None: all.
      previous: what was computed for these queries before; None: nothing.

    Raises:
      InputError: what the operator cannot express.
    """
    batch, length, heads, _ = query.shape
    kv_lengths = (key.shape[1],) * batch if kv_lengths is None else kv_lengths
    _check(query, key, value, is_causal, scale, kv_lengths, previous)
    before = nothing(query, VALUE) if previous is None else previous
    if not any(kv_lengths):
        return before
    packed_query, packed_key, packed_value = query.flatten(0, 1), _pack(key, kv_lengths), _pack(value, kv_lengths)
    out, lse = torch.ops.atb.npu_ring_mla(
        packed_query[..., :NOPE].contiguous(),
        packed_query[..., NOPE:].contiguous(),
        packed_key[..., :NOPE].contiguous(),
        packed_key[..., NOPE:].contiguous(),
        packed_value.contiguous(),
        _triu(query.device),
        torch.tensor([(length,) * batch, kv_lengths], dtype=torch.int32),  # stays on the CPU, the operator demands it
        heads,
        key.shape[2],
        pre_out=None if previous is None else previous.out.flatten(0, 1).contiguous(),
        prev_lse=None if previous is None else previous.lse.permute(2, 0, 1).flatten(1).contiguous(),
        qk_scale=scale,
        mask_type="mask_type_triu" if is_causal else "no_mask",
        calc_type="calc_type_first_ring" if previous is None else "calc_type_default",
    )
    new = Partial(out.unflatten(0, (batch, length)), lse.unflatten(1, (batch, length)).permute(1, 2, 0))
    return new if all(kv_lengths) else _where_keys(kv_lengths, new, before)


def _pack(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The counted tokens of all requests one after the other, `[Σ lengths, K, …]`."""
    if all(length == x.shape[1] for length in lengths):
        return x.flatten(0, 1)
    return torch.cat([request[:length] for request, length in zip(x, lengths, strict=True)])


@functools.cache
def _triu(device: torch.device) -> Tensor:
    """The causal mask as the FP16 kernel wants it: added to scores, and 512 wide whatever the lengths."""
    return torch.full((MASK_PITCH, MASK_PITCH), -torch.inf, dtype=torch.float16, device=device).triu(1)


def _where_keys(kv_lengths: tuple[int, ...], new: Partial, before: Partial) -> Partial:
    """`new` for requests with keys; for others the operator has written nothing, and what was before still holds."""
    has_keys = torch.tensor(kv_lengths, device=new.out.device)[:, None, None] > 0
    return where(has_keys, new, before)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float,
    kv_lengths: tuple[int, ...],
    previous: Partial | None,
) -> None:
    batch, length, heads, _ = query.shape
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype != torch.float16:
            raise InputError(f"{name} is {x.dtype}; context parallelism is FP16 only here, as in MindIE: convert it")
    if (query.shape[-1], key.shape[-1], value.shape[-1]) != (NOPE + ROPE, NOPE + ROPE, VALUE):
        dims = (query.shape[-1], key.shape[-1], value.shape[-1])
        raise InputError(f"head dims of query, key, value are {dims}; npu_ring_mla takes 192, 192, 128")
    if key.shape[:3] != value.shape[:3] or key.shape[0] != batch or key.shape[2] == 0 or heads % key.shape[2]:
        shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
        raise InputError(f"query, key, value {shapes} do not fit: equal batches, and N a multiple of K")
    if len(kv_lengths) != batch or any(not 0 <= n <= key.shape[1] for n in kv_lengths):
        raise InputError(f"kv_lengths {kv_lengths} must be {batch} numbers from 0 to {key.shape[1]}")
    if is_causal and any(n not in (0, length) for n in kv_lengths):
        raise InputError(
            f"causal with {length} queries and {kv_lengths} keys; the operator's mask starts top-left, so both must be "
            f"the same tokens: cut the keys so that they are"
        )
    if not abs(scale) < 65520:
        raise InputError(f"scale {scale:g} is not finite in FP16, where the operator multiplies with it")
    if batch > 1 and max(length, *kv_lengths) * heads >= 2**24:
        raise InputError(
            f"{length} tokens of {heads} heads overflow the operator's 32-bit offsets; pass one request a call"
        )
    if previous is not None and (previous.out.shape, previous.lse.shape) != (
        (*query.shape[:3], VALUE),
        query.shape[:3],
    ):
        raise InputError(f"previous {tuple(previous.out.shape)} is not of these queries {tuple(query.shape)}")
