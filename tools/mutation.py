"""Mutation testing: `python tools/mutation.py --of specification --sample 150 --seed 0 [--json FILE]`.

A mutant is one small change of a file of the algorithm, or of the instrument that judges others (`--of instrument`),
made in a copy of the project; the tests of that file run on it in a fresh process. It is killed if a test fails. A
timeout is not a kill, and is listed apart. `--control` runs the unchanged project and a mutant that is known to be
equivalent: both must survive.

First the unchanged project runs the same tests and leaves its compiled programs on disk (JAX's compilation cache, whose
key is the program itself): a mutant compiles only what it changes. Mutants read that folder and never write it, so no
mutant sees another's.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
# The tests that speak about a file, by their paths below tests/, the quickest first; pytest stops at the first failure.
EXCHANGE = ["spec/test_schedule.py", "spec/test_exchange.py"]
SPECIFICATION = {
    "mask.py": ["spec/test_mask.py", "spec/test_tiles.py"],
    "partial.py": ["spec/test_partial.py", "spec/test_precision.py", "spec/test_backward.py"],
    "precision.py": ["spec/test_precision.py"],
    "rounding.py": ["spec/test_precision.py"],
    "blocks/tiles.py": ["spec/test_precision.py", "spec/test_tiles.py"],
    "blocks/tiles_backward.py": ["spec/test_backward.py"],
    "partition/sequence.py": ["spec/test_partition.py", "spec/test_schedule.py"],
    "partition/striped.py": ["spec/test_partition.py", "spec/test_schedule.py"],
    "partition/zigzag.py": ["spec/test_partition.py", "spec/test_schedule.py"],
    "partition/packed.py": ["spec/test_partition.py"],
    "partition/cached.py": ["spec/test_partition.py"],
    "partition/schedule.py": ["spec/test_schedule.py"],
    "partition/packing.py": ["spec/test_packing.py"],
    "exchange/blocks.py": EXCHANGE,
    "exchange/ring.py": EXCHANGE,
    "exchange/ring_both_ways.py": EXCHANGE,
    "exchange/gather.py": EXCHANGE,
    "exchange/pass_query.py": EXCHANGE,
    "exchange/all_to_all.py": EXCHANGE,
    "exchange/all_to_all_ring.py": EXCHANGE,
    "exchange/ring_backward.py": ["spec/test_backward.py"],
    "exchange/device.py": ["spec/test_backward.py", "spec/test_exchange.py"],
}
JUDGE = [
    "judge/test_error_model.py",
    "judge/test_bound.py",
    "judge/test_judge.py",
    "judge/test_power.py",
    "judge/test_error_budget.py",
    "judge/test_judge_profiles.py",
]
DIAGNOSIS = [
    "diagnosis/test_diagnosis.py",
    "diagnosis/test_diagnosis_layouts.py",
    "diagnosis/test_diagnosis_dictionary.py",
]
INSTRUMENT = {
    f"crosscheck/{room}/{path.name}": tests
    for room, tests in (("error_model", JUDGE), ("judging", JUDGE), ("diagnosis", DIAGNOSIS))
    for path in sorted((ROOT / "cpjax" / "crosscheck" / room).glob("*.py"))
    if path.name != "__init__.py"
}
# These have tests of their own.
INSTRUMENT |= {
    "crosscheck/judging/expansion.py": ["judge/test_expansion.py"],
    "crosscheck/judging/pairwise.py": ["judge/test_pairwise.py"],
    "crosscheck/judging/error_budget.py": ["judge/test_error_budget.py"],
    "crosscheck/diagnosis/precision_search.py": ["dumps/test_dumps.py"],
}
TESTS = SPECIFICATION | INSTRUMENT
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
CALLS = {"maximum": "minimum", "max": "min", "exp": "exp2", "log": "log2", "min": "max"}


class Mutant(NamedTuple):
    """One change: the file, its line, what was done, and the whole changed source."""

    file: str
    line: int
    change: str
    source: str


def mutants(file: str) -> list[Mutant]:
    """Every mutant of a file; docstrings, annotations, messages and imports are left alone."""
    tree = ast.parse((ROOT / "cpjax" / file).read_text())
    alone = _left_alone(tree)
    nodes = [n for n in ast.walk(tree) if hasattr(n, "lineno") and id(n) not in alone]
    found = []
    for node in nodes:
        for change, apply, undo in _changes(node):
            apply()
            found.append(Mutant(file, node.lineno, change, ast.unparse(tree)))
            undo()
    return found


def _left_alone(tree: ast.AST) -> set[int]:
    skip: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if text or isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom):
            parts = [node]
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            parts = [node.annotation]
        elif isinstance(node, ast.FunctionDef) and node.returns:
            parts = [node.returns]
        skip |= {id(part) for root in parts for part in ast.walk(root)}
    return skip


def _changes(node: ast.AST) -> list:
    """(description, apply, undo) for each way to change this node."""
    out = []

    def replace(what: str, owner, field: str, new) -> None:
        old = getattr(owner, field)
        out.append((what, lambda: setattr(owner, field, new), lambda: setattr(owner, field, old)))

    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        new = SWAPS[type(node.op)]
        replace(f"{type(node.op).__name__} -> {new.__name__}", node, "op", new())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        new = SWAPS[type(node.ops[0])]
        replace(f"{type(node.ops[0]).__name__} -> {new.__name__}", node, "ops", [new()])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        replace("USub -> UAdd", node, "op", ast.UAdd())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        replace(f"{node.value} -> {node.value + 1}", node, "value", node.value + 1)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        replace(f"{node.value} -> {not node.value}", node, "value", not node.value)
    if isinstance(node, ast.Attribute) and node.attr in CALLS:
        replace(f"{node.attr} -> {CALLS[node.attr]}", node, "attr", CALLS[node.attr])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("rounded", "merge"):
        kept = 0 if node.func.id == "rounded" else 1  # no rounding; only the newer partial
        out.append(_as_its_argument(node, kept))
    return out


def _as_its_argument(node: ast.Call, index: int):
    """`f(a, b)` becomes `(lambda *x: x[i])(a, b)`, so that the arguments are still evaluated."""
    name = ast.unparse(node.func)
    pick = ast.parse(f"(lambda *x: x[{index}])", mode="eval").body
    old = node.func
    return f"{name}(…) -> its argument {index}", lambda: setattr(node, "func", pick), lambda: setattr(node, "func", old)


def run(mutant: Mutant, compiled: Path, timeout: float) -> str:
    """killed, survived or timeout."""
    try:
        done = pytest(TESTS[mutant.file], compiled, writes=False, mutant=mutant, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "timeout"
    return "survived" if done.returncode == 0 else "killed"


def compile_unchanged(file: str, compiled: Path) -> None:
    """Run one file of tests on the unchanged project and keep what it compiles. A failure ends everything."""
    done = pytest([file], compiled, writes=True)
    if done.returncode != 0:
        raise SystemExit(f"{file} fails without a mutant, so that it can judge none:\n{done.stdout.decode()[-2000:]}")


def pytest(
    tests: list[str], compiled: Path, writes: bool, mutant: Mutant | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess:
    """Run tests in a copy of the project, in a fresh process, with the programs compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        for name in ("cpjax", "npu_backend", "tests"):
            shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copied)
        if mutant:
            (copied / "cpjax" / mutant.file).write_text(mutant.source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        environment = {
            **os.environ,
            "PYTHONPATH": folder,
            "HYPOTHESIS_PROFILE": "mutants",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            # Only what took longer to compile than this many seconds is written; reading has no such bound.
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if writes else "1e9",
        }
        files = [f"tests/{name}" for name in tests]
        return subprocess.run(
            [*command, *files], cwd=copied, env=environment, capture_output=True, timeout=timeout, check=False
        )


def main() -> None:
    """Sample, run, print each verdict and the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=150, help="mutants to run (default 150)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600, help="seconds a mutant (default 600)")
    parser.add_argument("--of", choices=("specification", "instrument"), default="specification")
    parser.add_argument("--file", help="only this file, as in exchange/ring.py")
    parser.add_argument("--control", action="store_true", help="only the mutants that must survive")
    parser.add_argument("--json", type=Path, help="write the verdicts to this file")
    options = parser.parse_args()
    part = SPECIFICATION if options.of == "specification" else INSTRUMENT
    everything = [m for file in ([options.file] if options.file else part) for m in mutants(file)]
    chosen = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    if options.control:
        source = (ROOT / "cpjax" / "partial.py").read_text()
        equivalent = source.replace("total = weight_a + weight_b", "total = weight_b + weight_a")
        assert equivalent != source
        chosen = [Mutant("partial.py", 0, "unchanged", source), Mutant("partial.py", 0, "a + b -> b + a", equivalent)]
    print(f"{len(chosen)} of {len(everything)} mutants, seed {options.seed}")
    verdicts = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        compiled = Path(folder)
        files = sorted({test for mutant in chosen for test in TESTS[mutant.file]})
        for file, _ in zip(files, pool.map(lambda f: compile_unchanged(f, compiled), files), strict=True):
            print(f"unchanged {file} passes", flush=True)
        for mutant, verdict in zip(chosen, pool.map(lambda m: run(m, compiled, options.timeout), chosen), strict=True):
            verdicts.append({"file": mutant.file, "line": mutant.line, "change": mutant.change, "verdict": verdict})
            print(f"{verdict:9} {mutant.file}:{mutant.line}  {mutant.change}", flush=True)
    counts = {name: sum(v["verdict"] == name for v in verdicts) for name in ("killed", "survived", "timeout")}
    print(f"killed {counts['killed']}, survived {counts['survived']}, timeout {counts['timeout']}")
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "counts": counts, "mutants": verdicts}, indent=1))


if __name__ == "__main__":
    main()
