"""Small changes of a file, each as the whole changed text; all else stands as it stood, comments and line breaks too.

Tests that read the source of a module (for a constant's comment, or to change one line themselves) find it as it was.
"""

import ast
from typing import NamedTuple

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
CALLS = {"maximum": "minimum", "max": "min", "exp": "exp2", "log": "log2", "min": "max"}


class Mutant(NamedTuple):
    """One change: the file, the line, what was done, the changed text, and the lines of the statement around it."""

    file: str
    line: int
    change: str
    text: str
    statement: tuple[int, ...]


def mutants(file: str, text: str) -> list[Mutant]:
    """Every mutant of a file; docstrings, annotations, messages and imports are left alone."""
    tree = ast.parse(text)
    alone = _left_alone(tree)
    around = _statements(tree)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.expr) or id(node) in alone:
            continue
        for change, apply, undo in _changes(node):
            apply()
            found.append(Mutant(file, node.lineno, change, _with(text, node), around[id(node)]))
            undo()
    return found


def _with(text: str, node: ast.expr) -> str:
    """The text with `node` as it is now where it stood; columns of the tree count bytes."""
    lines = text.encode().splitlines(keepends=True)
    first, last = node.lineno - 1, node.end_lineno - 1
    before, behind = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
    new = f"({ast.unparse(node)})".encode()
    return b"".join([*lines[:first], before, new, behind, *lines[last + 1 :]]).decode()


def _statements(tree: ast.AST) -> dict[int, tuple[int, ...]]:
    """Of each node, by its id: the lines of the innermost statement it is in; of a compound one those of its head."""
    lines = {}
    for statement in ast.walk(tree):  # from the outside to the inside
        if isinstance(statement, ast.stmt):
            body = getattr(statement, "body", None)
            end = body[0].lineno if body else statement.end_lineno + 1
            for node in ast.walk(statement):
                lines[id(node)] = tuple(range(statement.lineno, max(end, statement.lineno + 1)))
    return lines


def _left_alone(tree: ast.AST) -> set[int]:
    skip: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if text or isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
            parts = [node]
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            parts = [node.annotation]
        elif isinstance(node, ast.FunctionDef) and node.returns:
            parts = [node.returns]
        skip |= {id(part) for root in parts for part in ast.walk(root)}
    return skip


def _changes(node: ast.AST) -> list:
    """(description, apply, undo) for each way to change this node."""
    out = []

    def replace(what: str, owner, field: str, new) -> None:
        old = getattr(owner, field)
        out.append((what, lambda: setattr(owner, field, new), lambda: setattr(owner, field, old)))

    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        new = SWAPS[type(node.op)]
        replace(f"{type(node.op).__name__} -> {new.__name__}", node, "op", new())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        new = SWAPS[type(node.ops[0])]
        replace(f"{type(node.ops[0]).__name__} -> {new.__name__}", node, "ops", [new(), *node.ops[1:]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        replace("USub -> UAdd", node, "op", ast.UAdd())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        replace(f"{node.value} -> {node.value + 1}", node, "value", node.value + 1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        replace(f"{node.value} -> {not node.value}", node, "value", not node.value)
    if isinstance(node, ast.Attribute) and node.attr in CALLS:
        replace(f"{node.attr} -> {CALLS[node.attr]}", node, "attr", CALLS[node.attr])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("rounded", "merge"):
        kept = 0 if node.func.id == "rounded" else 1  # no rounding; only the newer partial
        out.append(_as_its_argument(node, kept))
    return out


def _as_its_argument(node: ast.Call, index: int):
    """`f(a, b)` becomes `(lambda *x: x[i])(a, b)`, so that the arguments are still evaluated."""
    name = ast.unparse(node.func)
    pick = ast.parse(f"(lambda *x: x[{index}])", mode="eval").body
    old = node.func
    return f"{name}(…) -> its argument {index}", lambda: setattr(node, "func", pick), lambda: setattr(node, "func", old)
