"""What is installed: the wheel has what helps name, and the judge alone needs no more than docs/install.md lists."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_imports import MODULES, WITHOUT_JAX
from typer.main import get_command
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.errors import InputError
from cpjax.shared import write_shared

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "docs" / "install.md").read_text()
LIGHT = set(re.findall(r"(?m)^    pip install (numpy .*)$", PAGE)[0].split())
ALONE = (
    *WITHOUT_JAX,
    "cli",
    "shared",
    "mindie",
    "arrays",
    "mask",
    "precision",
    "attention",
    "dense",
    "inputs",
    "errors",
)


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports when it is imported: not those inside functions."""
    found = set()
    todo = list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found - sys.stdlib_module_names - {"cpjax"}


@pytest.mark.slow
def test_the_light_install_is_what_the_judge_imports():
    names = [name for name in MODULES if name.removeprefix("cpjax.").startswith(ALONE) and name != "cpjax.mindie.mesh"]
    found = set().union(*(imported_packages(MODULES[name]) for name in names))
    # Imported where they are used: templates of reports, tables, distributions.
    found |= {"jinja2", "rich", "scipy"}
    assert found - {"jax"} == LIGHT
    assert "jax" not in set().union(*(imported_packages(MODULES[name]) for name in names if "mindie" not in name))


def test_whatever_is_imported_is_a_dependency():
    required = {re.match(r"[\w-]+", line).group().replace("-", "_").lower() for line in PROJECT["dependencies"]}
    found = set().union(*(imported_packages(path) for name, path in MODULES.items() if name.startswith("cpjax")))
    # Optional ones. Triton comes with a CUDA build of torch; the one file with a Triton kernel is imported on a GPU.
    assert found - {"torch", "flax", "triton"} <= required
    here = [name for name, path in MODULES.items() if "triton" in imported_packages(path)]
    assert here == ["cpjax.trial.cuda.triton_flash"]
    assert required >= LIGHT


def test_license_and_metadata():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {PROJECT['version']}" in citation
    assert "license: Apache-2.0" in citation


ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "flax", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.process
def test_the_command_judges_where_jax_and_torch_cannot_be_imported(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}

    def cpjax(*arguments):
        line = [sys.executable, "-m", "cpjax", *map(str, arguments)]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    refused = subprocess.run([sys.executable, "-c", "import jax"], env=environment, capture_output=True, check=False)
    assert refused.returncode == 1
    shown = cpjax("judge-dump", "--help")
    assert shown.returncode == 0, shown.stderr
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 32, 2, 16)).astype(np.float32)
    p = np.tril(np.exp(np.einsum("btnh,bsnh->bnts", x, x) / 4))
    out = np.einsum("bnts,bsnh->btnh", p / p.sum(axis=3, keepdims=True), x)
    for name, array in {"x": x, "right": out, "wrong": 1.01 * out}.items():
        np.save(tmp_path / f"{name}.npy", array.astype(np.float32))
    arrays = ("--query", "x.npy", "--key", "x.npy", "--value", "x.npy", "--scale", "0.25", "--causal")
    right = cpjax("judge-dump", *arrays, "--out", "right.npy", "--layout-of", "bsnd")
    assert right.returncode == 0, right.stdout + right.stderr
    wrong = cpjax("judge-dump", *arrays, "--out", "wrong.npy", "--layout-of", "bsnd", "--report", "page")
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    assert "WRONG" in wrong.stdout
    assert (tmp_path / "page" / "index.html").exists()
    assert cpjax("cases", "cases").returncode == 0
    checked = cpjax("mindie", "check", ROOT / "examples" / "deepseek-r1-cp2.json")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def named_files() -> set[str]:
    """Files under examples/ and docs/ that helps name."""

    def texts(command):
        yield " ".join(filter(None, (command.help, command.epilog, *(getattr(p, "help", "") for p in command.params))))
        for below in getattr(command, "commands", {}).values():
            yield from texts(below)

    return set(re.findall(r"(?:examples|docs)/[\w./-]*\w", " ".join(texts(get_command(app)))))


def test_what_helps_name_is_written_by_the_command(tmp_path):
    assert {"examples/deepseek-r1-cp2.json", "docs/precision.md"} <= named_files()
    run = CliRunner().invoke(app, ["examples", str(tmp_path / "new")])
    assert run.exit_code == 0, run.output
    assert not [name for name in named_files() if not (tmp_path / "new" / name).is_file()]
    assert len(run.output.splitlines()) > 20
    again = CliRunner().invoke(app, ["examples", str(tmp_path / "new")])
    assert (again.exit_code, again.stdout) == (2, "")
    assert "nothing is overwritten" in again.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The sdist and the wheel made of it, as `make dist` makes them."""
    folder = tmp_path_factory.mktemp("dist")
    line = [sys.executable, "-P", "-m", "build", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        message = f"NOT TESTED, the wheel cannot be built: {(run.stdout + run.stderr)[-300:]}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.mark.wheel
def test_the_wheel_has_what_helps_name_and_every_module(dist):
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"cpjax-{PROJECT['version']}.dist-info/METADATA").decode()
    for name, source in MODULES.items():
        assert str(source.relative_to(ROOT)) in names, name
    assert {f"cpjax/data/{name}" for name in named_files()} <= names
    templates = {f"cpjax/crosscheck/report/templates/{path.name}" for path in
                 (ROOT / "cpjax/crosscheck/report/templates").iterdir()}  # fmt: skip
    assert templates | {"cpjax/mindie/deepseek-r1-cp2.json", "cpjax/py.typed", "cpjax/__init__.pyi"} <= names
    assert f"cpjax-{PROJECT['version']}.dist-info/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert not [name for name in names if name.startswith(("tests/", "notebooks/"))]


@pytest.mark.wheel
def test_the_wheel_works_alone(dist, tmp_path):
    """Unpacked, with the dependencies of this environment and nothing of the checkout."""
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for words in (
        ["examples", "files"],
        ["cases", "cases"],
        ["mindie", "check", "files/examples/deepseek-r1-cp2.json"],
    ):
        line = [sys.executable, "-P", "-m", "cpjax", *words]
        run = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "files" / "docs" / "formats.md").exists()
    where = [sys.executable, "-P", "-c", "import cpjax; print(cpjax.__file__)"]
    run = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(str(tmp_path))


@pytest.mark.wheel
def test_the_sdist_has_the_tests_and_the_licence(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CITATION.cff", "README.md", "pyproject.toml", "tests/conftest.py", "docs/install.md"} <= names


def test_the_shared_files_are_those_of_the_checkout(tmp_path):
    written = write_shared(tmp_path / "new")
    for path in written:
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path / "new")).read_bytes()


def test_half_of_the_shared_files_are_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("cpjax.shared.FOLDERS", ("examples", "nowhere"))
    with pytest.raises(InputError, match="cannot be written"):
        write_shared(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
