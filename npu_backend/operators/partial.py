"""Attention over some of the keys, as every wrapper takes and gives it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of the keys. `lse` is the natural logarithm of Σ exp(scaled score).

    A query that saw no key has (0, −inf); no lse is +inf or NaN.
    """

    out: Tensor  # [B, t, N, V], the dtype of the inputs
    lse: Tensor  # [B, t, N] float32


def nothing(query: Tensor, width: int) -> Partial:
    """The partial over no key of `query` `[B, t, N, H]`, for values of so many dims."""
    shape = query.shape[:3]
    return Partial(query.new_zeros(*shape, width), query.new_full(shape, -torch.inf, dtype=torch.float32))


def where(rows: Tensor, a: Partial, b: Partial) -> Partial:
    """`a` in these rows, a bool tensor that broadcasts to `[B, t, N]`, `b` in the others."""
    return Partial(torch.where(rows[..., None], a.out, b.out), torch.where(rows, a.lse, b.lse))
