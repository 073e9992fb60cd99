"""`cpjax cases --preset layer` and `cpjax judge` of layers: what is printed, as text and JSON, and the exit status."""

import json

import layer_twin
import pytest
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.crosscheck.layer.result import LayerResult, write_layer_result
from cpjax.crosscheck.layer.session import read_layer_cases
from cpjax.deepseek.layer_cases import SET

RUNNER = CliRunner()


def run(*arguments: object):
    return RUNNER.invoke(app, [str(x) for x in arguments], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The set; results of two of its cases in each of two folders, right and wrong."""
    root = tmp_path_factory.mktemp("layer")
    written = run("cases", "--preset", "layer", root / "cases")
    assert written.exit_code == 0, written.output
    assert f"{len(SET)} cases, version 1, in {root / 'cases'}. Next: cpjax judge {root / 'cases'}" in written.output
    for case in read_layer_cases(root / "cases")[:2]:
        (root / "two").mkdir(exist_ok=True)
        name = f"{case.name}.safetensors"
        (root / "two" / name).write_bytes((root / "cases" / name).read_bytes())
        write_layer_result(root / "right", case, LayerResult("twin", layer_twin.layer(case), {"made": "by hand"}))
        fault = "bias weighs" if case.is_moe else ""
        write_layer_result(root / "wrong", case, LayerResult("twin", layer_twin.layer(case, fault), {}))
    return root


@pytest.mark.slow
def test_right_results_exit_0(folder):
    judged = run("judge", folder / "two", folder / "right")
    assert judged.exit_code == 0, judged.output
    assert "Every stage of 2 of 2 results is what correct arithmetic in its precision gives." in judged.output
    assert judged.output.count("agrees") == 17 + 23
    assert "WRONG" not in judged.output


def test_a_wrong_stage_exits_1_and_is_named(folder):
    judged = run("judge", folder / "two", folder / "wrong")
    assert judged.exit_code == 1
    assert judged.output.count("WRONG") == 1
    assert "1-moe-float, twin: the first wrong stage is router (router), everywhere" in judged.output
    assert "equals, within its bound: the correction bias is in the experts' weights, too" in judged.output
    assert "1 of 2 results does not agree: 1-moe-float." in judged.output


def test_json_says_the_same(folder):
    judged = run("judge", folder / "two", folder / "wrong", "--json")
    assert judged.exit_code == 1
    said = json.loads(judged.stdout)
    assert [one["outcome"] for one in said["results"]] == ["pass", "fail"]
    verdict = said["results"][1]["verdict"]
    assert (verdict["passed"], verdict["first_wrong"], verdict["kind"]) == (False, "router", "router")
    wrong = [one for one in verdict["stages"] if one["outcome"] != "agrees"]
    assert [one["stage"] for one in wrong] == ["router"]
    assert wrong[0]["causes"] == [
        "the result equals, within its bound: the correction bias is in the experts' weights, too"
    ]
    assert {"stage", "kind", "outcome", "ratio", "z", "moved", "allowed", "where"} < wrong[0].keys()
    assert run("judge", folder / "two", folder / "right", "--json").exit_code == 0


def test_missing_results_exit_1(folder, tmp_path):
    (tmp_path / "none").mkdir()
    judged = run("judge", folder / "two", tmp_path / "none")
    assert judged.exit_code == 1
    assert judged.output.count("ERROR") == 2
    assert "does not exist" in judged.output


@pytest.mark.parametrize("option", [("--explain", "0-dense-float,0,0,0"), ("--report", "page")])
def test_what_is_of_attention_is_refused(folder, tmp_path, option):
    given = [tmp_path / x if x == "page" else x for x in option]
    judged = run("judge", folder / "two", folder / "right", *given)
    assert judged.exit_code == 2
    assert "--explain and --report are of attention" in judged.output


def test_bad_input_exits_2(folder, tmp_path):
    assert run("judge", folder / "two", tmp_path / "nowhere").exit_code == 2
    assert run("cases", "--preset", "layer", folder / "two").exit_code == 2
    name = "0-dense-float.safetensors"
    content = (folder / "two" / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = run("judge", tmp_path, folder / "right")
    assert damaged.exit_code == 2
    assert "does not have the digest" in damaged.output
    unknown = run("cases", "--preset", "layers", tmp_path / "new")
    assert unknown.exit_code == 2
    assert "known are conformance, fingerprint, layer" in unknown.output
