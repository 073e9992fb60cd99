"""docs/mindie.md shows what the commands really print, docs/mindie-rules.md the rules that there really are."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from typer.main import get_command

from cpjax.mindie.commands import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "mindie.md").read_text()
RULES_PAGE = (ROOT / "docs" / "mindie-rules.md").read_text()
SHOWN = dict(re.findall(r"```console\n\$ cpjax mindie (.*)\n((?s:.*?))```", PAGE))


def printed(arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit):
        get_command(app).main(arguments.split())
    return "".join(line.rstrip() + "\n" for line in out.getvalue().rstrip().splitlines())


@pytest.mark.parametrize("command", SHOWN)
def test_the_page_shows_what_is_printed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    assert SHOWN[command] == printed(command)


def test_the_page_shows_some_commands():
    assert {command.split()[0] for command in SHOWN} == {"check", "ranks", "link", "enable"}


def test_the_page_has_all_rules():
    assert f"<!-- rules -->\n{printed('rules')}<!-- /rules -->" in RULES_PAGE


def test_the_python_on_the_page_runs_as_far_as_eight_devices_go(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n((?s:.*?))```", PAGE)
    names: dict = {}
    with pytest.raises(ValueError, match="has 16 cards but JAX sees 8 device"):
        exec(code, names)
    assert names["groups"](names["sizes"])["attn_cp"][:2] == [[0, 8], [1, 9]]
