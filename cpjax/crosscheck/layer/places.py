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


def places_of(
    measured: Measured, expert: Int[np.ndarray, "T k"] | None, axes: tuple[str, ...], total_z: float
) -> list[str]:
    """Words, each for one axis, that of the smallest share first; none if it is everywhere.

    If the whole tensor is systematically off, a few numbers out of their bounds say nothing of its place: then a place
    must be systematically off itself.

    Args:
      expert: of a tensor whose second axis are the experts of a token.
      axes: names of the axes; of "slot" nothing is said.
    """
    shape = measured.moved.shape
    found: dict[str, tuple[float, str]] = {}

    def look(name: str, group: np.ndarray, names: np.ndarray) -> None:
        which = _wrong(measured, np.broadcast_to(group, shape), names, is_general=total_z > LIMIT)
        if which is not None:
            found[name] = (len(which) / len(names), words_of(name, which))

    for axis, name in enumerate(axes):
        if name != "slot":
            index = np.arange(shape[axis]).reshape((-1,) + (1,) * (len(shape) - axis - 1))
            look(name, index, np.arange(shape[axis]))
    if expert is not None:
        some, number = np.unique(expert, return_inverse=True)
        look("expert", number.reshape(expert.shape + (1,) * (len(shape) - 2)), some)
        # A wrong expert shows in its tokens, and a wrong token in its experts: the smaller share is the fault.
        if "expert" in found and found["expert"][0] == min(found.values())[0]:
            return [found["expert"][1]]
        found.pop("expert", None)
    return [words for _, words in sorted(found.values())]


def _wrong(measured: Measured, group: np.ndarray, names: np.ndarray, *, is_general: bool) -> np.ndarray | None:
    """The groups that are wrong, by name; None: nearly all are, or none can be told."""
    count = len(names)
    outside = np.bincount(group.ravel(), measured.outside.ravel(), count)
    is_wrong = group_z(measured, group, count) > LIMIT
    if not is_general:
        is_wrong = is_wrong | (outside > 0)
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
