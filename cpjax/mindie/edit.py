"""Change single values in a JSON text, and leave every other byte as it is."""

import json
import re
from typing import Any

from cpjax.mindie import json_text
from cpjax.mindie.config import ConfigFile
from cpjax.mindie.json_text import Path, Span

_MEMBER = re.compile(r'(?P<before>\s*)"(?:[^"\\]|\\.)*"(?P<colon>\s*:\s*)', re.DOTALL)


def with_value(file: ConfigFile, text: str, path: Path, value: Any) -> str:
    """The text with the value at `path` replaced, or the key added; objects that are missing are made.

    `text` is `file.text`, or a result of this function; `path` starts at the root of the document, and everything above
    its last existing step must be an object.
    """
    spans = _spans(file, text)
    if path in spans:
        start, end = spans[path]
        return text[:start] + json.dumps(value) + text[end:]
    depth = next(n for n in range(len(path) - 1, -1, -1) if path[:n] in spans)
    for step in reversed(path[depth + 1 :]):
        value = {step: value}
    return _with_member(text, spans, path[:depth], str(path[depth]), value)


def with_number(file: ConfigFile, text: str, path: Path, key: str, number: int) -> str:
    """The same for a number inside the string at `path`, which holds JSON itself: only its digits are changed."""
    start, end = _spans(file, text)[path]
    changed = re.sub(rf'(\\"{key}\\"\s*:\s*)-?\d+', rf"\g<1>{number}", text[start:end])
    return text[:start] + changed + text[end:]


def _spans(file: ConfigFile, text: str) -> dict[Path, Span]:
    """Where each value stands in the text itself, with its byte-order mark and without the braces of a fragment."""
    shift = file.shift
    return {path: (start + shift, end + shift) for path, (start, end) in json_text.spans(file.as_json(text)).items()}


def _with_member(text: str, spans: dict[Path, Span], parent: Path, key: str, value: Any) -> str:
    """A new member after the last one, with the space and the colon of the last one."""
    start, end = spans[parent]
    members = sorted(span for path, span in spans.items() if path[:-1] == parent and len(path) == len(parent) + 1)
    if not members:
        return text[: start + 1] + f"{json.dumps(key)}: {json.dumps(value)}" + text[end - 1 :]
    opened = text.index(",", members[-2][1]) if len(members) > 1 else start
    last = _MEMBER.fullmatch(text, opened + 1, members[-1][0])
    before, colon = (last["before"], last["colon"]) if last else (" ", ": ")
    at = members[-1][1]
    return text[:at] + f",{before}{json.dumps(key)}{colon}{json.dumps(value)}" + text[at:]
