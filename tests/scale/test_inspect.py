"""`cpjax inspect` without the compiler: what it refuses, and what it says of programs written by hand."""

import json

import pytest
from test_schedule_text import WRAPPED, Fusion, Loop, Permute, printed
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.errors import InputError
from cpjax.inspect.draw import draw, figure_of
from cpjax.inspect.hlo import parse
from cpjax.inspect.inspection import Inspection, Memory
from cpjax.inspect.programs import Shape
from cpjax.inspect.report import findings
from cpjax.inspect.schedule import read
from cpjax.inspect.topology import Topology


class Chip:
    def __init__(self, x, y):
        self.coords = (x, y, 0)


def inspection(text, link=1e9):
    devices = tuple(Chip(*place) for place in ((0, 0), (1, 0), (1, 1), (0, 1)))
    schedule = read(parse(text))
    return Inspection("forward", Topology("t", devices, (2, 2, 1), link, 2e9), Shape(64), schedule,
                      Memory(1, 2, 3, 4 * 2**20, 5), 1.25, 1000)  # fmt: skip


RING = [Permute(4, False), Loop([Permute(500, True, [Fusion(30, True), Fusion(9)])], 3)]


def test_the_json_says_what_the_table_says():
    seen = inspection(printed(RING))
    said = json.loads(json.dumps(seen.as_json(), allow_nan=False))
    assert said["collectives"] == {"collective-permute": 2}
    assert [(x["bytes"], x["runs"], x["hops"], x["asynchronous"]) for x in said["transfers"]] == [
        (8, 1, 1, False), (1000, 3, 1, True)]  # fmt: skip
    assert [work["cycles"] for work in said["transfers"][1]["encloses"]] == [30, 9]
    assert said["transfers"][1]["cycles_enclosed"] == 39
    assert said["transfers"][1]["link_cycles"] == 2 * 8 * 2 * 63  # 63 tiles of 8 numbers
    assert (said["peak_bytes"], said["cp"], said["compile_seconds"]) == (4 * 2**20, 4, 1.25)
    assert inspection(printed(RING), link=None).as_json()["transfers"][0]["link_cycles"] is None


def test_the_sentences():
    said = findings(inspection(printed(RING)))
    assert said[0] == "It has no collective but permutes."
    assert said[1] == (
        "exchange: 4 transfers, 1 synchronous; during 3 of them attention is computed; a chip sends 3,008 bytes in all."
    )
    assert "4.0 MiB at the peak" in said[2]
    other = findings(inspection(WRAPPED))
    assert other[0] == "Beside permutes it has 2 all-gather, 1 all-reduce."
    assert any("It has 1 kernel, of whose cycles the compiler has no estimate" in line for line in other)
    unknown = findings(inspection(printed([Loop([Permute(4, True)], 3, how="unknown")])))
    assert any("cycles are too few" in line for line in unknown)
    assert not any("cycles are too few" in line for line in said)


def test_hops_go_over_the_links_that_close_the_torus():
    line = Topology("t", tuple(Chip(x, 0) for x in range(6)), (6, 1, 1), None, None)
    assert [line.hops(0, x) for x in range(6)] == [0, 1, 2, 3, 2, 1]


def test_the_picture_shows_the_step(tmp_path):
    pytest.importorskip("matplotlib")
    seen = inspection(printed(RING))
    (axes,) = figure_of(seen).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["computed", "exchange, 0.00 MiB"]
    assert axes.get_xlim() == (0, 39)
    draw(seen, tmp_path / "step.svg")
    draw(seen, tmp_path / "again.svg")
    assert (tmp_path / "step.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    with pytest.raises(InputError, match="is there already"):
        draw(seen, tmp_path / "step.svg")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "pip install 'cpjax[tpu]'"),
        (["--draw", "step.pdf"], "pip install 'cpjax[tpu]'"),
    ],
)
def test_without_the_compiler_the_command_names_the_extra(arguments, why, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = CliRunner().invoke(app, ["inspect", "--topology", "v5e:2x2", "--tokens", "64", *arguments])
    assert (run.exit_code, run.stdout) == (2, "")
    assert why in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--draw", "step.pdf"], "step.pdf must end in .svg or .png"),
        (["--draw", "{there}"], "is there already"),
        (["--backward", "--latent"], "two programs"),
        (
            ["--latent", "--attend", "splash"],
            "attend is 'splash'; a latent's keys and values are made inside the block",
        ),
        (["--attend", "flash"], "unknown attend 'flash'; known are tiles, splash"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(arguments, why, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.svg").touch()
    monkeypatch.setattr("cpjax.inspect.topology.prepare", lambda: None)
    arguments = [x.format(there=tmp_path / "a.svg") for x in arguments]
    run = CliRunner().invoke(app, ["inspect", "--topology", "v5e:2x2", "--tokens", "64", *arguments])
    assert (run.exit_code, run.stdout) == (2, "")
    assert why in run.stderr
