"""Cached prefixes: who holds which of their blocks, and how every rank gets all of them.

Blocks of 128 tokens are dealt out in turn: block b of a request is on rank b mod cp (MindIE-LLM's block manager, with
one SP rank a CP rank). Each rank loads its own blocks, pads them to the most that any rank has, and all gather them; an
index array brings the rows into natural order (`prefix_cache_preprocess`). A prefix is before every query of its
request, so it is attended whole, and last.
"""

import numpy as np
import torch
from torch import Tensor

from npu_backend.exchange import Held, Link

BLOCK = 128
"""Tokens of a block of the cache."""


def owned(prefix_lengths: tuple[int, ...], rank: int, cp: int) -> np.ndarray:
    """The places of a rank's tokens among all prefixes, one after the other.

    >>> owned((300, 5), 0, cp=2).size, owned((300, 5), 1, cp=2).size
    (177, 128)
    """
    starts = np.cumsum((0, *prefix_lengths))[:-1]
    # Not as in decode, where a prompt's last block is on the last rank: a cached prefix ends before its prompt does.
    mine = [np.flatnonzero(np.arange(n) // BLOCK % cp == rank) for n in prefix_lengths]
    return np.concatenate([start + places for start, places in zip(starts, mine, strict=True)])


def recovery(prefix_lengths: tuple[int, ...], cp: int) -> np.ndarray:
    """Into the padded tokens of all ranks, rank after rank: gives natural order."""
    of_rank = [owned(prefix_lengths, rank, cp) for rank in range(cp)]
    most = max(map(len, of_rank))
    index = np.empty(sum(prefix_lengths), np.int64)
    for rank, places in enumerate(of_rank):
        index[places] = rank * most + np.arange(len(places))
    return index


def gather_prefix(link: Link, mine: Held, prefix_lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The rows of all prefixes, `[1, ΣP, …]` each; every rank gives those of its `owned` tokens. Places travel along.

    Raises:
      LinkError: the transfer failed.
    """
    most = max(len(owned(prefix_lengths, rank, link.cp)) for rank in range(link.cp))
    padded = Held(tuple(_pad(x, 1, most) for x in mine.rows), _pad(mine.places, 2, most))
    parts = link.gather(padded) if link.cp > 1 else [padded]
    index = torch.from_numpy(recovery(prefix_lengths, link.cp)).to(mine.places.device)
    return tuple(torch.cat(x, dim=1).index_select(1, index) for x in zip(*(part.rows for part in parts), strict=True))


def _pad(x: Tensor, dim: int, length: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim=dim)
