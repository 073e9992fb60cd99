"""Zigzag: 2·cp chunks; rank r holds chunk r and chunk 2·cp − 1 − r (MindIE, Megatron, TransformerEngine).

Under a causal mask an early and a late chunk cost the same together on every rank.
"""

from dataclasses import dataclass
from typing import ClassVar

from cpjax.partition.sequence import SequencePartition


@dataclass(frozen=True)
class Zigzag(SequencePartition):
    """`2·cp` chunks, two a rank; with one rank the text is not cut, and is one chunk.

    >>> [Zigzag(3).held_chunks(rank) for rank in range(3)], Zigzag(1).held_chunks(0)
    ([(0, 5), (1, 4), (2, 3)], (0,))
    """

    name: ClassVar[str] = "zigzag"

    def held_chunks(self, rank: int) -> tuple[int, ...]:
        """An early chunk and a late one."""
        return (rank, 2 * self.cp - 1 - rank) if self.cp > 1 else (0,)
