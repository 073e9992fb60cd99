"""docs/diagnosis.md has the message of every fault that can be named, in its words."""

import ast
from pathlib import Path

import cpjax.crosscheck.diagnosis.words as words

PAGE = (Path(__file__).parents[2] / "docs" / "diagnosis.md").read_text()
FUNCTIONS = ("_sentence", "_global", "_mask", "_run", "_merge", "_extra")
LEAST = 9
"""Letters of a piece between two numbers from which on it is looked for."""


def pieces() -> list[str]:
    """What stands between the numbers in the messages, by the tables `texts` and `LOGITS` and the functions."""
    tree = ast.parse(Path(words.__file__).read_text())
    parts = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS]
    texts = [value for part in parts for node in ast.walk(part) if isinstance(node, ast.Dict) for value in node.values]
    texts += [node for part in parts for node in ast.walk(part) if isinstance(node, ast.Return)]
    constants = [node for text in texts for node in ast.walk(text) if isinstance(node, ast.Constant)]
    found = [node.value for node in constants if isinstance(node.value, str)]
    found += [piece for text in [*words.LOGITS.values(), *words.CUTS.values()] for piece in text.split("{")]
    trimmed = [piece.removeprefix(":g}").removeprefix("}").strip(" :;(),") for piece in found]
    return sorted({piece for piece in trimmed if len(piece) >= LEAST})


def test_the_page_has_the_words_of_every_message():
    found = pieces()
    assert len(found) > 50
    assert [piece for piece in found if piece not in PAGE] == []
