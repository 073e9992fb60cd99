"""All cases of a folder; the folders that hold results."""

from collections.abc import Iterable
from pathlib import Path

from cpjax.crosscheck.files.atomic import atomic_write, is_free
from cpjax.crosscheck.files.case import Case, read_case, write_case
from cpjax.crosscheck.files.checksums import verify, write_sums
from cpjax.errors import InputError


def write_cases(folder: Path, cases: Iterable[Case], title: str) -> list[Case]:
    """Write the cases and their checksums into a new folder: all of them, or nothing.

    Args:
      title: of the checksums, a comment in their file.

    Returns:
      The cases with their digests, in order.

    Raises:
      InputError: the folder is there and not empty, or cannot be written.
    """
    if not is_free(folder):
        raise InputError(f"{folder} is there already; nothing is overwritten, name another folder")
    try:
        with atomic_write(folder) as unfinished:
            written = [write_case(unfinished, case) for case in cases]
            write_sums(unfinished, title)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror})") from None
    return written


def read_cases(folder: Path) -> list[Case]:
    """All cases of a folder, or one case file. Checksums (`SHA256SUMS`) are verified where the folder has some.

    Raises:
      InputError: there is none, or one of them is wrong.
    """
    if not folder.exists():
        raise InputError(f"{folder} does not exist; give a folder of cases or one case file")
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    if not paths:
        raise InputError(f"{folder} holds no case (*.safetensors)")
    verify(paths[0].parent)
    return [read_case(path) for path in paths]


def result_folders(results: Path) -> list[Path]:
    """The folders with results: `results` itself, or its subfolders, one a backend.

    Raises:
      InputError: it is no folder.
    """
    if not results.is_dir():
        raise InputError(f"{results} is no folder; give the folder that the results were written to")
    kinds = ("*.safetensors", "*.json")
    folders = [
        folder
        for folder in sorted(results.iterdir())
        if folder.is_dir() and any(path for kind in kinds for path in folder.glob(kind))
    ]
    return folders if folders and not any(results.glob("*.safetensors")) else [results]
