"""A verdict on dumped tensors. What was not said is found out by trying, and said; what cannot be, is asked for."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.diagnosis.precision_search import consistent_with
from cpjax.crosscheck.dumps.readers import LAYOUTS, read_tensor
from cpjax.crosscheck.judge import judge_problem
from cpjax.crosscheck.judging.problem import PROFILE_OF, Problem, checked_problem
from cpjax.crosscheck.judging.verdict import Verdict
from cpjax.errors import InputError
from cpjax.partition import ORDERS
from cpjax.precision import PROFILES


class Dump(NamedTuple):
    """Tensors in global token order, `[B, S, N, D]`."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray
    lse: np.ndarray | None
    layout: str


class Said(NamedTuple):
    """The verdict, and what was found out on the way."""

    verdict: Verdict
    remarks: list[str]
    dump: Dump
    problem: Problem
    """What the verdict answers."""


def judge_dump(
    query: list[Path],
    key: list[Path],
    value: Path,
    out: Path,
    lse: Path | None,
    *,
    scale: float,
    is_causal: bool,
    layout: str | None = None,
    positions: Path | None = None,
    lengths: list[int] | None = None,
    cp: int = 1,
    precision: str | None = None,
    order: str | None = None,
) -> Said:
    """Judge one dumped call of attention. Two files for query or key are its nope and rope parts.

    Raises:
      InputError: files that cannot be read or do not fit together; a problem that nobody could answer by trying.
    """
    if order is not None and order not in ORDERS:
        raise InputError(f"--order {order!r} is unknown; known are {', '.join(ORDERS)}")
    if precision is not None and precision not in PROFILES:
        raise InputError(f"--precision {precision!r} is unknown; known are {', '.join(PROFILES)}")
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"--layout-of {layout!r} is unknown; known are {', '.join(LAYOUTS)}")
    dumps = _readable(query, key, value, out, lse, layout)
    found: list[tuple[tuple, Verdict, Dump, Problem]] = []
    for dump in dumps:
        places = _places(dump, positions, lengths, is_causal=is_causal)
        profiles = [precision] if precision else _profiles(dump)
        for profile in profiles:
            for one in [order] if order else (["ascending"] if cp == 1 else ["ring", "gather", "ascending"]):
                if found and found[-1][1].passed:
                    break
                try:
                    problem = checked_problem(
                        dump.query, dump.key, dump.value, scale=scale, is_causal=is_causal, window=None, cp=cp,
                        precision=profile, order=one, **places,
                    )  # fmt: skip
                except ValueError as error:
                    raise InputError(f"{next(iter(str(error).splitlines()), '')}") from None
                found.append(((dump.layout, profile, one), judge_problem(problem, dump.out, dump.lse), dump, problem))
    # If nothing passes the strictest precision is taken: a laxer one would only make the failure look smaller.
    profiles = list(dict.fromkeys(entry[0][1] for entry in found))
    choice, verdict, dump, problem = min(
        found, key=lambda entry: (not entry[1].passed, profiles.index(entry[0][1]), _badness(entry[1]))
    )
    remarks = _remarks(choice, verdict, found, layout, precision, order)
    if verdict.passed:
        remarks += _computes(dump, problem, scale)
    return Said(verdict, remarks, dump, problem)


def _computes(dump: Dump, problem: Problem, scale: float) -> list[str]:
    """What was computed, and with which precisions the result is consistent."""
    names = consistent_with(problem, scale, dump.out, dump.lse)
    mask = "causal" if problem.mask.is_causal else "full"
    what = f"computes: {mask} attention, {dump.query.shape[2]} heads on {dump.key.shape[2]}"
    return [f"{what}; consistent with {'; or '.join(names)}"] if names else [what]


def _badness(verdict: Verdict) -> float:
    """How far `out` is from passing, to choose which failure is shown; if it is right, the first that was tried."""
    return max(float(np.nan_to_num(verdict.z, nan=1e300)), 1.2)


