"""How it is said where chunks are: their ranks and requests."""

import numpy as np
from jaxtyping import Int

from cpjax.crosscheck.judging.problem import Problem


def ranks(problem: Problem, q_chunks: Int[np.ndarray, " n"]) -> str:
    """The ranks that have the queries of these chunks."""
    found = [rank for c in q_chunks if c >= 0 for rank in problem.partition.q_ranks(int(c))]
    return numbers(np.array(found, int))


def holders(problem: Problem, chunks: tuple[int, ...]) -> str:
    """Whose key/value chunks these are, as "of rank 1" or "of rank 0 and of rank 2, request 1"."""
    held = dict.fromkeys(problem.partition.rank(c) for c in chunks)
    said = " and ".join("a prefix" if rank is None else f"of rank {rank}" for rank in held).replace(
        "and of rank", "and"
    )
    requests = [r for r in dict.fromkeys(problem.partition.request(c) for c in chunks) if r is not None]
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
