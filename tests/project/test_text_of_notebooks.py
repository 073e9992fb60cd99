"""Every notebook has a text beside it with the same cells, so that a change can be read and reviewed."""

from pathlib import Path

import jupytext
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def test_no_text_is_without_its_notebook():
    assert sorted(path.stem for path in (NOTEBOOKS / "text").iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_text_has_the_notebook_s_cells(name):
    text = jupytext.read(NOTEBOOKS / "text" / f"{name}.py")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    both = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (text, notebook)]
    assert both[0] == both[1], "make fresh takes over the newer of the two"
