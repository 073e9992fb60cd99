"""What travels is stamped with the case, the rank that sends it and the step at which it is sent.

Places alone do not tell a block from that of another case of the same shape, or from one that was sent before. The
stamp goes before the places, in the same tensor, so that it costs no message of its own; who receives reads it first.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend.errors import RankError

WORDS = 4
"""Of a stamp, int32 each: two of the case, rank, step."""


class Stamp(NamedTuple):
    """Whose block it is."""

    case: tuple[int, int]  # of `case_words`
    rank: int
    step: int

    def before(self, places: Tensor) -> Tensor:
        """The stamp and then the places, flat."""
        words = torch.tensor([*self.case, self.rank, self.step], dtype=places.dtype, device=places.device)
        return torch.cat([words, places.flatten()])


def case_words(digest: str) -> tuple[int, int]:
    """56 bits of a case's digest (hex), 28 in each word: they fit an int32 whatever they are.

    >>> case_words("0000001" + "000000f" + "0" * 50)
    (1, 15)
    """
    return int(digest[:7], 16), int(digest[7:14], 16)


def check_stamp(stamped: Tensor, wanted: Stamp, step: int) -> None:
    """Compare the stamp of what arrived at `step` with the one that it must have.

    Raises:
      RankError: it is of another case, rank or step; the message names the rank that was to send, and the step.
    """
    high, low, rank, sent = stamped[:WORDS].tolist()
    if (high, low) != wanted.case:
        theirs, ours = (f"{a:07x}{b:07x}" for a, b in ((high, low), wanted.case))
        raise RankError(
            f"step {step}: a wrong block; rank {wanted.rank} sent one of another case (digest {theirs}…, not {ours}…)"
        )
    if (rank, sent) != (wanted.rank, wanted.step):
        raise RankError(
            f"step {step}: a wrong block; rank {wanted.rank} was to send that of step {wanted.step}, but it is stamped "
            f"by rank {rank} at step {sent}"
        )
