"""The whole path by its command: a config in, attention three ways through real processes, a verdict out."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from strategies import examples
from typer.testing import CliRunner

import cpjax
from cpjax.cli import app
from cpjax.crosscheck.files.case import gaussian_case, read_case, write_case
from cpjax.crosscheck.files.result import read_result
from cpjax.crosscheck.run.session import judge_result
from cpjax.errors import InputError

pytestmark = [pytest.mark.process, pytest.mark.optimized]
ROOT = Path(cpjax.__file__).parents[1]
EXAMPLE = ROOT / "examples" / "deepseek-r1-cp2.json"
SMALL = ("--geometry", "16,128,64,128", "--tokens", "45")  # two heads a card, and pads


def cpjax_command(*arguments, timeout=300):
    line = [sys.executable, "-m", "cpjax", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def refused(*arguments):
    """What the command says to bad input, asked in this process: nothing is computed, so none has to start."""
    said = CliRunner().invoke(app, [*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, said.exit_code, said.stdout, said.stderr)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What one crosscheck of a small deployment prints and leaves."""
    folder = tmp_path_factory.mktemp("kept") / "out"
    run = cpjax_command("crosscheck", "--config", EXAMPLE, *SMALL, "--keep", folder, "--json")
    assert run.returncode == 0, run.stderr
    return folder, json.loads(run.stdout)


def test_specification_and_backend_agree_with_dense(kept):
    _, report = kept
    assert report["passed"]
    assert "both agree" in report["summary"]
    rows = {row["backend"]: row for row in report["results"]}
    assert {name: row["precision"] for name, row in rows.items()} == {"spec": "flash_fp16", "npu": "ring_mla_fp16"}
    for row in rows.values():
        assert row["passed"]
        assert row["case"] == "deepseek-r1-cp2-45"
        assert 0 < row["verdict"]["z"] < 1.3
        assert 0 < row["verdict"]["hard_ratio"] <= 1
        assert row["verdict"]["rows"] == 45 * 2
    steps = rows["npu"]["seconds_per_step"]
    assert [len(of_rank) for of_rank in steps] == [2, 2]
    [between] = report["between"]
    assert (between["backends"], between["agrees"], between["rows"]) == (["npu", "spec"], True, 45 * 2)
    assert 0.5 < between["z"] < 1.3  # two precisions round other numbers, so their errors are independent
    assert "Held against each other" in report["summary"]


def test_kept_files_are_judged_again_as_a_table(kept):
    folder, _ = kept
    run = cpjax_command("judge", folder / "cases", folder / "results")
    assert run.returncode == 0, run.stderr
    for word in ("specification", "NPU backend", "flash_fp16", "ring_mla_fp16", "agrees", "both agree"):
        assert word in run.stdout
    again = cpjax_command("crosscheck", *SMALL, "--keep", folder)
    assert again.returncode == 2
    assert "nothing is overwritten" in again.stderr


def tampered(folder: Path, tmp_path: Path, change) -> Path:
    """The NPU's results with one thing changed: `change(tensors, metadata)`, or bytes for the file."""
    source = folder / "results" / "npu" / "deepseek-r1-cp2-45.safetensors"
    target = tmp_path / "npu" / source.name
    target.parent.mkdir()
    with safe_open(source, framework="numpy") as file:
        tensors = {name: file.get_tensor(name).copy() for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    content = change(tensors, metadata)
    if content is None:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, target, metadata)
    else:
        target.write_bytes(content(source.read_bytes()))
    return target


def zero_head(tensors, metadata):
    tensors["out.1"][:, :, 1] = 0


def exchange_outputs(tensors, metadata):
    for field in ("out", "lse"):
        tensors[f"{field}.0"], tensors[f"{field}.1"] = tensors[f"{field}.1"], tensors[f"{field}.0"]


def exchange_ranks(tensors, metadata):
    exchange_outputs(tensors, metadata)
    for field in ("positions", "segments"):
        tensors[f"{field}.0"], tensors[f"{field}.1"] = tensors[f"{field}.1"], tensors[f"{field}.0"]


def one_nan(tensors, metadata):
    tensors["out.0"][0, 3, 0, 5] = np.nan


def one_lse_nan(tensors, metadata):
    tensors["lse.1"][0, 3, 0] = np.nan


def another_digest(tensors, metadata):
    metadata["digest"] = "0" * 64


def missing_tensor(tensors, metadata):
    del tensors["lse.1"]


def extra_tensor(tensors, metadata):
    tensors["out.2"] = tensors["out.1"]


def wrong_dtype(tensors, metadata):
    tensors["out.0"] = tensors["out.0"].astype(np.float32)


def wrong_shape(tensors, metadata):
    tensors["out.0"] = tensors["out.0"][:, 1:]


def wrong_precision(tensors, metadata):
    metadata["precision"] = "flash_fp16"


def truncated(tensors, metadata):
    return lambda content: content[:-100]


def no_header(tensors, metadata):
    return lambda content: b"\xff" * 8 + content


