"""`cpjax fingerprint`: kernels by name, a function in a file, a folder of probes; the profile that judge-dump takes."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import backend_package
import numpy as np
import pytest
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.crosscheck.files.case import read_case
from cpjax.crosscheck.files.result import Result, write_result
from cpjax.errors import InputError
from cpjax.fingerprint.card import all_probes, card_of, read_card
from cpjax.fingerprint.folder import case_of, probes_of, read_folder, write_probes
from cpjax.fingerprint.kernels import emulator, kernel_of
from cpjax.fingerprint.probe import Line, padded
from cpjax.fingerprint.ranks import CP

RUNNER = CliRunner()
ROOT = Path(__file__).parents[2]

KERNEL = '''
import torch


def attention(query, key, value, scale, is_causal):
    """Double sums, FP16 probabilities that are divided before they are rounded."""
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    score = q @ k.transpose(2, 3) * scale
    if is_causal:
        score = score.masked_fill(~torch.ones(score.shape[2:], dtype=torch.bool).tril(), -torch.inf)
    p = torch.softmax(score, dim=-1).to(query.dtype)
    return (p.float() @ v).to(query.dtype).transpose(1, 2)


def wrong_shape(query, key, value, scale, is_causal):
    return query[:, :1]
'''


def run(*words: str) -> tuple[int, str]:
    """Exit status, and what is printed: with --json stdout alone, for the progress bar is on stderr."""
    result = RUNNER.invoke(app, ["fingerprint", *words])
    return result.exit_code, result.stdout if "--json" in words and result.exit_code == 0 else result.output


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of the probes, and the results of an emulator, as any program would write them."""
    folder = tmp_path_factory.mktemp("fingerprint")
    write_probes(folder / "cases", (96, 80), cp=1)
    kernel = emulator("rounded_sum_fp16", tile=128)
    for name in all_probes("float16"):
        if name == "digits":
            continue
        case = read_case(folder / "cases" / f"fingerprint-{name}.safetensors")
        answer = kernel(padded(all_probes("float16")[name], (96, 80)))
        lse = None if answer.lse is None else answer.lse.astype(np.float32)
        result = Result("mine", "rounded_sum_fp16", "ascending", answer.out.astype(np.float16), lse, {})
        write_result(folder / "results", case, result)
    return folder / "cases", folder / "results"


@pytest.mark.slow
def test_a_folder_of_probes_gives_the_card_of_the_kernel_itself(probes):
    from_folder, direct = read_folder(*probes), card_of(emulator("rounded_sum_fp16", tile=128), "float16")
    assert from_folder.kernel == "mine"
    assert from_folder.failures == {"digits": "no result in the folder"}
    same = [line for line in direct.lines if line.name != "digits of p·v, 64 keys"]
    # The order of a product may depend on the head dim; all else does not.
    names = [line.name for line in same if not line.name.startswith("order")]
    assert [from_folder.line(name).code for name in names] == [direct.line(name).code for name in names]
    assert from_folder.profile is not None
    assert from_folder.profile.name == "rounded_sum_fp16"


