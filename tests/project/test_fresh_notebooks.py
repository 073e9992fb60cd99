"""`make notebooks` finds outputs that are stale; every chapter is stored with outputs, and linked to its neighbours."""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))
import fresh_notebooks  # noqa: E402


def picture(*frames: np.ndarray) -> str:
    """Levels `[height, width, 3]` as the text of a PNG, an animated one if there are several."""
    images = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    images[0].save(file, "PNG", save_all=len(images) > 1, append_images=images[1:])
    return base64.b64encode(file.getvalue()).decode()


def drawing(size: tuple[int, int] = (60, 80), line: int | None = 20) -> np.ndarray:
    """A white picture with a black line of one pixel."""
    levels = np.full((*size, 3), 255, np.uint8)
    if line is not None:
        levels[:, line] = 0
    return levels


def said(text: str, name: str = "stdout"):
    return new_output("stream", name=name, text=text)


def shown(*frames: np.ndarray):
    return new_output("display_data", data={"image/png": picture(*frames), "text/plain": "<Figure>"})


def slider(*frames: np.ndarray, words: str = "step"):
    """Pictures inside HTML."""
    images = (f'<img alt="{words}" src="data:image/png;base64,{picture(frame)}">' for frame in frames)
    return new_output("display_data", data={"text/html": "".join(images)})


def found(stored: list, fresh: list, tags: tuple[str, ...] = ()) -> list[str]:
    cells = [new_code_cell("1", outputs=outputs, metadata={"tags": list(tags)}) for outputs in (stored, fresh)]
    return list(fresh_notebooks.differences_of(*cells, is_same_processor=True))


ERROR = new_output("error", ename="ValueError", evalue="two ranks", traceback=[])
SAME = [said("z 1.00\n"), shown(drawing())]
STALE = {
    "a sentence": ([said("z 1.00\nright\n")], [said("z 1.00\nwrong\n")], "stored 'right', fresh 'wrong'"),
    "a digit": ([said("z 1.00\n")], [said("z 1.01\n")], "stdout differs"),
    "the last line": ([said("a\nb\n")], [said("a\n")], "stored 'b', fresh '(no line)'"),
    "white space at the end": ([said("a\n")], [said("a")], "the ends of their lines"),
    "a missing picture": ([said("a")], [said("a"), shown(drawing())], "a picture (image/png) is not stored"),
    "a picture too many": ([shown(drawing())], [], "a picture (image/png) is stored, and no longer made"),
    "an extra output": ([said("a")], [said("a"), said("warning", "stderr")], "stderr 'warning' is not stored"),
    "another stream": ([said("a")], [said("a", "stderr")], "stdout 'a' is stored; it is stderr 'a' now"),
    "an error": ([said("a")], [said("a"), ERROR], "raised ValueError: two ranks"),
    "an error that is stored": ([ERROR], [ERROR], "raised ValueError: two ranks"),
    "no output at all": ([], SAME, "is not stored"),
    "a moved line": ([shown(drawing(line=20))], [shown(drawing(line=21))], "columns 20 to 21 of 60 × 80"),
    "a missing line": ([shown(drawing(line=None))], [shown(drawing())], "columns 20 to 20 of 60 × 80"),
    "another size": ([shown(drawing())], [shown(drawing((60, 81)))], "fresh (1, 60, 81)"),
    "a frame too few": ([shown(drawing(), drawing(line=30))], [shown(drawing())], "stored (frames, height, width) (2,"),
    "another second frame": (
        [shown(drawing(), drawing(line=30))],
        [shown(drawing(), drawing(line=40))],
        "columns 30 to 40",
    ),
    "another second picture of a slider": (
        [slider(drawing(), drawing(line=30))],
        [slider(drawing(), drawing(line=40))],
        "columns 30 to 40",
    ),
    "a picture too few of a slider": ([slider(drawing(), drawing())], [slider(drawing())], "'<img alt="),
    "another word beside a slider": ([slider(drawing())], [slider(drawing(), words="cp")], 'alt="cp"'),
}


@pytest.mark.parametrize("name", STALE)
def test_what_is_stale_is_found(name):
    stored, fresh, expected = STALE[name]
    assert expected in "; ".join(found(stored, fresh))


def test_equal_outputs_are_fresh():
    assert found(SAME, SAME) == []
    assert found([], []) == []


def test_where_a_stream_is_cut_does_not_matter():
    assert found([said("one\n"), said("two\n")], [said("one\ntwo\n")]) == []


