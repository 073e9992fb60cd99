"""Any backend through an entry point: four outcomes, and none of a backend's doings is a pass or a crash."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import backend_package
import numpy as np
import pytest

import cpjax
from cpjax.crosscheck import backends, judge
from cpjax.crosscheck.backends.compute import compute
from cpjax.crosscheck.conformance.cases import conformance_cases
from cpjax.crosscheck.files.case import gaussian_case, read_case, write_case
from cpjax.crosscheck.files.folders import read_cases
from cpjax.crosscheck.files.note import Note, write_note
from cpjax.crosscheck.files.result import read_result, write_result
from cpjax.crosscheck.run.session import judge_folder, judge_result
from cpjax.crosscheck.run.summary import all_passed, sentence
from cpjax.errors import InputError
from npu_backend.families import FAMILIES, precision_of

pytestmark = pytest.mark.optimized

ROOT = Path(cpjax.__file__).parents[1]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return backend_package.install(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    made = gaussian_case("c", (60, 2, 1, 16, 16), cp=2, precision={}, seed=3, about={})
    return write_case(tmp_path_factory.mktemp("cases"), made)


@pytest.fixture(scope="module")
def cases_folder(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name in ("a", "b"):
        write_case(folder, gaussian_case(name, (60, 2, 1, 16, 16), cp=2, precision={}, seed=3, about={}))
    return folder


@pytest.fixture
def installed(package, monkeypatch):
    monkeypatch.syspath_prepend(package)
    yield
    sys.modules.pop("their_backends", None)


def command(package, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, "-m", "cpjax", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_ours_are_entry_points_like_any_other(installed):
    found = backends.installed()
    assert {"spec", "npu", "sdpa", "dense"} <= set(found)
    assert backends.about(found["dense"])["package"] == "their-backends"
    assert isinstance(backends.load("dense"), backends.Backend)


@pytest.mark.parametrize("name", [*backend_package.PASS, *backend_package.FAIL])
def test_a_result_is_judged(installed, case, tmp_path, name):
    compute(name, backends.load(name.lower()), [case], tmp_path / name)
    judged = judge_result(case, tmp_path / name / "c.safetensors")
    assert judged.outcome == ("pass" if name in backend_package.PASS else "fail"), judged.reasons
    assert judged.backend == name  # that of the entry point, whatever the result says


@pytest.mark.parametrize(
    "name", [name for name in backend_package.ERROR if name not in ("Dies", "NoBackend", "Missing")]
)
def test_whatever_a_backend_does_is_an_error_and_never_a_pass(installed, case, tmp_path, name, capsys):
    compute(name, backends.load(name.lower()), [case], tmp_path)
    judged = judge_result(case, tmp_path / "c.safetensors")
    assert (judged.outcome, judged.passed, judged.verdict) == ("error", False, None)
    assert judged.reasons[0]
    assert not all_passed([judged])
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_what_is_no_backend_or_not_there_is_refused(installed):
    with pytest.raises(TypeError, match="no backend"):
        backends.load("nobackend")
    with pytest.raises(AttributeError):
        backends.load("missing")
    with pytest.raises(InputError, match="installed are"):
        backends.load("nowhere")


@pytest.mark.process
def test_four_outcomes_by_the_command(package, cases_folder, tmp_path):
    names = ("dense", "unsupported", "dies", "forgetsakey", "nobackend", "missing")
    words = [word for name in names for word in ("--backend", name)]
    run = command(package, "crosscheck", "--cases", cases_folder, *words, "--keep", tmp_path / "k", "--json")
    assert run.returncode == 1, run.stderr
    outcomes = {(row["backend"], row["case"]): row["outcome"] for row in json.loads(run.stdout)["results"]}
    expected = dict(zip(names, ("pass", "unsupported", "error", "fail", "error", "error"), strict=True))
    assert outcomes == {(name, case): expected[name] for name in names for case in ("a", "b")}
    table = command(package, "judge", cases_folder, tmp_path / "k" / "results")
    assert table.returncode == 1
    for word in ("agrees", "unsupported", "ERROR", "WRONG", "SIGABRT", "only on <Tuesdays>"):
        assert word in table.stdout


@pytest.mark.process
def test_each_family_of_the_npu_backend_is_a_backend(package, tmp_path):
    """Each computes with its own operators, and is judged in their precision; MLA's head dims are what all take."""
    families = {"npu": "ring_mla", "npu-fia": "fia", "npu-fusion": "fusion"}
    write_case(tmp_path / "cases", gaussian_case("c", (32, 2, 1, 192, 128), cp=2, precision={}, seed=4, about={}))
    words = [word for name in families for word in ("--backend", name)]
    run = command(package, "crosscheck", "--cases", tmp_path / "cases", *words, "--json")
    assert run.returncode == 0, run.stderr
    judged = {row["backend"]: (row["outcome"], row["precision"]) for row in json.loads(run.stdout)["results"]}
    assert judged == {name: ("pass", precision_of(FAMILIES[family], 2)) for name, family in families.items()}


@pytest.mark.process
def test_exit_status(package, cases_folder, tmp_path):
    both = command(package, "crosscheck", "--cases", cases_folder, "--backend", "dense", "--backend", "unsupported")
    assert both.returncode == 0, both.stdout
    assert "unsupported" in both.stdout
    nobody = command(package, "crosscheck", "--cases", cases_folder, "--backend", "unsupported")
    assert nobody.returncode == 1
    assert "Nothing was judged" in nobody.stdout
    for words in (["--backend", "nowhere"], ["--backend", "dense", "--cases", cases_folder, "--tokens", 8]):
        wrong = command(package, "crosscheck", *words)
        assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    listed = command(package, "backends", "--json")
    assert {row["name"] for row in json.loads(listed.stdout)} >= {"spec", "npu", "sdpa", "dense"}


