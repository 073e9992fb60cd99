"""Mutation testing: `python tools/mutation.py --of specification --sample 150 --seed 0 [--json FILE]`.

A mutant is one small change of a file of the algorithm, or of the instrument that judges others (`--of instrument`),
made in a copy of the project; tests run on it in a fresh process. It is killed if a test fails. A timeout is not a
kill, and is listed apart. `--control` runs the unchanged project and a mutant that is known to be equivalent: both must
survive.

Which tests: of the specification those of the list below, for what JAX has compiled once runs no line of Python again.
Of the instrument the tests of its rooms that run the changed statement, the quickest first, or if it runs when the
module is imported, those that run any line of the file; `lines_of_tests` says which they are. They get 90 seconds
together: what survives might be killed by a dearer one. Tests of the text of the
source, which fail for any change, do not count.

First the unchanged project runs the same tests and leaves its compiled programs on disk (JAX's compilation cache, whose
key is the program itself): a mutant compiles only what it changes. Mutants read that folder and never write it, so no
mutant sees another's.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

from mutants import Mutant, mutants

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
INSTRUMENT = [
    f"crosscheck/{room}/{path.name}"
    for room in ("error_model", "judging", "diagnosis")
    for path in sorted((ROOT / "cpjax" / "crosscheck" / room).glob("*.py"))
]
ROOMS = ["judge", "diagnosis", "dumps/test_dumps.py"]
"""Below tests/: where tests of the instrument are looked for."""

OF_TEXT = ("test_constants", "test_twice_or_half", "test_every_constant", "test_what_is_explained", "_words.py")
"""Tests of constants in a text and of the pins themselves, which do not ask what the code does."""

COPIED = ("cpjax", "npu_backend", "tests", "docs", "examples", "README.md", "CONTRIBUTING.md", "pyproject.toml")


def recorded(folder: Path) -> list[dict]:
    """What `lines_of_tests` writes, of each of `ROOMS`, unless it is there. A failure ends everything."""
    records = []
    for room in ROOMS:
        written = folder / f"{Path(room).stem}.json"
        if not written.exists():
            done = pytest([f"tests/{room}"], plugin=written)
            if done.returncode != 0:
                raise SystemExit(
                    f"{room} fails without a mutant, so that it can judge none:\n{done.stdout.decode()[-2000:]}"
                )
        records.append(json.loads(written.read_text()))
        print(f"unchanged {room} passes: {len(records[-1]['tests'])} tests", flush=True)
    return records


def tests_of(mutant: Mutant, records: list[dict], budget: float) -> list[str]:
    """The tests that run the mutant's statement, or its file if none does: the quickest first, for `budget` seconds."""
    seconds = {}
    for wanted in (set(mutant.statement), None):
        for record in records:
            runs = record["lines"].get(mutant.file, {})
            numbers = {k for line, ks in runs.items() if wanted is None or int(line) in wanted for k in ks}
            seconds |= {record["tests"][k]: record["seconds"][k] for k in numbers}
        if seconds:
            break
    quickest = sorted(seconds, key=lambda test: seconds[test])
    together = accumulate(seconds[test] for test in quickest)
    return [test for test, so_far in zip(quickest, together, strict=True) if so_far <= budget or test == quickest[0]]


KILLS: Counter[str] = Counter()
"""How many mutants each test has killed. Those that killed most are asked first: the same verdict, sooner."""


