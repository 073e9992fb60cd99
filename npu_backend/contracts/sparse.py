"""sparse_mode and atten_mask, which FIA and npu_fusion_attention share: which keys a query may see.

    mode   atten_mask (1 = hidden)       query i of m sees key j of n
    0      none                          all
    0      [m, n]                        what the mask shows, in the band i − pre ≤ j ≤ i + next
    1      [m, n]                        what the mask shows
    2      2048x2048 triangle            j ≤ i                     (top-left)
    3      2048x2048 triangle            j ≤ i + n − m             (bottom-right)
    4      2048x2048 triangle            i + n − m − pre ≤ j ≤ i + n − m + next

Which shapes a mask of modes 0 and 1 may have is a matter of the operator (full_mask.py). Modes 2 to 4 read the triangle
as a pattern of any length. What it must hold (ones above the diagonal, as the vendor's examples have it; the prose of
its documents says "lower triangular") is checked here, and is not by the vendor.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend.contracts.refuse import Refusal

TRIANGLE = 2048
FAR = 2147483647


class Visible(NamedTuple):
    """Which keys a query may see: i + lower ≤ j ≤ i + upper, and not hidden[i, j]. None: no limit."""

    lower: int | None = None
    upper: int | None = None
    hidden: Tensor | None = None  # bool [m, n], or [N, m, n] if the heads have masks of their own

    def columns(self, rows: slice, count: int) -> tuple[int, int]:
        """The key columns, half-open, outside of which the band shows these rows nothing."""
        first = 0 if self.lower is None else min(max(rows.start + self.lower, 0), count)
        last = count if self.upper is None else min(max(rows.stop + self.upper, 0), count)
        return first, max(first, last)

    def hides(self, rows: slice, columns: slice) -> Tensor | None:
        """bool `[rows, columns]`, perhaps per head, True where a key may not be seen; None if all may."""
        hidden = None if self.hidden is None else self.hidden[..., rows, columns]
        over = torch.arange(columns.start, columns.stop)[None] - torch.arange(rows.start, rows.stop)[:, None]
        if self.upper is not None and columns.stop - 1 > rows.start + self.upper:
            hidden = (over > self.upper) if hidden is None else hidden | (over > self.upper)
        if self.lower is not None and columns.start < rows.stop - 1 + self.lower:
            hidden = (over < self.lower) if hidden is None else hidden | (over < self.lower)
        return hidden

    def blind(self, rows: int, count: int) -> Tensor:
        """bool `[rows]`: the rows to which the band, whatever the mask, shows none of `count` keys."""
        i = torch.arange(rows)
        first = torch.zeros_like(i) if self.lower is None else (i + self.lower).clamp(min=0)
        last = torch.full_like(i, count - 1) if self.upper is None else (i + self.upper).clamp(max=count - 1)
        return first > last


class Sparse(NamedTuple):
    """The mask arguments of a checked call."""

    mode: int
    mask: Tensor | None  # modes 0 and 1: bool [B, 1 or N, m, n]
    before: int
    after: int

    def visible(self, request: int, rows: int, count: int) -> Visible:
        """For one request of so many queries and keys."""
        if self.mode == 0 and self.mask is None:
            return Visible()
        if self.mode in (0, 1):
            assert self.mask is not None
            hidden = self.mask[request, :, :rows, :count]
            hidden = hidden[0] if hidden.shape[0] == 1 else hidden
            if self.mode == 1:
                return Visible(hidden=hidden)
            return Visible(_limit(-self.before), _limit(self.after), hidden)
        if self.mode == 2:
            return Visible(upper=0)
        end = count - rows
        if self.mode == 3:
            return Visible(upper=end)
        return Visible(_limit(end - self.before), _limit(end + self.after))


def _limit(offset: int) -> int | None:
    """An offset that reaches over every sequence is no limit."""
    return None if abs(offset) >= FAR // 2 else offset


def check_sparse(
    refusal: Refusal, mode: int, mask: Tensor | None, before: int, after: int, full: Callable[[Tensor], Tensor]
) -> Sparse:
    """The mask arguments, checked; `full` gives a mask of modes 0 and 1 as bool `[B, 1 or N, m, n]`, or refuses it.

    Raises:
      RuntimeError: what the operator refuses.
    """
    if mode == 0 and mask is None:
        return Sparse(0, None, before, after)
    if mask is None:
        raise RuntimeError(f"{refusal.operator}: 161002 (bad parameter): sparse_mode {mode} needs atten_mask")
    refusal.parameter(
        mask.dtype in (torch.bool, torch.int8, torch.uint8), f"atten_mask is {mask.dtype}, must be bool, int8 or uint8"
    )
    if mode in (0, 1):
        return Sparse(mode, full(mask), before, after)
    refusal.parameter(
        tuple(mask.shape[-2:]) == (TRIANGLE, TRIANGLE) and mask.numel() == TRIANGLE**2,
        f"atten_mask is {tuple(mask.shape)}, sparse_mode {mode} needs ({TRIANGLE}, {TRIANGLE})",
    )
    refusal.require(
        torch.equal(mask.reshape(TRIANGLE, TRIANGLE) != 0, _triangle()),
        f"atten_mask of sparse_mode {mode} must hold ones above the diagonal and zeros elsewhere (unsafe)",
    )
    return Sparse(mode, None, before, after)


@functools.cache
def _triangle() -> Tensor:
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool).triu(1)
