"""Where a chunk is: its rank, the ring step at which it is met, and how that is said; for every layout of a case."""

import numpy as np
from jaxtyping import Int

from cpjax.crosscheck.judging.problem import Question


def rank_of(question: Question, chunk: int) -> int | None:
    """The rank that holds a key/value chunk; None for a cached prefix, which every rank reads."""
    cp, last = question.cp, 2 * question.cp - 1
    if question.layout == "packed":  # each request has 2·cp chunks, and its prefix
        place = chunk % (2 * cp + 1)
        return None if place > last else min(place, last - place)
    if question.layout == "decode":
        return chunk % cp
    return min(chunk, last - chunk) if question.layout == "zigzag" else chunk


def request_of(question: Question, chunk: int) -> int | None:
    """The request that a key/value chunk belongs to, where chunks are those of requests."""
    each = {"packed": 2 * question.cp + 1, "decode": question.cp}.get(question.layout)
    return None if each is None else chunk // each


def step_of(question: Question, q_chunk: int, kv_chunk: int) -> int | None:
    """The ring step at which the rank of the query chunk meets a chunk; None where the order has no steps."""
    source, rank = rank_of(question, kv_chunk), rank_of(question, q_chunk)
    if source is None or rank is None or question.layout == "decode":
        return None
    if question.order == "ring":
        return (rank - source) % question.cp
    return source if question.order == "gather" else None


def ranks(question: Question, q_chunks: Int[np.ndarray, " n"]) -> str:
    """The ranks of these query chunks. In decode all ranks have all queries."""
    if question.layout == "decode":
        return numbers(np.arange(question.cp))
    return numbers(
        np.array([rank for c in q_chunks if c >= 0 and (rank := rank_of(question, int(c))) is not None], int)
    )


def holders(question: Question, chunks: tuple[int, ...]) -> str:
    """Whose key/value chunks these are, as "of rank 1" or "of rank 0 and of rank 2, request 1"."""
    held = dict.fromkeys(rank_of(question, c) for c in chunks)
    said = " and ".join("a prefix" if rank is None else f"of rank {rank}" for rank in held).replace(
        "and of rank", "and"
    )
    requests = [r for r in dict.fromkeys(request_of(question, c) for c in chunks) if r is not None]
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
