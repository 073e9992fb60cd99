"""The commands as a user meets them: what they print, how they end, and that no file whatsoever makes a traceback."""

import contextlib
import copy
import io
import json
import os
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindie_build import DP2, build
from mindie_cases import CASES
from typer.main import get_command

from cpjax.mindie.commands import app

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "deepseek-r1-cp2.json"
PAIR = [str(ROOT / "examples" / name) for name in ("prefill-cp2.json", "decode.json")]
COMMAND = get_command(app)
FEW = 24
"""As real processes, each of which starts Python; what the bytes do is asked of all the others, in this process."""
FUZZED = int(os.environ.get("CPJAX_FUZZED_FILES", "10000"))


class Result(NamedTuple):
    exit_code: int | str | None
    stdout: str
    stderr: str


def run(*arguments: object) -> Result:
    """The command's entry function; whatever it raises besides SystemExit goes through."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        COMMAND.main([str(argument) for argument in arguments], prog_name="cpjax mindie")
    return Result(ended.value.code, out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """The one line of a user error."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result
    (line,) = result.stderr.splitlines()
    assert line.startswith("cpjax mindie: ")
    return line


# check


def test_check_says_what_is_wrong_and_ends_with_1(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(build(CASES["cp-sp-is-tp"].breaks)[0]))
    result = run("check", path, "--dtype", "float16")
    assert result.exit_code == 1
    assert "error   cp-needs-sp: cp 2, sp 1" in result.stdout
    column = path.read_text().index('"sp"') + 1
    assert f"at    {path}:1:{column}  $.ModelDeployConfig.ModelConfig[0].sp" in result.stdout
    assert "fix   set sp to tp" in result.stdout
    assert "refused, 2 errors, 0 warnings; the server would not catch 2 of them" in result.stdout.splitlines()[-1]


def test_check_accepts_with_warnings_and_ends_with_0():
    result = run("check", EXAMPLE)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].endswith("accepted, 1 warning (role hybrid, documentation head)")
    assert run("check", EXAMPLE, "--dtype", "bf16").exit_code == 1
    assert run("check", *PAIR, "--role", "prefill", "--role", "decode").exit_code == 0
    assert run("check", *PAIR[::-1], "--role", "prefill", "--role", "decode").exit_code == 1


def test_check_as_json():
    result = run("check", EXAMPLE, "--json", "--dtype", "bfloat16", "--hardware", "800i-a2")
    (one,) = json.loads(result.stdout)
    assert (result.exit_code, one["accepted"], one["role"], one["sizes"]["cp"]) == (1, False, "hybrid", 2)
    assert [finding["rule"] for finding in one["errors"]] == ["cards-of-a-server", "fp16-only"]
    assert one["errors"][0].keys() == {"rule", "level", "path", "found", "says", "fix", "source", "enforced"} | {
        "file", "line", "column",
    }  # fmt: skip
    lines = EXAMPLE.read_text().splitlines()
    for finding in one["errors"]:
        assert finding["file"] == str(EXAMPLE)
        at = lines[finding["line"] - 1][finding["column"] - 1 :]
        assert at.startswith(json.dumps(finding["path"].rpartition(".")[2]))


def test_a_finding_says_of_which_version_the_code_was_seen(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(build({"Server.port": 80})[0]))
    for options, said in (((), "server_config.cpp; enforced by the server\n"), (("--mindie-version", "2.3.0"), OLDER)):
        result = run("check", path, "--dtype", "float16", *options)
        assert (result.exit_code, said in result.stdout) == (1, True), result.stdout


OLDER = "enforced by the server of head; the code of 2.3.0 was not seen\n"


def test_rules_say_their_versions():
    table = run("rules").stdout
    assert "| `cp-1-or-2` | `cp` | error | does not check it | since 2.1.RC1 | cp is 1 or 2 |" in table
    assert "| `cards-of-a-node` | `npuDeviceIds` | warning | checks it | before head |" in table
    assert "| `hybrid-listed-2.1` | `plugin_params` | error | does not check it | 2.1.RC1 |" in table


