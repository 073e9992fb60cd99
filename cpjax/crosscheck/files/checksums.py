"""`SHA256SUMS`: the checksums of a folder of cases, as `sha256sum -c SHA256SUMS` reads them too."""

import hashlib
import re
from pathlib import Path

from cpjax.errors import InputError

NAME = "SHA256SUMS"


def write_sums(folder: Path, title: str) -> None:
    """Write the checksums of all cases of a folder; `title` is a comment."""
    lines = [f"{sha256_of(path)}  {path.name}" for path in sorted(folder.glob("*.safetensors"))]
    (folder / NAME).write_text("\n".join([f"# {title}", *lines, ""]), encoding="utf-8")


def verify(folder: Path) -> None:
    """Compare a folder with its checksums; a folder without any is taken as it is.

    Raises:
      InputError: a case is missing, altered, or not among them.
    """
    path = folder / NAME
    if not path.exists():
        return
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__})") from None
    wanted = {}
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  ([A-Za-z0-9._-]+\.safetensors)", line)
        if match is None:
            raise InputError(f"{path}: {line[:80]!r} is no line 'SHA-256  NAME.safetensors'; write the cases again")
        wanted[match[2]] = match[1]
    found = {case.name for case in folder.glob("*.safetensors")}
    for name in sorted(wanted.keys() | found):
        if name not in wanted:
            raise InputError(f"{folder / name} is not among the checksums in {NAME}; keep other cases elsewhere")
        if name not in found:
            raise InputError(f"{folder / name} is missing; {NAME} lists it, write the cases again")
        if sha256_of(folder / name) != wanted[name]:
            raise InputError(f"{folder / name} was altered: its checksum is not that of {NAME}; write the cases again")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
