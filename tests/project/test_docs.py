"""What the pages say is there, is there."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


# Pages, and whatever the sources say in docstrings, comments and strings.
SOURCES = [
    *(ROOT / name for name in ("Makefile", "pyproject.toml", "CHANGELOG.md")),
    *(
        path
        for folder in ("cpjax", "npu_backend", "tests", "tools", "examples")
        for path in (ROOT / folder).rglob("*.py")
    ),
]


def test_paths_that_pages_and_docstrings_name_exist():
    named = {
        path
        for page in PAGES + SOURCES
        for path in re.findall(r"(?<![\w./-])(?:tests|cpjax|npu_backend)/[\w/.-]*\.py\b", page.read_text())
    }
    assert {"tests/helpers/oracle.py", "cpjax/partition/schedule.py", "npu_backend/schedule.py"} <= named
    assert not {path for path in named if not (ROOT / path).exists()}


def test_tests_that_pages_name_exist():
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(files) == len(list((ROOT / "tests").rglob("test_*.py"))), "two files of one name"
    named = {name for page in PAGES for name in re.findall(r"`(?:[\w/]*/)?(test_\w+(?:\.py)?)`", page.read_text())}
    assert {"test_tiles.py", "test_misuse_is_refused_before_tracing"} <= named
    functions = {name for text in files.values() for name in re.findall(r"(?m)^def (test_\w+)", text)}
    assert named <= functions | set(files)


def test_make_targets_exist():
    named = set(re.findall(r"(?m)(?:`|^    )make ([a-z]+)", README + PAGES[1].read_text()))
    assert {"crosscheck", "test", "deep"} <= named
    assert named <= set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))


# In backticks, or on an indented line, with or without a prompt.
COMMANDS = sorted(set(re.findall(r"(?m)(?:`|^    (?:\$ )?)cpjax ((?:mindie )?[a-z]+)", README)))


def test_commands_are_found():
    assert {"crosscheck", "judge", "mindie check"} <= set(COMMANDS)


@pytest.mark.process
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    line = [sys.executable, "-m", "cpjax", *command.split(), "--help"]
    assert subprocess.run(line, cwd=ROOT, capture_output=True, check=False).returncode == 0


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_readme_has_examples():
    assert [len(doctest.DocTestParser().get_examples(block)) for block in BLOCKS] == [7, 11]


@pytest.mark.process
@pytest.mark.parametrize("block", BLOCKS, ids=["arrays", "JAX"])
def test_an_example_of_the_readme(block):
    code = (
        f"import doctest; test = doctest.DocTestParser().get_doctest({block!r}, {{}}, 'README', None, 0);"
        "raise SystemExit(doctest.DocTestRunner().run(test).failed)"
    )
    # A process of its own: it sets the number of devices, as a user would.
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


ATLAS = (ROOT / "docs" / "atlas.md").read_text()


@pytest.mark.parametrize("line", re.findall(r"(?m)^    (?:python -m|torchrun .*-m) npu_backend (.*)$", ATLAS))
def test_commands_for_an_atlas_host_are_understood(line):
    from npu_backend.__main__ import _arguments

    assert _arguments(line.split()).device == "npu"