def test_unknown_fields_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(build({"cp_size": 2})[0]))
    assert "note    $.ModelDeployConfig.ModelConfig[0].cp_size is not a field known here" in run("check", path).stdout


# ranks and link


def test_ranks_prints_a_table_json_and_a_picture(tmp_path):
    table = run("ranks", EXAMPLE).stdout
    assert "   15  0   1   7   15  0    112–127  512–1023, 1024–1535     128  15" in table
    assert "attn_cp               8 × 2    [0, 8] [1, 9] [7, 15]" in table
    cards = json.loads(run("ranks", EXAMPLE, "--json").stdout)
    assert [card["rank"] for card in cards] == list(range(16))
    assert all(card.keys() == {"rank", "groups", "index"} for card in cards)
    picture = tmp_path / "cards.svg"
    assert f"drawn: {picture}" in run("ranks", EXAMPLE, "--draw", picture).stdout
    drawn = picture.read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert all(f"<!-- card {rank} -->" in drawn for rank in range(16))
    assert "is there already" in refused("ranks", EXAMPLE, "--draw", picture)
    assert run("ranks", EXAMPLE, "--draw", tmp_path / "cards.png").exit_code == 0
    assert (tmp_path / "cards.png").read_bytes()[:4] == b"\x89PNG"
    assert "must end in .svg or .png" in refused("ranks", EXAMPLE, "--draw", tmp_path / "cards.jpg")


def test_ranks_refuses_what_cannot_be_laid_out(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(build({"dp": 2})[0]))
    assert "only one may be above 1; see cpjax mindie check" in refused("ranks", path)
    path.write_text(json.dumps(build({"worldSize": 2**31})[0]))
    assert "at most 4096 are printed" in refused("ranks", path)
    assert "tokens is 0" in refused("ranks", EXAMPLE, "--tokens", 0)
    assert "geometry" in refused("ranks", EXAMPLE, "--geometry", "1,2")
    assert "does not divide the model's 12 heads" in refused("ranks", EXAMPLE, "--geometry", "12,8,8,8")


def test_link_says_who_sends_what_and_why_the_last_block_is_where_it_is():
    text = run("link", *PAIR, "--tokens", 2300).stdout
    assert "decode tp rank 0 fetches from prefill ranks 0, 1, 2, 3, 4 … 15 (16), in this order" in text
    assert "The prompt's last block, 17, has 124 tokens. It lives on prefill rank 15" in text
    found = json.loads(run("link", *PAIR, "--tokens", 2300, "--json").stdout)
    assert found["prefill"] == {str(rank): [0] for rank in range(16)}
    assert found["transfers"]["0"][-1] == {"block": 17, "source": 15, "slot": 1, "target": 17, "tokens": 124}


# enable


def enabled(path: Path, *more: object) -> tuple[str, list[tuple]]:
    """The text after `enable` and the changed fields."""
    output = path.with_suffix(".new")
    output.unlink(missing_ok=True)
    result = run("enable", path, "-o", output, "--json", *more)
    assert result.exit_code == 0, result
    changes = [(change["field"], change["old"], change["new"]) for change in json.loads(result.stdout)["changes"]]
    assert run("check", output, *more).exit_code == 0
    return output.read_bytes().decode(), changes


@pytest.fixture
def without_cp(tmp_path):
    path = tmp_path / "config.json"
    text = EXAMPLE.read_text()
    for field in ("dp", "cp", "sp", "tp", "moe_ep"):
        text = text.replace(next(line for line in text.splitlines(keepends=True) if f'"{field}":' in line), "")
    path.write_text(text.replace('"moe_tp": 1', '"moe_tp": 16'))
    assert run("check", path).exit_code == 0
    return path


