"""A config file comes in: found, small enough, UTF-8, JSON, and with exactly one ModelDeployConfig and ModelConfig."""

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

from cpjax.errors import InputError
from cpjax.mindie import json_text
from cpjax.mindie.json_text import Place, json_path, kind, shown
from cpjax.mindie.text_file import printable, read_text

MARK = "\ufeff"

MOTOR = {"prefill": "mindie_server_prefill_config", "decode": "mindie_server_decode_config"}
"""Role → the key of MindIE-Motor's user_config.json that holds the part of a server config for it."""

NEW_MOTOR = "motor_deploy_config"
"""What version v2.0 of that file has in place of deploy_config (README.md of MindIE-pyMotor)."""

OLD = ("OtherParam", "WorkFlowParam", "ModelDeployParam", "ScheduleParam")
"""Sections of a config from before 1.0.RC3 (build/service/upgrade_info.json of MindIE-Motor)."""


class ConfigFile(NamedTuple):
    """A file that holds a deployment. `at` is the path to `ModelDeployConfig` from the root of `document`."""

    path: Path
    text: str  # as in the file, byte-order mark included
    document: dict[str, Any]
    at: json_text.Path = ()
    before: str = ""  # what was put round the bare `"ModelDeployConfig" : {…}` of a page, to read it
    after: str = ""
    is_fragment: bool = False
    warnings: tuple[str, ...] = ()
    root: json_text.Path = ()  # where ServerConfig and BackendConfig stand
    role: str | None = None  # which part of MindIE-Motor's user_config.json it is

    @property
    def deploy(self) -> dict[str, Any]:
        """The object `ModelDeployConfig`."""
        return _descend(self.document, self.at)

    @property
    def model(self) -> dict[str, Any]:
        """The only entry of `ModelConfig`."""
        return self.deploy["ModelConfig"][0]

    def as_json(self, text: str) -> str:
        """The text as JSON: without mark and last comma, and with what makes a fragment an object."""
        body = text.removeprefix(MARK)
        if self.is_fragment and body.rstrip().endswith(","):
            body = body.rstrip()[:-1]
        return self.before + body + self.after

    @property
    def shift(self) -> int:
        """How far a position in `text` is behind the same one in `as_json(text)`."""
        return int(self.text.startswith(MARK)) - len(self.before)

    def place(self, path: json_text.Path) -> Place:
        """Where a value stands in the file; of one that is not there, where the object stands that lacks it."""
        found = _starts(self.as_json(self.text))
        path = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in found), ())
        body = self.text.removeprefix(MARK)
        return json_text.place(body, max(0, found.get(path, 0) - len(self.before)))


@functools.lru_cache(maxsize=4)
def _starts(text: str) -> dict[json_text.Path, int]:
    return json_text.starts(text)


def read_configs(path: Path) -> list[ConfigFile]:
    """Read a server's `config.json`, a fragment of one, or the prefill and decode parts of MindIE-Motor's file.

    A UTF-8 byte-order mark is accepted with a warning, because the server's parser (nlohmann/json) skips it.

    Raises:
      InputError: one line with the file, the place in it, what was found, the rule and the fix.
    """
    try:
        return _read_configs(path)
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from None


def read_config(path: Path, role: str | None = None) -> ConfigFile:
    """The same, one of them. Of MindIE-Motor's file it is the part for `role`.

    Raises:
      InputError: the file has two parts and no role is given, or has no part for it.
    """
    found = read_configs(path)
    if found[0].role is None:
        return found[0]
    for file in found:
        if file.role == role:
            return file
    parts = " and ".join(str(file.role) for file in found)
    raise InputError(f"{printable(path)}: is a user_config.json with {parts}; say which is meant with --role")


