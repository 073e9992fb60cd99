"""Imports go downwards and do no work, neither half imports the other, what judges needs no JAX, examples run."""

import ast
import doctest
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The order of the rooms, from the ground up. A room is a sub-package, or a file that stands in none; a file imports
# from its own room and from layers below, never from another room of its own layer. Imports inside functions count.
# A package's `__init__.py` that only speaks for its rooms (`cpjax.crosscheck`) is a room too: Python runs it first,
# but that is not an import that anybody wrote.
LAYERS = [
    [
        *("cpjax", "cpjax.errors", "cpjax.deepseek", "cpjax.mesh", "cpjax.rounding", "cpjax.wording"),
        *("cpjax.crosscheck.exact", "cpjax.deepseek.matrix"),
    ],
    [
        *("cpjax.arrays", "cpjax.mask", "cpjax.precision"),
        *("cpjax.deepseek.config", "cpjax.deepseek.quantized", "cpjax.deepseek.description"),
        "cpjax.deepseek.tokenizer",
    ],
    [
        *("cpjax.partial", "cpjax.partition", "cpjax.dense", "cpjax.inputs"),
        *("cpjax.deepseek.quantized_linear", "cpjax.deepseek.quantized_cut", "cpjax.deepseek.quantizers"),
    ],
    ["cpjax.attention", "cpjax.deepseek.layout", "cpjax.deepseek.quantized_matrix"],
    ["cpjax.blocks", "cpjax.crosscheck.files", "cpjax.crosscheck.error_model"],
    [
        *("cpjax.exchange", "cpjax.mapping", "cpjax.mindie", "cpjax.shared"),
        *("cpjax.crosscheck.judging", "cpjax.crosscheck.conformance"),
    ],
    ["cpjax.checks", "cpjax.latent", "cpjax.plan", "cpjax.crosscheck.diagnosis", "cpjax.deepseek.rope"],
    [
        *("cpjax.parallel", "cpjax.decode", "cpjax.deepseek.attention"),
        *("cpjax.crosscheck.judge", "cpjax.crosscheck.gradients"),
    ],
    ["cpjax.crosscheck.layer", "cpjax.deepseek.moe", "cpjax.deepseek.watched"],
    ["cpjax.deepseek.model"],
    ["cpjax.deepseek.mtp", "cpjax.deepseek.cache", "cpjax.deepseek.quantized_ties"],
    ["cpjax.deepseek.names", "cpjax.deepseek.logit_error"],
    ["cpjax.deepseek.sources", "cpjax.deepseek.calibration"],
    ["cpjax.deepseek.checkpoint", "cpjax.deepseek.parallel"],
    [
        *("cpjax.deepseek.ahead", "cpjax.deepseek.draft", "cpjax.deepseek.handover", "cpjax.deepseek.module"),
        "cpjax.deepseek.quantized_checkpoint",
    ],
    ["cpjax.deepseek.generate", "cpjax.deepseek.layer_cases"],
    ["cpjax.deepseek.one_device"],
    ["cpjax.deepseek.simulate"],
    [
        *("cpjax.module", "cpjax.bench", "cpjax.inspect", "cpjax.testing"),
        *("cpjax.crosscheck", "cpjax.crosscheck.run", "cpjax.crosscheck.dumps"),
    ],
    ["cpjax.crosscheck.report", "cpjax.crosscheck.backends", "cpjax.trial"],
    ["cpjax.fingerprint"],
    ["cpjax.commands"],
    ["cpjax.cli"],
    ["cpjax.__main__"],
]
NPU_LAYERS = [
    ["errors", "schemas", "autoload", "progress", "contracts"],
    ["emulation", "files", "latent", "schedule", "sdk", "stamp"],
    ["vendor", "exchange", "packing"],
    ["", "operators", "prefix"],
    ["families"],
    ["shard", "decode_by_heads", "provenance"],
    ["ring", "decode"],
    ["profile", "ring_backward"],
    ["rank"],
    ["workers"],
    ["runner"],
    ["layer"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms} | {
    f"npu_backend.{room}".rstrip("."): level for level, rooms in enumerate(NPU_LAYERS) for room in rooms
}

# What the specification is made of; every public function of these has an example.
SPECIFICATION = (
    *("errors", "mask", "precision", "attention", "partial", "dense", "checks", "latent", "parallel", "decode"),
    *("module", "mesh", "blocks", "partition", "exchange"),
)
# Used inside the package only; their laws are tests of their own.
INNER = {
    "exchange.blocks": {"fold", "finished", "delivered", "pieces", "to_next", "to_previous"},
    "checks": {
        *("check_axes", "check_kernel", "check_mesh", "check_not_manual", "check_order", "check_packed"),
        *("check_precision", "check_scale", "check_sink", "checked_lengths", "current_mesh", "manual_axes", "ranks"),
    },
    "blocks.tiles": {"rounded_scale", "scores", "accumulate", "finish", "where_seen"},
    "blocks.tiles_backward": {"attend_backward"},
    "blocks.cudnn": {"attend_cudnn"},  # it needs a GPU
    "exchange.device": {"check_block"},
    "exchange.ring_backward": {"ring_backward"},
    "exchange.all_to_all": {"to_few_heads", "to_few_tokens"},
}
# One signature for all: the example is at `attention_on_device`, which calls them by name.
EXCHANGES = {"ring", "ring_both_ways", "gather", "pass_query", "all_to_all", "all_to_all_ring"}

# The one arrow between the halves: the file that goes over, and the words with which a family of the other refuses it.
SHARED = {
    ("cpjax.crosscheck.backends.npu", "npu_backend.errors.InputError"),
    ("cpjax.crosscheck.backends.npu", "npu_backend.families.FAMILIES"),
    ("cpjax.crosscheck.backends.npu", "npu_backend.files.read_case"),
    ("cpjax.crosscheck.backends.npu", "npu_backend.shard.check_computable"),
}
# What judges, so that it can live on a host where JAX cannot be had.
WITHOUT_JAX = (
    "partition",
    "testing",
    *(f"crosscheck.{room}" for room in ("exact", "files", "error_model", "judging", "diagnosis", "judge", "gradients")),
    *(f"crosscheck.{room}" for room in ("conformance", "dumps", "layer", "run", "report")),
)


def modules() -> dict[str, Path]:
    """Every module of both halves, by name."""
    found = {}
    for half in ("cpjax", "npu_backend"):
        for path in sorted((ROOT / half).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(source: str, own_package: str = "") -> Iterator[str]:
    """All names that a source imports, in full, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = own_package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            yield from (".".join(filter(None, (base, node.module, alias.name))) for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            first = node.args[0] if node.args else None
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value)


def module_of(name: str) -> str | None:
    """The module of ours that an imported name is, or is in."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


def imports_of(name: str) -> set[str]:
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return {module for module in map(module_of, imported(path.read_text(), package)) if module} - {name}


IMPORTS = {name: imports_of(name) for name in MODULES}


def room_of(module: str) -> str:
    """The sub-package of a module, or itself."""
    parts = module.split(".")
    depth = 3 if parts[:2] in (["cpjax", "crosscheck"], ["cpjax", "deepseek"]) else 2
    return ".".join(parts[:depth])


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\ndef f():\n from c import d\n from . import e\n from .g import h\n import_module('i.j')"
    assert set(imported(source, "p.q")) == {"a.b", "c.d", "p.q.e", "p.q.g.h", "i.j"}


def test_the_walk_finds_what_python_finds():
    """No folder without `__init__.py`, which the walk of files would see and a wheel would not, or the reverse."""
    assert len(MODULES) > 200
    for name, path in MODULES.items():
        assert (path.parent / "__init__.py").exists(), name


def test_no_modules_import_each_other():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_every_room_has_its_place():
    assert set(map(room_of, MODULES)) == set(LEVEL)
    assert len(LEVEL) == sum(map(len, LAYERS + NPU_LAYERS)), "a room that stands twice"


def test_no_import_goes_upwards():
    upwards = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others)
        if name.split(".")[0] == other.split(".")[0]
        and room_of(name) != room_of(other)
        and LEVEL[room_of(other)] >= LEVEL[room_of(name)]
    ]
    assert upwards == []