def nothing(tensors, metadata):
    return lambda content: b""


TAMPERING = (zero_head, exchange_outputs, exchange_ranks, one_nan, one_lse_nan, another_digest, missing_tensor,
             extra_tensor, wrong_dtype, wrong_shape, wrong_precision, truncated, no_header, nothing)  # fmt: skip


@pytest.mark.parametrize("change", TAMPERING, ids=lambda change: change.__name__)
def test_a_tampered_result_never_passes(kept, tmp_path, change):
    folder, _ = kept
    case = read_case(folder / "cases" / "deepseek-r1-cp2-45.safetensors")
    judged = judge_result(case, tampered(folder, tmp_path, change))
    assert not judged.passed
    assert judged.reasons
    json.dumps(judged.as_json(), allow_nan=False)


@pytest.mark.parametrize("change", [zero_head, truncated, another_digest], ids=lambda change: change.__name__)
def test_judge_exits_with_one_and_names_the_case(kept, tmp_path, change):
    folder, _ = kept
    run = cpjax_command("judge", folder / "cases", tampered(folder, tmp_path, change).parent)
    assert run.returncode == 1, run.stderr
    assert "deepseek-r1-cp2-45" in run.stdout
    assert "Traceback" not in run.stderr


def test_a_missing_result_is_a_failure(kept, tmp_path):
    folder, _ = kept
    (tmp_path / "empty").mkdir()
    run = cpjax_command("judge", folder / "cases", tmp_path / "empty")
    assert run.returncode == 1
    assert "does not exist" in run.stdout


@given(st.integers(0, 10**6), st.integers(0, 255))
@examples(1)
def test_a_result_with_any_byte_changed_never_crashes(kept, tmp_path_factory, at, byte):
    """In the header it is refused, in the outputs it is judged; only a change that changes nothing may pass."""
    folder, _ = kept
    case = read_case(folder / "cases" / "deepseek-r1-cp2-45.safetensors")
    source = folder / "results" / "npu" / "deepseek-r1-cp2-45.safetensors"
    content = bytearray(source.read_bytes())
    changed = content[at % len(content)] != byte
    content[at % len(content)] = byte
    target = tmp_path_factory.mktemp("bytes") / source.name
    target.write_bytes(content)
    result = None
    with contextlib.suppress(InputError):
        result = read_result(target, case)
    assert result is not None or changed
    if result is not None:
        assert result.out.shape == (1, 48, 2, 128)


def test_cases_are_written_once_and_read_back(tmp_path):
    case = gaussian_case("c", (5, 2, 1, 192, 128), cp=2, precision={"npu": "ring_mla_fp16"}, seed=3, about={"x": 1})
    written = write_case(tmp_path, case)
    again = read_case(tmp_path / "c.safetensors")
    assert again.digest == written.digest
    assert (again.scale, again.is_causal, again.cp, again.precision) == (192**-0.5, True, 2, {"npu": "ring_mla_fp16"})
    assert again.about == {"x": 1, "seed": 3}
    assert again.query.shape == (1, 8, 2, 192)
    assert (again.q_tokens.segment == [[0, 0, 0, 0, 0, -1, -1, -1]]).all()
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(getattr(again, name), getattr(case, name))
    with pytest.raises(InputError, match="nothing is overwritten"):
        write_case(tmp_path, case)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_both_halves_read_the_same_case(kept):
    from npu_backend.files import read_case as read_by_npu

    path = kept[0] / "cases" / "deepseek-r1-cp2-45.safetensors"
    ours, theirs = read_case(path), read_by_npu(path)
    assert ours.digest == theirs.digest
    assert (ours.scale, ours.is_causal, ours.cp) == (theirs.scale, theirs.is_causal, theirs.cp)
    np.testing.assert_array_equal(ours.query, theirs.query)


BAD_CONFIGS = {
    "empty": b"",
    "not JSON": b"{",
    "list": b"[]",
    "null": b"null",
    "binary": bytes(range(256)),
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "no ModelConfig": b'{"BackendConfig": {"ModelDeployConfig": {"maxSeqLen": 2560, "maxInputTokenLen": 2048}}}',
}


def one_line(run):
    assert run.returncode == 2, run.stdout
    assert run.stdout == ""
    assert run.stderr.startswith("cpjax: ")
    assert run.stderr.count("\n") == 1, run.stderr


