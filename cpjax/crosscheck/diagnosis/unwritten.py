"""Rows that nobody wrote: zeros, or one number in every column, where the correct output is something else."""

import numpy as np
from jaxtyping import Bool

from cpjax.crosscheck.diagnosis.dictionary import Fault
from cpjax.crosscheck.diagnosis.places import numbers
from cpjax.crosscheck.diagnosis.predict import exact_model
from cpjax.crosscheck.diagnosis.sample import out_suspects, sample_of
from cpjax.crosscheck.judging.evidence import RowTable
from cpjax.crosscheck.judging.problem import Problem
from cpjax.wording import counted, is_are

LEAST_COLUMNS = 2
"""Columns from which on equal numbers in all of them tell something."""


SAW_NOTHING = "as if never written, or as if they saw no key"


def unwritten_rows(table: RowTable, out: np.ndarray) -> Bool[np.ndarray, " R"]:
    """Rows whose `out` is wrong and the same finite number in every column. A wrong lse alone makes none of them."""
    rows = out[table.batch, table.position, table.head]
    same = np.isfinite(rows[:, 0]) & (rows == rows[:, :1]).all(axis=1)
    return out_suspects(table) & same & ((rows[:, 0] == 0) | (rows.shape[1] >= LEAST_COLUMNS))


def sees_nothing(
    fault: Fault, problem: Problem, table: RowTable, rows: Bool[np.ndarray, " R"], out: np.ndarray
) -> bool:
    """Whether under this fault none of these rows sees a key, so that zeros are what it gives."""
    if fault.limits:
        return all(_is_below(fault, problem, int(table.batch[i]), int(table.position[i])) for i in np.flatnonzero(rows))
    groups = np.stack([table.batch, table.head // problem.group, problem.q_chunk[table.position]], axis=1)
    for group in np.unique(groups[rows], axis=0):
        some = np.flatnonzero(rows & (groups == group).all(axis=1))
        if not np.isneginf(exact_model(sample_of(problem, table, some, out), problem, fault).rows.lse).all():
            return False
    return True


def _is_below(fault: Fault, problem: Problem, batch: int, at: int) -> bool:
    """Whether a row comes before as many keys as a row of its request lacks."""
    position, segment = (np.asarray(x)[batch] for x in problem.q_tokens)
    kv_position = np.asarray(problem.kv_tokens.position)[batch][
        np.asarray(problem.kv_tokens.segment)[batch] == segment[at]
    ]
    lacks = [
        int(position[place]) + 1 - limit
        for (b, place), limit in fault.limits
        if b == batch and segment[place] == segment[at]
    ]
    return bool(lacks) and int(position[at]) - int(kv_position.min()) < max(lacks)


def said(
    problem: Problem, table: RowTable, out: np.ndarray, rows: Bool[np.ndarray, " R"], *, saw_nothing: bool
) -> list[str]:
    """A sentence for each number that stands in such rows: how many, and where.

    Args:
      saw_nothing: rows of zeros may be rows that saw no key.
    """
    first = out[table.batch, table.position, table.head][:, 0].astype(np.float64)
    sentences = []
    for number in np.unique(first[rows])[:LEAST_COLUMNS]:
        here = rows & (first == number)
        batch, position, head = (x[here] for x in (table.batch, table.position, table.head))
        what = "zero" if number == 0 else f"{number:g} in every column"
        why = SAW_NOTHING if number == 0 and saw_nothing else "as if never written"
        where = [f"position{'s' * (len(np.unique(position)) > 1)} {numbers(position)}"]
        if len(np.unique(head)) < problem.query.shape[2]:
            where.append(f"head{'s' * (len(np.unique(head)) > 1)} {numbers(head)}")
        if problem.query.shape[0] > 1:
            where.append(f"batch {numbers(batch)}")
        count = int(here.sum())
        sentences.append(
            f"{counted(count, 'row')} of out {is_are(count)} {what}, {why}: {', '.join(where)}"
            f"{_of_requests(problem, batch, position)}."
        )
    return sentences


def _of_requests(problem: Problem, batch: np.ndarray, position: np.ndarray) -> str:
    """Whether these are the first or the last tokens of their requests, or all of them."""
    segment = np.asarray(problem.q_tokens.segment)
    parts = []
    for b in np.unique(batch):
        for request in np.unique(segment[b, position[batch == b]]):
            own = np.flatnonzero(segment[b] == request)
            mine = np.unique(position[(batch == b) & (segment[b, position] == request)])
            name = f"request {request}" if len(np.unique(segment[segment >= 0])) > 1 else "the text"
            if len(mine) == len(own):
                parts.append(f"all of {name}")
            elif np.array_equal(mine, own[-len(mine) :]):
                parts.append(f"the last {_few(mine)} of {name}")
            elif np.array_equal(mine, own[: len(mine)]):
                parts.append(f"the first {_few(mine)} of {name}")
    return f" ({', '.join(dict.fromkeys(parts))})" if parts else ""


def _few(tokens: np.ndarray) -> str:
    return "token" if len(tokens) == 1 else str(len(tokens))