def test_neither_half_imports_the_other():
    across = {
        (name, what)
        for name, path in MODULES.items()
        for what in imported(path.read_text(), name)
        if {what.split(".")[0], name.split(".")[0]} == {"cpjax", "npu_backend"}
    }
    assert across == SHARED


# At import -----------------------------------------------------------------------------------------------------------

# Packages that importing nothing of ours needs: they are extras (docs/design.md), or slow and used in one function.
LAZY = ("torch", "flax", "matplotlib", "pandas", "scipy.stats", "scipy.sparse", "scipy.optimize")
NEEDS_AN_EXTRA = {"cpjax.module", "cpjax.deepseek.module", "cpjax.trial.activations"}
NEEDS_TRITON = {"cpjax.trial.cuda.triton_flash"}
RUNS = {name for name in MODULES if name.endswith("__main__")}


def says(code: str) -> str:
    """What a fresh process prints."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_importing_starts_no_backend_and_loads_no_extra():
    """Of all modules of the specification and the instrument, in one process."""
    names = [name for name in MODULES if name.startswith("cpjax") and not name.startswith("cpjax.trial")]
    code = f"""
import importlib, sys
for name in {sorted(set(names) - NEEDS_AN_EXTRA - RUNS)}:
    importlib.import_module(name)
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), [name for name in {LAZY} if name in sys.modules])
"""
    assert says(code).split(maxsplit=1) == ["False", "[]\n"]


NO_JAX = """
import importlib, sys