def _remarks(
    choice: tuple, verdict: Verdict, found: list, layout: str | None, precision: str | None, order: str | None
) -> list[str]:
    remarks = []
    if layout is None:
        tried = len({entry[0][0] for entry in found})
        how = "it fits best of those whose shapes fit" if tried > 1 else "no other layout fits the shapes"
        remarks.append(f"layout: taken as {choice[0]}, {how}; say --layout-of")
    if precision is None:
        tried = list(dict.fromkeys(entry[0][1] for entry in found))
        failed = [name for name in tried if name != choice[1]]
        more = f"; {', '.join(failed)} {'does not' if verdict.passed else 'does not pass either'}" if failed else ""
        remarks.append(f"precision: {choice[1]} {'passes' if verdict.passed else 'is taken'}{more}")
    if order is None and len({entry[0][2] for entry in found}) > 1:
        remarks.append(f"order of merging: {choice[2]} {'passes' if verdict.passed else 'is nearest'}")
    return remarks


def _profiles(dump: Dump) -> list[str]:
    """Likely precisions, the strictest first."""
    name = PROFILE_OF.get(dump.query.dtype.name, "float32")
    if dump.query.dtype.name == "float16":
        return [name, "ring_mla_fp16"] if dump.out.dtype.name == "float16" else [name]
    return [name]


def _readable(
    query: list[Path], key: list[Path], value: Path, out: Path, lse: Path | None, layout: str | None
) -> list[Dump]:
    """The dump in every layout in which its shapes fit together."""
    fits, reasons = [], []
    for name in [layout] if layout else LAYOUTS:
        try:
            dump = _in_layout(query, key, value, out, lse, name)
        except InputError as error:
            if layout or "--layout-of" not in str(error):
                raise
            reasons.append(f"{name}: {error}")
            continue
        fits.append(dump)
    if not fits:
        raise InputError(f"no layout fits all files; name it with --layout-of. {reasons[0]}")
    return fits


def _in_layout(query: list[Path], key: list[Path], value: Path, out: Path, lse: Path | None, layout: str) -> Dump:
    q, k = (
        np.concatenate([read_tensor(path, name, layout=layout) for path in paths], axis=-1)
        for name, paths in (("query", query), ("key", key))
    )
    v, o = read_tensor(value, "value", layout=layout), read_tensor(out, "out", layout=layout)
    summed = None if lse is None else read_tensor(lse, "lse", layout=layout)
    hint = "name the right layout with --layout-of"
    if not (len(q) == len(k) == len(v)) or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise InputError(f"query {q.shape}, key {k.shape}, value {v.shape} do not fit together as {layout}; {hint}")
    if q.shape[2] % k.shape[2] or o.shape != (*q.shape[:3], v.shape[3]):
        raise InputError(f"query {q.shape}, key {k.shape}, out {o.shape} do not fit together as {layout}; {hint}")
    if summed is not None and summed.shape != q.shape[:3]:
        raise InputError(f"lse {summed.shape} must be {q.shape[:3]} (batch, tokens, heads); {hint}")
    return Dump(q, k, v, o, None if summed is None else summed.astype(np.float32), layout)


def _places(dump: Dump, positions: Path | None, lengths: list[int] | None, *, is_causal: bool) -> dict:
    """Positions and segments as `judge` takes them."""
    batch, length = dump.query.shape[:2]
    keys = dump.key.shape[1]
    if lengths is not None:
        if length != keys or sum(lengths) > length or min(lengths) < 1:
            raise InputError(
                f"--lengths {lengths} must be positive and sum to at most the {length} tokens of query and key"
            )
        position = np.concatenate([*(np.arange(n) for n in lengths), np.zeros(length - sum(lengths))]).astype(np.int32)
        segment = np.full(length, -1, np.int32)
        segment[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
        spread = np.broadcast_to(position, (batch, length))
        return {"q_positions": spread, "kv_positions": spread, "segment_ids": np.broadcast_to(segment, (batch, length))}
    if positions is not None:
        from cpjax.crosscheck.dumps.readers import read_array

        given = read_array(positions, "positions")
        if given.dtype.kind not in "iu" or given.shape not in ((length,), (batch, length)):
            raise InputError(
                f"--positions {positions}: is {given.dtype} {list(given.shape)}; it must be whole numbers [{length}]"
            )
        natural = np.broadcast_to(np.arange(keys, dtype=np.int32), (batch, keys))
        return {"q_positions": np.broadcast_to(given.astype(np.int32), (batch, length)), "kv_positions": natural}
    if is_causal and length != keys:
        raise InputError(
            f"causal with {length} queries and {keys} keys: give --positions, the global position of each query"
        )
    return {}
