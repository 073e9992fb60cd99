"""What `make docs` builds is complete: every page has its place, every public name its entry. Sphinx is not needed."""

import ast
import importlib
import inspect
import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import cpjax
import cpjax.partition
import npu_backend
import npu_backend.emulation
import npu_backend.operators

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"

sys.path.append(str(SITE))
import docstrings  # noqa: E402
import pages  # noqa: E402

REFERENCE = "\n".join(path.read_text() for path in sorted((SITE / "reference").glob("*.rst")))


def files(page: str) -> list[Path]:
    return [path for ending in (".md", ".rst", ".ipynb") if (path := ROOT / f"{page}{ending}").exists()]


def test_every_page_is_listed_once():
    there = [
        *(ROOT.glob("*.md")),
        *((ROOT / "docs").glob("*.md")),
        *((ROOT / "notebooks").glob("*.ipynb")),
        *((SITE / "reference").glob("*.rst")),
    ]
    named = sorted(pages.EVERY)
    assert named == sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in there)
    assert all(len(files(page)) == 1 for page in named)


BOOK = list(pages.SECTIONS["The book"])


def markdown(page: str) -> list[str]:
    """The text cells of a chapter."""
    cells = json.loads(files(page)[0].read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def title(page: str) -> str:
    """Number and words of a chapter's title."""
    return markdown(page)[0].split("\n")[0].removeprefix("# ")


def test_the_book_is_in_order():
    assert sorted(BOOK) == BOOK
    for number, page in enumerate(BOOK):
        assert page.startswith(f"notebooks/{number:02}-")
        assert re.fullmatch(rf"{number}\. \S.*", title(page))


@pytest.mark.parametrize("page", BOOK)
def test_a_chapter_ends_with_links_to_its_neighbours(page):
    number = BOOK.index(page)
    others = {"Previous": number - 1, "Next": number + 1}
    links = [
        f"{word}: [{title(BOOK[other])}]({BOOK[other].removeprefix('notebooks/')}.ipynb)"
        for word, other in others.items()
        if 0 <= other < len(BOOK)
    ]
    contents = "[Contents](../docs/README.md#the-book)"
    links.insert(0 if number == 0 else 1, contents)
    assert markdown(page)[-1] == " · ".join(links)
    assert "## The book\n" in (ROOT / "docs" / "README.md").read_text()


@pytest.mark.parametrize("page", BOOK)
def test_a_chapter_has_exercises_with_solutions(page):
    text = "\n".join(markdown(page))
    exercises = text[text.index("## Exercises") :]
    assert re.search(r"(?m)^1\. ", exercises)
    assert re.search(r"(?m)^2\. ", exercises)
    assert "<summary>Solutions</summary>" in text
    assert text.count("<details>") == text.count("</details>") == 1


def test_the_contents_list_every_chapter():
    linked = re.findall(r"(?m)^\| \[([^]]+)\]\(\.\./(notebooks/.+)\.ipynb\)", (ROOT / "docs" / "README.md").read_text())
    assert linked == [(title(page), page) for page in BOOK]


def test_the_index_lists_every_page_of_docs():
    linked = re.findall(r"(?m)^\| \[[\w-]+\.md\]\(([\w-]+)\.md\)", (ROOT / "docs" / "README.md").read_text())
    assert sorted(linked) == sorted(path.stem for path in (ROOT / "docs").glob("*.md") if path.stem != "README")


@pytest.mark.parametrize("page", BOOK)
def test_links_of_notebooks_lead_somewhere(page):
    path = files(page)[0]
    links = re.findall(r"\]\(([^)#\s]+)", "\n".join(markdown(page)))
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]


# Directive and the name it documents, and of a module whether all its members are shown.
ENTRIES = re.findall(r"(?m)^\.\. auto(\w+):: ([\w.]+)\n((?:   .*\n)*)", REFERENCE + "\n")
ALL_OF = {name for kind, name, options in ENTRIES if kind == "module" and re.search(r"(?m)^   :members:$", options)}
ONES = {name for kind, name, _ in ENTRIES if kind != "module"} | {
    f"{module}.{name}"
    for kind, module, options in ENTRIES
    if kind == "module"
    for names in re.findall(r"(?m)^   :members: (.+)$", options)
    for name in names.split(", ")
}

