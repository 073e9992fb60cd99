"""In which order one query's partial results are merged. With FP16 carried between merges it decides the bits.

A chunk is what is computed and merged as one piece: a run of the sequence for zigzag (2·cp of them) and contiguous
(cp), every cp-th token for striped.
"""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from cpjax.partition.layout import chunks_per_rank, held_chunks

Order = Literal["ascending", "ring", "gather", "unknown"]
ORDERS: tuple[str, ...] = get_args(Order)


def chunk_count(layout: str, cp: int) -> int:
    """Pieces of the keys that are computed and merged on their own.

    >>> chunk_count("zigzag", cp=2), chunk_count("striped", cp=2)
    (4, 2)
    """
    return cp * chunks_per_rank(layout)


def chunk_of(length: int, layout: str, cp: int) -> Int[np.ndarray, " T"]:
    """The chunk of every token; where the length does not divide, the last chunks are shorter or missing.

    >>> chunk_of(5, "zigzag", cp=2)
    array([0, 0, 1, 1, 2])
    """
    if layout == "striped":
        return np.arange(length) % cp
    return np.arange(length) // max(1, -(-length // chunk_count(layout, cp)))


def merge_orders(order: str, layout: str, cp: int) -> Int[np.ndarray, "Q C"]:
    """For each query chunk, the key/value chunks in the order in which its results are merged (visible or not).

    >>> merge_orders("ring", "zigzag", cp=2)
    array([[0, 3, 1, 2],
           [1, 2, 0, 3],
           [1, 2, 0, 3],
           [0, 3, 1, 2]])

    Raises:
      ValueError: for an unknown order; it lists the known ones.
    """
    if order not in ORDERS:
        raise ValueError(f"unknown merge order {order!r}; known are {', '.join(ORDERS)}")
    chunks = chunk_count(layout, cp)
    orders = np.empty((chunks, chunks), int)
    for rank in range(cp):
        sources = [(rank - step) % cp for step in range(cp)] if order == "ring" else list(range(cp))
        met = [chunk for source in sources for chunk in held_chunks(layout, source, cp)]
        for query_chunk in held_chunks(layout, rank, cp):
            orders[query_chunk] = met if order in ("ring", "gather") else np.arange(chunks)
    return orders
