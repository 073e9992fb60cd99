"""Right results in the wrong place, or nowhere: rows never written, requests, heads, ranks or axes exchanged."""

import numpy as np

from cpjax.trial.fault_case import Case, Made, Name, named, requests_of
from cpjax.trial.problem import Result
from cpjax.trial.settings import REQUESTS, TOKENS


def _last_of_requests(case: Case, count: int) -> np.ndarray:
    """`[B, T]`: the last queries of each request."""
    batch, length = case.problem.query.shape[:2]
    rows = np.zeros((batch, length), bool)
    for b, numbers in enumerate(requests_of(case)):
        for number in np.unique(numbers[numbers >= 0]):
            rows[b, np.flatnonzero(numbers == number)[-count:]] = True
    return rows


def unwritten(case: Case, fill: float) -> Made:
    """The last 3 rows of each request were never written."""
    rows = _last_of_requests(case, 3)
    out, lse = (x.copy() for x in case.right)
    out[rows], lse[rows] = fill, 0
    what = "zero" if fill == 0 else f"{fill:g} in every column"
    return Made(Result(out, lse), named(f"{what}, as if never written: .*the last 3 of"))


def all_zero(case: Case) -> Made:
    """Nothing was written."""
    return Made(
        Result(np.zeros_like(case.right.out), np.zeros_like(case.right.lse)),
        named("as if never written: .*all of"),
    )


def out_times(case: Case, factor: float) -> Made:
    """A factor on out that was forgotten, or should not be there."""
    out = (case.right.out * factor).astype(case.right.out.dtype)
    told = Name(r"out is (\S+) times what it should be, and nothing else is wrong", factor)
    return Made(Result(out, case.right.lse), (told,))


def batch_exchanged(case: Case) -> Made | None:
    """The first two batch rows have each other's results."""
    if case.setting.batch < 2:
        return None
    rows = np.arange(case.setting.batch)
    rows[:2] = 1, 0
    return Made(
        Result(*(x[rows] for x in case.right)), named("Batch rows are exchanged: row 0 has the outputs of row 1")
    )


def requests_exchanged(case: Case) -> Made | None:
    """Two requests of a packed row have each other's results."""
    if case.setting.layout != "packed":
        return None
    first = TOKENS - sum(REQUESTS)
    rows = np.arange(TOKENS)
    rows[first : first + 80] = np.roll(rows[first : first + 80], 40)
    return Made(Result(*(x[:, rows] for x in case.right)), named("Requests are exchanged"))


def heads_exchanged(case: Case) -> Made | None:
    """The first two heads have each other's results."""
    if case.setting.one_head:
        return None
    heads = np.arange(case.setting.heads)
    heads[:2] = 1, 0
    return Made(
        Result(*(x[:, :, heads] for x in case.right)), named("Heads are exchanged: head 0 has the outputs of head 1")
    )


def ranks_exchanged(case: Case) -> Made | None:
    """Ranks 0 and 1 hand over each other's rows."""
    if case.setting.cp == 1:
        return None
    count = 2 * case.setting.cp
    rows = np.arange(TOKENS).reshape(count, -1)
    rows[[0, 1, count - 1, count - 2]] = rows[[1, 0, count - 2, count - 1]]
    return Made(
        Result(*(x[:, rows.ravel()] for x in case.right)),
        named(r"Ranks or chunks are exchanged: query chunk 0 \(rank 0\) has the outputs of chunk 1"),
    )


def axes_exchanged(case: Case) -> Made | None:
    """`out` lies in memory as [B, N, T, V]."""
    if case.setting.one_head:
        return None
    out = np.ascontiguousarray(case.right.out.swapaxes(1, 2)).reshape(case.right.out.shape)
    return Made(case.right._replace(out=out), named(r"out lies in memory as \[batch, heads, tokens, dim\]"))
