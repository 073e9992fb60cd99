"""Each backend in a process of its own: one that takes its process down has failed in one case, and the rest go on."""

import signal
import subprocess
import sys
from pathlib import Path

from cpjax.crosscheck.files.atomic import is_free
from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.files.note import Note, write_note
from cpjax.errors import InputError

REFUSED = 77
"""Status of a process that cannot write its results; a backend's own statuses are small numbers."""


def launch(name: str, cases: Path, results: Path, all_cases: list[Case]) -> None:
    """Leave a result or a note in `results` for every case of the folder (or file) `cases`.

    The process runs `python -m cpjax.crosscheck.backends NAME CASES RESULTS`. If it ends too early, the first case that
    it owes is the one it died in; a new one is started for those behind it.

    Raises:
      InputError: `results` holds something already, or cannot be written.
    """
    if not is_free(results):
        raise InputError(f"{results} is there already; nothing is overwritten, move it away")
    while owed(all_cases, results):
        line = [sys.executable, "-m", "cpjax.crosscheck.backends", name, str(cases), str(results)]
        # What a backend prints is not our output.
        status = subprocess.run(line, stdout=2, check=False).returncode
        left = owed(all_cases, results)
        if status == REFUSED:
            raise InputError(f"the results of backend {name} cannot be written; its message is above")
        if left:
            write_note(results, left[0], name, Note("error", f"its process ended {_ending(status)} in this case"))


def owed(cases: list[Case], results: Path) -> list[Case]:
    """Cases for which there is neither a result nor a note."""
    return [
        case
        for case in cases
        if not any((results / f"{case.name}.{suffix}").exists() for suffix in ("safetensors", "json"))
    ]


def _ending(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"
