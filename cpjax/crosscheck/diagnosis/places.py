"""Where a chunk is: its rank, the ring step at which it is met, and how that is said; for every layout of a case."""

import numpy as np
from jaxtyping import Int

from cpjax.crosscheck.judging.problem import Problem


def rank_of(problem: Problem, chunk: int) -> int | None:
    """The rank that holds a key/value chunk; None for a cached prefix, which every rank reads."""
    cp, last = problem.cp, 2 * problem.cp - 1
    if problem.layout == "packed":  # each request has 2·cp chunks, and its prefix
        place = chunk % (2 * cp + 1)
        return None if place > last else min(place, last - place)
    if problem.layout == "decode":
        return chunk % cp
    return min(chunk, last - chunk) if problem.layout == "zigzag" else chunk


def request_of(problem: Problem, chunk: int) -> int | None:
    """The request that a key/value chunk belongs to, where chunks are those of requests."""
    each = {"packed": 2 * problem.cp + 1, "decode": problem.cp}.get(problem.layout)
    return None if each is None else chunk // each


def step_of(problem: Problem, q_chunk: int, kv_chunk: int) -> int | None:
    """The ring step at which the rank of the query chunk meets a chunk; None where the order has no steps."""
    source, rank = rank_of(problem, kv_chunk), rank_of(problem, q_chunk)
    if source is None or rank is None or problem.layout == "decode":
        return None
    if problem.order == "ring":
        return (rank - source) % problem.cp
    return source if problem.order == "gather" else None


def ranks(problem: Problem, q_chunks: Int[np.ndarray, " n"]) -> str:
    """The ranks of these query chunks. In decode all ranks have all queries."""
    if problem.layout == "decode":
        return numbers(np.arange(problem.cp))
    return numbers(np.array([rank for c in q_chunks if c >= 0 and (rank := rank_of(problem, int(c))) is not None], int))


def holders(problem: Problem, chunks: tuple[int, ...]) -> str:
    """Whose key/value chunks these are, as "of rank 1" or "of rank 0 and of rank 2, request 1"."""
    held = dict.fromkeys(rank_of(problem, c) for c in chunks)
    said = " and ".join("a prefix" if rank is None else f"of rank {rank}" for rank in held).replace(
        "and of rank", "and"
    )
    requests = [r for r in dict.fromkeys(request_of(problem, c) for c in chunks) if r is not None]
    return said + f", request {' and '.join(map(str, requests))}" * bool(requests)


def numbers(x: Int[np.ndarray, " n"]) -> str:
    """Whole numbers as a person writes them.

    >>> numbers(np.array([0, 1, 2, 5]))
    '0–2, 5'
    """
    x = np.unique(x)
    if len(x) == 0:
        return "none"
    runs = np.split(x, np.flatnonzero(np.diff(x) != 1) + 1)
    return ", ".join(
        f"{run[0]}" if len(run) == 1 else f"{run[0]}{'–' if len(run) > 2 else ', '}{run[-1]}" for run in runs
    )