def run(mutant: Mutant, tests: list[str], compiled: Path | None, timeout: float) -> str:
    """killed, survived or timeout; what no test runs survives, and what cannot be imported is killed."""
    if not tests:
        return "survived"
    tests = sorted(tests, key=lambda test: -KILLS[test])
    try:
        done = pytest(tests, compiled, mutant=mutant, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "timeout"
    KILLS.update(re.findall(r"(?m)^FAILED (.+?)(?: - .*)?$", done.stdout.decode()))
    return {0: "survived", 1: "killed", 2: "killed"}.get(done.returncode, f"pytest ended with {done.returncode}")


def compile_unchanged(file: str, compiled: Path) -> None:
    """Run one file of tests on the unchanged project and keep what it compiles. A failure ends everything."""
    done = pytest([file], compiled, writes=True)
    if done.returncode != 0:
        raise SystemExit(f"{file} fails without a mutant, so that it can judge none:\n{done.stdout.decode()[-2000:]}")


def pytest(
    tests: list[str],
    compiled: Path | None = None,
    writes: bool = False,
    mutant: Mutant | None = None,
    timeout: float | None = None,
    plugin: Path | None = None,
) -> subprocess.CompletedProcess:
    """Run tests in a copy of the project, in a fresh process, with the programs compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, copied)
        if mutant:
            (copied / "cpjax" / mutant.file).write_text(mutant.text)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, str(Path(__file__).parent)]),
            "HYPOTHESIS_PROFILE": "mutants",
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1",
        }
        if plugin:
            command += ["-p", "lines_of_tests", "-k", " and ".join(f"not {name}" for name in OF_TEXT)]
            environment["LINES_OF_TESTS"] = str(plugin)
        if compiled:
            environment["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
            environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
            # Only what took longer to compile than this many seconds is written; reading has no such bound.
            environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0" if writes else "1e9"
        return subprocess.run(
            [*command, *tests], cwd=copied, env=environment, capture_output=True, timeout=timeout, check=False
        )


def main() -> None:
    """Sample, run, print each verdict and the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=150, help="mutants to run (default 150)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600, help="seconds a mutant (default 600)")
    parser.add_argument(
        "--budget", type=float, default=90, help="CPU seconds of tests that a mutant of the instrument gets (90)"
    )
    parser.add_argument("--of", choices=("specification", "instrument"), default="specification")
    parser.add_argument("--file", help="only this file, as in exchange/ring.py")
    parser.add_argument("--control", action="store_true", help="only the mutants that must survive")
    parser.add_argument("--lines", type=Path, help="a folder: which tests run which line is kept there, and read again")
    parser.add_argument("--json", type=Path, help="write the verdicts to this file")
    options = parser.parse_args()
    of_instrument = options.of == "instrument"
    if options.lines:
        options.lines.mkdir(parents=True, exist_ok=True)
    files = [options.file] if options.file else INSTRUMENT if of_instrument else list(SPECIFICATION)
    everything = [m for file in files for m in mutants(file, (ROOT / "cpjax" / file).read_text())]
    chosen = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    if options.control:
        chosen = _controls(of_instrument)
    for mutant in chosen:
        ast.parse(mutant.text)  # a mutant that is no Python would be killed by every test
    print(f"{len(chosen)} of {len(everything)} mutants, seed {options.seed}")
    verdicts = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        compiled = None if of_instrument else Path(folder)
        if of_instrument:
            records = recorded(options.lines or Path(folder))
            tests = [tests_of(mutant, records, options.budget) for mutant in chosen]
        else:
            tests = [[f"tests/{name}" for name in SPECIFICATION[mutant.file]] for mutant in chosen]
            unchanged = sorted({file for files in tests for file in files})
            for file, _ in zip(
                unchanged, pool.map(lambda f: compile_unchanged(f, Path(folder)), unchanged), strict=True
            ):
                print(f"unchanged {file} passes", flush=True)
        outcomes = pool.map(lambda pair: run(*pair, compiled, options.timeout), zip(chosen, tests, strict=True))
        for mutant, asked, verdict in zip(chosen, tests, outcomes, strict=True):
            found = {"file": mutant.file, "line": mutant.line, "change": mutant.change, "verdict": verdict}
            verdicts.append(found | {"tests": len(asked)})
            print(f"{verdict:9} {mutant.file}:{mutant.line}  {mutant.change}  ({len(asked)} tests)", flush=True)
    counts = Counter(v["verdict"] for v in verdicts)
    print(", ".join(f"{name} {count}" for name, count in counts.most_common()))
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "counts": counts, "mutants": verdicts}, indent=1))


def _controls(of_instrument: bool) -> list[Mutant]:
    """The unchanged project, and a change that computes the same."""
    file, old, new = "partial.py", "total = weight_a + weight_b", "total = weight_b + weight_a"
    if of_instrument:
        file, old, new = "crosscheck/judging/statistic.py", "return ", "return 0 or "
    text = (ROOT / "cpjax" / file).read_text()
    assert old in text
    line = text[: text.index(old)].count("\n") + 1
    changed = text.replace(old, new, 1)
    return [Mutant(file, line, "unchanged", text, (line,)), Mutant(file, line, f"{old} -> {new}", changed, (line,))]


if __name__ == "__main__":
    main()
