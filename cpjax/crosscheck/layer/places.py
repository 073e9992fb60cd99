"""Where a stage is wrong: the tokens, heads, columns or experts whose numbers are, if they are not all."""

import numpy as np
from jaxtyping import Int

from cpjax.crosscheck.judging.statistic import LIMIT
from cpjax.crosscheck.layer.lattice import Measured, group_z
from cpjax.wording import counted

MOST_SHARE = 0.8
"""Share of all groups from which on a fault is everywhere."""

MOST_RANGES = 6
"""Ranges that a sentence lists."""


def places_of(measured: Measured, expert: Int[np.ndarray, "T k"] | None, axes: tuple[str, ...]) -> list[str]:
    """Words, each for one axis; none if it is everywhere.

    Args:
      expert: of a tensor whose second axis are the experts of a token.
      axes: names of the axes; of "slot" nothing is said.
    """
    shape = measured.moved.shape
    if expert is not None:
        of = np.broadcast_to(expert.reshape(*expert.shape, *(1,) * (len(shape) - 2)), shape)
        some, number = np.unique(expert, return_inverse=True)
        which = _wrong(measured, np.broadcast_to(number.reshape(of.shape[:2] + (1,) * (len(shape) - 2)), shape), some)
        if which is not None:
            return [words_of("expert", which)]
    found = []
    for axis, name in enumerate(axes):
        if name == "slot":
            continue
        index = np.arange(shape[axis]).reshape((-1,) + (1,) * (len(shape) - axis - 1))
        which = _wrong(measured, np.broadcast_to(index, shape), np.arange(shape[axis]))
        if which is not None:
            found.append(words_of(name, which))
    return found


def _wrong(measured: Measured, group: np.ndarray, names: np.ndarray) -> np.ndarray | None:
    """The groups that are wrong, by name; None: nearly all are, or none can be told."""
    count = len(names)
    outside = np.bincount(group.ravel(), measured.outside.ravel(), count)
    is_wrong = (group_z(measured, group, count) > LIMIT) | (outside > 0)
    share = is_wrong.mean()
    return names[is_wrong] if 0 < share < MOST_SHARE else None


def words_of(noun: str, which: np.ndarray) -> str:
    """A noun with numbers, runs as ranges.

    >>> words_of("token", np.array([1, 2, 3, 7]))
    'tokens 1–3, 7'
    """
    runs = np.split(which, np.flatnonzero(np.diff(which) != 1) + 1)
    texts = [f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    shown = ", ".join(texts[:MOST_RANGES])
    if len(runs) > MOST_RANGES:
        return f"{counted(len(which), noun)} ({shown}, …)"
    return f"{noun if len(which) == 1 else noun + 's'} {shown}"
