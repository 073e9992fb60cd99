"""TOML files of facts: those in `data/`, and those of a user. Everything in them is checked when it is read."""

import functools
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cpjax.errors import InputError


class Fact(BaseModel):
    """A table of a data file: known keys only, and it does not change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


F = TypeVar("F", bound=Fact)


@functools.cache
def shipped(name: str) -> dict[str, Any]:
    """The document `data/NAME.toml` of this package."""
    return tomllib.loads((files("cpjax.plan") / "data" / f"{name}.toml").read_text(encoding="utf-8"))


def read_toml(path: Path) -> dict[str, Any]:
    """A user's file.

    Raises:
      InputError: it is not there, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not there; give a TOML file as docs/plan.md describes") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be read as TOML ({next(iter(str(error).splitlines()), '')})") from None


def checked(kind: type[F], value: Any, where: str) -> F:
    """A table as a `kind`.

    Raises:
      InputError: a key is missing, unknown, or has a value of the wrong kind: the first of them, in one line.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in found["loc"])
        said = found["msg"][0].lower() + found["msg"][1:]
        given = "" if found["type"] == "missing" else f" is {found['input']!r:.60}"
        keys = ", ".join(kind.model_fields)
        raise InputError(f"{where}: {name or 'this'}{given}: {said}; keys are {keys}") from None


def tables(document: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The tables `[NAME.…]` of a document.

    Raises:
      InputError: there is something else under that name.
    """
    found = document.get(name, {})
    if not isinstance(found, dict):
        raise InputError(f"{where}: {name} is {found!r:.40}; write tables, as [{name}.mine]")
    return found