class Absent:
    "Every import of these fails, as on a host that does not have them."
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for name in NAMES:
    importlib.import_module(name)
print(*[name for name in LAZY if name in sys.modules])

from pathlib import Path
import numpy as np
from cpjax.crosscheck.dumps.judge_dump import judge_dump
from cpjax.crosscheck.dumps.question import Question
from cpjax.crosscheck.files.case import gaussian_case, read_case, write_case
from cpjax.crosscheck.files.result import Result, write_result
from cpjax.crosscheck.report.page import write_report
from cpjax.crosscheck.run.session import judge_result

def attention(case, seen):
    score = case.scale * np.einsum("btnh,bsnh->bnts", *(x.astype(float) for x in (case.query, case.key)))
    p = np.where(seen, np.exp(score), 0.0)
    total = p.sum(axis=3)
    out = np.einsum("bnts,bsnv->btnv", p / total[..., None], case.value.astype(float))
    lse = np.log(total).swapaxes(1, 2).astype(np.float32)
    return Result("numpy", "flash_fp16", "unknown", out.astype(np.float16), lse, {})

folder = Path(FOLDER)
write_case(folder, gaussian_case("c", (64, 2, 2, 32, 32), cp=2, precision={}, seed=3, about={}))
case = read_case(folder / "c.safetensors")
right = np.tri(64, dtype=bool)
wrong = right.copy()
wrong[48:, 16:32] = False
judged = []
for name, seen in (("right", right), ("wrong", wrong)):
    (folder / name).mkdir()
    result = attention(case, seen)
    one = judge_result(case, write_result(folder / name, case, result), draw=True)
    print(name, one.outcome, "" if one.verdict is None else one.verdict.diagnosis, one.reasons)
    judged.append(one)
write_report(folder / "report", judged, "without JAX")
print(*[name for name in ABSENT + HEAVY if name in sys.modules])
for name in ("query", "key", "value"):
    np.save(folder / f"{name}.npy", getattr(case, name))
np.save(folder / "out.npy", attention(case, right).out)
query, key, value, out = (folder / f"{name}.npy" for name in ("query", "key", "value", "out"))
said = judge_dump(Question((query,), (key,), value, out, scale=case.scale, is_causal=True, layout="bsnd", cp=2))
print("dump", said.verdict.passed)

from cpjax.testing import assert_attention
assert_attention(case.query, case.key, case.value, attention(case, right).out, scale=case.scale, cp=2)
try:
    assert_attention(case.query, case.key, case.value, attention(case, wrong).out, scale=case.scale, cp=2)
except AssertionError as error:
    print("assert", str(error).splitlines()[0])
"""
ABSENT = ("jax", "jaxlib", "flax", "torch")
HEAVY = ("scipy.stats", "pandas", "matplotlib")


@pytest.mark.slow
def test_what_judges_works_without_jax(tmp_path):
    """Imported, and used: right and wrong results, with the reason, through case files, result files and a dump."""
    names = [name for name in MODULES if name.removeprefix("cpjax.").startswith(WITHOUT_JAX)]
    assert {name.removeprefix("cpjax.").rpartition(".")[0] for name in names} >= set(WITHOUT_JAX) - {
        "crosscheck.judge",
        "testing",
    }
    code = NO_JAX
    for word, what in {"NAMES": names, "LAZY": LAZY, "ABSENT": ABSENT, "HEAVY": HEAVY, "FOLDER": str(tmp_path)}.items():
        code = code.replace(word, repr(what))
    loaded, right, wrong, heavy, dump, asserted = says(code).splitlines()
    assert loaded == "", "loaded by importing the judge"
    assert right == "right pass [] []"
    assert wrong.startswith("wrong fail ['rank 0: key/value chunk 1 (of rank 1) never entered query chunk 3 ")
    assert heavy == "", "loaded by judging"
    assert dump == "dump True"
    assert asserted == "assert attention is WRONG: not what correct flash_fp16 arithmetic gives"


# Examples ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(MODULES) - RUNS - NEEDS_TRITON))
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


@pytest.mark.parametrize("name", [x for x in MODULES if x.removeprefix("cpjax.").split(".")[0] in SPECIFICATION])
def test_every_public_function_of_the_specification_has_an_example(name):
    module, short = importlib.import_module(name), name.removeprefix("cpjax.")
    if short.removeprefix("exchange.") in EXCHANGES:
        return
    for label, item in vars(module).items():
        if label.startswith("_") or not inspect.isfunction(item) or item.__module__ != name:
            continue
        assert item.__doc__, label
        assert ">>>" in item.__doc__ or label in INNER.get(short, set()), f"{name}.{label} has no example"
