"""`cpjax plan`, as a user runs it."""

import json
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.plan.constants import frozen
from cpjax.plan.published import rows

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "deepseek-r1-cp2.json"
LLAMA = ("--model", "Llama-3.1-405B", "--device", "h100", "--tp", 8)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *(str(x) for x in arguments)])


def said(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments):
    """The one line of a user error."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_deployment_is_planned_on_its_own_cards():
    result = run(EXAMPLE, "--tokens", "8192", "--cp", "1,2")
    assert result.exit_code == 0
    assert "8,192 tokens: predicted time to first token, not measured" in result.stdout
    for heading in ("time s", "exposed s", "received GB", "card GB", "TFLOP/s", "GB/s"):
        assert heading in result.stdout
    assert "800i-a3 was taken for 16 cards a node" in result.stderr
    found = said(EXAMPLE, "--tokens", 2048)
    assert [(one["cp"], one["tp"], one["cards"], one["exchange"]) for one in found["choices"]] == [
        (1, 16, 16, "gather"), (2, 8, 16, "gather"), (4, 4, 16, "gather"), (8, 2, 16, "gather")
    ]  # fmt: skip
    assert found["says"] == "predicted, not measured"
    assert found["model"]["weight_bits"] == 8


def test_options_say_the_same_as_a_config():
    one = said(EXAMPLE, "--tokens", 4096, "--cp", "1,2")
    options = ("--model", "DeepSeek-R1", "--device", "800i-a3", "--cards", 16, "--exchange", "gather", "--cp", "1,2")
    two = said(*options, "--tokens", 4096)
    for this, that in zip(one["choices"], two["choices"], strict=True):
        assert this["lengths"][0]["seconds"] == that["lengths"][0]["seconds"]


def test_cp_brings_cards_with_tp():
    found = said(
        *LLAMA, "--tokens", 131072, "--chunk", 65536, "--cp", "1,2", "--prefix", 1000, "--partition", "contiguous"
    )
    assert [one["cards"] for one in found["choices"]] == [8, 16]
    assert found["prefix"] == 1000
    assert found["choices"][1]["lengths"][0]["balance"] < 0.99


def test_own_devices_and_measurements(tmp_path):
    (tmp_path / "devices.toml").write_text('[devices.mine]\nlike = "h100"\ntflops_16bit = 1978.0\n')
    (tmp_path / "own.toml").write_text(
        "[efficiency]\nattention = 0.9\n[device]\nring_link_gb_s = 1.0\n"
        "[[times]]\ncp = 2\ntokens = 65536\nseconds = 9.0\n"
    )
    arguments = ("--model", "Llama-3.1-405B", "--tp", 8, "--tokens", 65536, "--cp", "1,2")
    ours = said(*arguments, "--device", "h100")
    mine = said(*arguments, "--device", "mine", "--devices", tmp_path / "devices.toml")
    own = said(*arguments, "--device", "h100", "--measured", tmp_path / "own.toml")
    first = [found["choices"][0]["lengths"][0] for found in (ours, mine, own)]
    assert first[1]["attention_seconds"] == pytest.approx(first[0]["attention_seconds"] / 2)
    assert own["constants"] == ours["constants"] | {"attention": 0.9}
    assert own["device"]["ring_link_gb_s"] == 1
    time = own["your_times"][0]
    assert time["predicted_s"] == own["choices"][1]["lengths"][0]["seconds"]
    assert time["error"] == pytest.approx(time["predicted_s"] / 9 - 1)
    assert "measured s" in run(*arguments, "--device", "h100", "--measured", tmp_path / "own.toml").stdout


def test_published_times_and_the_fit(monkeypatch):
    """As printed; all rows, and the fit itself, are tested beside the laws."""
    monkeypatch.setattr("cpjax.plan.published.rows", lambda constants: islice(rows(constants), 3))
    monkeypatch.setattr("cpjax.plan.fit.fit", frozen)
    table = run("--published").stdout
    printed = [line.split() for line in table.splitlines()]
    assert ["llama3-16-nodes", "128,000", "3.8", "3.8", "+0.0%", "fitted"] in printed
    assert "llama3-1-node: the same on one node" in table
    listed = json.loads(run("--published", "--json").stdout)["rows"]
    assert [row["error"] for row in listed] == [row.error for row in islice(rows(frozen()), 3)]
    fitted = json.loads(run("--fit", "--json").stdout)
    assert fitted["fitted"] == fitted["shipped"]
    assert "published 3.8 s, predicted 3.8 s" in run("--fit").stdout


def test_a_picture_is_drawn_and_nothing_overwritten(tmp_path):
    picture = tmp_path / "plan.svg"
    arguments = (*LLAMA, "--tokens", 8192, "--cp", "1,8", "--draw", picture)
    assert run(*arguments).exit_code == 0
    assert b"<svg" in picture.read_bytes()
    assert "is there already" in refused(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.svg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--tokens is missing"),
        (("--tokens", "many"), "--tokens 'many' must be whole numbers"),
        (("--tokens", 0), "--tokens has 0"),
        (("--tokens", 5), "give CONFIG, or --model and --device"),
        ((EXAMPLE, "--tokens", 5, "--model", "x"), "CONFIG says the model"),
        ((EXAMPLE, "--tokens", 5, "--tp", 8, "--cards", 8), "give --tp, with which cp brings more cards"),
        ((EXAMPLE, "--tokens", 5, "--cp", "3"), "--cp has 3, which does not divide 16 cards"),
        ((EXAMPLE, "--tokens", 5, "--cp", "2,2"), "--cp is 2,2; give different numbers"),
        ((EXAMPLE, "--tokens", 5, "--device", "abacus"), "device 'abacus' is not known"),
        (("--model", "GPT-2", "--device", "h100", "--tokens", 5), "model 'GPT-2' is not known"),
        ((*LLAMA, "--tokens", 10**9), "1000000000 tokens are not planned for"),
        ((*LLAMA, "--tokens", 10**6, "--chunk", 1), "chunk 1 cuts 1000000 tokens into more than"),
        ((*LLAMA, "--tokens", 5, "--partition", "blocks"), "partition 'blocks' is not known here"),
        ((*LLAMA, "--tokens", 5, "--draw", "plan.gif"), "must end in .svg or .png"),
        ((*LLAMA, "--tokens", 5, "--devices", "absent.toml"), "absent.toml is not there"),
        (("--published", "--tokens", 5), "--published and --fit rest on the shipped data"),
        (("--published", "--fit"), "--published and --fit print one thing each"),
        (("absent.json", "--tokens", 5), "absent.json"),
    ],
)  # fmt: skip
def test_users_errors_are_one_line(arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[devices.x]\nlike = 'y'", "devices.x: like is 'y'; known are h100"),
        ("[devices.x]\nlike = 'h100'\nnode = 0", "node is 0: input should be greater than or equal to 1"),
        ("[devices.x]\nlike = 'h100'\ntflops = 1.0", "tflops is 1.0: extra inputs are not permitted; keys are about"),
        ("[devices.x]\nabout = 'x'", "devices.x: source: field required"),
        ("devices = 3", "devices is 3; write tables"),
        ("x = ", "cannot be read as TOML"),
        ("", "has no device"),
    ],
)
def test_errors_of_a_users_file_name_the_place(tmp_path, text, message):
    (tmp_path / "d.toml").write_text(text)
    assert message in refused(*LLAMA, "--tokens", 5, "--devices", tmp_path / "d.toml")
