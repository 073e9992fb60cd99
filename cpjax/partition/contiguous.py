"""Contiguous: rank r holds one run of T/cp tokens.

Under a causal mask the last rank has nearly twice the mean work.
"""

from dataclasses import dataclass
from typing import ClassVar

from cpjax.partition.sequence import SequencePartition


@dataclass(frozen=True)
class Contiguous(SequencePartition):
    """`cp` chunks, one a rank. `Contiguous(1)` is one device without context parallelism.

    >>> Contiguous(2).order(4).reshape(2, -1).tolist()
    [[0, 1], [2, 3]]
    """

    name: ClassVar[str] = "contiguous"

    def held_chunks(self, rank: int) -> tuple[int, ...]:
        """The chunk of the rank's own number."""
        return (rank,)
