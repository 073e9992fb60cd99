"""One case on one backend: asked, run, checked, written. Whatever a backend does becomes one of the outcomes."""

import json
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cpjax.crosscheck.backends import Backend
from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.files.note import Note, write_note
from cpjax.crosscheck.files.result import Result, write_result
from cpjax.partition import ORDERS
from cpjax.precision import PROFILES

FAILURES = (Exception, SystemExit)
"""What a backend may raise. Ctrl-C is the user's."""


def compute(name: str, backend: Backend, cases: list[Case], folder: Path) -> None:
    """Leave a result or a note in `folder` for every case.

    Raises:
      InputError: there is something already, or the folder cannot be written.
    """
    wanted = []
    for case in cases:
        note = asked(backend, case)
        if note is None:
            wanted.append(case)
        else:
            write_note(folder, case, name, note)
    for case, answer in run_all(name, backend, wanted):
        if isinstance(answer, Note):
            write_note(folder, case, name, answer)
        else:
            write_result(folder, case, answer)


def run_all(name: str, backend: Backend, cases: list[Case]) -> Iterator[tuple[Case, Result | Note]]:
    """Each case with its result, in order, or with a note on what was raised; the backend is prepared once for all.

    Args:
      cases: those that `asked` has no note on.
    """
    prepare, problem = getattr(backend, "prepare", None), None
    if cases and prepare is not None:
        try:
            prepare(cases)
        except FAILURES as error:
            problem = _said(error, "prepare")
    for case in cases:
        yield case, problem or _answer(name, backend, case)


def asked(backend: Backend, case: Case) -> Note | None:
    """None if the backend supports the case."""
    try:
        reason = backend.supports(case)
    except FAILURES as error:
        return _said(error, "supports")
    if reason is None:
        return None
    if not isinstance(reason, str) or not reason.strip():
        return Note("error", f"supports() returned {reason!r:.60}; it must be None or a reason in words")
    return Note("unsupported", one_line(reason))


def _answer(name: str, backend: Backend, case: Case) -> Result | Note:
    try:
        result = backend.run(case)
        return replace(checked(result, case), backend=name)
    except FAILURES as error:
        return _said(error, "run")


def checked(result: Any, case: Case) -> Result:
    """The result with its arrays as NumPy arrays. Numbers are not looked at: that is the judge's.

    Raises:
      ValueError, TypeError: it is no result of this case.
    """
    if not isinstance(result, Result):
        raise TypeError(
            f"run() returned {type(result).__name__}; it must return a cpjax.crosscheck.files.result.Result"
        )
    batch, tokens, heads, _ = case.query.shape
    out = _array("out", result.out, "float16", (batch, tokens, heads, case.value.shape[3]))
    lse = None if result.lse is None else _array("lse", result.lse, "float32", (batch, tokens, heads))
    if result.precision not in PROFILES:
        raise ValueError(f"precision {result.precision!r:.60} is unknown; known are {', '.join(PROFILES)}")
    if result.order not in ORDERS:
        raise ValueError(f"order {result.order!r:.60} is unknown; known are {', '.join(ORDERS)}")
    if not isinstance(result.about, dict):
        raise TypeError(f"about is a {type(result.about).__name__}; it must be a dict")
    json.dumps(result.about)
    made = result.key_value
    if made is not None:
        if case.latent is None:
            raise ValueError("key_value is given, but the case gives keys and values itself; leave it None")
        key, value = made
        made = _array("key", key, "float16", case.key.shape), _array("value", value, "float16", case.value.shape)
    return replace(result, out=out, lse=lse, key_value=made)


def _array(name: str, given: Any, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(given)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}; it must be {dtype} {list(shape)}")
    return array


def _said(error: BaseException, where: str) -> Note:
    """The note on an exception; its traceback goes to stderr."""
    traceback.print_exception(error)
    return Note("error", one_line(f"{where}() raised {type(error).__name__}: {error}"))


def one_line(text: str) -> str:
    """The text as a note takes it."""
    return " ".join(text.split())[:500]
