"""What the command says of itself, and what it prints besides tables: helps, version, completion, questions."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cpjax.cli import PROFILE_NAMES, app
from cpjax.crosscheck.dumps.question import ALIGNS, LAYOUTS, LSE_LAYOUTS
from cpjax.crosscheck.files.case import gaussian_case, read_case, write_case
from cpjax.crosscheck.files.result import Result, write_result
from cpjax.crosscheck.judge import judge
from cpjax.crosscheck.judging.asked import sentences
from cpjax.crosscheck.run.session import Judged
from cpjax.crosscheck.run.summary import questions, sentence
from cpjax.partition import ORDERS, PARTITIONS
from cpjax.precision import PROFILES

ROOT = Path(__file__).parents[2]


def said(*arguments: str, columns: int = 80) -> str:
    run = CliRunner().invoke(app, [*arguments], env={"COLUMNS": str(columns)})
    assert run.exit_code == 0, run.output
    return run.output


def commands(group, above: tuple[str, ...] = ()):
    yield above
    for name in getattr(group, "commands", {}):
        yield from commands(group.commands[name], (*above, name))


ALL = list(commands(get_command(app)))


def test_all_commands_are_found():
    assert {(), ("judge-dump",), ("mindie",), ("mindie", "check")} <= set(ALL)


@pytest.mark.slow
@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_every_help_fits_and_says_what_the_exit_statuses_mean(command):
    text = said(*command, "--help")
    assert text == said(*command, "-h")
    assert max(map(len, text.splitlines())) <= 80
    assert "..." not in re.sub(r"\.\.\.$|ARGS\]\.\.\.|\}\.\.\.", "", text.splitlines()[0]) + "".join(
        text.splitlines()[1:]
    )
    assert re.search(r"Exit status: 0 .*2 bad input", " ".join(text.split()))
    options = text.partition("Options:\n")[2]
    assert not re.findall(r"<[a-z][^>]*>", options), "a type in the place of a name"


def test_judge_dump_is_the_first_command():
    listed = said("--help").partition("Commands:\n")[2]
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ")][:2] == ["judge-dump", "judge"]


def test_choices_in_the_help_are_those_that_are_taken():
    text = " ".join(said("judge-dump", "--help", columns=400).split())
    assert PROFILE_NAMES.split(", ") == list(PROFILES)
    assert f"one of {PROFILE_NAMES} " in text
    for option, choices in (
        ("layout-of", LAYOUTS),
        ("align", tuple(reversed(ALIGNS))),
        ("lse-layout", LSE_LAYOUTS[:4]),
    ):
        assert f"--{option} {'|'.join(choices)} " in text
    order = re.findall(r"--order (\S+) ", text)[0].split("|")
    assert set(order) == {*ORDERS, "together"}
    names = re.findall(r"who holds which tokens: ([^;]*);", text)[0].split(", ")
    assert set(names) == PARTITIONS.keys() - {"decode"}


def test_no_option_is_spelled_like_its_metavar():
    """typer 0.27 makes --DEVICE of an option `device` whose metavar is DEVICE."""

    def options(command):
        yield from (param for param in command.params if param.param_type_name == "option")
        for inner in getattr(command, "commands", {}).values():
            yield from options(inner)

    found = list(options(get_command(app)))
    assert len(found) > 100
    assert not [param.opts for param in found if (param.metavar or "").lower() == param.name]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("judge-dump", "--causal"), "Missing option '--scale'; cpjax judge-dump --help lists what there is"),
        (("judge-dump", "--scale", "1/8", "--causal"), "Invalid value for '--scale': Input should be a valid number"),
        (("judge-dump", "--scal", "1"), "No such option: --scal"),
        (("mindie", "chek"), "No such command 'chek'. Did you mean 'check'"),
        (("judge",), "Missing argument 'CASES'; cpjax judge --help"),
    ],
)
def test_an_option_that_is_wrong_is_one_line_too(words, says):
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 2
    assert run.output.startswith(f"cpjax: {says}")
    assert run.output.count("\n") == 1


def test_a_group_without_a_command_prints_its_help():
    assert "Commands:" in CliRunner().invoke(app, ["mindie"]).output


def test_version():
    assert said("--version") == f"cpjax {version('cpjax')}\n"


@pytest.mark.process
def test_bash_completes_a_command():
    environment = os.environ | {"_CPJAX_COMPLETE": "complete_bash", "COMP_WORDS": "cpjax ju", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['cpjax']; from cpjax.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["judge-dump", "judge"], run.stdout + run.stderr


# What was asked ------------------------------------------------------------------------------------------------------


def attention(case, seen, dtype=np.float16):
    score = case.scale * np.einsum("btnh,bsnh->bnts", *(x.astype(float) for x in (case.query, case.key)))
    p = np.where(seen, np.exp(score), 0.0)
    total = p.sum(axis=3)
    out = np.einsum("bnts,bsnv->btnv", p / total[..., None], case.value.astype(float))
    return Result("numpy", "flash_fp16", "unknown", out.astype(dtype), np.log(total).swapaxes(1, 2).astype("f4"), {})


def test_judge_prints_the_question_as_judge_dump_does(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_case(tmp_path / "cases", gaussian_case(name, (16, 2, 2, 8, 8), cp=2, precision={}, seed=seed, about={}))
    (tmp_path / "results").mkdir()
    for name in "ab":
        case = read_case(tmp_path / "cases" / f"{name}.safetensors")
        write_result(tmp_path / "results", case, attention(case, np.tri(16, dtype=bool)))
    run = CliRunner().invoke(app, ["judge", str(tmp_path / "cases"), str(tmp_path / "results"), "--workers", "1"])
    assert run.exit_code == 0, run.output
    lines = run.stdout.splitlines()
    asked = [line for line in lines if "asked: " in line]
    assert len(asked) == 1, "one question, asked of two cases"
    assert asked[0].startswith("a, numpy, b, numpy: asked: query float16 [1, 16, 2, 8], ")
    assert "mask causal" in asked[0]
    assert "order unknown, precision flash_fp16" in asked[0]
    assert lines.count("assumed: no sink, no softcap, no bias, no alibi, no window") == 1


def judged(name: str, *, passed: bool, tokens: int = 4, **words) -> Judged:
    x = np.random.default_rng(0).standard_normal((1, tokens, 1, 4)).astype(np.float32)
    verdict = judge(x, x, x, x[..., :3] if not passed else _dense(x), is_causal=False, **words)
    assert verdict.passed is passed
    return Judged(name, "kernel", "float32", "ascending", verdict=verdict)


def _dense(x):
    p = np.exp(np.einsum("btnh,bsnh->bnts", x, x).astype(float) / 2)
    return np.einsum("bnts,bsnh->btnh", p / p.sum(axis=3, keepdims=True), x).astype(np.float32)


def test_one_result_says_its_question_without_a_name():
    one = judged("c", passed=True)
    assert questions([one]) == sentences(one.verdict.asked)
    assert questions([Judged("c", "kernel", error="no file")]) == []


def test_of_many_questions_those_that_failed_come_first():
    many = [judged(f"c{n}", passed=n != 5, tokens=n) for n in range(2, 9)]
    lines = questions(many)
    assert lines[0].startswith("c5, kernel: asked: query float32 [1, 5, 1, 4], ")
    assert lines[-2:] == [
        "asked: 3 other questions, which --json and --report print",
        "assumed: no sink, no softcap, no bias, no alibi, no window",
    ]
    assert len(lines) == 6
    alike = questions([judged(f"c{n}", passed=True) for n in range(5)])
    assert alike[0].startswith("c0, kernel, c1, kernel, c2, kernel and 2 more: asked: ")
    other = questions([many[0], judged("d", passed=True, softcap=1e3)])
    assert [line for line in other if "assumed" in line] == [
        "c2, kernel: assumed: no sink, no softcap, no bias, no alibi, no window",
        "d, kernel: assumed: no sink, no bias, no alibi, no window",
    ]


def test_one_result_is_and_two_are():
    wrong, right = judged("c", passed=False), judged("d", passed=True)
    missing = Judged("e", "kernel", error="no file")
    assert sentence([wrong]) == "1 of 1 result is NOT what correct arithmetic in its precision gives: c."
    assert sentence([wrong, right, missing]) == (
        "1 of 3 results is NOT what correct arithmetic in its precision gives: c. 1 of 3 results is an error: e."
    )
    both = sentence([wrong, wrong, missing, missing])
    assert both == (
        "2 of 4 results are NOT what correct arithmetic in their precision gives: c. 2 of 4 results are errors: e."
    )


# The other half ------------------------------------------------------------------------------------------------------

ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["run", "cases", "results"], [], ["--help"]], ids=len)
def test_npu_backend_without_torch_says_so_in_one_line(tmp_path, arguments):
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    line = [sys.executable, "-m", "npu_backend", *arguments]
    run = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == 'npu_backend needs torch, which is not installed; install it: pip install "torch>=2.13"\n'
    code = [sys.executable, "-c", "import npu_backend"]
    run = subprocess.run(code, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ModuleNotFoundError: npu_backend needs torch, ")
