"""An installed backend (`cpjax backends`) asked: all probes as FP16 cases, of one rank and more, prepared at once."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from cpjax.crosscheck.backends import Backend, load
from cpjax.crosscheck.backends.compute import FAILURES, asked, run_all
from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.files.note import Note
from cpjax.errors import InputError
from cpjax.fingerprint import merging
from cpjax.fingerprint.card import Card, all_probes, read_card
from cpjax.fingerprint.folder import DTYPE, answer_of, case_of
from cpjax.fingerprint.probe import Answer, Probe, padded, squared
from cpjax.fingerprint.ranks import CP


def card_of_backend(
    name: str,
    dtype: str,
    head_dims: tuple[int, int],
    advance: Callable[..., None] = lambda *_: None,
    cp: int = CP,
) -> Card:
    """The card of a backend, which answers through the same two functions as in `cpjax crosscheck`.

    What it raises is among the card's failures, in the words of `cpjax crosscheck`, with a traceback on stderr.

    Args:
      cp: over how many ranks it is asked, too; with 1 it is not.

    Raises:
      InputError: it is not installed, or cannot be loaded; the dtype is not float16.
    """
    if dtype != DTYPE:
        raise InputError(f"backend {name} takes FP16; say --dtype float16")
    probes = all_probes(dtype) | merging.probes(cp)
    asked = {probe_name: padded(probe, head_dims) for probe_name, probe in probes.items()}
    answers, failures = answers_of_backend(name, asked, advance)
    dims = {probe_name: probe.value.shape[3] for probe_name, probe in probes.items()}
    cut = {probe_name: one._replace(out=one.out[..., : dims[probe_name]]) for probe_name, one in answers.items()}
    return read_card(name, dtype, probes, cut, failures)


def answers_of_backend(
    name: str, asked: Mapping[str, Probe], advance: Callable[..., None] = lambda *_: None, what: str = "probes"
) -> tuple[dict[str, Answer], dict[str, str]]:
    """The backend's answers by name, and why it gave none to the others.

    Args:
      advance: called with `what`, how much is done, of how much.

    Raises:
      InputError: it is not installed, or cannot be loaded.
    """
    backend = _loaded(name)
    failures: dict[str, str] = {}
    cases: dict[str, Case] = {}
    for probe_name, probe in asked.items():
        case, note = _supported(backend, probe_name, probe)
        if note is None:
            cases[probe_name] = case
        else:
            failures[probe_name] = f"{note.outcome}: {note.reason}"
    answers: dict[str, Answer] = {}
    advance(what, 0, len(cases))
    results = run_all(name, backend, list(cases.values()))
    for done, (probe_name, (_, given)) in enumerate(zip(cases, results, strict=True), 1):
        if isinstance(given, Note):
            failures[probe_name] = f"{given.outcome}: {given.reason}"
        else:
            answers[probe_name] = answer_of(given, asked[probe_name])
        advance(what, done, len(cases))
    return answers, failures


def _loaded(name: str) -> Backend:
    try:
        return load(name)
    except InputError:
        raise
    except FAILURES as error:
        raise InputError(
            f"backend {name} cannot be loaded ({type(error).__name__}: {error}); mend its package"
        ) from None


def _supported(backend: Backend, name: str, probe: Probe) -> tuple[Case, Note | None]:
    """The case, and why the backend does not take it. Many take only as many queries as keys."""
    case = case_of(name, probe)
    note = asked(backend, case)
    # Under a causal mask the rows would be at other places.
    if note is None or probe.cp > 1 or probe.is_causal or not 1 < probe.query.shape[1] < probe.key.shape[1]:
        return case, note
    # Another name: a backend may keep what it knows of a case by its name.
    square = replace(case_of(name, squared(probe)), name=f"{case.name}-square")
    return square, asked(backend, square)
