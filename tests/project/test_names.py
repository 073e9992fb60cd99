"""`import cpjax` offers the public names and loads none of them before it is asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cpjax

STUB = Path(cpjax.__file__).with_suffix(".pyi")


@pytest.mark.parametrize("name", cpjax.__all__)
def test_every_name_is_there(name):
    assert name in dir(cpjax)
    found = getattr(cpjax, name)
    assert getattr(found, "__module__", "cpjax").startswith("cpjax")


def test_type_checkers_are_told_the_same():
    nodes = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    said = {(node.module, alias.name) for node in nodes for alias in node.names if alias.asname == alias.name}
    assert said == {(module, name) for name, module in cpjax._MODULE.items()}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cpjax' has no attribute 'ring'"):
        cpjax.ring  # noqa: B018


def test_nothing_is_loaded_before_it_is_asked_for():
    code = """
import sys, cpjax
dir(cpjax)
print([name for name in sys.modules if name.split(".")[0] in ("cpjax", "jax", "numpy", "flax")])
cpjax.Zigzag, cpjax.Mask, cpjax.Computation, cpjax.judge
print([name for name in ("jax", "flax") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["['cpjax']", "[]"]