PUBLIC = {
    *((module, name) for module, names in cpjax._WHERE.items() for name in names),
    *(("cpjax.crosscheck", name) for name in ("Verdict", "GradientVerdict")),
    *(("cpjax.testing", name) for name in ("assert_attention", "message_of")),
    *(
        (package.__name__, name)
        for package in (cpjax.partition, npu_backend, npu_backend.emulation, npu_backend.operators)
        for name in package.__all__
    ),
}


def defined_in(module: str, name: str) -> str:
    """The module that defines a name which `module` may only hand on; constants do not know it themselves."""
    for node in ast.parse(inspect.getsource(importlib.import_module(module))).body:
        if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            return node.module or module
    return module


def test_public_names_are_found():
    assert {("cpjax.testing", "assert_attention"), ("cpjax.partition", "ORDERS")} <= PUBLIC
    assert {f"cpjax.deepseek.{path.stem}" for path in (ROOT / "cpjax" / "deepseek").glob("[!_]*.py")} <= ALL_OF
    exported = set(re.findall(r"import \w+ as (\w+)", (ROOT / "cpjax" / "crosscheck" / "__init__.py").read_text()))
    assert exported == {name for module, name in PUBLIC if module == "cpjax.crosscheck"}


def test_every_package_is_named():
    packages = {f"cpjax.{path.parent.name}" for path in (ROOT / "cpjax").glob("*/__init__.py")}
    assert {"cpjax", "npu_backend", *packages} <= {name for kind, name, _ in ENTRIES if kind == "module"}


@pytest.mark.parametrize(("module", "name"), sorted(PUBLIC), ids=lambda word: word)
def test_a_public_name_has_an_entry_and_a_docstring(module, name):
    found = getattr(importlib.import_module(module), name)
    home = defined_in(module, name)
    if inspect.ismodule(found):
        assert found.__name__ in ALL_OF
        assert found.__doc__
    elif inspect.isroutine(found) or inspect.isclass(found):
        assert found.__doc__
        # A package that lists its names shows the functions and classes among them, wherever they are defined.
        assert {f"{module}.{name}", f"{home}.{name}"} & ONES or {module, home} & ALL_OF
    else:
        assert f"{home}.{name}" in ONES or home in ALL_OF
        assert name in documented_constants(home)


def documented_constants(module: str) -> set[str]:
    """Names that the module assigns and says something about on the line below."""
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    return {
        ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        for node, after in pairwise(body)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


@pytest.mark.parametrize("name", sorted(ONES | ALL_OF))
def test_an_entry_is_of_something(name):
    module, _, attribute = name.rpartition(".")
    assert name in ALL_OF or hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one |x| and a*b", r"one \|x\| and a\*b"),
        ("see `cpjax.mask`", r"see \ :py:obj:`cpjax.mask`\ "),
        ("(docs/trial.md)", "(:doc:`docs/trial.md </docs/trial>`)"),
        ("docs/of-another-project.md", "docs/of-another-project.md"),
        ("`[B, T]` floats", r"\ ``[B, T]``\  floats"),
    ],
)
def test_a_docstring_is_shown_as_it_reads(text, expected):
    assert docstrings.converted([text]) == [expected, ""]


def test_indented_text_and_tables_stand_as_they_are():
    assert docstrings.converted(["Sum.", "", "    a = |b|"]) == ["Sum.", "", "::", "", "        a = |b|", ""]
    table = ["one      first", "two      second"]
    assert docstrings.converted(table) == ["::", "", *("    " + line for line in table), ""]


def test_sections_are_left_to_napoleon():
    lines = ["Args:", "  x: an array", "", "  y: a number"]
    assert docstrings.converted(lines) == ["Args:", "  x: an array", "", "  y: a number", ""]
