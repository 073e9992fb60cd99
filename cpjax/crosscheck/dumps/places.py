"""Where the tokens of a dump are, in which request, from what was said: arguments of `cpjax.crosscheck.judge`."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from cpjax.crosscheck.dumps.question import Question
from cpjax.crosscheck.dumps.readers import WHOLE, read_array
from cpjax.errors import InputError
from cpjax.mask import PAD
from cpjax.wording import counted, is_are

Row = Int[np.ndarray, " _"]


def places(question: Question, batch: int, length: int, keys: int, offsets: tuple[Row, Row] | None) -> dict[str, Any]:
    """Positions and segments as `judge` takes them; empty where tokens are simply 0, 1, 2, … of one request.

    Args:
      offsets: where requests begin and end among queries and keys, if a block table has said so.

    Raises:
      InputError: files that do not fit; a mask that depends on places which nobody has said.
    """
    if question.segments is not None:
        segment = _segments(question.segments, batch, length, keys)
        position = _counted(segment)
        q, kv = (_given(question, batch, length, position), segment), (position, segment)
        return {"q_positions": q[0], "kv_positions": kv[0], "segment_ids": (q[1], kv[1])}
    offsets = _offsets(question, length, keys) if offsets is None else offsets
    if offsets is not None:
        q, kv = _packed(question, offsets, length, keys)
        q = (_given(question, batch, length, q[0]), q[1])
        spread = [
            np.broadcast_to(x, (batch, n)) for x, n in ((q[0], length), (kv[0], keys), (q[1], length), (kv[1], keys))
        ]
        return {"q_positions": spread[0], "kv_positions": spread[1], "segment_ids": (spread[2], spread[3])}
    natural = np.broadcast_to(np.arange(keys), (batch, keys))
    if question.positions is not None:
        return {"q_positions": _given(question, batch, length, None), "kv_positions": natural}
    if length == keys:
        return {}
    first = _first(question, length, keys)
    return {"q_positions": np.broadcast_to(first + np.arange(length), (batch, length)), "kv_positions": natural}


def read_offsets(path: Path, name: str, length: int | None = None) -> Row:
    """cu_seqlens: 0, the end of request 0, the end of request 1, …

    Raises:
      InputError: what does not begin with 0 and ascend, or goes beyond the `length` tokens that there are.
    """
    x = read_array(path, name, WHOLE)
    if x.ndim != 1 or len(x) < 2 or x[0] != 0 or (np.diff(x.astype(np.int64)) < 0).any():
        raise InputError(
            f"--{name} {path}: is {list(x.shape)} from {x.ravel()[:4].tolist()}; it must be 0, ends ascending"
        )
    if length is not None and int(x[-1]) > length:
        raise InputError(
            f"--{name} {path}: ends at {int(x[-1])}, but there {is_are(length)} {counted(length, 'token')}"
        )
    return x.astype(np.int64)


def _given(question: Question, batch: int, length: int, otherwise: np.ndarray | None) -> np.ndarray:
    """The positions in the file, or what else is known."""
    if question.positions is None:
        assert otherwise is not None  # asked only where there is no file
        return otherwise
    given = read_array(question.positions, "positions")
    if given.dtype.name not in WHOLE or given.shape not in ((length,), (batch, length)):
        raise InputError(
            f"--positions {question.positions}: is {given.dtype} {list(given.shape)}; "
            f"it must be whole numbers [{length}]"
        )
    return np.broadcast_to(given, (batch, length))


def _segments(path: Path, batch: int, length: int, keys: int) -> np.ndarray:
    given = read_array(path, "segments")
    if given.dtype.name not in WHOLE or given.shape not in ((length,), (batch, length)):
        raise InputError(
            f"--segments {path}: is {given.dtype} {list(given.shape)}; it must be whole numbers [{length}]"
        )
    if length != keys:
        raise InputError(
            f"--segments is for queries and keys alike, but there are {length} and {keys}; say --cu-seqlens-q"
        )
    return np.broadcast_to(given.astype(np.int64), (batch, length))


def _counted(segment: np.ndarray) -> np.ndarray:
    """How many tokens of the same segment stand before each; pads count among pads."""
    position = np.zeros(segment.shape, np.int64)
    for b, row in enumerate(segment):
        for value in np.unique(row):
            position[b, row == value] = np.arange(int((row == value).sum()))
    return position


def _offsets(question: Question, length: int, keys: int) -> tuple[Row, Row] | None:
    if question.lengths is not None:
        lengths = list(question.lengths)
        if length != keys or not lengths or sum(lengths) > length or min(lengths) < 1:
            raise InputError(
                f"--lengths {lengths} must be positive and sum to at most the {counted(length, 'token')} of "
                "query and key"
            )
        ends = np.cumsum([0, *lengths])
        return ends, ends
    if question.cu_seqlens_q is None:
        return None
    q = read_offsets(question.cu_seqlens_q, "cu-seqlens-q", length)
    if question.cu_seqlens_k is None:
        if length != keys:
            raise InputError(
                f"--cu-seqlens-q for {counted(length, 'query', 'queries')} and {counted(keys, 'key')}: give "
                "--cu-seqlens-k, too"
            )
        return q, q
    kv = read_offsets(question.cu_seqlens_k, "cu-seqlens-k", keys)
    if len(q) != len(kv):
        raise InputError(
            f"--cu-seqlens-q has {counted(len(q) - 1, 'request')}, --cu-seqlens-k {len(kv) - 1}; make them equal"
        )
    return q, kv


def _packed(question: Question, offsets: tuple[Row, Row], length: int, keys: int):
    """Position and segment of every query and key of one row; requests where `cu_seqlens_padded` says, if it does."""
    starts = None
    if question.cu_seqlens_padded is not None:
        starts = read_offsets(question.cu_seqlens_padded, "cu-seqlens-padded", min(length, keys))
        for ends in offsets:
            if len(starts) != len(ends) or (np.diff(starts) < np.diff(ends)).any():
                raise InputError("--cu-seqlens-padded must have room for every request of --cu-seqlens-q and -k")
    found = []
    for ends, count in zip(offsets, (length, keys), strict=True):
        position, segment = np.zeros(count, np.int64), np.full(count, PAD, np.int64)
        begins = ends[:-1] if starts is None else starts[:-1]
        for i, (begin, n) in enumerate(zip(begins, np.diff(ends), strict=True)):
            segment[begin : begin + n], position[begin : begin + n] = i, np.arange(n)
        found.append((position, segment))
    (q_position, q_segment), kv = found
    if question.positions is None:
        for i, (tokens, cached) in enumerate(zip(np.diff(offsets[0]), np.diff(offsets[1]), strict=True)):
            if tokens != cached:
                q_position[q_segment == i] += _first(question, int(tokens), int(cached))
    return (q_position, q_segment), kv


def _first(question: Question, length: int, keys: int) -> int:
    """The position of the first of so many queries on so many keys."""
    if question.align == "bottom-right":
        return keys - length
    depends = [
        name
        for name, on in (("causal", question.is_causal), ("--window", question.window), ("--alibi", question.alibi))
        if on
    ]
    if depends and question.align is None:
        raise InputError(
            f"{depends[0]} with {counted(length, 'query', 'queries')} and {counted(keys, 'key')}: give "
            "--positions, the global position of each query, "
            f"or --align bottom-right (the last query sees all keys) or top-left (the first query sees the first key)"
        )
    return 0
