"""A result: what a backend computed of a case, rank by rank, and its ranks joined again (docs/formats.md)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpjax.crosscheck.files.case import VERSION, Case, expect_metadata, read_tensors, write_tensors
from cpjax.errors import InputError
from cpjax.mask import PAD
from cpjax.partition import ORDERS
from cpjax.precision import PROFILES

FIELDS = {"out": "F16", "lse": "F32", "positions": "I32", "segments": "I32"}
MADE = ("key", "value")
"""What a backend made of a case's latent; one of each, in the case's order of tokens."""


@dataclass(frozen=True)
class Result:
    """A backend's answer in global token order."""

    backend: str
    precision: str
    order: str
    out: np.ndarray
    """`[B, T, N, V]` float16."""
    lse: np.ndarray | None
    """`[B, T, N]` float32, natural logarithm; None where the backend does not give it."""
    about: dict[str, Any]
    """Where it comes from: versions, device; free, but JSON."""
    key_value: tuple[np.ndarray, np.ndarray] | None = None
    """Keys `[B, S, N, H]` and values `[B, S, N, V]`, float16, that it made of the case's latent; None: the case's."""


def write_result(folder: Path, case: Case, result: Result) -> Path:
    """Write `folder/name.safetensors` in per-device order, whole or not at all.

    Raises:
      InputError: a file is there already, or the folder cannot be written.
    """
    rows = _held(case)
    arrays: dict[str, np.ndarray] = {}
    if result.key_value is not None:
        arrays |= zip(MADE, result.key_value, strict=True)
    for rank, held in enumerate(rows):
        arrays[f"out.{rank}"] = result.out[:, held]
        if result.lse is not None:
            arrays[f"lse.{rank}"] = result.lse[:, held]
        arrays[f"positions.{rank}"] = np.asarray(case.q_tokens.position)[:, held]
        arrays[f"segments.{rank}"] = np.asarray(case.q_tokens.segment)[:, held]
    metadata = {"format": "cpjax.result", "version": VERSION, "name": case.name, "digest": case.digest}
    metadata |= {"backend": result.backend, "precision": result.precision, "order": result.order}
    path = folder / f"{case.name}.safetensors"
    write_tensors(path, arrays, metadata | {"about": json.dumps(result.about)})
    return path


def read_result(path: Path, case: Case) -> Result:
    """Read a result of this case, check it, and join its ranks.

    Raises:
      InputError: one line: missing, truncated, of another case, of the wrong form, ranks that hold the wrong tokens.
    """
    tensors, dtypes, metadata = read_tensors(path)
    expect_metadata(metadata, {"format": "cpjax.result", "version": VERSION, "name": case.name})
    if metadata.get("digest") != case.digest:
        raise InputError(
            f"is a result of another case (digest {str(metadata.get('digest'))[:8]}…, not {case.digest[:8]}…)"
        )
    backend, precision, order = (metadata.get(key, "") for key in ("backend", "precision", "order"))
    if precision not in PROFILES or order not in ORDERS:
        raise InputError(f"precision {precision[:40]!r} or order {order[:40]!r} is unknown; see docs/formats.md")
    wanted = case.precision.get(backend)
    if wanted is not None and wanted != precision:
        raise InputError(f"was computed as {precision}, but the case wants {wanted} of backend {backend}")
    key_value = _made(tensors, dtypes, case)
    joined = _join(tensors, dtypes, case)
    try:
        about = json.loads(metadata.get("about", "{}"))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise InputError("metadata 'about' is no JSON object")
    return Result(backend, precision, order, joined["out"], joined.get("lse"), about, key_value)


def _made(tensors: dict[str, np.ndarray], dtypes: dict[str, str], case: Case) -> tuple[np.ndarray, np.ndarray] | None:
    """Takes the backend's own keys and values out of `tensors`."""
    if not any(name in tensors for name in MADE):
        return None
    if case.latent is None:
        raise InputError("has a tensor 'key' or 'value', but the case gives keys and values itself; leave them out")
    for name, wanted in zip(MADE, (case.key, case.value), strict=True):
        if name not in tensors or (dtypes[name], tensors[name].shape) != ("F16", wanted.shape):
            found = f"{dtypes[name]} {list(tensors[name].shape)}" if name in tensors else "missing"
            raise InputError(f"tensor {name!r} is {found}; it must be F16 {list(wanted.shape)}, or both be left out")
    return tensors.pop("key"), tensors.pop("value")


def _join(tensors: dict[str, np.ndarray], dtypes: dict[str, str], case: Case) -> dict[str, np.ndarray]:
    present = [field for field in FIELDS if field != "lse" or any(name.startswith("lse.") for name in tensors)]
    expected = {f"{field}.{rank}" for field in present for rank in range(case.cp)}
    if tensors.keys() != expected:
        missing, extra = sorted(expected - tensors.keys())[:4], sorted(tensors.keys() - expected)[:4]
        raise InputError(f"missing tensors {missing}, unknown tensors {extra}; cp is {case.cp}")
    batch, length, heads, _ = case.query.shape
    rows = _held(case)
    share = rows.shape[1]
    shapes = {
        "out": (batch, share, heads, case.value.shape[3]),
        "lse": (batch, share, heads),
        "positions": (batch, share),
        "segments": (batch, share),
    }
    for name, array in tensors.items():
        field = name.partition(".")[0]
        if dtypes[name] != FIELDS[field] or array.shape != shapes[field]:
            wanted = f"{FIELDS[field]} {list(shapes[field])}"
            raise InputError(f"tensor {name!r} is {dtypes[name]} {list(array.shape)}; it must be {wanted}")
    joined: dict[str, np.ndarray] = {"out": np.empty((batch, length, heads, case.value.shape[3]), np.float16)}
    if "lse" in present:
        joined["lse"] = np.empty((batch, length, heads), np.float32)
    for rank, held in enumerate(rows):
        _check_places(tensors, case, rank, held)
        for field, whole in joined.items():
            mine = tensors[f"{field}.{rank}"]
            if rank and np.array_equal(held, rows[0]) and mine.tobytes() != tensors[f"{field}.0"].tobytes():
                raise InputError(f"{field} of rank {rank} is not rank 0's; in decode all ranks hold the same results")
            whole[:, held] = tensors[f"{field}.{rank}"]
    return joined


def _check_places(tensors: dict[str, np.ndarray], case: Case, rank: int, held: np.ndarray) -> None:
    """A rank holds the tokens that the layout gives it. Positions of pads are free."""
    position, segment = case.q_tokens.position[:, held], case.q_tokens.segment[:, held]
    wrong = (tensors[f"segments.{rank}"] != segment) | ((tensors[f"positions.{rank}"] != position) & (segment != PAD))
    if wrong.any():
        b, i = np.argwhere(wrong)[0]
        found = tensors[f"positions.{rank}"][b, i], tensors[f"segments.{rank}"][b, i]
        raise InputError(
            f"rank {rank} says that its row {i} is at position {found[0]} of segment {found[1]}; {case.layout} puts "
            f"position {position[b, i]} of segment {segment[b, i]} there"
        )


def _held(case: Case) -> np.ndarray:
    """Which tokens each rank holds, `[cp, t]`."""
    return case.partition.held(np.asarray(case.q_tokens.segment)[0])
