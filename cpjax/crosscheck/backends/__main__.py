"""`python -m cpjax.crosscheck.backends NAME CASES RESULTS`: the process of one backend, started by `launch`."""

import sys
from pathlib import Path

from cpjax.crosscheck.backends import load
from cpjax.crosscheck.backends.compute import FAILURES, compute, one_line
from cpjax.crosscheck.backends.launch import REFUSED, owed
from cpjax.crosscheck.files.folders import read_cases
from cpjax.crosscheck.files.note import Note, write_note
from cpjax.errors import InputError


def main(name: str, cases: Path, results: Path) -> int:
    """Compute what is owed; `REFUSED` where results cannot be written."""
    try:
        todo = owed(read_cases(cases), results)
        try:
            backend = load(name)
        except FAILURES as error:
            note = Note("error", one_line(f"it cannot be loaded: {type(error).__name__}: {error}"))
            for case in todo:
                write_note(results, case, name, note)
            return 0
        compute(name, backend, todo, results)
    except InputError as error:
        print(f"cpjax: {error}", file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
