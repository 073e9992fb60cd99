"""Pages: a page table says which rank's cache holds each page of each request."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError
from cpjax.partition.cached import Cached
from cpjax.wording import counted


@dataclass(frozen=True)
class Pages(Cached):
    """Page p of request i is in the cache of rank `ranks[i][p]`; a page is `page` tokens, the last may have fewer.

    >>> Pages(2, page=2, ranks=((1, 0), (0,))).owners(0, 3)
    array([1, 1, 0])

    Raises:
      InputError: a page without tokens, a rank that there is not, a request with fewer pages than its tokens need.
    """

    page: int = 1
    ranks: tuple[tuple[int, ...], ...] = ()
    name: ClassVar[str] = "pages"

    def __post_init__(self):
        """Refuse what is no page table."""
        super().__post_init__()
        if self.page < 1:
            raise InputError(f"page is {self.page}; it is the number of tokens of a page, at least 1")
        wrong = [rank for row in self.ranks for rank in row if not 0 <= rank < self.cp]
        if wrong:
            raise InputError(f"the page table names rank {wrong[0]}; ranks are 0 to {self.cp - 1}")

    def check(self, q_segment: Int[np.ndarray, "B T"], kv_segment: Int[np.ndarray, "B S"]) -> None:
        """As every partition of a decode, and the table has a rank for each page.

        >>> Pages(2, page=2, ranks=((1, 0),)).check(np.zeros((1, 1), int), np.zeros((1, 3), int))

        Raises:
          InputError: also for a request with more pages than its row of the table.
        """
        super().check(q_segment, kv_segment)
        for request, length in enumerate(np.bincount(kv_segment[0])):
            self.owners(request, int(length))

    def owners(self, request: int, length: int) -> Int[np.ndarray, " S"]:
        """As the table says."""
        needed = -(-length // self.page)
        if request >= len(self.ranks) or len(self.ranks[request]) < needed:
            raise InputError(
                f"request {request} has {counted(length, 'token')}, {counted(needed, 'page')} of {self.page}, "
                "but the page table has "
                f"{len(self.ranks[request]) if request < len(self.ranks) else 0}; add a rank for every page"
            )
        return np.repeat(np.array(self.ranks[request], int), self.page)[:length]
