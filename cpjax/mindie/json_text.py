"""JSON that must be exactly what it looks like: no key twice, no NaN, no infinity; and where each value stands."""

import json
import math
import re
from typing import Any, NamedTuple

from cpjax.errors import InputError

_TOO_DEEP = "is nested too deeply to be a config, which has about ten levels"

Path = tuple[str | int, ...]
Span = tuple[int, int]

DEEPEST = 64
"""Levels of nesting; a config has about ten."""


class Place(NamedTuple):
    """Where something stands in a text, counted from 1 as editors do."""

    line: int
    column: int

    def __str__(self) -> str:  # noqa: D105
        return f"line {self.line}, column {self.column}"


_KEY_ENDS = re.compile(r"\s*:")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{},:]|[^][{},:"\s]+', re.DOTALL)


def parse(text: str, added: int = 0) -> Any:
    """The value of a JSON text, of which the first `added` characters are not in the file.

    Raises:
      InputError: what is wrong and where, as line and column; the caller says in which file.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        said, at = _explained(text, error)
        line, column = place(text, at)
        raise InputError(f"is not JSON: {said} ({Place(line, column - (added if line == 1 else 0))})") from None
    except RecursionError:
        raise InputError(_TOO_DEEP) from None
    except InputError:
        raise
    except ValueError:  # Python's limit on the digits of an integer
        raise InputError("has an integer of thousands of digits; no field of a config takes one") from None
    spans(text)
    return value


_FOREIGN = {
    "//": "a comment, which JSON does not have; the server refuses it too: take it out",
    "/*": "a comment, which JSON does not have; the server refuses it too: take it out",
    "#": "a comment, which JSON does not have; the server refuses it too: take it out",
    "...": "dots in place of what a page leaves out; put the fields in, or take the dots out",
    "…": "dots in place of what a page leaves out; put the fields in, or take the dots out",
    "'": "a single quote; JSON has double quotes",
    "“": "a typographic quote; JSON has the plain double quote",
    "”": "a typographic quote; JSON has the plain double quote",
    "<": "a placeholder; put the value in",
    "$": "a placeholder; put the value in",
    "True": "True; JSON has true",
    "False": "False; JSON has false",
    "None": "None; JSON has null",
    "，": "a full-width comma; JSON has the plain one",
    "：": "a full-width colon; JSON has the plain one",
}
"""What people write in JSON that is none, and what to do about it."""


def _explained(text: str, error: json.JSONDecodeError) -> tuple[str, int]:
    """What is wrong and where. The parser stops behind a comma that is one too many; the comma is what is wrong."""
    at = error.pos + len(text[error.pos :]) - len(text[error.pos :].lstrip())
    before = text[:at].rstrip()
    if text[at : at + 1] in ("}", "]") and before.endswith(","):
        return "a comma before the closing bracket; the server refuses it too: take it out", len(before) - 1
    if error.msg == "Extra data" and text[at : at + 1] == ",":
        return "a comma behind the end; take it out", at
    for mark, said in _FOREIGN.items():
        if text.startswith(mark, at):
            return said, at
    return error.msg[0].lower() + error.msg[1:], error.pos


def place(text: str, at: int) -> Place:
    """Line and column of a position."""
    return Place(text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at))


def spans(text: str) -> dict[Path, Span]:
    """Where each value of a valid JSON text stands: path → `(start, end)`; a path is keys and indices from the root.

    >>> spans('{"a": [1, 23]}')[("a", 1)]
    (10, 12)

    Raises:
      InputError: a key stands twice in one object (parsers then keep one of the two, and not all the same one), or
        more than `DEEPEST` levels.
    """
    return _scan(text)[0]


def starts(text: str) -> dict[Path, int]:
    """Where a reader looks for each value: at its key, or at the value itself in a list.

    >>> starts('{"a": [1, 23]}')[("a",)], starts('{"a": [1, 23]}')[("a", 1)]
    (1, 10)
    """
    return _scan(text)[1]


def _scan(text: str) -> tuple[dict[Path, Span], dict[Path, int]]:
    found: dict[Path, Span] = {}
    keys: dict[Path, int] = {}
    open_at: list[int] = []  # where each enclosing object or list begins
    path: list[str | int] = []  # of the value that comes next
    for token in _TOKEN.finditer(text):
        word, (start, end) = token.group(), token.span()
        if word in "{[":
            if len(path) == DEEPEST:
                raise InputError(_TOO_DEEP)
            open_at.append(start)
            path.append(0 if word == "[" else "")
        elif word in "}]":
            path.pop()
            found[tuple(path)] = (open_at.pop(), end)
        elif word == ",":
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else ""
        elif word == ":":
            continue
        elif path and path[-1] == "" and text[open_at[-1]] == "{" and _KEY_ENDS.match(text, end):
            path[-1] = json.loads(word)
            if tuple(path) in found:
                raise InputError(f"has the key {shown(path[-1])} twice in one object ({place(text, start)}); keep one")
            found[tuple(path)] = (start, end)  # taken by the key until its value is known
            keys[tuple(path)] = start
        else:
            found[tuple(path)] = (start, end)
    return found, {path: keys.get(path, start) for path, (start, _) in found.items()}


def shown(value: Any, length: int = 60) -> str:
    """A value of a JSON file for a message: printable ASCII on one line, and not longer than `length`."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):
        text = f"a {kind(value)} too large to print"
    return text if len(text) <= length else text[: length - 1] + "…"


def kind(value: Any) -> str:
    """What JSON calls it."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def json_path(path: Path) -> str:
    """`$.BackendConfig.npuDeviceIds[0]`.

    >>> json_path(("a", 0, "b c"))
    '$.a[0]["b c"]'
    """
    return "$" + "".join(map(_step, path))


def _step(step: str | int) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if re.fullmatch(r"[A-Za-z_]\w*", step, re.ASCII) else f"[{shown(step)}]"


def _no_constant(word: str) -> Any:
    raise InputError(f"has the number {word}, which JSON does not have; write a finite number")


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise InputError(f"has the number {word[:20]}, which is beyond every float; write a finite number")
    return value