def test_another_shade_at_an_edge_is_alike():
    shaded = drawing()
    shaded[:, 20] = 30
    assert found([shown(drawing())], [shown(shaded)]) == []
    assert found([slider(drawing())], [slider(shaded)]) == []


def test_of_a_cell_that_varies_numbers_may_differ_and_words_may_not():
    old, new = [said("reading: 1.5 s, JAX 0.10.2\n")], [said("reading: 12.25 s, JAX 0.10.3\n")]
    assert found(old, new)
    assert found(old, new, ("varies",)) == []
    assert found(old, [said("writing: 1.5 s, JAX 0.10.2\n")], ("varies",))
    assert found(old, [said("reading: s, JAX 0.10.2\n")], ("varies",))
    assert found([shown(drawing())], [shown(drawing(line=30))], ("varies",)) == []
    assert found([shown(drawing())], [shown(drawing((60, 81)))], ("varies",))


def differ(tag: str, is_same_processor: bool, fresh: list) -> list[str]:
    """What is found in a cell that stores one line."""
    stored = [said("tile: 512\n")]
    cells = [
        new_code_cell("1", outputs=outputs, metadata={"tags": [tag] if tag else []}) for outputs in (stored, fresh)
    ]
    return list(fresh_notebooks.differences_of(*cells, is_same_processor=is_same_processor))


def test_what_kernels_of_one_processor_do_is_compared_on_such_a_processor():
    assert differ("processor", True, [said("tile: 256\n")])
    assert differ("processor", False, [said("no tile\n")]) == []
    assert differ("processor", False, [])  # but there must be an output
    assert differ("processor", False, [ERROR])


def test_numbers_may_differ_on_another_processor():
    assert differ("", True, [said("tile: 256\n")])
    assert differ("", False, [said("tile: 256\n")]) == []
    assert differ("", False, [said("splits: 256\n")])
    assert differ("", False, [ERROR])


def notebook(*outputs: list, tags: tuple[str, ...] = ()):
    cells = [
        new_code_cell("1", outputs=one, execution_count=number, metadata={"tags": list(tags)})
        for number, one in enumerate(outputs, 1)
    ]
    return new_notebook(cells=[new_markdown_cell("# Title"), *cells])


def test_cells_are_named_by_their_place():
    stored, fresh = notebook([said("a")], [said("b")]), notebook([said("a")], [said("c")])
    assert [cell for cell, _ in fresh_notebooks.differences(stored, fresh)] == [2]


def test_after_an_error_nothing_is_compared():
    fresh = notebook([ERROR], [])
    assert [cell for cell, _ in fresh_notebooks.differences(notebook([said("a")], [said("b")]), fresh)] == [1]


def test_a_cell_that_was_never_executed_is_found():
    stored = notebook([])
    stored.cells[1].execution_count = None
    assert "number None of the run" in str(list(fresh_notebooks.differences(stored, notebook([]))))


def test_only_stale_cells_are_replaced():
    shade = drawing()
    shade[:, 20] = 30
    stored, fresh = notebook([shown(drawing())], [said("old")]), notebook([shown(shade)], [said("new")])
    kept = stored.cells[1].outputs
    fresh_notebooks.replace_stale(stored, fresh)
    assert stored.cells[1].outputs == kept
    assert stored.cells[2].outputs == [said("new")]
    assert list(fresh_notebooks.differences(stored, fresh)) == []


@pytest.mark.process
def test_the_command_finds_and_mends_a_stale_notebook(tmp_path, capsys):
    path = tmp_path / "one.ipynb"
    cells = [new_markdown_cell("# Title"), new_code_cell("print(6 * 7)", outputs=[said("41\n")], execution_count=1)]
    nbformat.write(new_notebook(cells=cells), path)
    assert fresh_notebooks.main([str(path)]) == 1
    printed = capsys.readouterr()
    assert "one.ipynb, cell 1: stdout differs: stored '41', fresh '42'" in printed.out
    assert "make fresh" in printed.err
    assert fresh_notebooks.main(["--write", str(path)]) == 0
    assert fresh_notebooks.main([str(path)]) == 0
    path.write_text(path.read_text().replace("6 * 7", "6 / 0"))
    assert fresh_notebooks.main([str(path)]) == 1
    assert "raised ZeroDivisionError: division by zero" in capsys.readouterr().out
    before = path.read_text()
    assert fresh_notebooks.main(["--write", str(path)]) == 1
    assert path.read_text() == before


CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_stored_as_it_was_executed_once(path):
    """What can be seen without executing it; `make notebooks` does the rest."""
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
