"""Gradients dumped beside a forward pass: judged as the problem that the forward pass was read as."""

from itertools import product
from pathlib import Path

import numpy as np

from cpjax.crosscheck.dumps.judge_dump import Said
from cpjax.crosscheck.dumps.layouts import AXES, natural, natural_out
from cpjax.crosscheck.dumps.readers import FLOATS, read
from cpjax.crosscheck.gradients.asked import DS, OVER_RANKS
from cpjax.crosscheck.gradients.judge import judge_gradients_of
from cpjax.crosscheck.gradients.verdict import GradientVerdict
from cpjax.errors import InputError

NAMES = ("dout", "dq", "dk", "dv")


def check_given(files: dict[str, Path | None]) -> bool:
    """Whether there are gradients: all four or none.

    >>> check_given({"dout": None, "dq": None, "dk": None, "dv": None})
    False

    Raises:
      InputError: some are missing.
    """
    missing = [f"--{name}" for name in NAMES if files[name] is None]
    if missing and len(missing) < len(NAMES):
        raise InputError(f"{', '.join(missing)} missing: gradients are judged by dout, dq, dk and dv together")
    return not missing


def judge_dumped_gradients(
    said: Said,
    files: dict[str, Path | None],
    ds: str | None = None,
    rounded_every: int | None = None,
    over_ranks: str | None = None,
) -> tuple[GradientVerdict, list[str]]:
    """The verdict on dq, dk and dv of `.npy`, `.pt` and other files, in the layout that was found for the forward pass.

    out and lse are those of the forward pass's dump. The files and their SHA-256 are added to `said.about`.

    Args:
      ds, rounded_every: as of `judge_gradients`. ds None: `plain`, or else the first of the others that passes.
        rounded_every None: dk and dv are rounded once, or, if heads share keys and that does not pass, once a head.
      over_ranks: as of `judge_gradients`. None: no part is rounded, or, if there are several ranks and that does not
        pass, the parts of chunks are.

    Returns:
      The verdict, and what was taken, in sentences.

    Raises:
      InputError: folders of ranks, which must be joined first; files that cannot be read or do not fit.
    """
    arrays: list[np.ndarray] = []
    for name in NAMES:
        path = files[name]
        assert path is not None
        found = read(path, name, FLOATS)
        if found.by_rank or said.about.get("joined"):
            raise InputError(f"--{name} {path}: gradients of folders of ranks are not joined; give whole tensors")
        layout, shape = said.about["layout"], (*said.problem.query.shape[:3], said.problem.value.shape[3])
        lying = natural_out(found.parts[0], layout, shape) if name == "dout" else None
        said.about["files"] |= found.files
        if lying is not None:
            arrays.append(lying[0])
            continue
        axes = AXES[layout]
        if found.parts[0].ndim != axes:
            raise InputError(
                f"--{name} {path}: has shape {list(found.parts[0].shape)}; in the layout {layout} of the "
                f"other files it must have {axes} axes"
            )
        arrays.append(natural(found.parts[0], layout))
    problem, (dout, dq, dk, dv) = said.problem, arrays

    def judged(way: str, every: int | None, over: str | None) -> GradientVerdict:
        return judge_gradients_of(problem, said.out, said.lse, dout, dq, dk, dv, every, way, over)

    verdict = judged(ds or DS[0], rounded_every, over_ranks)
    is_half = problem.precision.probability != problem.precision.compute
    if verdict.passed or not verdict.judgeable or not is_half:
        return verdict, []
    ways = DS if ds is None else (ds,)
    # Where keys were repeated for the heads of a group, each head has a gradient of its own, which is rounded.
    length = problem.query.shape[1]
    everies = [rounded_every] + [length] * (rounded_every is None and problem.group > 1)
    overs = [over_ranks, *(OVER_RANKS if over_ranks is None and problem.partition.cp > 1 else ())]
    for every, over, way in product(everies, overs, ways):
        if (way, every, over) == (ways[0], rounded_every, over_ranks):
            continue
        tried = judged(way, every, over)
        if not tried.passed:
            continue
        taken = [f"ds: {way} passes, {DS[0]} does not; say --ds"] if way != ways[0] else []
        if every != rounded_every:
            taken.append(
                f"rounded_every: {every} passes, as where keys are repeated for the heads of a group: each has a "
                "dk and a dv, which are rounded, then their sum; say --rounded-every"
            )
        if over != over_ranks:
            taken.append(
                f"over_ranks: {over} passes, as where each pair of chunks has a dq, a dk and a dv, which are rounded, "
                f"then added up in {'that format' if over == 'out' else over}; say --over-ranks"
            )
        return tried, taken
    if ds is not None:
        return verdict, []
    return verdict, [f"ds: {DS[0]} is taken; {' and '.join(DS[1:])} do not pass either"]