def _read_configs(path: Path) -> list[ConfigFile]:
    text = read_text(path)
    warnings = ()
    if text.startswith(MARK):
        warnings = ("the file begins with a byte-order mark; the server skips it, other readers may not: remove it",)
    file = _parsed(ConfigFile(path, text, {}, warnings=warnings))
    old = [key for key in OLD if key in file.document]
    if old:
        raise InputError(
            f"$ has {', '.join(old)}: it is a config from before MindIE 1.0.RC3, whose fields had other names; convert "
            f"it with the newer MindIE's upgrade tool ({file.place((old[0],))})"
        )
    if NEW_MOTOR in file.document:
        raise InputError(
            f"$ has {NEW_MOTOR}: it is a user_config.json of version v2.0, which is not known here; give one of v1.0, "
            f"which has {' and '.join(MOTOR.values())}, or a server's config.json ({file.place((NEW_MOTOR,))})"
        )
    parts = [(role, key) for role, key in MOTOR.items() if key in file.document]
    if not parts:
        return [file._replace(at=_place(file))]
    for _, key in parts:
        _expect(file, (key,), dict, "an object")
    found = [file._replace(root=(key,), role=role) for role, key in parts]
    return [part._replace(at=_place(part)) for part in found]


_MEMBER = re.compile(r'\s*"(?:[^"\\]|\\.)*"\s*:')


def _parsed(file: ConfigFile) -> ConfigFile:
    """The file with its document, whole or one of the fragments that the vendor's pages print.

    They print `"ModelDeployConfig" : {…}`, with or without a comma at the end, `"ModelConfig" : […]`, and its entry.
    """
    body = file.text.removeprefix(MARK)
    if not body.strip():
        raise InputError("is empty; a config is a JSON object with ModelDeployConfig")
    if _MEMBER.match(body):
        file = file._replace(before="{", after="}", is_fragment=True)
    elif re.match(r'\s*\{\s*"(modelInstanceType|modelName)"', body):
        file = file._replace(before='{"ModelConfig":[', after="]}", is_fragment=True)
    elif body.rstrip().endswith(",") and '"ServerConfig"' not in body:
        file = file._replace(is_fragment=True)
    document = json_text.parse(file.as_json(file.text), added=len(file.before))
    if not isinstance(document, dict):
        raise InputError(
            f"$ is {_described(document)}; a config is an object, a whole server config or one with ModelDeployConfig"
        )
    return file._replace(document=document)


def _place(file: ConfigFile) -> json_text.Path:
    """Where `ModelDeployConfig` is, after checking that it is there once and has one ModelConfig."""
    root, backend = _descend(file.document, file.root), (*file.root, "BackendConfig")
    if "BackendConfig" in root:
        _expect(file, backend, dict, "an object")
    places = [file.root] if "ModelConfig" in root else []
    places += [(*file.root, "ModelDeployConfig")] if "ModelDeployConfig" in root else []
    places += [(*backend, "ModelDeployConfig")] if "ModelDeployConfig" in root.get("BackendConfig", {}) else []
    if not places:
        found = ", ".join(shown(key, 30) for key in list(root)[:5]) or "no key"
        raise InputError(
            f"{json_path(file.root)} has no ModelDeployConfig, neither here nor in BackendConfig (it has {found}); "
            'give a server\'s config.json or the fragment "ModelDeployConfig" : {…}'
        )
    if len(places) > 1:
        raise InputError(f"has ModelDeployConfig in {' and in '.join(json_path(at[:-1]) for at in places)}; keep one")
    at = places[0]
    deploy = _expect(file, at, dict, "an object")
    if "ModelConfig" not in deploy:
        raise InputError(f"{json_path(at)} has no ModelConfig; it must have one, a list with one object")
    models = _expect(file, (*at, "ModelConfig"), list, "a list with one object")
    if len(models) != 1:
        raise InputError(
            f"{json_path((*at, 'ModelConfig'))} has {len(models)} entries; it must have exactly one model "
            f"({file.place((*at, 'ModelConfig'))})"
        )
    _expect(file, (*at, "ModelConfig", 0), dict, "an object")
    return at


def _expect(file: ConfigFile, path: json_text.Path, wanted: type, rule: str) -> Any:
    value = _descend(file.document, path)
    if not isinstance(value, wanted):
        raise InputError(f"{json_path(path)} is {_described(value)}; it must be {rule} ({file.place(path)})")
    return value


def _described(value: Any) -> str:
    return "null" if value is None else f"the {kind(value)} {shown(value, 40)}"


def _descend(value: Any, path: json_text.Path) -> Any:
    for step in path:
        value = value[step]
    return value
