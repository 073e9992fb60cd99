"""Case and result files of a layer: what is written is read again, what is damaged is refused in one line."""

import json
from dataclasses import replace

import layer_twin
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cpjax.crosscheck.files.case import content_digest
from cpjax.crosscheck.layer.case import DTYPES, read_layer_case, write_layer_case
from cpjax.crosscheck.layer.result import LayerResult, read_layer_result, write_layer_result
from cpjax.crosscheck.layer.session import are_layers, judge_layers
from cpjax.deepseek.layer_cases import CONFIG, SET, layer_case
from cpjax.errors import InputError

SMALL = replace(
    CONFIG, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_attention_heads=2, n_routed_experts=8
)


def small(number: int):
    return layer_case(SET[number], 0, tokens=5, config=SMALL)


@pytest.mark.parametrize("number", range(len(SET) - 1))
def test_a_case_is_read_as_it_was_written(tmp_path, number):
    written = write_layer_case(tmp_path, small(number))
    read = read_layer_case(tmp_path / f"{written.name}.safetensors")
    assert replace(read, tensors={}) == replace(written, tensors={})
    assert read.tensors.keys() == written.tensors.keys()
    for name, x in written.tensors.items():
        assert x.dtype == read.tensors[name].dtype
        np.testing.assert_array_equal(x, read.tensors[name])


def rewritten(path, change) -> None:
    """The file with its description or tensors changed, and the digest that belongs to them."""
    with safe_open(path, framework="numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    said = json.loads(metadata["case"])
    change(said, tensors)
    metadata["case"] = json.dumps(said)
    dtypes = {name: DTYPES.get(x.dtype.name, x.dtype.name) for name, x in tensors.items()}
    metadata["digest"] = content_digest(metadata["case"], tensors, dtypes)
    save_file(tensors, path, metadata)


def static_experts(said, tensors):
    said["kinds"] = {name: "W8A8" if "experts" in name else kind for name, kind in said["kinds"].items()}


DAMAGES = {
    "missing tensor": (4, lambda said, x: x.pop("self_attn.o_proj.deq_scale"), "missing tensors"),
    "unknown tensor": (0, lambda said, x: x.update(bias=x["hidden"]), "unknown tensors"),
    "shape": (0, lambda said, x: x.update({"mlp.up_proj.weight": x["mlp.up_proj.weight"][:-1].copy()}), "must be F16"),
    "dtype": (1, lambda said, x: x.update({"mlp.gate.weight": x["mlp.gate.weight"].astype(np.float16)}), "must be F32"),
    "nan": (0, lambda said, x: x["hidden"].__setitem__((0, 0), np.nan), "NaN or infinity"),
    "position": (0, lambda said, x: x["position"].__setitem__(1, 7), "not 0, 1, 2"),
    "input_scale": (3, lambda said, x: x["self_attn.o_proj.input_scale"].fill(0), "positive number"),
    "weight_offset": (5, lambda said, x: x["mlp.up_proj.weight_offset"].fill(1), "weights are symmetric"),
    "kind": (0, lambda said, x: said["kinds"].update({"mlp.up_proj": "W2A8"}), "must be one of"),
    "kinds of one product": (0, lambda said, x: said["kinds"].update({"mlp.up_proj": "W8A8"}), "must be of one kind"),
    "static experts": (4, static_experts, "experts are quantised per token"),
    "a kind too many": (0, lambda said, x: said["kinds"].update({"mlp.gate": "FLOAT"}), "must name each weight"),
    "arithmetic": (0, lambda said, x: said.update(arithmetic="fast"), "arithmetic"),
    "config": (0, lambda said, x: said["config"].update(model_type="llama"), "model_type"),
    "dense": (1, lambda said, x: said.update(is_moe=False), "must name each weight"),
    "more words": (0, lambda said, x: said.update(scale=1.0), "scale"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_case_is_refused(tmp_path, damage):
    number, change, words = DAMAGES[damage]
    path = tmp_path / f"{write_layer_case(tmp_path, small(number)).name}.safetensors"
    rewritten(path, change)
    with pytest.raises(InputError) as error:
        read_layer_case(path)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_altered_truncated_and_renamed_cases_are_refused(tmp_path):
    path = tmp_path / f"{write_layer_case(tmp_path, small(0)).name}.safetensors"
    whole = path.read_bytes()
    for changed in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-7], whole[:100], b""):
        path.write_bytes(changed)
        with pytest.raises(InputError):
            read_layer_case(path)
    path.write_bytes(whole)
    other = path.rename(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="'name' is '0-dense-float'"):
        read_layer_case(other)


def test_nothing_is_overwritten(tmp_path):
    case = write_layer_case(tmp_path, small(0))
    with pytest.raises(InputError, match="nothing is overwritten"):
        write_layer_case(tmp_path, case)


RESULT_DAMAGES = {
    "missing": (lambda x: x.pop("q.integers"), r"missing tensors \['q.integers'\]"),
    "no token scale": (lambda x: x.pop("down.token_scale"), r"missing tensors \['down.token_scale'\]"),
    "unknown": (lambda x: x.update(more=x["out"]), r"unknown tensors \['more'\]"),
    "shape": (lambda x: x.update(query=x["query"][:, :1].copy()), r"'query' is F16 \[5, 1, 192\]; it must be F16"),
    "dtype": (lambda x: x.update(lse=x["lse"].astype(np.float16)), "'lse' is F16"),
}


@pytest.mark.parametrize("damage", RESULT_DAMAGES)
def test_a_damaged_result_is_an_error_and_no_verdict(tmp_path, damage):
    case, (change, words) = write_layer_case(tmp_path / "cases", small(3)), RESULT_DAMAGES[damage]
    there = dict(layer_twin.layer(case))
    change(there)
    path = write_layer_result(tmp_path / "results", case, LayerResult("twin", there, {}))
    with pytest.raises(InputError, match=words):
        read_layer_result(path, case)
    (judged,) = judge_layers([case], tmp_path / "results")
    assert judged.outcome == "error"
    assert judged.as_json()["verdict"] is None


def test_a_result_of_another_case_is_refused(tmp_path):
    case, other = write_layer_case(tmp_path / "a", small(0)), layer_case(SET[0], 1, tokens=5, config=SMALL)
    other = write_layer_case(tmp_path / "b", other)
    path = write_layer_result(tmp_path / "results", other, LayerResult("twin", layer_twin.layer(other), {}))
    with pytest.raises(InputError, match="is a result of another case"):
        read_layer_result(path, case)


def test_a_note_stands_for_a_result(tmp_path):
    case = write_layer_case(tmp_path / "cases", small(0))
    note = {"format": "cpjax.outcome", "version": "1", "name": case.name, "digest": case.digest, "backend": "mine"}
    note |= {"outcome": "unsupported", "reason": "no YaRN"}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{case.name}.json").write_text(json.dumps(note))
    (judged,) = judge_layers([case], tmp_path / "results")
    assert (judged.outcome, judged.backend, judged.unsupported) == ("unsupported", "mine", "no YaRN")


def test_layers_are_told_from_attention(tmp_path):
    path = tmp_path / f"{write_layer_case(tmp_path, small(0)).name}.safetensors"
    assert are_layers(tmp_path)
    assert are_layers(path)
    path.write_bytes(b"no file")
    assert not are_layers(tmp_path)
    assert not are_layers(tmp_path / "none")
