"""Imports go downwards, do no work, and every public function has an example that runs."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = [
    ["errors"],
    ["mask", "precision"],
    ["attention", "partial", "layout"],
    ["dense", "tiles", "schedule", "packing"],
    ["tiles_backward", "exchange.blocks"],
    [
        "exchange.ring",
        "exchange.ring_both_ways",
        "exchange.gather",
        "exchange.pass_query",
        "exchange.all_to_all",
        "exchange.decode",
    ],
    ["exchange.all_to_all_ring", "exchange.ring_backward"],
    ["exchange.device"],
    ["checks", "latent"],
    ["parallel", "decode"],
    ["module"],
]
FILES = [f"cpjax.{name}" for layer in LAYERS for name in layer]
# Used inside the package only; their laws are tests of their own.
INNER = {
    "blocks": {"fold", "finished", "pieces"},
    "checks": {"check_axes", "check_inputs", "check_mesh", "check_packed", "check_precision", "check_sink", "ranks"},
    "tiles": {"scores", "accumulate", "finish"},
    "tiles_backward": {"attend_backward"},
    "ring_backward": {"ring_backward"},
    "all_to_all": {"to_few_heads", "to_few_tokens"},
}
# One signature for all: the example is at `attention_on_device`, which calls them by name.
EXCHANGES = {"ring", "ring_both_ways", "gather", "pass_query", "all_to_all", "all_to_all_ring"}


def imported(name: str) -> set[str]:
    path = ROOT / (name.replace(".", "/") + ".py")
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module} & set(FILES)


@pytest.mark.parametrize("level", range(len(LAYERS)))
def test_a_file_imports_only_what_stands_below_it(level):
    below = {f"cpjax.{name}" for layer in LAYERS[:level] for name in layer}
    for name in LAYERS[level]:
        assert imported(f"cpjax.{name}") <= below | {"cpjax.partial" if name == "dense" else ""}, name


def test_importing_starts_no_backend_and_loads_no_torch():
    code = (
        "import sys, cpjax.parallel, cpjax.latent, cpjax.partition.packing, cpjax.partition.schedule;"
        "from jax._src import xla_bridge;"
        "print(xla_bridge.backends_are_initialized(), 'torch' in sys.modules, 'flax' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False", "False"]


@pytest.mark.parametrize("name", FILES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


@pytest.mark.parametrize("name", FILES)
def test_every_public_function_has_an_example(name):
    module, short = importlib.import_module(name), name.rsplit(".", 1)[1]
    if short in EXCHANGES:
        return
    for label, item in vars(module).items():
        if label.startswith("_") or not inspect.isfunction(item) or item.__module__ != name:
            continue
        assert item.__doc__, label
        assert ">>>" in item.__doc__ or label in INNER.get(short, set()), f"{name}.{label} has no example"
