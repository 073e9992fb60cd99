"""A config file comes in: found, small enough, UTF-8, JSON, and with exactly one ModelDeployConfig and ModelConfig."""

import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

from cpjax.errors import InputError
from cpjax.mindie import json_text
from cpjax.mindie.json_text import json_path, kind, shown

LARGEST = 1 << 20
"""Bytes. A server config has about five thousand."""


class ConfigFile(NamedTuple):
    """A file that holds a deployment. `at` is the path to `ModelDeployConfig` from the root of `document`."""

    path: Path
    text: str  # as in the file, byte-order mark included
    document: dict[str, Any]
    at: json_text.Path
    is_fragment: bool  # the bare `"ModelDeployConfig" : {…}` of the vendor's pages: braces were added to read it
    warnings: tuple[str, ...]

    @property
    def deploy(self) -> dict[str, Any]:
        """The object `ModelDeployConfig`."""
        return _descend(self.document, self.at)

    @property
    def model(self) -> dict[str, Any]:
        """The only entry of `ModelConfig`."""
        return self.deploy["ModelConfig"][0]

    @property
    def backend(self) -> dict[str, Any]:
        """The object `BackendConfig`, empty where the file has none."""
        return self.document.get("BackendConfig", {})


def read_config(path: Path) -> ConfigFile:
    """Read a server's `config.json`, an object with `ModelDeployConfig`, or the bare `"ModelDeployConfig" : {…}`.

    A UTF-8 byte-order mark is accepted with a warning, because the server's parser (nlohmann/json) skips it.

    Raises:
      InputError: one line with the file, the place in it, what was found, the rule and the fix.
    """
    try:
        return _read_config(path)
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None


def _read_config(path: Path) -> ConfigFile:
    text = read_text(path)
    warnings = ()
    if text.startswith("\ufeff"):
        warnings = ("the file begins with a byte-order mark; the server skips it, other readers may not: remove it",)
    body = text.removeprefix("\ufeff")
    is_fragment = re.match(r'\s*"(?:[^"\\]|\\.)*"\s*:', body) is not None
    if is_fragment:
        document = json_text.parse("{" + body + "}", added=1)
    elif not body.strip():
        raise InputError("is empty; a config is a JSON object with ModelDeployConfig")
    else:
        document = json_text.parse(body)
    if not isinstance(document, dict):
        raise InputError(
            f"$ is {_described(document)}; a config is an object, a whole server config or one with ModelDeployConfig"
        )
    return ConfigFile(path, text, document, _place(document), is_fragment, warnings)


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


def _place(document: dict[str, Any]) -> json_text.Path:
    """Where `ModelDeployConfig` is, after checking that it is there once and has one ModelConfig."""
    backend = document.get("BackendConfig", {})
    _expect(backend, dict, ("BackendConfig",), "an object")
    places = [("ModelDeployConfig",)] if "ModelDeployConfig" in document else []
    places += [("BackendConfig", "ModelDeployConfig")] if "ModelDeployConfig" in backend else []
    if not places:
        found = ", ".join(shown(key, 30) for key in list(document)[:5]) or "no key"
        raise InputError(
            f"$ has no ModelDeployConfig, neither here nor in BackendConfig (it has {found}); give a server's "
            'config.json or the fragment "ModelDeployConfig" : {…}'
        )
    if len(places) > 1:
        raise InputError("has ModelDeployConfig in $ and in $.BackendConfig; keep the one that is meant")
    at = places[0]
    deploy = _descend(document, at)
    _expect(deploy, dict, at, "an object")
    if "ModelConfig" not in deploy:
        raise InputError(f"{json_path(at)} has no ModelConfig; it must have one, a list with one object")
    models = deploy["ModelConfig"]
    _expect(models, list, (*at, "ModelConfig"), "a list with one object")
    if len(models) != 1:
        raise InputError(f"{json_path((*at, 'ModelConfig'))} has {len(models)} entries; it must have exactly one model")
    _expect(models[0], dict, (*at, "ModelConfig", 0), "an object")
    return at


def _expect(value: Any, wanted: type, path: json_text.Path, rule: str) -> None:
    if not isinstance(value, wanted):
        raise InputError(f"{json_path(path)} is {_described(value)}; it must be {rule}")


def _described(value: Any) -> str:
    return "null" if value is None else f"the {kind(value)} {shown(value, 40)}"


def _descend(value: Any, path: json_text.Path) -> Any:
    for step in path:
        value = value[step]
    return value


def printable(path: Path) -> str:
    """A path for a message of one line."""
    return str(path) if str(path).isprintable() else repr(str(path))
