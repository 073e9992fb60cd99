"""The command as users start it, under torchrun and alone: faults, resuming after a kill, profile and provenance."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from npu_strategies import joined, problem, write_case
from safetensors import safe_open

import npu_backend
from npu_backend.provenance import cann_version

ROOT = Path(npu_backend.__file__).parents[1]
MARK = "NPU_BACKEND_TEST"
TIMEOUT = 4

FAULT = """
import os, signal, sys
from npu_backend import ring
from npu_backend.__main__ import main

victim, step, number = map(int, sys.argv[1:4])
real = ring._attend

def faulty(who, at, *rest):
    if (who.rank, at) == (victim, step):
        os.kill(os.getpid(), number)
    return real(who, at, *rest)

ring._attend = faulty
sys.exit(main(sys.argv[4:]))
"""
KILLED_PARENT = """
import os, signal, sys
from npu_backend import runner
from npu_backend.__main__ import main

def listener(advance, name, done):
    def listen(rank, what, step):
        if (name, what) == ("b", "compute"):
            os.kill(os.getpid(), signal.SIGKILL)
    return listen

runner._listener = listener
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def small(cp, seed=0):
    return problem(seed, "normal", (2, 1), (11,), 8 * cp, is_causal=True, cp=cp)


def start(tmp_path, *line):
    """Run a Python command; its processes, and those they start, carry a mark."""
    environment = os.environ | {MARK: str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, line)]
    return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)


def torchrun(tmp_path, ranks, *line):
    return start(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *line)


def left(tmp_path):
    """Processes that carry the mark. Zombies have none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={tmp_path}".encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def about(path):
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["about"])


def broken(tmp_path, *fault):
    """What a run of 3 ranks under torchrun says that breaks; nothing is left of it."""
    case, script = write_case(tmp_path, small(3), "c"), tmp_path / "fault.py"
    script.write_text(FAULT)
    run = torchrun(tmp_path, 3, script, *fault, "run", case, tmp_path / "r", "--timeout", TIMEOUT)
    assert run.returncode == 1
    assert left(tmp_path) == []
    assert list((tmp_path / "r").iterdir()) == []
    return run.stderr


@pytest.mark.parametrize("step", [0, 1, 2])
def test_torchrun_names_a_rank_that_is_killed(tmp_path, step):
    text = broken(tmp_path, 1, step, 9)
    assert re.search(r"local_rank: 1 |rank\s*: 1 \(local_rank: 1\)", text)
    assert "Signal 9 (SIGKILL)" in text


def test_under_torchrun_the_others_of_a_rank_that_hangs_name_the_step(tmp_path):
    """torchrun gives a stopped process 30 s before it kills it."""
    started = time.monotonic()
    text = broken(tmp_path, 1, 1, 19)
    assert time.monotonic() - started < 30 + TIMEOUT + 40
    # Step 1 is computed while the block for step 2 is on its way already, so the others may get as far as the end.
    assert re.search(r"npu_backend: c: rank [02]: .* failed .*\(last heard: wait, step [23]\)", text)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_torchrun_with_another_number_of_ranks_is_refused_once(tmp_path, ranks):
    case = write_case(tmp_path, small(3), "c")
    run = torchrun(tmp_path, ranks, "-m", "npu_backend", "run", case, tmp_path / "r")
    assert run.returncode != 0
    assert run.stderr.count(f"c is for 3 ranks but torchrun has started {ranks}") == 1
    assert not (tmp_path / "r").exists()
    assert left(tmp_path) == []


def test_a_double_ring_under_torchrun_with_a_profile(tmp_path):
    case, options = write_case(tmp_path, small(4), "c"), ["--exchange", "double-ring", "--inner", 2]
    run = torchrun(tmp_path, 4, "-m", "npu_backend", "run", case, tmp_path / "r", *options, "--profile", "--json")
    assert run.returncode == 0, run.stderr
    [one] = json.loads(run.stdout)
    joined(Path(one["result"]), small(4))
    told = about(one["result"])
    assert (told["exchange"], told["inner"]) == ("double-ring", 2)
    check_profile(told["profile"], 4)


def check_profile(profile, cp):
    """One entry a rank, in it one entry a step of the schedule."""
    assert len(profile) == cp
    for of_rank in profile:
        assert set(of_rank) == {"compute", "waited", "transfer_alone", "hidden"}
        for name in ("compute", "waited", "transfer_alone"):
            assert len(of_rank[name]) == cp
            assert all(second >= 0 for second in of_rank[name])
        assert all(second > 0 for second in of_rank["compute"])
        if cp == 1:
            assert of_rank["hidden"] is None
        else:
            assert sum(of_rank["transfer_alone"]) > 0
            assert 0 <= of_rank["hidden"] <= 1


@pytest.mark.parametrize(("cp", "exchange"), [(1, "ring"), (3, "ring"), (3, "gather")])
def test_a_profile_has_the_steps_of_the_schedule(tmp_path, cp, exchange):
    case = write_case(tmp_path, small(cp), "c")
    run = start(tmp_path, "-m", "npu_backend", "run", case, tmp_path / "r", "--exchange", exchange, "--profile")
    assert run.returncode == 0, run.stderr
    told = about(tmp_path / "r" / "c.safetensors")
    check_profile(told["profile"], cp)
    assert told["exchange"] == exchange
    assert told["soc"] is None  # a CPU; nothing is made up
    assert told["kernel_type"] == "kernel_type_high_precision, emulated"


def test_after_a_kill_finished_cases_are_kept_and_only_the_others_are_computed(tmp_path):
    cases, results, script = tmp_path / "cases", tmp_path / "r", tmp_path / "killed.py"
    cases.mkdir()
    for seed, name in enumerate("ab"):
        write_case(cases, small(2, seed), name)
    script.write_text(KILLED_PARENT)
    assert start(tmp_path, script, "run", cases, results).returncode == -9
    deadline = time.monotonic() + 20
    while left(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left(tmp_path) == []
    assert {x.name for x in results.iterdir()} <= {"a.safetensors", "b.safetensors"}
    first = results / "a.safetensors"
    before = first.read_bytes(), first.stat().st_mtime_ns
    run = start(tmp_path, "-m", "npu_backend", "run", cases, results, "--json")
    assert run.returncode == 0, run.stderr
    assert [one["name"] for one in json.loads(run.stdout)] == ["a", "b"]
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    joined(results / "b.safetensors", small(2, 1))


@pytest.mark.parametrize(
    ("path", "text", "version"),
    [
        ("x86_64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.2.RC1\n", "8.2.RC1"),
        ("version.cfg", "runtime_running_version=[7.3.0.1.231:8.0.RC2]\n", "8.0.RC2"),
        ("version.cfg", "nothing\n", None),
        ("other", "version=1\n", None),
    ],
)
def test_the_version_of_cann_is_read_where_the_toolkit_states_it(tmp_path, path, text, version):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(text)
    assert cann_version({"ASCEND_HOME_PATH": str(tmp_path)}) == version
    assert cann_version({}) is None