@pytest.mark.parametrize("content", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_cannot_be_read_ends_in_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    one_line(refused("crosscheck", "--config", path))


@pytest.mark.parametrize("value", ["0", "-1", '"two"', "1e99", "65"])
def test_a_cp_that_nobody_can_compute_ends_in_one_line(tmp_path, value):
    path = tmp_path / "config.json"
    path.write_text(EXAMPLE.read_text().replace('"cp": 2', f'"cp": {value}'))
    one_line(refused("crosscheck", "--config", path))


def test_other_bad_input_ends_in_one_line(tmp_path):
    one_line(cpjax_command("crosscheck", "--config", tmp_path / "nowhere.json"))
    one_line(refused("crosscheck", "--config", tmp_path))
    odd = tmp_path / "odd.json"
    odd.write_text(EXAMPLE.read_text().replace('"tp": 8', '"tp": 7'))
    one_line(refused("crosscheck", "--config", odd))
    unknown = tmp_path / "unknown.json"
    unknown.write_text(EXAMPLE.read_text().replace("DeepSeek-R1_w8a8", "llama"))
    one_line(refused("crosscheck", "--config", unknown))
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(2 * 10**9)
    one_line(cpjax_command("crosscheck", "--config", huge))
    one_line(refused("crosscheck", "--tokens", 0))
    one_line(refused("judge", tmp_path / "nowhere", tmp_path))
    one_line(refused("judge", odd, tmp_path))


def test_a_config_that_mindie_does_not_take_is_refused(tmp_path):
    path = tmp_path / "cp3.json"
    path.write_text(EXAMPLE.read_text().replace('"cp": 2', '"cp": 3'))
    run = cpjax_command("crosscheck", "--config", path, *SMALL)
    one_line(run)
    assert "MindIE does not take this config: cp-1-or-2 (cp 3); world-product (cp 3" in run.stderr


def test_several_tensor_parallel_shares_are_cases_of_their_own():
    run = cpjax_command("crosscheck", *SMALL, "--shares", 2, "--json")
    assert run.returncode == 0, run.stderr
    assert "scaled down: 4 of 16 cards" in run.stderr
    assert "cp·sp = 16 ranks share is computed with --decode only" in run.stderr
    names = [(row["backend"], row["case"]) for row in json.loads(run.stdout)["results"]]
    assert names == [(who, f"deepseek-r1-cp2-45-tp{share}") for who in ("npu", "spec") for share in (0, 1)]
    one_line(refused("crosscheck", *SMALL, "--shares", 9))


def test_decode_of_a_deployment_with_sp_is_computed_over_all_its_ranks(tmp_path):
    path, text = tmp_path / "sp.json", EXAMPLE.read_text()
    for old, new in (
        ('"dp": 1', '"dp": 8'),
        ('"cp": 2', '"cp": 1'),
        ('"sp": 8', '"sp": 2'),
        ('"tp": 8', '"tp": 2'),
    ):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    run = cpjax_command("crosscheck", "--config", path, "--geometry", "16,128,64,128", "--tokens", 300, "--decode",
                        "--keep", tmp_path / "out", "--json")  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    rows = [row for row in report["results"] if row["case"] == "sp-300-decode"]
    assert [(row["backend"], row["precision"], row["order"], row["outcome"]) for row in rows] == [
        (name, "decode_fp16_lse", "ascending", "pass") for name in ("npu", "spec")
    ]
    case = read_case(tmp_path / "out" / "cases" / "sp-300-decode.safetensors")
    assert (case.cp, case.layout, case.query.shape, case.key.shape) == (2, "decode", (1, 2, 16, 576), (1, 450, 1, 576))
    assert case.q_tokens.position.tolist() == [[299, 149]]
    assert case.scale == 192**-0.5
    assert {one["case"]: one["agrees"] for one in report["between"]} == {"sp-300": True, "sp-300-decode": True}


def test_more_cache_ranks_than_are_computed_are_refused(tmp_path):
    path = tmp_path / "many.json"
    text = EXAMPLE.read_text().replace('"worldSize" : 16', '"worldSize" : 128').replace('"moe_ep": 16', '"moe_ep": 128')
    text = text.replace('"sp": 8', '"sp": 64').replace('"tp": 8', '"tp": 64')
    cards = "[[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]]"
    assert cards in text
    path.write_text(text.replace(cards, str([list(range(128))])))
    run = refused("crosscheck", "--config", path, "--tokens", 45, "--decode")
    one_line(run)
    assert "cp·sp is 128; at most 64 ranks" in run.stderr


def test_pairs_that_do_not_agree_are_named():
    from cpjax.crosscheck.judging.pairwise import Agreement
    from cpjax.crosscheck.run.compare import Compared, between_sentence

    good = Compared("a", ("npu", "spec"), Agreement(True, (), 0.5, 0.2, 0.5, 0.2, 9))
    bad = Compared("b", ("npu", "spec"), Agreement(False, ("out: far",), float("inf"), 2.0, float("nan"), 0.2, 9))
    assert between_sentence([]) == ""
    assert "z at most 0.50" in between_sentence([good])
    assert between_sentence([good, bad]) == "1 of 2 pairs does NOT agree with each other. b, npu and spec: out: far."
    assert (bad.as_json()["z"], bad.as_json()["lse_z"]) == (None, None)


@pytest.mark.parametrize("command", [[], ["crosscheck"], ["judge"]])
def test_help_shows_an_example(command):
    run = cpjax_command(*command, "--help")
    assert run.returncode == 0
    if command:
        assert "Example: cpjax" in run.stdout