@pytest.mark.slow
def test_the_command_on_a_folder_and_its_profile(probes, tmp_path):
    status, said = run(str(probes[0]), str(probes[1]), "--json", "--profile", str(tmp_path / "mine.json"))
    assert status == 0
    assert json.loads(said)["profile"]["total"] == "float16"
    status, said = run(str(probes[0]), str(probes[1]), "--profile", str(tmp_path / "mine.json"))
    assert status == 2
    assert "nothing is overwritten" in said
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 64, 2, 64)).astype(np.float16) for _ in range(3))
    from cpjax.trial import emulators
    from cpjax.trial.problem import Problem

    out, _ = emulators.attend(Problem(query, key, value, 0.125), emulators.PROFILES["rounded_sum_fp16"])
    names = []
    for name, x in {"query": query, "key": key, "value": value, "out": out}.items():
        np.save(tmp_path / f"{name}.npy", x)
        names += [f"--{name}", str(tmp_path / f"{name}.npy")]
    words = [
        "judge-dump",
        *names,
        "--scale",
        "0.125",
        "--no-causal",
        "--precision",
        str(tmp_path / "mine.json"),
        "--json",
    ]
    result = RUNNER.invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "rounded_sum_fp16" in result.output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Invalid JSON"),
        ('{"format": "cpjax.profile", "version": "1", "name": "x"}', "compute"),
        ('{"format": "other"}', "format"),
        ("", "Invalid JSON"),
    ],
)
def test_a_damaged_profile_is_one_line(tmp_path, content, said):
    (tmp_path / "p.json").write_text(content)
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 1, 8), np.float16))
    x = str(tmp_path / "x.npy")
    words = ["--query", x, "--key", x, "--value", x, "--out", x, "--scale", "1", "--no-causal"]
    result = RUNNER.invoke(app, ["judge-dump", *words, "--precision", str(tmp_path / "p.json")])
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_function_in_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(KERNEL)
    status, said = run(f"{tmp_path}/mine.py:attention", "--dtype", "bfloat16", "--json")
    assert status == 0
    card = json.loads(said)
    assert card["profile"]["name"] == "softmax_bf16"
    assert {line["name"]: line["value"] for line in card["lines"]}["lse"] == "none is handed over"
    status, said = run(f"{tmp_path}/mine.py:wrong_shape", "--json")
    assert status == 0
    assert json.loads(said)["profile"] is None
    assert "it must be [B, T, N, V]" in said


def test_a_file_hides_no_other_module(tmp_path):
    """Files of one name in two folders, of the name of a package, and one that breaks while it is imported."""
    body = "def attention(query, key, value, scale, is_causal):\n    return query * 0 + FILL\n"
    for folder, fill in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text(f"FILL = {fill}\n{body}")
    (tmp_path / "broken.py").write_text("import math\nraise RuntimeError('no device')\n")
    before = set(sys.modules)
    with pytest.raises(InputError, match="no device"):
        kernel_of(f"{tmp_path}/broken.py:attention", "float32", "cpu")
    assert not {name for name in set(sys.modules) - before if "broken" in name}
    one, two = (kernel_of(f"{tmp_path}/{folder}/json.py:attention", "float32", "cpu") for folder in "ab")
    probe = all_probes("float32")["causal"]
    probe = probe._replace(value=probe.query)
    assert (one(probe).out == 1).all()
    assert (two(probe).out == 2).all()
    assert sys.modules["json"] is json


@pytest.mark.slow
def test_kernels_of_other_projects_are_read_by_the_example():
    """One is traced by PyTorch's compiler, which looks its module up by name."""
    example = ROOT / "examples" / "other_kernels.py"
    status, said = run(f"{example}:ring", "--dtype", "float32", "--json")
    assert status == 0
    card = json.loads(said)
    assert not card["failures"]
    assert {line["name"]: line["value"] for line in card["lines"]}["key tile"] == "512 keys"
    kernel = kernel_of(f"{example}:flex", "float16", "cpu")
    causal = all_probes("float16")["causal"]
    assert np.isfinite(kernel(causal).out).all()


@pytest.mark.slow
def test_pytorchs_kernel_is_read():
    status, said = run("torch:flash", "--dtype", "bfloat16", "--evidence")
    assert status == 0
    assert "profile: flash_bf16" in said
    assert "512 keys" in said
    assert "2,016 sums of 64 terms" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("torch:falsh",), "torch:flash"),
        (("torch:flash", "--dtype", "float8"), "--dtype 'float8' must be one of"),
        (("torch:flash", "--device", "teapot"), "--device 'teapot'"),
        (("emulator:flash_fp16", "--dtype", "bfloat16"), "say --dtype float16"),
        (("emulator:flash",), "known are"),
        (("spec", "--dtype", "float32"), "takes FP16"),
        (("missing.py:attention",), "missing.py is no file"),
        (("torch:flash", "--head-dims", "64"), "--head-dims '64' must be two numbers"),
        (("nowhere", "results"), "nowhere is no folder"),
    ],
)
def test_bad_input_is_one_line(words, said):
    result = RUNNER.invoke(app, ["fingerprint", *words])
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_folder_of_other_cases_is_refused(probes, tmp_path):
    from cpjax.crosscheck.files.case import write_case

    folder = tmp_path / "cases"
    asked = all_probes("float16")
    for name, one in asked.items():
        write_case(folder, case_of(name, one._replace(scale=one.scale * 2) if name == "tiles" else one))
    status, said = run(str(folder), str(probes[1]))
    assert status == 2
    assert "no probe of this version" in said or "another case" in said


