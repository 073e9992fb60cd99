"""What a rank holds of a case: two chunks of it, with the places of their tokens."""

import math
from typing import NamedTuple

import numpy as np

from npu_backend.errors import InputError
from npu_backend.files import Case
from npu_backend.schedule import held_chunks

PAD = -1
"""The segment of a token that is only filling."""

PRECISION = "ring_mla_fp16"
"""The profile this backend computes in: the roundings of npu_ring_mla with FP16 tensors."""


class Shard(NamedTuple):
    """The tokens of one rank in per-device order: its early chunk, then its late chunk; t = T/cp tokens."""

    query: np.ndarray  # [B, t, N, 192] float16
    key: np.ndarray  # [B, t, K, 192] float16
    value: np.ndarray  # [B, t, K, 128] float16
    position: np.ndarray  # [B, t] int32
    segment: np.ndarray  # [B, t] int32


def shard(case: Case, rank: int) -> Shard:
    """The shard of `rank`. Pads become zeros.

    A pad is hidden from real tokens by the operator's mask, which is added to the scores: that hides any number, but
    not a NaN or an infinity, and what a case stores in its pads is nobody's business.
    """
    held = chunk_rows(rank, case.cp, case.query.shape[1])
    real = (case.q_segment[:, held] != PAD)[..., None, None]
    query, key, value = (np.where(real, x[:, held], np.float16(0)) for x in (case.query, case.key, case.value))
    return Shard(query, key, value, case.q_position[:, held], case.q_segment[:, held])


def chunk_rows(rank: int, cp: int, tokens: int) -> np.ndarray:
    """The global indices of a rank's tokens, `[t]`, in per-device order.

    >>> chunk_rows(0, 2, 8)
    array([0, 1, 6, 7])
    """
    chunk = tokens // (2 * cp)
    return np.concatenate([np.arange(c * chunk, (c + 1) * chunk) for c in held_chunks(rank, cp)])


def real_lengths(case: Case) -> tuple[int, ...]:
    """The number of tokens of each request, pads not counted."""
    return tuple(int(n) for n in (case.q_segment != PAD).sum(axis=1))


def check_computable(case: Case) -> None:
    """Refuse what this backend cannot compute, before any process is started.

    Raises:
      InputError: one line with the rule and the fix.
    """
    name, (_, tokens, heads, head_dim), value_dim = case.name, case.query.shape, case.value.shape[3]
    if (head_dim, value_dim) != (192, 128):
        raise InputError(
            f"{name}: head dims are {head_dim} (query, key) and {value_dim} (value); npu_ring_mla takes 192 and 128"
        )
    if heads > 128:
        raise InputError(f"{name}: {heads} query heads; npu_ring_mla takes at most 128 per device, split them over tp")
    if tokens != case.key.shape[1]:
        raise InputError(f"{name}: {tokens} queries but {case.key.shape[1]} keys; this backend needs equal numbers")
    if tokens % (2 * case.cp):
        raise InputError(
            f"{name}: {tokens} tokens are no multiple of 2·cp = {2 * case.cp}; "
            f"pad to {math.ceil(tokens / (2 * case.cp)) * 2 * case.cp} with tokens of segment -1"
        )
    if abs(case.scale) >= 65520:
        raise InputError(f"{name}: scale {case.scale:g} is not finite in FP16, where npu_ring_mla multiplies with it")
    wanted = case.precision.get("npu", PRECISION)
    if wanted != PRECISION:
        raise InputError(f"{name}: precision {str(wanted)[:40]!r} is wanted of backend npu; it has only {PRECISION}")
    _check_places(case)


def _check_places(case: Case) -> None:
    if not (np.array_equal(case.q_position, case.kv_position) and np.array_equal(case.q_segment, case.kv_segment)):
        raise InputError(f"{case.name}: queries and keys are at different places; this backend needs self-attention")
    index = np.arange(case.query.shape[1])
    for b, (position, segment) in enumerate(zip(case.q_position, case.q_segment, strict=True)):
        real = segment != PAD
        if (segment < PAD).any():
            raise InputError(f"{case.name}: segment {segment.min()} in batch row {b}; segments are -1 (pad) or more")
        if np.unique(segment[real]).size > 1:
            raise InputError(
                f"{case.name}: batch row {b} packs several requests; this version takes one request per batch row"
            )
        if not np.array_equal(real, index < real.sum()):
            raise InputError(f"{case.name}: pads of batch row {b} are not at the right end; move them there")
        if not np.array_equal(position[real], index[real]):
            raise InputError(f"{case.name}: positions of batch row {b} are not 0, 1, 2, …; renumber them")
