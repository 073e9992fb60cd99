"""A text file comes in: regular, small enough, UTF-8."""

import os
import stat
from pathlib import Path

from cpjax.errors import InputError

LARGEST = 1 << 20
"""Bytes. A server config has about five thousand."""


def read_text(path: Path) -> str:
    """The text of a regular UTF-8 file of at most `LARGEST` bytes; the size is looked at before anything is read.

    Raises:
      InputError: without the file's name, which the caller adds.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"is a {_file_kind(status.st_mode)}; give a config file")
        if status.st_size > LARGEST:
            raise InputError(f"has {status.st_size} bytes; a config has a few thousand, and at most {LARGEST} are read")
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(data) > LARGEST:
        raise InputError(f"grows while it is read; at most {LARGEST} bytes are")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "it looks like UTF-16; " if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise InputError(
            f"is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); {hint}save it as UTF-8"
        ) from None


def _file_kind(mode: int) -> str:
    return "directory" if stat.S_ISDIR(mode) else "device, pipe or socket"


def printable(path: Path) -> str:
    """A path for a message of one line."""
    return str(path) if str(path).isprintable() else repr(str(path))
