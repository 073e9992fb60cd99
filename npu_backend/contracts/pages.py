"""Caches in blocks, as several operators take them: how the tokens of a block lie, and which blocks a request has.

ND     [blocks, block, K·D] or [blocks, block, K, D]     tokens first
BNBD   [blocks, K, block, D]                             heads first
NZ     [blocks, K, D/16, block, 16]                      the head dim in slices of 16: 32 bytes of FP16 or BF16
"""

from torch import Tensor

SLICE = 16
"""Numbers of two bytes in a slice of NZ, which has 32 bytes."""


def from_nz(x: Tensor) -> Tensor:
    """Tokens first: `[blocks, D/16, block, 16]` as `[blocks, block, D]`, and with K after the blocks the same."""
    if x.dim() == 4:
        return x.transpose(1, 2).flatten(2)
    return x.permute(0, 3, 1, 2, 4).flatten(3)


def used_blocks(table: Tensor, lengths: list[int], block: int, skipped: list[int] | None = None) -> list[list[int]]:
    """Of each row of a block table the entries that a request of so many tokens uses, after those that are skipped."""
    rows = zip(table.tolist(), lengths, skipped or [0] * len(lengths), strict=True)
    return [row[first : first - (-length // block)] for row, length, first in rows]
