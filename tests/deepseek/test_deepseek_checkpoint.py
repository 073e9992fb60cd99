"""Checkpoints: what is written is read, slice by slice; what is damaged or not understood is refused in one line."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cpjax.deepseek.checkpoint import INDEX, SINGLE, Checkpoint, load, open_checkpoint, write_random
from cpjax.deepseek.config import SMALL
from cpjax.deepseek.names import shapes
from cpjax.deepseek.parallel import model_mesh, specs
from cpjax.errors import InputError

TINY = replace(SMALL, vocab_size=97, hidden_size=48, num_hidden_layers=2, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepseek") / "model"
    write_random(folder, TINY, seed=2, shard_bytes=2**16)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def tensors(folder):
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def test_what_is_written(model):
    found = tensors(model)
    assert {name: x.shape for name, x in found.items()} == shapes(TINY)
    files = sorted(path.name for path in model.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    index = json.loads((model / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == np.float32
    assert found["lm_head.weight"].dtype == np.float16
    assert open_checkpoint(model).config == TINY


def test_a_tensor_follows_from_seed_and_name(model, tmp_path):
    write_random(tmp_path / "same", TINY, seed=2)
    write_random(tmp_path / "other", TINY, seed=3)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert (tensors(tmp_path / "same")[name] == tensors(model)[name]).all()
    assert not (tensors(tmp_path / "other")[name] == tensors(model)[name]).any()


def test_each_device_reads_its_slices_and_no_more(model, monkeypatch):
    """Of every weight as many numbers as the devices hold, and what is read is what the file has."""
    count, real = {}, Checkpoint.read

    def read(self, name, index):
        found = real(self, name, index)
        count[name] = count.get(name, 0) + found.size
        return found

    monkeypatch.setattr(Checkpoint, "read", read)
    mesh = model_mesh(2, 2)
    weights = load(open_checkpoint(model), "float32", mesh=mesh, specs=specs(TINY))
    expert = "model.layers.1.mlp.experts.7.down_proj.weight"
    assert count[expert] == 48 * 32, "one of four devices has it"
    assert count["model.layers.0.self_attn.o_proj.weight"] <= 4 * 48 * 32, "half of it, on each of four devices"
    found = tensors(model)
    for ours, name in (
        (weights.layers[1].mlp.experts.down_proj[7], expert),
        (weights.layers[0].self_attn.o_proj, "model.layers.0.self_attn.o_proj.weight"),
        (weights.layers[1].mlp.shared_experts.up_proj, "model.layers.1.mlp.shared_experts.up_proj.weight"),
        (weights.layers[1].mlp.gate, "model.layers.1.mlp.gate.weight"),
        (weights.embed_tokens, "model.embed_tokens.weight"),
    ):
        np.testing.assert_array_equal(np.asarray(ours), found[name].astype(np.float32))


def test_bfloat16_is_read_exactly(tmp_path):
    write_random(tmp_path / "model", TINY, seed=2, dtype="bfloat16")
    weights = load(open_checkpoint(tmp_path / "model"), "float32")
    wanted = tensors(tmp_path / "model")["model.layers.0.self_attn.kv_b_proj.weight"]
    np.testing.assert_array_equal(np.asarray(weights.layers[0].self_attn.kv_b_proj), wanted.astype(np.float32))


def test_modules_bear_the_checkpoint_s_names(model):
    from cpjax.deepseek.module import names_of, read_module

    module = read_module(model, "float32")
    assert sorted(names_of(module)) == sorted(shapes(TINY))
    ours, theirs = (jax.tree.leaves(x) for x in (module.weights(), load(open_checkpoint(model), "float32")))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_nothing_is_overwritten(model):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in model.iterdir())
    with pytest.raises(InputError, match="is there already; nothing is overwritten"):
        write_random(model, TINY, seed=9)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in model.iterdir()) == before


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    from cpjax.deepseek import checkpoint

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(InputError, match=r"cannot be written \(no space left\)"):
        write_random(tmp_path / "model", TINY, seed=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is unknown; known are float64"),
        ({"config": replace(SMALL, vocab_size=10**9)}, "bytes of random weights are more than"),
    ],
)
def test_what_is_not_written(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        write_random(**{"folder": tmp_path / "model", "config": TINY, "seed": 2} | change)


# Refused when it is read ----------------------------------------------------------------------------------------------


def in_one_file(folder, change):
    """The checkpoint with its tensors changed, in one file."""
    found = tensors(folder)
    change(found)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(found, folder / SINGLE)


def refused(folder):
    with pytest.raises(InputError) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


NAME = "model.layers.1.self_attn.o_proj.weight"
DAMAGE = {
    "missing": (lambda found: found.pop(NAME), f"tensor {NAME} is missing; config.json says the model has it"),
    "another shape": (
        lambda found: found.update({NAME: found[NAME][:, :-1].copy()}),
        f"tensor {NAME} has shape [48, 63]; by config.json it must be [48, 64]",
    ),
    "integers": (
        lambda found: found.update({NAME: found[NAME].astype(np.int8)}),
        f"tensor {NAME} has dtype I8, a quantisation",
    ),
    "a bias that a quantiser has added": (
        lambda found: found.update({"model.layers.1.input_layernorm.bias": np.zeros(48, np.float16)}),
        "tensor model.layers.1.input_layernorm.bias is not understood, so results might be wrong",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_tensor_that_is_wrong(copy, what):
    change, message = DAMAGE[what]
    in_one_file(copy, change)
    assert message in refused(copy)


def test_tensors_of_the_draft_module_are_left_out(copy):
    in_one_file(copy, lambda found: found.update({"model.layers.2.eh_proj.weight": np.zeros((48, 96), np.float16)}))
    assert "model.layers.2.eh_proj.weight" not in open_checkpoint(copy).files


def test_files_that_are_damaged(copy):
    index = json.loads((copy / INDEX).read_text())
    first = next(iter(index["weight_map"].values()))
    (copy / first).write_bytes(b"\0" * 40)
    assert f"{first} is no safetensors file" in refused(copy)
    (copy / first).unlink()
    assert f"names the file '{first}', which is not beside it" in refused(copy)
    index["weight_map"][NAME] = "../model.safetensors"
    (copy / INDEX).write_text(json.dumps(index))
    assert "names the file '../model.safetensors', which is not beside it" in refused(copy)
    (copy / INDEX).write_text("[]")
    assert "has no weight_map" in refused(copy)
    (copy / INDEX).write_text("{")
    assert "cannot be read as JSON" in refused(copy)
    (copy / INDEX).unlink()
    assert "has neither" in refused(copy)
    assert "is no folder; give a checkpoint's" in refused(copy / "nowhere")


def test_a_dtype_in_which_nothing_is_computed(model):
    with pytest.raises(InputError, match="dtype 'float16' is not one that a model is computed in"):
        load(open_checkpoint(model), "float16")
    with pytest.raises(InputError, match="float64 needs float64 in JAX"):
        load(open_checkpoint(model), "float64")
