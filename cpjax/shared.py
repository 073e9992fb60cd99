"""What helps and messages name besides code: examples/ and docs/, from the wheel or from the checkout."""

import shutil
from pathlib import Path

from cpjax.crosscheck.files.atomic import atomic_write
from cpjax.errors import InputError

FOLDERS = ("examples", "docs")


def shared() -> Path:
    """The folder that holds `FOLDERS`: in a wheel beside this file, in a checkout two floors up.

    >>> (shared() / "docs" / "formats.md").exists(), (shared() / "examples" / "deepseek-r1-cp2.json").exists()
    (True, True)
    """
    packed = Path(__file__).with_name("data")
    return packed if packed.is_dir() else Path(__file__).parents[1]


def write_shared(folder: Path) -> list[Path]:
    """Copy them into a new folder, all of them or nothing; the files, in order.

    Raises:
      InputError: the folder is there already, or cannot be written.
    """
    if folder.exists():
        raise InputError(f"{folder} is there already, and nothing is overwritten; give another name")
    try:
        with atomic_write(folder) as unfinished:
            for name in FOLDERS:
                shutil.copytree(shared() / name, unfinished / name)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error})") from None
    return sorted(path for path in folder.rglob("*") if path.is_file())