@pytest.mark.slow
def test_results_of_nobody(probes, tmp_path):
    status, said = run(str(probes[0]), str(tmp_path))
    assert status == 2
    assert "no result of a probe" in said


@pytest.mark.slow
def test_a_backend_is_asked_all_at_once():
    """The ring of the specification, by the two functions that every backend has."""
    status, said = run("spec", "--json")
    assert status == 0
    card = json.loads(said)
    assert card["profile"]["name"] == "flash_fp16"
    lines = {line["name"]: line["code"] for line in card["lines"]}
    assert lines["key tile"] == "512"
    assert lines["lse"] == "natural"
    assert card["cp"] == 4
    assert lines["order over ranks, out"] == lines["order over ranks, lse"] == "ring"
    assert (lines["division over ranks"], lines["carried out"], lines["carried lse"]) == ("each", "float16", "float32")
    assert (lines["weights of a merge"], lines["lse of a merge"]) == ("max", "log")
    assert lines["a rank that the mask hides"] == lines["a rank of pads"] == "nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raisesinprepare", "error: prepare() raised OSError: no device"),
        ("raises", "error: run() raised RuntimeError: kernel panic second line"),
        ("raisesinsupports", "error: supports() raised KeyError: 'x'"),
        ("unsupported", "unsupported: only on <Tuesdays>"),
    ],
)
def test_what_a_backend_raises_is_the_reason_of_every_probe(tmp_path, monkeypatch, name, reason):
    """None is a traceback in the place of a card."""
    monkeypatch.syspath_prepend(backend_package.install(tmp_path))
    status, said = run(name, "--json")
    monkeypatch.delitem(sys.modules, "their_backends")
    assert status == 0
    card = json.loads(said)
    assert card["failures"] == dict.fromkeys(probes_of(CP), reason)
    assert card["cp"] == 1
    assert card["profile"] is None


@pytest.mark.parametrize(("name", "reason"), [("nobackend", "TypeError"), ("missing", "AttributeError")])
def test_a_backend_that_cannot_be_loaded_is_an_error_of_the_user(tmp_path, monkeypatch, name, reason):
    monkeypatch.syspath_prepend(backend_package.install(tmp_path))
    status, said = run(name)
    monkeypatch.delitem(sys.modules, "their_backends")
    assert status == 2
    assert f"backend {name} cannot be loaded ({reason}: " in said


def test_cases_refuses_head_dims_of_another_set(tmp_path):
    result = RUNNER.invoke(app, ["cases", str(tmp_path / "x"), "--head-dims", "192,128"])
    assert result.exit_code == 2
    assert "--preset fingerprint" in result.output
    assert not (tmp_path / "x").exists()


def test_brackets_are_printed_as_they_are(monkeypatch):
    """Not taken for the markup of rich, which leaves an opening one out and fails at a closing one."""
    empty = read_card("mine[x]", "float16", all_probes("float16"), {}, {"scores": "no [x]"})
    card = replace(empty, lines=(*empty.lines, Line("line [x]", "value [/x]", "evidence [x] and [/x]")))
    monkeypatch.setattr("cpjax.fingerprint.card.card_of", lambda *_: card)
    status, said = run("emulator:flash_fp16", "--evidence")
    assert status == 0
    for text in ("mine[x], float16", "line [x]", "value [/x]", "evidence [x] and [/x]", "scores (no [x])"):
        assert text in said


def test_an_empty_card_has_no_profile():
    card = read_card("nobody", "float16", all_probes("float16"), {}, {})
    assert card.profile is None
    assert all("cannot be told" in line.value for line in card.lines)
