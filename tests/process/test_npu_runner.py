"""The command and the pool of processes: results, resuming, refusals, and ranks that fail, die or fall silent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from npu_strategies import joined, problem, write_case
from safetensors import safe_open

import npu_backend
from npu_backend import progress as progress_module
from npu_backend.__main__ import main
from npu_backend.errors import RankError
from npu_backend.workers import Workers

ROOT = Path(npu_backend.__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def small(cp, seed=0):
    return problem(seed, "normal", (2, 1), (11,), 12, is_causal=True, cp=cp)


def command(*arguments, launcher=(sys.executable,)):
    line = [*launcher, "-m", "npu_backend", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_cases_are_computed_once_and_reported_as_json(tmp_path):
    for cp in (1, 2):
        write_case(tmp_path / "", small(cp), f"c{cp}")
    run = command("run", tmp_path, tmp_path / "results", "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert [(one["name"], one["cp"]) for one in report] == [("c1", 1), ("c2", 2)]
    for one in report:
        assert set(one) == {"name", "cp", "seconds", "seconds_per_step", "result"}
        joined(Path(one["result"]), small(one["cp"]))
        steps = one["seconds_per_step"]
        assert [len(of_rank) for of_rank in steps] == [one["cp"]] * one["cp"]
        assert all(second > 0 for of_rank in steps for second in of_rank)
        assert one["seconds"] == max(map(sum, steps))
    with safe_open(report[1]["result"], framework="numpy") as file:
        about = json.loads(file.metadata()["about"])
    assert {"torch", "torch_npu", "device", "seconds_per_step"} <= about.keys()
    stamps = [Path(one["result"]).stat().st_mtime_ns for one in report]
    again = command("run", tmp_path, tmp_path / "results", "--json")
    assert json.loads(again.stdout) == report
    assert stamps == [Path(one["result"]).stat().st_mtime_ns for one in report]


def test_torchrun_ranks_write_one_result_and_refuse_another_world_size(tmp_path):
    case = write_case(tmp_path, small(2), "c2")
    run = command("run", case, tmp_path / "results", "--json", launcher=[*TORCHRUN, "--nproc-per-node", "2"])
    assert run.returncode == 0, run.stderr
    assert [one["name"] for one in json.loads(run.stdout)] == ["c2"]
    joined(tmp_path / "results" / "c2.safetensors", small(2))
    run = command("run", case, tmp_path / "none", launcher=[*TORCHRUN, "--nproc-per-node", "1"])
    assert run.returncode != 0
    assert "c2 is for 2 ranks but torchrun has started 1" in run.stderr
    assert not (tmp_path / "none").exists()


def refused(capsys, *arguments):
    """The one line that a bad call prints."""
    assert main(["run", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("npu_backend: ")
    assert err.count("\n") == 1
    return err


def test_bad_input_is_refused_in_one_line_before_anything_is_computed(tmp_path, capsys):
    cases, results = tmp_path / "cases", tmp_path / "results"
    cases.mkdir()
    assert "does not exist" in refused(capsys, tmp_path / "nowhere", results)
    assert "holds no case" in refused(capsys, cases, results)
    first = write_case(cases, small(1), "a")
    (cases / "b.safetensors").write_bytes(b"")
    assert "b.safetensors: is not a whole safetensors file" in refused(capsys, cases, results)
    assert not results.exists()
    (cases / "b.safetensors").unlink()
    assert "is no folder" in refused(capsys, cases, first)
    assert "not this case's" in refused(capsys, cases, cases)  # the case itself is in the way
    assert "device npu: torch_npu is not installed" in refused(capsys, cases, results, "--device", "npu")
    assert not results.exists()
    (tmp_path / "file").write_text("")
    assert "cannot be made or written" in refused(capsys, cases, tmp_path / "file" / "results")


def test_a_result_of_another_case_is_never_overwritten(tmp_path, capsys):
    case = write_case(tmp_path, small(1), "c")
    assert main(["run", str(case), str(tmp_path / "r")]) == 0
    before = (tmp_path / "r" / "c.safetensors").read_bytes()
    write_case(tmp_path, small(1, seed=1), "c")
    capsys.readouterr()
    assert "move it away" in refused(capsys, case, tmp_path / "r")
    assert (tmp_path / "r" / "c.safetensors").read_bytes() == before


@pytest.mark.parametrize("arguments", [[], ["walk"], ["run"], ["run", "a"], ["run", "a", "b", "--timeout", "0"]])
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "torchrun --nproc-per-node" in capsys.readouterr().out


def test_progress_without_rich_is_plain_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with progress_module.progress(4) as advance:
        advance("case", 3)
    assert capsys.readouterr().err == "case: ring step 3 of 4\n"


@pytest.fixture
def files(tmp_path):
    return write_case(tmp_path, small(3), "c3"), tmp_path / "r.safetensors"


def test_ranks_that_die_fail_or_hang_are_named_and_nobody_is_left(files, tmp_path):
    case, result = files
    with Workers(3, timeout=4) as workers:
        workers.run(case, result)
        result.unlink()
        first = workers.pids

        os.kill(first[1], signal.SIGKILL)
        with pytest.raises(RankError, match=r"rank 1: was killed by signal 9"):
            workers.run(case, result)
        assert workers.pids == []
        assert not any(map(alive, first))

        workers.run(case, result)  # a new pool
        second = workers.pids
        with pytest.raises(RankError, match=r"rank 0: .*is there already"):
            workers.run(case, result)
        assert not any(map(alive, second))
        result.unlink()

        workers.run(case, result)
        result.unlink()
        third = workers.pids
        os.kill(third[2], signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(RankError, match=r"^rank 2: silent for 4 s"):
            workers.run(case, result)
        assert time.monotonic() - started < 15
        assert not any(map(alive, third))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["c3.safetensors"]


def test_a_failed_case_leaves_nothing_and_does_not_stop_the_others(tmp_path):
    """Files may have 100 kB at most here, as on a full disk; the result of "a" is longer."""
    cases, results = tmp_path / "cases", tmp_path / "results"
    cases.mkdir()
    write_case(cases, problem(0, "normal", (1, 1), (800,), 800, is_causal=True, cp=1), "a")
    write_case(cases, small(1), "b")
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    start = f"sys.argv = ['npu_backend', 'run', {str(cases)!r}, {str(results)!r}, '--json']; "
    line = [sys.executable, "-c", limit + start + "import runpy; runpy.run_module('npu_backend', run_name='__main__')"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    failed, computed = json.loads(run.stdout)
    assert failed["result"] is None
    assert "rank 0: " in failed["error"]
    assert "could not be written" in failed["error"]
    assert failed["error"] in run.stderr
    assert "Traceback" not in run.stderr
    joined(Path(computed["result"]), small(1))
    assert [x.name for x in results.iterdir()] == ["b.safetensors"]


def test_ranks_that_work_on_different_cases_say_so(tmp_path):
    with Workers(2, timeout=30) as workers, pytest.raises(RankError, match="is for 3 ranks, there are 2"):
        workers.run(write_case(tmp_path, small(3), "c3"), tmp_path / "r.safetensors")


def test_ranks_end_when_their_parent_is_killed(tmp_path):
    case = write_case(tmp_path, small(2), "c2")
    program = (
        "import sys, time; from pathlib import Path; from npu_backend.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    workers = Workers(2); workers.run(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "    print(*workers.pids, flush=True); time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    line = [sys.executable, str(script), str(case), str(tmp_path / "r.safetensors")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))
