"""Docstrings here are plain text, made to be read in an editor. This turns them into reStructuredText.

    backticks                         code, and a link where it is a name that the reference knows
    docs/formats.md                   a link to the page, if the site has it
    an indented block, a table        shown as it stands
    * | _ anywhere else               themselves

Google's sections (Args, Returns, Raises) are left to napoleon, which comes after. Nothing of Sphinx is imported:
tests/project/test_site.py tries this without it.
"""

import re
from typing import Any

import pages

SECTION = re.compile(r"(Args|Arguments|Attributes|Returns|Yields|Raises|Example|Examples|Note):$")
NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*(\(\))?")
PAGE = re.compile(r"\b(docs/[\w-]+)\.md\b")
COLUMNS = re.compile(r"\S {3,}\S")


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this. Napoleon's step has priority 500."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-process-docstring", _restore, priority=600)
    return {"parallel_read_safe": True}


def _process(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    # Both packages have an InputError.
    package = name.partition(".")[0]
    lines[:] = converted([re.sub(r"^( +)InputError:", rf"\1~{package}.errors.InputError:", line) for line in lines])
    if what in ("attribute", "data", "property"):
        # Of these napoleon takes the words before a colon for a type; here they are a sentence. It is shown nothing.
        _kept[:] = lines
        lines.clear()


_kept: list[str] = []


def _restore(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines.extend(_kept)
    _kept.clear()


def converted(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    found: list[str] = []
    for block, follows_section in _blocks(lines):
        indent = _indent(block[0])
        if block[0].lstrip().startswith(">>> "):
            found += [*block, ""]
        elif not follows_section and (indent >= 2 or (len(block) > 1 and all(map(COLUMNS.search, block)))):
            found += ["::", "", *("    " + line for line in block), ""]
        else:
            found += [*_listed(_inline("\n".join(block)).split("\n")), ""]
    return found


def _blocks(lines: list[str]) -> list[tuple[list[str], bool]]:
    """Paragraphs, each with whether it belongs to a section. Indented paragraphs in a row outside of one are joined."""
    blocks: list[tuple[list[str], bool]] = []
    section = False
    fresh = True
    for line in lines:
        if not line.strip():
            fresh = True
            continue
        if _indent(line) == 0:
            section = bool(SECTION.match(line))
        joined = fresh and blocks and not section and _indent(line) >= 2 and _indent(blocks[-1][0][0]) >= 2
        if joined and not blocks[-1][1]:
            blocks[-1][0].extend(["", line])
        elif fresh or (section and _indent(line) == 0):
            blocks.append(([line], section))
        else:
            blocks[-1][0].append(line)
        fresh = False
    return blocks


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _inline(text: str) -> str:
    """Code in backticks, links to pages, everything else literally."""
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(_code(part) if part.startswith("`") else _words(part) for part in parts)


def _words(part: str) -> str:
    return PAGE.sub(_page, re.sub(r"([\\*|_])", r"\\\1", part))


def _page(named: re.Match[str]) -> str:
    return f":doc:`{named[0]} </{named[1]}>`" if named[1] in pages.EVERY else named[0]


def _code(part: str) -> str:
    words = re.sub(r"\s+", " ", part.strip("`"))
    # A role must stand free: `\ ` is a separator that is not shown.
    return rf"\ :py:obj:`{words}`\ " if NAME.fullmatch(words) else rf"\ ``{words}``\ "


def _listed(lines: list[str]) -> list[str]:
    """A list begins after an empty line."""
    found: list[str] = []
    for line in lines:
        if re.match(r"\s*- ", line) and found and found[-1].strip() and not re.match(r"\s*(- |  )", found[-1]):
            found.append("")
        found.append(line)
    return found
