"""An installed backend (`cpjax backends`) asked: all probes as FP16 cases of one device, prepared all at once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cpjax.crosscheck.backends import Backend, load
from cpjax.crosscheck.backends.compute import checked, one_line
from cpjax.crosscheck.files.case import Case
from cpjax.errors import InputError
from cpjax.fingerprint.card import Card, all_probes, read_card
from cpjax.fingerprint.folder import DTYPE, case_of
from cpjax.fingerprint.probe import Answer, Probe, padded, squared


def card_of_backend(
    name: str, dtype: str, head_dims: tuple[int, int], advance: Callable[..., None] = lambda *_: None
) -> Card:
    """The card of a backend, which answers through the same two functions as in `cpjax crosscheck`.

    Raises:
      InputError: it is not installed, or the dtype is not float16.
    """
    if dtype != DTYPE:
        raise InputError(f"backend {name} takes FP16; say --dtype float16")
    backend, probes = load(name), all_probes(dtype)
    failures: dict[str, str] = {}
    cases: dict[str, Case] = {}
    for probe_name, asked in probes.items():
        case, reason = _supported(backend, probe_name, padded(asked, head_dims))
        if reason is None:
            cases[probe_name] = case
        else:
            failures[probe_name] = f"not supported: {reason}"
    prepare: Any = getattr(backend, "prepare", None)
    if cases and prepare is not None:
        prepare(list(cases.values()))
    answers: dict[str, Answer] = {}
    for done, (probe_name, case) in enumerate(cases.items()):
        advance("probes", done, len(cases))
        try:
            result = checked(backend.run(case), case)
        except Exception as error:
            failures[probe_name] = one_line(f"{type(error).__name__}: {error}")
            continue
        asked = probes[probe_name]
        rows, dims = slice(0, asked.query.shape[1]), slice(0, asked.value.shape[3])
        lse = None if result.lse is None else result.lse[:, rows].astype(np.float64)
        answers[probe_name] = Answer(result.out[:, rows, :, dims].astype(np.float64), lse)
    advance("probes", len(cases), len(cases))
    return read_card(name, dtype, probes, answers, failures)


def _supported(backend: Backend, name: str, asked: Probe) -> tuple[Case, str | None]:
    """The case, and why the backend does not take it. Many take only as many queries as keys."""
    case = case_of(name, asked)
    reason = backend.supports(case)
    if reason is None or not 1 < asked.query.shape[1] < asked.key.shape[1]:
        return case, reason
    # Another name: a backend may keep what it knows of a case by its name.
    square = replace(case_of(name, squared(asked)), name=f"{case.name}-square")
    return square, backend.supports(square)
