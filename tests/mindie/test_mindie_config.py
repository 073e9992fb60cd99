"""Reading a config file: what is read, what is refused, and that each refusal is one line with a place and a fix."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpjax.errors import InputError
from cpjax.mindie import json_text
from cpjax.mindie.config import read_config
from cpjax.mindie.deployment import Sizes, read_deployment
from cpjax.mindie.models import Geometry, family, geometry, identify, local_heads, parse_geometry, quantisation
from cpjax.mindie.text_file import LARGEST

EXAMPLE = Path(__file__).parents[2] / "examples" / "deepseek-r1-cp2.json"
MODEL = "$.BackendConfig.ModelDeployConfig.ModelConfig[0]"


def example(**changes) -> dict:
    """The vendor's example with other values in its ModelConfig; `...` takes a field away."""
    document = json.loads(EXAMPLE.read_text())
    model = document["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
    for key, value in changes.items():
        model[key] = value
        if value is ...:
            del model[key]
    return document


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_deployment(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 600
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def put(tmp_path):
    def write(content) -> Path:
        path = tmp_path / "config.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


def test_the_vendors_example_is_read_whole_as_object_and_as_fragment(put):
    document = example()
    deploy = document["BackendConfig"]["ModelDeployConfig"]
    fragment = f'\n "ModelDeployConfig" :\n {json.dumps(deploy, indent=1)}\n'.encode()
    for content in (document, {"ModelDeployConfig": deploy}, fragment, b"\xef\xbb\xbf" + fragment):
        deployment = read_deployment(put(content))
        assert deployment.sizes == Sizes(world_size=16, dp=1, cp=2, sp=8, tp=8, pp=1, moe_ep=16, moe_tp=1)
        assert (deployment.model_name, deployment.max_seq_len, deployment.max_input_token_len) == (
            "DeepSeek-R1_w8a8",
            2560,
            2048,
        )
    assert "byte-order mark" in deployment.warnings[0]


def test_defaults_are_the_vendors(put):
    bare = dict.fromkeys(("dp", "cp", "sp", "tp", "moe_ep", "moe_tp"), ...)
    assert read_deployment(put(example(**bare))).sizes == Sizes(16, 1, 1, 1, 16, 1, 1, 16)
    assert read_deployment(put(example(**bare | {"tp": 8}))).sizes == Sizes(16, 1, 1, 1, 8, 1, 1, 8)
    assert read_deployment(put(example(**bare | {"tp": -1, "moe_tp": -1}))).sizes == Sizes(16, 1, 1, 1, 16, 1, 1, 16)


def test_cp_3_is_read_because_reading_is_not_checking(put):
    assert read_deployment(put(example(cp=3))).cp == 3


UNREADABLE = {
    "is empty": b" \n",
    "a comma before the closing bracket; the server refuses it too: take it out (line 1, column 8)": b'{"a": 1,\n}',
    "a comma before the closing bracket; the server refuses it too: take it out (line 1, column 39)": (
        b'"ModelDeployConfig":{"ModelConfig":[{},]}'
    ),
    "is not JSON: a comment, which JSON does not have; the server refuses it too: take it out (line 2, column 8)": (
        b'{\n"a": 1 // one\n, "b": 2}'
    ),
    "a comment, which JSON does not have; the server refuses it too: take it out (line 1, column 10)": (
        b'{"a": 1, /* b */ "c": 2}'
    ),
    "a comment, which JSON does not have; the server refuses it too: take it out (line 1, column 7)": b'{"a": # b\n1}',
    "dots in place of what a page leaves out; put the fields in, or take the dots out (line 3, column 3)": (
        b'{\n"a": 1,\n  ...\n}'
    ),
    "a single quote; JSON has double quotes (line 1, column 2)": b"{'a': 1}",
    "a placeholder; put the value in (line 1, column 7)": b'{"a": <cards>}',
    "True; JSON has true (line 1, column 7)": b'{"a": True}',
    "is not JSON: expecting ',' delimiter (line 2, column 1)": b'{"a": 1\n"b": 2}',
    "a comma behind the end; take it out (line 1, column 37)": b'{"ServerConfig": {}, "Version": "a"},',
    "$ has motor_deploy_config: it is a user_config.json of version v2.0, which is not known here": (
        b'{"version": "v2.0",\n"motor_deploy_config": {}}'
    ),
    "$ has ModelDeployParam, ScheduleParam: it is a config from before MindIE 1.0.RC3": (
        b'{"ModelDeployParam": {}, "ScheduleParam": {}}'
    ),
    "$ is the list []; a config is an object": b"[]",
    "$ is null": b"null",
    "$ is the number 3": b"3",
    '$ is the string "ModelDeployConfig"': b'"ModelDeployConfig"',
    "is not UTF-8 (byte 1 is 0x80)": b"{\x80}",
    "it looks like UTF-16": '{"ModelDeployConfig": {}}'.encode("utf-16"),
    "is nested too deeply": b"[" * 100_000,
    "is nested too deeply to": b'{"a":' * 100 + b"1" + b"}" * 100,
    'has the key "cp" twice in one object (line 3, column 1)': b'{"a": {"cp": 1,\n"b": "cp",\n"cp": 2}}',
    'has the key "a" twice': b'{"a": 1, "\\u0061": 2}',
    "has the number NaN": b'{"a": NaN}',
    "has the number -Infinity": b'{"a": -Infinity}',
    "has the number 1e999": b'{"a": 1e999}',
    "has an integer of thousands of digits": b'{"a": ' + b"9" * 5000 + b"}",
    '$ has no ModelDeployConfig, neither here nor in BackendConfig (it has "\\ud800\\n")': b'{"\\ud800\\n": 1}',
    "$.BackendConfig is the number 3; it must be an object": b'{"BackendConfig": 3}',
    "has ModelDeployConfig in $ and in $.BackendConfig": (
        b'{"ModelDeployConfig": {}, "BackendConfig": {"ModelDeployConfig": {}}}'
    ),
    "$.ModelDeployConfig is null; it must be an object": b'"ModelDeployConfig": null',
    "$.ModelDeployConfig has no ModelConfig": b'{"ModelDeployConfig": {}}',
    "$.ModelDeployConfig.ModelConfig is the object {}": b'{"ModelDeployConfig": {"ModelConfig": {}}}',
    "$.ModelDeployConfig.ModelConfig has 0 entries": b'{"ModelDeployConfig": {"ModelConfig": []}}',
    "$.ModelDeployConfig.ModelConfig has 2 entries": b'{"ModelDeployConfig": {"ModelConfig": [{}, {}]}}',
    "$.ModelDeployConfig.ModelConfig[0] is the list []": b'{"ModelDeployConfig": {"ModelConfig": [[]]}}',
    "ModelConfig[0].modelName is missing": b'"ModelDeployConfig": {"ModelConfig": [{"worldSize": 1}]}',
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_what_is_no_config_is_refused_with_its_place(put, message):
    assert message in refusal(put(UNREADABLE[message]))


def test_files_that_are_none_are_refused(tmp_path):
    assert refusal(tmp_path / "missing.json") == "does not exist"
    assert refusal(tmp_path) == "is a directory; give a config file"
    assert refusal(Path("/dev/zero")) == "is a device, pipe or socket; give a config file"
    sparse = tmp_path / "zeros.json"
    with open(sparse, "wb") as file:
        file.truncate(2 << 30)
    assert f"has {2 << 30} bytes; a config has a few thousand, and at most {LARGEST} are read" in refusal(sparse)
    assert "is not JSON" in refusal(_written(tmp_path / "zero.json", b"\0" * 100))


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


WRONG = {
    "cp": {
        0: "is 0; it must be at least 1",
        -1: "is -1; it must be at least 1",
        "two": 'is the string "two"; it must be a whole number, without quotes, point or exponent',
        "2": 'is the string "2"; it must be a whole number, without quotes, point or exponent',
        2.0: "is the number 2.0; it must be a whole number, without quotes, point or exponent",
        1e99: "is the number 1e+99; it must be a whole number, without quotes, point or exponent",
        True: "is the boolean true; it must be a whole number, without quotes, point or exponent",
        2**31: f"is the number {2**31}; it must be less than {2**31}",
    },
    "worldSize": {
        0: "is 0; it must be at least 1",
        -1: "is the number -1; it must be greater than or equal to 0",
        ...: "is missing; it must be given",
    },
    "modelName": {3: "is the number 3; it must be a string", None: "is null; it must be a string"},
    "plugin_params": {
        "{": 'is the string "{"; it must hold JSON, but is not JSON',
        '{"plugin_type": "a", "plugin_type": "b"}': 'but has the key "plugin_type" twice',
        '{"plugin_type": 3}': "",
        "[]": "is the list []; it must be an object",
    },
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]])
def test_a_field_that_cannot_be_understood_is_named_with_its_value_and_rule(put, field, value):
    assert refusal(put(example(**{field: value}))).startswith(f"{MODEL}.{field}")
    assert WRONG[field][value] in refusal(put(example(**{field: value})))


def test_all_wrong_fields_are_named_in_one_line(put):
    message = refusal(put(example(cp="two", tp=8.5, worldSize=True)))
    assert all(f"{MODEL}.{field} is" in message for field in ("cp", "tp", "worldSize"))


def test_fields_that_are_not_known_are_named_and_kept(put):
    document = example(ccp=2, models={"deepseekv2": {"kv_cache_options": {"enablenz": True}}})
    document["LogConfg"] = {}
    deployment = read_deployment(put(document))
    named = [warning.split()[0] for warning in deployment.warnings]
    assert named == ["$.LogConfg", f"{MODEL}.ccp", f"{MODEL}.models.deepseekv2.kv_cache_options.enablenz"]
    assert deployment.file.model["ccp"] == 2


def test_where_says_the_place_in_the_file(put):
    deployment = read_deployment(put({"ModelDeployConfig": example()["BackendConfig"]["ModelDeployConfig"]}))
    assert deployment.where("cp") == "$.ModelDeployConfig.ModelConfig[0].cp"
    assert deployment.where("maxSeqLen") == "$.ModelDeployConfig.maxSeqLen"
    assert deployment.where("cacheBlockSize") == "$.BackendConfig.ScheduleConfig.cacheBlockSize"
    assert deployment.where("inferMode") == "$.ServerConfig.inferMode"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(JSON, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_spans_are_where_the_values_stand(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)

    def values(value, path=()):
        yield path, value
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            yield from values(inner, (*path, key))

    expected = dict(values(value))
    found = json_text.spans(text)
    assert found.keys() == expected.keys()
    for path, (start, end) in found.items():
        assert text[start:end] == json.dumps(expected[path], indent=indent, ensure_ascii=ascii_only) or (
            json.loads(text[start:end]) == expected[path]
        )


@given(st.dictionaries(st.sampled_from(["dp", "cp", "sp", "tp", "pp", "moe_ep", "moe_tp"]), st.integers(1, 64)))
def test_what_is_given_is_what_is_read(tmp_path_factory, given_sizes):
    path = tmp_path_factory.mktemp("given") / "config.json"
    model = {"modelName": "a", "worldSize": 64, **given_sizes}
    path.write_text(json.dumps({"ModelDeployConfig": {"ModelConfig": [model]}}))
    sizes = read_deployment(path).sizes
    assert {field: getattr(sizes, field) for field in given_sizes} == given_sizes


@pytest.mark.parametrize(
    ("name", "model", "bits"),
    [
        ("DeepSeek-R1_w8a8", "DeepSeek-R1", "W8A8"),
        ("ds_r1_w8a8", "DeepSeek-R1", "W8A8"),
        ("DEEPSEEK-R1-0528-W4A8", "DeepSeek-R1", "W4A8"),
        ("deepseek_v3_w4a8", "DeepSeek-V3", "W4A8"),
        ("DeepSeek-V3-0324", "DeepSeek-V3", None),
        ("ds_v31_w4a8", "DeepSeek-V3.1", "W4A8"),
        ("DeepSeek-V3.1-Terminus-w4a8-mtp", "DeepSeek-V3.1", "W4A8"),
        ("DeepSeek-V3.2-Exp_w8a8", None, "W8A8"),
        ("DeepSeek-R1-Distill-Llama-70B", None, None),
        ("DeepSeek-V30", None, None),
        ("deepseek-r10", None, None),
        ("llama_65b", None, None),
        ("my-DeepSeek-R1", None, None),
        ("", None, None),
    ],
)
def test_names_mean_one_model_or_none(name, model, bits):
    assert (family(name), quantisation(name)) == (model, bits)
    identity = identify(name, None, None)
    if model is None:
        with pytest.raises(InputError, match="--geometry HEADS,NOPE,ROPE,VALUE"):
            geometry(identity, name)
    else:
        assert identity.models == (model,)
        found = geometry(identity, name)
        assert found[:4] == (128, 128, 64, 128)
        assert found.scale == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2)  # YaRN, factor 40


THREE = ("DeepSeek-R1", "DeepSeek-V3", "DeepSeek-V3.1")


@pytest.mark.parametrize(
    ("name", "path", "model_type", "models"),
    [
        ("deepseek", "/data/DeepSeek-R1_w8a8/", None, ("DeepSeek-R1",)),
        ("deepseek", "C:\\data\\ds_v3_w8a8", None, ("DeepSeek-V3",)),
        ("DeepSeek-R1", "/data/DeepSeek-V3.1_w8a8", None, ("DeepSeek-V3.1",)),  # the label is free text
        ("DeepSeek-R1", "/data/weights", None, ("DeepSeek-R1",)),
        ("deepseek", "/data/weights", None, None),
        ("deepseek", "/data/weights", "deepseek_v3", THREE),
        ("deepseek", "/data/r1_w8a8dyn", "deepseek_v3", ("DeepSeek-R1",)),
        ("deepseek", "/data/r1_w8a8dyn", None, None),
        ("DeepSeek-R1", "/data/r1", "qwen2", ("qwen2",)),
        ("DeepSeek-R1", None, "deepseek_v32", ("DeepSeek-V3.2",)),
        ("DeepSeek-V3.2-Exp", None, None, ("DeepSeek-V3.2",)),
        ("DeepSeek-V3.20", None, None, None),
    ],
)
def test_the_model_is_that_of_the_weights_then_of_their_path_then_of_the_name(name, path, model_type, models):
    assert identify(name, path, model_type).models == models


def test_a_geometry_can_be_given():
    assert parse_geometry("4,8,0,16") == Geometry(4, 8, 0, 16)
    for wrong in (
        "",
        "1,2,3",
        "1,2,3,4,5",
        "0,1,1,1",
        "1,0,1,1",
        "1,1,1,0",
        "1,-1,1,1",
        "a,b,c,d",
        "1,1,1,٣",
        "9999999,1,1,1",
    ):
        with pytest.raises(InputError, match="geometry"):
            parse_geometry(wrong)


def test_heads_that_tp_does_not_divide_are_refused():
    assert local_heads(128, 8) == 16
    with pytest.raises(InputError, match="tp is 3, which does not divide the model's 128 heads"):
        local_heads(128, 3)


def test_the_whole_text_is_kept(put):
    path = put(b"\xef\xbb\xbf" + json.dumps(example(), indent=3).encode() + b"\n")
    assert read_config(path).text.encode() == path.read_bytes()
