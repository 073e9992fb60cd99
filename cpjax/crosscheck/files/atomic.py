"""Files and folders that are whole or not there: made under another name, and renamed when they are finished."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpjax.errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """The name under which the block makes the file or folder `path`; if the block fails, nothing of it is left.

    Raises:
      OSError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a new JSON file, whole or not at all.

    Raises:
      InputError: a file is there already, or it cannot be written.
    """
    if path.exists():
        raise InputError(f"{path} is there already; nothing is overwritten, move it away")
    try:
        with atomic_write(path) as unfinished:
            unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})") from None


def is_free(folder: Path) -> bool:
    """Whether a folder can be made here without overwriting anything: it is not there, or empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
