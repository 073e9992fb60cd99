"""Every constant of judge and diagnosis stands in the docs, with value and kind; no number hides in a formula."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CROSSCHECK = ROOT / "cpjax" / "crosscheck"
PAGES = {"verdict.md": ("exact", "error_model", "judging", "layer"), "diagnosis.md": ("diagnosis",)}
KINDS = {"derived", "fitted", "chosen", "cost", "words"}
FILES = [path for rooms in PAGES.values() for room in rooms for path in sorted((CROSSCHECK / room).glob("*.py"))]
# Of formulas: signs, squares, halves, 1/12 of a uniform error's variance, 9 in Wilson and Hilferty's cube root, ln 10.
PLAIN = {-1, 0, 1, 2, 3, 0.5, 12} | {9, 10}
SHAPE = {4}
"""Dimensions of an array."""


def constants(path: Path) -> dict[str, float]:
    """The numbers that a module names."""
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    targets = [t for n in ast.parse(path.read_text()).body if isinstance(n, ast.Assign) for t in n.targets]
    names = [x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name) and x.id.isupper()]
    values = {name: getattr(module, name) for name in names}
    return {name: x for name, x in values.items() if isinstance(x, int | float) and abs(x) != float("inf")}


def documented(page: str) -> dict[tuple[str, str], tuple[float, str]]:
    """File and constant → value and kind, as the page's table says."""
    rows = re.findall(r"(?m)^\| `(\w+/\w+)` `(\w+)` \| (\S+) \| (\w+) \|", (ROOT / "docs" / page).read_text())
    return {(file, name): (_value(text), kind) for file, name, text, kind in rows}


def _value(text: str) -> float:
    base, power, exponent = text.partition("^")
    return float(base) ** float(exponent) if power else float(text)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_has_every_constant_and_no_other(page):
    there = {
        (f"{path.parent.name}/{path.stem}", name): value
        for path in FILES
        if path.parent.name in PAGES[page]
        for name, value in constants(path).items()
    }
    assert len(there) > 30
    written = documented(page)
    assert written.keys() == there.keys()
    for key, (value, kind) in written.items():
        assert value == pytest.approx(there[key], rel=1e-5), key  # as many digits as the page has
        assert kind in KINDS, key


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_number_without_a_name(path):
    tree = ast.parse(path.read_text())
    named = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    text = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    annotations = [x for node in ast.walk(tree) for x in _annotations(node)]
    free = {id(x) for part in [*named, *text, *annotations] for x in ast.walk(part)}
    numbers = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and id(node) not in free
    ]
    hidden = {(node.lineno, node.value) for node in numbers if node.value not in PLAIN | _allowed(path)}
    assert not hidden


def _allowed(path: Path) -> set[float]:
    if path.name == "problem.py":
        return SHAPE
    if path.name == "formats.py":
        return {11, -14, 65504.0, 8, -126, 24, 53, -1022, 0.0, 0x7FF, 52}  # what the formats are
    return {0b111} if path.name == "score_tests.py" else set()  # the last bits of an FP16 significand


def _annotations(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    if isinstance(node, ast.FunctionDef):
        found = [argument.annotation for argument in [*node.args.args, *node.args.kwonlyargs]]
        return [x for x in [*found, node.returns] if x is not None]
    return []
