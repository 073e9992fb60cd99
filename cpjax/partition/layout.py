"""Who holds which tokens: a permutation of the sequence, cut into `cp` equal shards. Integers only.

    contiguous   rank r holds one run of T/cp tokens. Under a causal mask the last rank has nearly twice the mean work.
    zigzag       2·cp chunks; rank r holds chunk r and chunk 2·cp − 1 − r (MindIE, Megatron). Every rank works alike.
    striped      rank r holds tokens r, r + cp, r + 2·cp, … (arXiv 2311.09431).

A layout never enters the algorithm: positions travel with the tokens, and positions decide the mask.
"""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError

Layout = Literal["contiguous", "zigzag", "striped"]
LAYOUTS: tuple[str, ...] = get_args(Layout)


def order(layout: str, length: int, cp: int) -> Int[np.ndarray, " T"]:
    """The global index of the token at each place of the ranks' shards, laid one after the other.

    >>> order("zigzag", 8, cp=2)
    array([0, 1, 6, 7, 2, 3, 4, 5])

    Raises:
      InputError: unknown layout, cp < 1, or a length that the layout cannot cut into equal parts.
    """
    if cp < 1:
        raise InputError(f"cp is {cp}; it is a number of ranks, at least 1")
    parts = cp * chunks_per_rank(layout)
    if length % parts:
        raise InputError(
            f"{length} tokens cannot be cut into {parts} equal parts (layout {layout!r}, cp {cp}); "
            f"pad to {-(-length // parts) * parts} with pad tokens (segment -1)"
        )
    tokens = np.arange(length)
    if layout == "striped":
        return tokens.reshape(-1, cp).T.ravel()
    chunks = tokens.reshape(parts, -1)
    return np.concatenate([chunks[chunk] for rank in range(cp) for chunk in held_chunks(layout, rank, cp)])


def inverse(permutation: Int[np.ndarray, " T"]) -> Int[np.ndarray, " T"]:
    """The permutation that undoes it.

    >>> zigzag = order("zigzag", 8, cp=2)
    >>> zigzag[inverse(zigzag)]
    array([0, 1, 2, 3, 4, 5, 6, 7])
    """
    return np.argsort(permutation, kind="stable")


def chunks_per_rank(layout: str) -> int:
    """Pieces of a shard that are runs of the sequence of their own, and are computed and merged one after the other.

    >>> chunks_per_rank("zigzag"), chunks_per_rank("striped")
    (2, 1)

    Raises:
      InputError: for an unknown layout; it lists the known ones.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
    return 2 if layout == "zigzag" else 1


def held_chunks(layout: str, rank: int, cp: int) -> tuple[int, ...]:
    """The chunks that a rank holds, in the order in which it holds them.

    >>> [held_chunks("zigzag", rank, cp=3) for rank in range(3)]
    [(0, 5), (1, 4), (2, 3)]
    """
    return (rank, 2 * cp - 1 - rank) if layout == "zigzag" else (rank,)
