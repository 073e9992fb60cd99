"""tools/mutants.py: each mutant is one change, and all other text stands as it stood."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from mutants import mutants

TEXT = '''"""A number: 1."""
LIMIT = 6.0  # half of twelve; δ stands before a column


def inside(δ: int = 3, *, strict: bool = True) -> bool:
    """Not 4."""
    if δ < 0:
        raise ValueError(f"{δ} is below {0 + 0}")
    close = [
        one  # a comment inside a statement
        for one in (δ - 1, -δ)
        if one != 2 or strict
    ]
    return max(close) * 2 > LIMIT
'''


def changes():
    return [(one.line, one.change) for one in mutants("a.py", TEXT)]


@pytest.mark.parametrize("number", range(len(changes())), ids=[f"{line}: {change}" for line, change in changes()])
def test_a_mutant_differs_in_one_expression(number):
    one = mutants("a.py", TEXT)[number]
    before, after = (ast.dump(ast.parse(text), indent=1).splitlines() for text in (TEXT, one.text))
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert all(comment in one.text for comment in ("# half of twelve; δ", "# a comment inside", '"""Not 4."""'))


def test_what_is_changed_and_what_is_not():
    found = changes()
    assert (2, "6.0 -> 7.0") in found
    assert (5, "3 -> 4") in found
    assert (5, "True -> False") in found
    assert (11, "USub -> UAdd") in found
    assert (12, "Or -> And") in found
    assert (14, "Gt -> GtE") in found
    # Docstrings, and what a message says.
    assert not [line for line, _ in found if line in (1, 6, 8)]


def test_a_statement_has_all_its_lines_and_a_compound_one_those_of_its_head():
    of_line = {one.line: one.statement for one in mutants("a.py", TEXT)}
    assert of_line[12] == of_line[11] == (9, 10, 11, 12, 13)
    assert of_line[7] == (7,)
    assert of_line[5] == (5,)
