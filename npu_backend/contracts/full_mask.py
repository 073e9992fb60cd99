"""Masks of every pair (sparse_mode 0 and 1): the shapes in which each operator takes them, brought to one.

    operator               B requests of m queries and n keys
    npu_fusion_attention   [m, n], [1 or B, 1 or N, m, n]; TND: [maxSq, maxSkv], of which each request reads its corner
    FIA                    [1 or B, m, n], [1 or B, 1, m, n]; [m, n] or, for single queries, [B, n]

FIA takes m and n rounded up to 16 or 32, and with pages any n that covers them. It takes two dims in BSH, BSND, BNSD
and BNSD_BSND, without rope and with equal head dims (aclnnFusedInferAttentionScoreV4, August 2026).
"""

from typing import NamedTuple

from torch import Tensor

from npu_backend.contracts.refuse import Refusal


class Pairs(NamedTuple):
    """What a mask has to cover: of B requests m queries and n keys, or the largest of each."""

    batch: int
    rows: int
    columns: int


def fusion_mask(refusal: Refusal, mask: Tensor, pairs: Pairs, heads: int, is_packed: bool) -> Tensor:
    """The mask of npu_fusion_attention as bool `[B, 1 or N, m, n]`.

    Raises:
      RuntimeError: another shape.
    """
    batch, *inner = pairs
    shape = list(mask.shape)
    fits = shape == inner
    if not is_packed and len(shape) == 4:
        fits = shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == inner
    others = "" if is_packed else f", or of these [1 or {batch}, 1 or {heads}, …]"
    refusal.parameter(fits, f"atten_mask is {tuple(shape)}, must be {tuple(inner)}{others}")
    masks = (mask != 0).reshape(-1, shape[1] if len(shape) == 4 else 1, *inner)
    return masks.expand(batch, -1, -1, -1)


def fused_infer_mask(
    refusal: Refusal, mask: Tensor, pairs: Pairs, paged_keys: int | None, takes_two_dims: bool
) -> Tensor:
    """FIA's mask as bool `[B, 1, m, n]`; `paged_keys` are those that the pages of a request hold, if there are pages.

    Raises:
      RuntimeError: another shape.
    """
    batch, rows, count = pairs
    shape = tuple(mask.shape)
    columns_fit = shape[-1] in _rounded(count) if paged_keys is None else shape[-1] >= paged_keys
    if takes_two_dims and rows == 1 and len(shape) == 2 and shape[0] == batch and columns_fit:
        return (mask != 0)[:, None, None]
    leads = [(1,), (batch,), (1, 1), (batch, 1), *([()] if takes_two_dims else [])]
    fits = len(shape) >= 2 and shape[:-2] in leads and shape[-2] in _rounded(rows) and columns_fit
    keys = f"{count}" if paged_keys is None else f"at least {paged_keys}, all that the pages hold"
    refusal.parameter(
        fits,
        f"atten_mask is {shape}, must be [1 or {batch}, 1, {rows}, keys], or without the 1"
        f"{', or [queries, keys]' if takes_two_dims else ''}; keys: {keys}",
    )
    return (mask != 0).reshape(-1, 1, *shape[-2:]).expand(batch, -1, -1, -1)


def _rounded(n: int) -> set[int]:
    return {n, -(-n // 16) * 16, -(-n // 32) * 32}
