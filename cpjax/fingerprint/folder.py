"""The probes as a folder of FP16 cases, for a kernel that is called elsewhere; its results, read as answers."""

from pathlib import Path

import numpy as np

from cpjax.crosscheck.files.case import Case, read_case
from cpjax.crosscheck.files.checksums import verify
from cpjax.crosscheck.files.folders import write_cases
from cpjax.crosscheck.files.note import read_note
from cpjax.crosscheck.files.result import Result, read_result
from cpjax.errors import InputError
from cpjax.fingerprint import merging
from cpjax.fingerprint.card import Card, all_probes, read_card
from cpjax.fingerprint.probe import HEAD_DIM, Answer, Probe, padded
from cpjax.fingerprint.ranks import CP, MOST_CP
from cpjax.mask import PAD, Tokens

DTYPE = "float16"
VERSION = 4
"""Raised when any number of any probe changes."""
PROFILE = {"spec": "flash_fp16", "sdpa": "flash_fp16", "npu": "ring_mla_fp16"}


def case_of(name: str, asked: Probe) -> Case:
    """A probe as a case of its ranks; token i of the queries and of the keys is at position i."""
    batch, rows = asked.query.shape[:2]
    query, key, value = (x.astype(np.float16) for x in asked[:3])
    return Case(
        name=f"fingerprint-{name}",
        query=query,
        key=key,
        value=value,
        q_tokens=_tokens(batch, rows, asked.length),
        kv_tokens=_tokens(batch, key.shape[1], asked.length),
        scale=asked.scale,
        is_causal=asked.is_causal,
        cp=asked.cp,
        precision=dict(PROFILE),
        about={"kind": "fingerprint", "version": VERSION},
    )


def _tokens(batch: int, tokens: int, length: int) -> Tokens:
    """Places of so many tokens, all of one text; those behind `length` are pads, unless it is 0."""
    position = np.broadcast_to(np.arange(tokens, dtype=np.int32), (batch, tokens)).copy()
    return Tokens(position, np.where(position < (length or tokens), 0, PAD).astype(np.int32))


def answer_of(result: Result, asked: Probe) -> Answer:
    """The answer in a result; rows and dims beyond those of the probe, of `squared` and `padded`, are left out."""
    rows, dims = slice(asked.query.shape[1]), slice(asked.value.shape[3])
    lse = None if result.lse is None else result.lse[:, rows].astype(np.float64)
    return Answer(result.out[:, rows, :, dims].astype(np.float64), lse)


def write_probes(folder: Path, head_dims: tuple[int, int] = (HEAD_DIM, HEAD_DIM), cp: int = CP) -> list[Case]:
    """Write all probes and their checksums into a new folder: all of them, or nothing.

    Args:
      head_dims: of query and key, and of value, for kernels that take no others; the rest of a head is 0.
      cp: ranks of the probes over ranks; with 1 there are none.

    Raises:
      InputError: the folder is there and not empty, or cannot be written.
    """
    cases = (case_of(name, padded(asked, head_dims)) for name, asked in probes_of(cp).items())
    return write_cases(folder, cases, f"cpjax fingerprint probes, version {VERSION}")


def read_folder(cases: Path, results: Path) -> Card:
    """The card of a kernel that computed the probes of `cases` and wrote `results` (docs/formats.md).

    Raises:
      InputError: the folder holds other cases than the probes of this version, or a result is not one of its case.
    """
    if not cases.is_dir():
        raise InputError(f"{cases} is no folder; cpjax cases --preset fingerprint DIR writes one")
    verify(cases)
    answers: dict[str, Answer] = {}
    failures: dict[str, str] = {}
    backends = set()
    probes = probes_of(_ranks_of(cases))
    for name, asked in probes.items():
        case = _checked(cases / f"fingerprint-{name}.safetensors", name, asked)
        path = results / f"{case.name}.safetensors"
        try:
            if path.exists():
                result = read_result(path, case)
                answers[name] = answer_of(result, asked)
                backends.add(result.backend)
            elif path.with_suffix(".json").exists():
                backend, note = read_note(path.with_suffix(".json"), case)
                failures[name] = f"{note.outcome}: {note.reason}"
                backends.add(backend)
            else:
                failures[name] = "no result in the folder"
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    if not answers:
        raise InputError(f"{results} holds no result of a probe; its files are to be named as those of {cases}")
    if len(backends) > 1:
        raise InputError(f"{results} holds results of several backends: {', '.join(sorted(backends))}; ask about one")
    return read_card(backends.pop(), DTYPE, probes, answers, failures)


def probes_of(cp: int) -> dict[str, Probe]:
    """All probes of a folder, by name."""
    return all_probes(DTYPE) | merging.probes(cp)


def _ranks_of(cases: Path) -> int:
    """Over how many ranks the probes of the folder ask."""
    path = cases / "fingerprint-merge-order.safetensors"
    if not path.exists():
        return 1
    cp = read_case(path).cp
    if not 2 <= cp <= MOST_CP:
        raise InputError(f"{path} is no probe of this version; write the folder again")
    return cp


def _checked(path: Path, name: str, asked: Probe) -> Case:
    """The case of the file, which must be this very probe: lines are read with the numbers of this version."""
    case = read_case(path)
    wanted = case_of(name, padded(asked, (max(case.query.shape[3], HEAD_DIM), max(case.value.shape[3], HEAD_DIM))))
    same = all(np.array_equal(getattr(case, x), getattr(wanted, x), equal_nan=True) for x in ("query", "key", "value"))
    same &= all(np.array_equal(getattr(case, x).segment, getattr(wanted, x).segment) for x in ("q_tokens", "kv_tokens"))
    if not same or (case.scale, case.is_causal, case.cp) != (wanted.scale, wanted.is_causal, wanted.cp):
        raise InputError(f"{path} is no probe of this version; write the folder again")
    return case
