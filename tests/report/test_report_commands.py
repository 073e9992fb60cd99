"""--report by the real commands: a page that stands alone, whatever the verdict; nothing that is there is touched."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from html_page import Page

import cpjax
from cpjax.crosscheck.files.case import gaussian_case, write_case
from cpjax.crosscheck.files.result import Result, write_result
from cpjax.trial.emulators import PROFILES, attend
from cpjax.trial.problem import Problem

pytestmark = pytest.mark.process
ROOT = Path(cpjax.__file__).parents[1]


def cpjax_command(*arguments):
    line = [sys.executable, "-m", "cpjax", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`cases`, results that are `right` and `wrong` (the scale is 1 % off), and the same as dumps."""
    folder = tmp_path_factory.mktemp("files")
    case = gaussian_case("c", (64, 2, 2, 16, 16), cp=2, precision={}, seed=3, about={})
    case = write_case(folder / "cases", case)
    p = Problem(case.query, case.key, case.value, case.scale, is_causal=True, cp=2)
    for name, factor in (("right", 1.0), ("wrong", 1.01)):
        out, lse = attend(replace(p, scale=p.scale * factor), PROFILES["flash_fp16"], "ring")
        write_result(folder / name / "them", case, Result("them", "flash_fp16", "ring", out, lse, {"kernel": "<b>1"}))
        np.save(folder / f"{name}.npy", out)
    for name in ("query", "key", "value"):
        np.save(folder / f"{name}.npy", getattr(case, name))
    return folder


def words_of(files, command, result):
    """The command line that judges this result."""
    if command == "judge":
        return ["judge", files / "cases", files / result]
    arrays = [word for name in ("query", "key", "value") for word in (f"--{name}", files / f"{name}.npy")]
    rest = ["--scale=0.25", "--causal", "--layout-of=bsnd", "--cp=2", "--order=ring"]
    return ["judge-dump", *arrays, "--out", files / f"{result}.npy", *rest]


@pytest.mark.parametrize("command", ["judge", "judge-dump"])
@pytest.mark.parametrize(("result", "status"), [("right", 0), ("wrong", 1)])
def test_a_page_is_written_whatever_the_verdict(files, tmp_path, command, result, status):
    run = cpjax_command(*words_of(files, command, result), "--report", tmp_path / "deep" / "r")
    assert run.returncode == status, run.stderr
    assert [path.name for path in (tmp_path / "deep" / "r").iterdir()] == ["index.html"]
    assert f"report: {tmp_path / 'deep' / 'r' / 'index.html'}" in run.stderr
    page = Page((tmp_path / "deep" / "r" / "index.html").read_text(encoding="utf-8"))
    page.assert_alone()
    assert page.says("NOT PASSED") == (result == "wrong")
    assert page.says("the scale is 1.0") == (result == "wrong")
    assert page.says("<b>1") == (command == "judge")


def test_crosscheck_writes_one_for_what_it_computed(files, tmp_path):
    pytest.importorskip("torch", reason="the backend sdpa is PyTorch")
    line = ["crosscheck", "--cases", files / "cases", "--backend", "sdpa", "--report", tmp_path / "r"]
    run = cpjax_command(*line)
    assert run.returncode == 0, run.stderr
    page = Page((tmp_path / "r" / "index.html").read_text(encoding="utf-8"))
    page.assert_alone()
    assert page.says("PyTorch SDPA")
    before = (tmp_path / "r" / "index.html").read_bytes()
    again = cpjax_command(*line, "--keep", tmp_path / "kept")
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (2, "", 1)
    assert "nothing is overwritten" in again.stderr
    assert (tmp_path / "r" / "index.html").read_bytes() == before
    assert not (tmp_path / "kept").exists()  # refused before anything was computed


@pytest.mark.parametrize("command", ["judge", "judge-dump"])
@pytest.mark.parametrize("there", ["folder", "file"])
def test_what_is_there_is_not_touched(files, tmp_path, command, there):
    target = tmp_path / "r"
    if there == "folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.write_text("mine")
    run = cpjax_command(*words_of(files, command, "right"), "--report", target)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith(f"cpjax: --report {target} is there already")
    assert (target / "mine" if there == "folder" else target).read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == (2 if there == "folder" else 1)


def test_a_result_that_is_none_is_on_the_page_too(files, tmp_path):
    (tmp_path / "them").mkdir()
    (tmp_path / "them" / "c.safetensors").write_bytes(b"\0" * 100)
    run = cpjax_command("judge", files / "cases", tmp_path, "--report", tmp_path / "r")
    assert run.returncode == 1, run.stderr
    page = Page((tmp_path / "r" / "index.html").read_text(encoding="utf-8"))
    page.assert_alone()
    assert page.says("ERROR")
    assert page.says("is no whole safetensors file")
