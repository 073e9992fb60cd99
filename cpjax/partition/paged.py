"""Cases of layout "decode": new tokens of several requests over a KV cache that is cut by tokens (docs/formats.md).

The piece of a request that one rank's cache holds is a chunk, numbered request · cp + rank. A query's chunk is its
request.
"""

import numpy as np
from jaxtyping import Int

from cpjax.errors import InputError
from cpjax.partition.kv_cache import BLOCK, block_ranks


def check_decode(q_segment: Int[np.ndarray, "B T"], kv_segment: Int[np.ndarray, "B S"]) -> None:
    """One row; requests 0, 1, … one after the other, each with queries and keys; no pads.

    >>> check_decode(np.array([[0, 1]]), np.array([[0, 0]]))
    Traceback (most recent call last):
    cpjax.errors.InputError: every request of layout 'decode' has queries and keys

    Raises:
      InputError: it is not so.
    """
    for name, segment in (("queries", q_segment), ("keys", kv_segment)):
        if segment.shape[0] != 1 or segment[0, 0] != 0 or not np.isin(np.diff(segment[0]), (0, 1)).all():
            raise InputError(f"the {name} of layout 'decode' are one row of requests 0, 1, … in order, without pads")
    if q_segment[0, -1] != kv_segment[0, -1]:
        raise InputError("every request of layout 'decode' has queries and keys")


def chunks(kv_segment: Int[np.ndarray, " S"], cp: int) -> Int[np.ndarray, " S"]:
    """The chunk of every key of the row.

    >>> np.unique(chunks(np.zeros(300, int), cp=2), return_counts=True)[1]
    array([128, 172])
    """
    found = []
    for request, length in enumerate(np.bincount(kv_segment)):
        owners = np.repeat(block_ranks(int(length), cp), BLOCK)[:length]
        found.append(request * cp + owners)
    return np.concatenate(found)


def merging(requests: int, cp: int) -> Int[np.ndarray, "Q C"]:
    """For each request its own chunks in the order of the ranks, then those it cannot see.

    >>> merging(requests=2, cp=2)
    array([[0, 1, 2, 3],
           [2, 3, 0, 1]])
    """
    every = np.arange(requests * cp).reshape(requests, cp)
    return np.array([np.concatenate([every[i], np.delete(every, i, axis=0).ravel()]) for i in range(requests)])
