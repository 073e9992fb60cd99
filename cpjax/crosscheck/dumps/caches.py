"""Caches that are cut over ranks, where every rank has all queries: keys and values of the ranks, joined."""

from typing import Any

import numpy as np

from cpjax.crosscheck.dumps.readers import Read
from cpjax.errors import InputError
from cpjax.partition import Partition, inverse
from cpjax.partition.cached import Cached
from cpjax.partition.sequence import SequencePartition

CUT = ("contiguous", "interleaved", "blocks")
"""How a cache may be cut, tried in this order."""

SHARED = ("query", "out", "lse")
"""What every rank has."""


def is_cut(tensors: dict[str, list[Read]]) -> bool:
    """Whether keys and values are folders of ranks, and what every rank has is one file."""
    shared = [one for name in SHARED for one in tensors.get(name, [])]
    caches = [one for name in ("key", "value") for one in tensors[name]]
    return all(one.by_rank for one in caches) and not any(one.by_rank for one in shared)


def shared_once(tensors: dict[str, list[Read]], partition: Partition | None) -> dict[str, list[Read]]:
    """The tensors, of copies that every rank has dumped one.

    Raises:
      InputError: a partition of a cache, and ranks whose queries or results are not the same.
    """
    if not isinstance(partition, Cached):
        return tensors
    found = dict(tensors)
    for name in SHARED:
        for one in tensors.get(name, []):
            if not all(np.array_equal(part, one.parts[0], equal_nan=True) for part in one.parts):
                raise InputError(
                    f"--{name}: ranks hold different arrays; with --partition {partition.name} the cache is cut, and "
                    "every rank has all queries and the same result: judge the result of each rank for itself"
                )
        found[name] = [one._replace(parts=one.parts[:1], by_rank=False) for one in tensors.get(name, [])]
    return {name: reads for name, reads in found.items() if reads}


def places_of(partition: Partition, sizes: list[int], segment: np.ndarray) -> np.ndarray:
    """The permutation from keys laid rank after rank to the text.

    Args:
      partition: who holds which keys.
      sizes: how many each rank holds.
      segment: the request of each key, `[S]`.

    Raises:
      InputError: ranks that hold other numbers of keys than the partition gives them.
    """
    length = len(segment)
    if isinstance(partition, SequencePartition):
        held = list(partition.order(length).reshape(partition.cp, -1))
    elif isinstance(partition, Cached):
        chunk = partition.kv_chunks(segment, segment)
        rank = np.array([partition.rank(int(c)) for c in chunk])
        held = [np.flatnonzero(rank == r) for r in range(partition.cp)]
    else:
        raise InputError(f"--partition {partition.name}: no cache is cut so; join the ranks and give whole files")
    wanted = [len(x) for x in held]
    if wanted != sizes:
        raise InputError(
            f"--key: ranks hold {', '.join(map(str, sizes))} tokens; {partition} gives them "
            f"{', '.join(map(str, wanted))} of {length}: say another --partition, as interleaved:8 or blocks:64"
        )
    return inverse(np.concatenate(held))


def in_one_row(where: dict[str, Any], batch: int, length: int, keys: int) -> dict[str, Any]:
    """Positions and segments of batch rows that become requests of one row, as a partition of a cache has them."""
    natural = (np.broadcast_to(np.arange(n), (batch, n)) for n in (length, keys))
    q, kv = (
        np.asarray(where.get(name, other)).reshape(1, -1)
        for name, other in zip(("q_positions", "kv_positions"), natural, strict=True)
    )
    segments = tuple(np.repeat(np.arange(batch), n)[None] for n in (length, keys))
    return {"q_positions": q, "kv_positions": kv, "segment_ids": segments}