def test_a_note_is_believed_only_if_it_is_one(case, tmp_path):
    path = write_note(tmp_path, case, "x", Note("unsupported", "head dim"))
    result = tmp_path / "c.safetensors"
    assert judge_result(case, result).outcome == "unsupported"
    said = json.loads(path.read_text())
    for change in ({"digest": "0" * 64}, {"outcome": "pass"}, {"reason": ""}, {"more": 1}, {"version": 1}):
        path.write_text(json.dumps(said | change))
        assert judge_result(case, result).outcome == "error"
    for content in (b"", b"[]", b"\xff\xfe", b"[" * 10**5):
        path.write_bytes(content)
        assert judge_result(case, result).outcome == "error"
    path.write_text(json.dumps(said))
    result.write_bytes(b"")
    assert "remove one" in judge_result(case, result).reasons[0]


def test_pytorch_and_the_specification_on_a_case(tmp_path):
    pytest.importorskip("torch", reason="the backend sdpa is PyTorch")
    made = gaussian_case("c", (61, 4, 2, 16, 16), cp=2, precision={}, seed=5, about={})
    made = write_case(tmp_path / "cases", made)
    for name in ("sdpa", "spec"):
        compute(name, backends.load(name), [made], tmp_path / "results" / name)
    judged = list(judge_folder([made], tmp_path / "results", lambda *_: None))
    assert [(one.backend, one.outcome) for one in judged] == [("sdpa", "pass"), ("spec", "pass")]
    assert "agree" in sentence(judged)
    assert np.isnan(judged[0].verdict.lse_z)


def test_pytorch_reads_packed_prefixes_and_pads(tmp_path):
    """Its mask is made of positions and segments, so every layout is the same to it."""
    pytest.importorskip("torch", reason="the backend sdpa is PyTorch")
    kinds = ("prefix", "decode", "pads", "interleaved", "pages")
    added = ("softcap", "sink", "window", "alibi", "bias", "all-of-them")
    wanted = [case for case in conformance_cases() if any(kind in case.name for kind in (*kinds, *added))]
    cases = [write_case(tmp_path / "cases", case) for case in wanted]
    compute("sdpa", backends.load("sdpa"), cases, tmp_path / "sdpa")
    outcomes = {one.case: one.outcome for one in judge_folder(cases, tmp_path / "sdpa", lambda *_: None)}
    lacking = [name for name in outcomes if any(word in name for word in ("softcap", "sink", "alibi", "all-of-them"))]
    assert len(lacking) == 4
    assert outcomes == {name: "unsupported" if name in lacking else "pass" for name in outcomes}
    assert len(outcomes) == 15


@pytest.mark.process
def test_several_processes_say_what_one_says(cases_folder, tmp_path):
    """A right result, a wrong one and a missing one; the diagnosis comes along."""
    cases = read_cases(cases_folder)
    compute("sdpa", backends.load("sdpa"), cases[:1], tmp_path / "r" / "sdpa")
    wrong = read_result(tmp_path / "r" / "sdpa" / f"{cases[0].name}.safetensors", cases[0])
    write_result(tmp_path / "r" / "wrong", cases[0], replace(wrong, out=wrong.out[..., ::-1].copy()))
    said = [
        [one.as_json() for one in judge_folder(cases, tmp_path / "r", lambda *_: None, workers=workers)]
        for workers in (1, 2)
    ]
    assert [one["outcome"] for one in said[0]] == ["pass", "error", "fail", "error"]
    assert said[0][2]["verdict"]["diagnosis"]
    assert said[0] == said[1]


def test_all_keys_at_once_is_no_order_of_chunks():
    """Two keys hold the weight, in two chunks: a kernel that merges has p = 1 in both, one without chunks has not."""
    torch = pytest.importorskip("torch", reason="the kernel is PyTorch's")
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, n, 4, 64)).astype(np.float16) for n in (256, 256, 256))
    query[..., 0], key[0, [20, 236]] = 8, 0
    key[0, [20, 236], :, 0] = 40
    key[0, 236, :, 1], value[0, 236] = 1, -value[0, 20]
    arrays = [torch.from_numpy(x).transpose(1, 2) for x in (query, key, value)]
    out = torch.nn.functional.scaled_dot_product_attention(*arrays, scale=0.125).transpose(1, 2).numpy()
    asked = {"scale": 0.125, "is_causal": False, "cp": 4}
    assert judge(query, key, value, out, **asked, order="together").passed
    assert not judge(query, key, value, out, **asked, order="ascending").passed


def test_the_example_of_the_page(case, tmp_path):
    """docs/backends.md: its code is a backend that passes."""
    page = (ROOT / "docs" / "backends.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "def supports" in block]
    names: dict = {}
    exec(code, names)
    compute("mine", names["MyBackend"](), [case], tmp_path)
    assert judge_result(case, tmp_path / "c.safetensors").outcome == "pass"


@pytest.mark.process
def test_the_foreign_reader_of_the_page(cases_folder, tmp_path):
    """docs/formats.md is enough for a program that knows nothing of safetensors, NumPy or this package."""
    script = ROOT / "examples" / "foreign.py"
    text = script.read_text()
    assert set(re.findall(r"(?m)^(?:import|from) (\w+)", text)) == {"json", "math", "pathlib", "struct", "sys"}
    line = [sys.executable, "-I", script, cases_folder, tmp_path / "foreign"]
    run = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    judged = list(judge_folder(read_cases(cases_folder), tmp_path / "foreign", lambda *_: None))
    assert [one.outcome for one in judged] == ["pass", "pass"], judged[0].reasons
    assert read_case(cases_folder / "a.safetensors").digest