def test_enable_adds_what_is_missing_in_the_files_own_style(without_cp):
    text, changes = enabled(without_cp)
    assert changes == [("cp", None, 2), ("sp", None, 8), ("tp", None, 8)]
    before = without_cp.read_text()
    indent = 20 * " "
    added = f',\n{indent}"cp": 2,\n{indent}"sp": 8,\n{indent}"tp": 8'
    assert text == before.replace('"moe_tp": 16', '"moe_tp": 16' + added)


def test_enable_changes_only_digits_where_the_fields_are_there(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(EXAMPLE.read_text().replace('"dp": 1', '"dp": 2').replace('"cp": 2', '"cp": 1'))
    text, changes = enabled(path)
    assert changes == [("dp", 2, 1), ("cp", 1, 2)]
    assert text == EXAMPLE.read_text()
    result = run("enable", path)
    assert '-                    "dp": 2,\n' in result.stdout
    assert '+                    "cp": 2,\n' in result.stdout
    assert "Nothing was written" in result.stdout
    assert "mindie_llm_server" not in result.stdout
    written = run("enable", path, "-o", tmp_path / "new.json")
    assert f"Written: {tmp_path / 'new.json'}" in written.stdout
    assert "mindie_llm_server" in written.stdout
    assert "Nothing was written" not in written.stdout


def test_enable_of_a_fragment_with_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "config.json"
    model = build({"cp": 1, "dp": 2, "zzz": [1.50, {}]})[0]["ModelDeployConfig"]["ModelConfig"][0]
    text = (
        '\ufeff"ModelDeployConfig" :\r\n{ "maxSeqLen" : 64, "maxInputTokenLen":8, "ModelConfig":['
        + json.dumps(model)
        + "]}\r\n"
    )
    path.write_bytes(text.encode())
    after, changes = enabled(path)
    assert changes == [("dp", 2, 1), ("cp", 1, 2)]
    assert after == text.replace('"dp": 2', '"dp": 1').replace('"cp": 1', '"cp": 2')


def test_enable_mends_mtp_and_the_cache_format_where_they_stand_in_the_way(tmp_path):
    path = tmp_path / "config.json"
    plugins = r'"plugin_params": "{ \"plugin_type\":\"mtp,prefix_cache\", \"num_speculative_tokens\" : 2}"'
    path.write_text(EXAMPLE.read_text().replace('"cp": 2', f'"cp": 1, {plugins}').replace('"dp": 1', '"dp": 2'))
    text, _ = enabled(path)
    assert plugins.replace(": 2}", ": 1}") in text
    assert '"models": {"deepseekv2": {"kv_cache_options": {"enable_nz": true}}}' in text


def test_enable_of_what_is_on_already_changes_nothing():
    assert "is on already" in run("enable", EXAMPLE).stdout


def test_enable_refuses_where_no_edit_can(tmp_path, without_cp):
    path = tmp_path / "other.json"
    for changes, options, message in [
        ({"modelName": "llama_65b", **DP2}, (), "model-known"),
        ({"modelName": "DeepSeek-V3_w8a8", **DP2}, (), "v3-w8a8-disputed"),
        ({"modelName": "DeepSeek-R1", **DP2}, (), "quantisation-known"),
        ({"backendType": "torch", "sp": 1, **DP2}, (), "cp-with-torch"),
        ({}, ("--dtype", "bf16"), "fp16-only"),
        ({}, ("--role", "decode"), "decode-without-cp"),
        ({}, ("--hardware", "300i-duo"), "hardware-supported"),
        ({}, ("--cp", 4), "cp-1-or-2"),
        ({}, ("--cp", 3), "worldSize is 16, which cp 3 does not divide"),
        ({}, ("--cp", 1), "cp is 1; it must be at least 2"),
        ({"worldSize": 15}, (), "worldSize is 15"),
        ({"worldSize": 2**32 - 1}, (), "it must be 1 to 4096"),
    ]:
        path.write_text(json.dumps(build(changes)[0]))
        assert message in refused("enable", path, *options)
    assert "is there already" in refused("enable", without_cp, "-o", path)
    assert "cannot be written" in refused("enable", without_cp, "-o", tmp_path / "no" / "folder.json")
    assert not list(tmp_path.glob(".*"))


SIZES = ["dp", "cp", "sp", "tp", "moe_ep", "moe_tp"]


@given(
    st.sampled_from([4, 8, 16, 32]),
    st.dictionaries(st.sampled_from(SIZES), st.sampled_from([1, 2, 4, 8, 16])),
    st.permutations(["a", *SIZES, "modelName", "worldSize", "cpuMemSize"]),
    st.sampled_from([None, 0, 1, "\t"]),
)
def test_enable_edits_to_a_valid_config_and_keeps_all_else(tmp_path_factory, world, sizes, keys, indent):
    """Whatever the sizes were: the result is valid, every other field is as before, and in the same order."""
    folder = tmp_path_factory.mktemp("enable")
    document = build({field: ... for field in SIZES})[0]
    model = document["ModelDeployConfig"]["ModelConfig"][0] | {"worldSize": world, "a": {"dp": 7, "b": [None]}} | sizes
    model = {key: model[key] for key in (*keys, *model) if key in model}
    document["ModelDeployConfig"]["ModelConfig"] = [model]
    path = folder / "config.json"
    path.write_text(json.dumps(document, indent=indent))
    text, changes = enabled(path, "--dtype", "float16")
    changed = {field: new for field, _, new in changes}
    after = json.loads(text)["ModelDeployConfig"]["ModelConfig"][0]
    assert after == model | changed
    assert list(after)[: len(model)] == list(model)
    assert changed.get("cp", model.get("cp")) == 2
    if indent is None:
        assert text == json.dumps(json.loads(text))  # new fields look like the old ones


# schema


def test_the_schema_describes_the_example(tmp_path):
    schema = json.loads(run("schema").stdout)
    assert schema["properties"].keys() == {"ServerConfig", "BackendConfig", "ModelDeployConfig"}
    model = schema["$defs"]["Model"]
    assert model["properties"]["cp"]["description"].startswith("context parallel: 1 or 2")
    assert set(model["required"]) == {"modelName", "worldSize"}


# whatever the file


def test_help_has_an_example():
    for command in ("check", "ranks", "link", "enable", "schema"):
        assert f"cpjax mindie {command}" in run(command, "--help").stdout.replace("\n", " ")


def random_json(rng: random.Random, depth: int) -> object:
    kinds = 5 if depth == 0 else 7
    match rng.randrange(kinds):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2:
            return rng.choice([0, -1, 10 ** rng.randrange(400), rng.random(), 1e308, -1e-320])
        case 3 | 4:
            return "".join(
                chr(rng.choice([rng.randrange(32), rng.randrange(128), 0xD800, 0x1F600]))
                for _ in range(rng.randrange(6))
            )
        case 5:
            return [random_json(rng, depth - 1) for _ in range(rng.randrange(4))]
        case _:
            keys = ["ModelDeployConfig", "BackendConfig", "ModelConfig", "ServerConfig", "", "\n", "é"]
            return {rng.choice(keys): random_json(rng, depth - 1) for _ in range(rng.randrange(4))}


WRONG_TYPES = {
    "modelName": [None, 1, [], {}], "worldSize": [None, True, "2", 2.0, 1e99, -1, 2**32, [], {}],
    "cp": [True, "two", 2.0, 1e99, 2**31, -(2**31) - 1, 10**400, [], {}], "tp": ["8", 8.5, [8]],
    "models": [None, 3, []], "plugin_params": [3, [], "{", "[]", '{"plugin_type": 1}', '{"a": 1, "a": 1}', "[" * 2000],
    "trustRemoteCode": ["yes", 0, 2], "npuMemSize": [1.5, "x", 2**31],
}  # fmt: skip


def fuzzed_file(rng: random.Random) -> bytes:
    """A file that is no config: random or damaged bytes, other encodings, other JSON, one field of a wrong type."""
    example = EXAMPLE.read_bytes()
    match rng.randrange(9):
        case 0:
            return b"\xff" + rng.randbytes(rng.randrange(200))  # no UTF-8 begins so
        case 1:
            return example[: rng.randrange(len(example) - 3)]  # truncated
        case 2:
            return example.decode().encode(rng.choice(["utf-16", "utf-32", "utf-16-le"]))
        case 3:
            at = rng.randrange(len(example))
            return example[:at] + rng.choice([b"\x00", b"\x80", b"\x1b", b"\xc0\xaf", b"\xed\xa0\x80"]) + example[at:]
        case 4:
            opened = rng.choice([b"[", b'{"a":', b'[{"":'])
            return rng.choice([b"", b'"ModelDeployConfig":']) + opened * rng.choice([65, 1000, 100_000])
        case 5:
            document = copy.deepcopy(json.loads(example))
            field = rng.choice(sorted(WRONG_TYPES))
            document["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0][field] = rng.choice(WRONG_TYPES[field])
            return json.dumps(document).encode()
        case 6:
            lines = example.splitlines(keepends=True)
            fields = [number for number, line in enumerate(lines) if line.rstrip().endswith(b",") and b'" :' in line]
            at = rng.choice(fields)  # a field twice
            return b"".join([*lines[: at + 1], *lines[at:]])
        case 7:
            number = rng.choice(
                [b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"-", b"01", b"0x10", b"1.", b"+1", b"'1'"]
            )
            return example.replace(b'"cp": 2', b'"cp": ' + number)
        case _:
            value = random_json(rng, 4)
            text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
            return rng.choice([b"", b"\xef\xbb\xbf"]) + text


def fuzzed(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(seed)
    for number in range(count):
        yield ("check", "ranks", "enable")[number % 3], fuzzed_file(rng)


@pytest.mark.slow
def test_fuzzed_files_end_in_one_line_and_exit_2(tmp_path):
    """10,000 files that are no config, through the command's entry function."""
    path = tmp_path / "config.json"
    for number, (command, content) in enumerate(fuzzed(FUZZED, seed=1)):
        path.write_bytes(content)
        result = run(command, path)
        lines = result.stderr.splitlines()
        assert (result.exit_code, len(lines), result.stdout) == (2, 1, ""), (number, content[:300], result)
        assert lines[0].startswith(f"cpjax mindie: {path}: ")
        assert lines[0].isprintable()


@pytest.mark.slow
def test_damaged_configs_end_without_a_traceback(tmp_path):
    """The example with bytes exchanged, left out or doubled may still be a config: then it is one with a verdict."""
    rng, path, example = random.Random(2), tmp_path / "config.json", EXAMPLE.read_bytes()
    seen = set()
    for _ in range(FUZZED // 10):
        content = bytearray(example)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(content))
            content[at : at + rng.randrange(3)] = bytes(
                rng.choices(b'0123456789"{}[],:-. aet\\\xc3', k=rng.randrange(3))
            )
        path.write_bytes(content)
        result = run("check", path)
        assert result.exit_code in (0, 1, 2), bytes(content)
        assert (result.exit_code == 2) == (result.stdout == ""), bytes(content)
        seen.add(result.exit_code)
    assert seen == {0, 1, 2} or FUZZED < 1000


PROGRAM = "from cpjax.mindie.commands import app; app()"


def process(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.process
def test_fuzzed_files_as_real_processes(tmp_path):
    running = []
    for number, (command, content) in enumerate(fuzzed(FEW, seed=3)):
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        running.append(process(command, path))
        if len(running) == 4 or number == FEW - 1:
            for one in running:
                out, err = one.communicate(timeout=120)
                assert (one.returncode, out, len(err.splitlines())) == (2, "", 1), err
            running = []


def test_check_imports_neither_jax_nor_torch():
    program = (
        f"{PROGRAM[:-5]}app(['check', {str(EXAMPLE)!r}], standalone_mode=False); import sys; print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    modules = done.stdout.splitlines()[-1]
    assert "'pydantic'" in modules
    assert not any(f"'{name}'" in modules for name in ("jax", "torch", "numpy", "matplotlib", "rich.table"))
