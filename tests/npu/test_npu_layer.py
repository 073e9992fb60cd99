"""`python -m npu_backend layer`: every stage against NumPy, the whole against float64, files, refusals, the command."""

import json

import numpy as np
import pytest
import torch
from npu_layer import CONFIG, YARN, check_stages, layer, quantize, whole_layer, write_layer
from safetensors import safe_open
from safetensors.numpy import load_file

from npu_backend import vendor
from npu_backend.__main__ import main
from npu_backend.contracts.refuse import Refusal
from npu_backend.errors import InputError
from npu_backend.layer import run as run_module
from npu_backend.layer.angles import cos_sin, frequencies
from npu_backend.layer.case import read_layer
from npu_backend.layer.config import config_of
from npu_backend.layer.run import operators_of, run_layers

KINDS = ("FLOAT", "W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC")


def computed(tmp_path, case, arrays):
    """The path of the result."""
    path = write_layer(tmp_path / "cases", "one", case, arrays)
    (outcome,) = run_layers(path, tmp_path / "results", device="cpu")
    assert outcome.error is None, outcome.error
    return outcome.result


# --- stages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arithmetic", ["vendor", "exact"])
def test_stages_of_a_dense_layer(tmp_path, kind, arithmetic):
    case, arrays = layer(1, is_moe=False, kind=kind, arithmetic=arithmetic)
    check_stages(case, arrays, computed(tmp_path, case, arrays))


@pytest.mark.parametrize(
    ("kind", "expert_kind", "arithmetic"),
    [
        ("FLOAT", "FLOAT", "vendor"),
        ("W8A8", "W8A8_DYNAMIC", "vendor"),
        ("W8A8_DYNAMIC", "W4A8_DYNAMIC", "vendor"),
        ("W8A8", "W4A8_DYNAMIC", "exact"),
        ("FLOAT", "W8A8_DYNAMIC", "exact"),
    ],
)
def test_stages_of_a_layer_with_experts(tmp_path, kind, expert_kind, arithmetic):
    case, arrays = layer(2, is_moe=True, kind=kind, expert_kind=expert_kind, arithmetic=arithmetic)
    check_stages(case, arrays, computed(tmp_path, case, arrays))


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None},
        {"kv_lora_rank": 512},
        {"rope_scaling": None, "num_attention_heads": 3},
        {"rope_scaling": YARN | {"mscale": 0.7}},
        {"rope_scaling": YARN | {"mscale_all_dim": None}},
    ],
)
def test_stages_of_other_attentions(tmp_path, changes):
    case, arrays = layer(3, is_moe=False, tokens=9, **changes)
    check_stages(case, arrays, computed(tmp_path, case, arrays))


@pytest.mark.parametrize(
    "changes",
    [{"n_shared_experts": 0}, {"n_shared_experts": 2, "n_group": 1, "topk_group": 1}, {"num_experts_per_tok": 1}],
)
def test_stages_of_other_experts(tmp_path, changes):
    case, arrays = layer(4, is_moe=True, tokens=9, **changes)
    check_stages(case, arrays, computed(tmp_path, case, arrays))


def test_groups_of_k_of_4_bit_weights(tmp_path):
    case, arrays = layer(5, is_moe=True, kind="W8A8_DYNAMIC", expert_kind="W4A8_DYNAMIC", groups=4, tokens=9)
    check_stages(case, arrays, computed(tmp_path, case, arrays))


@pytest.mark.parametrize("tokens", [1, 530])
def test_one_token_and_more_than_a_tile_of_keys(tmp_path, tokens):
    case, arrays = layer(6, is_moe=False, tokens=tokens, num_attention_heads=1)
    check_stages(case, arrays, computed(tmp_path, case, arrays))


# --- the whole


@pytest.mark.parametrize("is_moe", [False, True])
def test_the_whole_layer_is_the_function(tmp_path, is_moe):
    """Roundings of FP16 add up to a few thousandths of what the layer adds to its input."""
    case, arrays = layer(7, is_moe=is_moe)
    out = load_file(computed(tmp_path, case, arrays))["out"].astype(np.float64)
    wanted = whole_layer(case, arrays)
    added = wanted - arrays["hidden"]
    error = np.sqrt(((out - wanted) ** 2).mean() / (added**2).mean())
    assert 1e-5 < error < 3e-3


@pytest.mark.parametrize(("kind", "limit"), [("W8A8_DYNAMIC", 0.03), ("W8A8", 0.2), ("W4A8_DYNAMIC", 0.3)])
def test_quantised_layers_are_near_the_float_one(tmp_path, kind, limit):
    """Not a check of roundings: of scales, offsets, and of which row is which."""
    case, arrays = layer(8, is_moe=False)
    wanted = whole_layer(case, arrays)
    case, quantised = layer(8, is_moe=False, kind=kind)
    quantised |= {name: x for name, x in arrays.items() if "_proj" not in name or "kv_b" in name}
    for name in case["kinds"]:
        parts = quantize(np.random.default_rng(0), arrays[f"{name}.weight"].astype(np.float64), kind)
        if kind == "W8A8":  # without an arbitrary bias
            parts["quant_bias"] = np.rint(-3.0 * parts["weight"].astype(int).sum(axis=1)).astype(np.int32)
        quantised |= {f"{name}.{part}": x for part, x in parts.items()}
    out = load_file(computed(tmp_path, case, quantised))["out"].astype(np.float64)
    error = np.sqrt(((out - wanted) ** 2).mean() / ((wanted - arrays["hidden"]) ** 2).mean())
    assert error < limit


def test_an_angle_is_that_of_its_position():
    config = config_of(CONFIG | {"rope_scaling": None}, is_moe=False)
    np.testing.assert_allclose(frequencies(config)[[0, 31]], [1, 10000 ** (-62 / 64)])
    cos, sin = cos_sin(config, np.array([0, 3]))
    assert cos.shape == sin.shape == (2, 64)
    assert cos[0].tolist() == [1] * 64
    assert sin[1, 0] == sin[1, 32] == np.float16(np.sin(3))
    stretched = frequencies(config_of(CONFIG, is_moe=False))
    assert stretched[0] == 1  # the fastest is as trained
    np.testing.assert_allclose(stretched[31] * 40, 10000 ** (-62 / 64))  # the slowest is 40 times slower


def test_both_spellings_of_the_rotary_embedding():
    said = {key: x for key, x in YARN.items() if key != "type"} | {"rope_type": "yarn", "rope_theta": 10000.0}
    other = {key: x for key, x in CONFIG.items() if key not in ("rope_scaling", "rope_theta")}
    other["rope_parameters"] = said
    assert config_of(other, is_moe=True) == config_of(CONFIG, is_moe=True)
    assert config_of(CONFIG, is_moe=True).softmax_scale == pytest.approx(0.1352337788608801)


# --- files and the command


def test_a_result_says_what_computed_it(tmp_path):
    case, arrays = layer(9, is_moe=False, tokens=4)
    path = write_layer(tmp_path / "cases", "one", case, arrays)
    (outcome,) = run_layers(path, tmp_path / "results", device="cpu")
    with safe_open(outcome.result, "numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "cpjax.layer-result"
    assert (metadata["version"], metadata["name"], metadata["backend"]) == ("1", "one", "npu")
    assert metadata["digest"] == read_layer(path).digest
    about = json.loads(metadata["about"])
    assert about["torch"] == torch.__version__
    assert about["arithmetic"] == "vendor"
    assert "npu::npu_rms_norm" in about["operators"]
    assert outcome.seconds == about["seconds"] > 0


def test_what_is_finished_is_not_computed_again_and_nothing_is_overwritten(tmp_path, capsys):
    case, arrays = layer(9, is_moe=False, tokens=4)
    write_layer(tmp_path / "cases", "one", case, arrays)
    arguments = ["layer", str(tmp_path / "cases"), str(tmp_path / "results")]
    assert main(arguments) == 0
    assert "one: dense, " in capsys.readouterr().out
    result = tmp_path / "results" / "one.safetensors"
    before = result.stat().st_mtime_ns
    assert main([*arguments, "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert set(said) == {"name", "is_moe", "seconds", "result"}
    assert result.stat().st_mtime_ns == before
    arrays["hidden"] = arrays["hidden"] * 2
    write_layer(tmp_path / "cases", "one", case, arrays)
    assert main(arguments) == 2
    assert "move it away" in capsys.readouterr().err
    assert result.stat().st_mtime_ns == before


def test_a_layer_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        write_layer(tmp_path / "cases", name, *layer(9, is_moe=False, tokens=4))
    real = run_module.compute_layer

    def fail_once(case, device):
        Refusal("npu_x").require(case.name != "a", "too wide\nand more")
        return real(case, device)

    monkeypatch.setattr(run_module, "compute_layer", fail_once)
    assert main(["layer", str(tmp_path / "cases"), str(tmp_path / "results")]) == 1
    out, err = capsys.readouterr()
    assert err == "npu_backend: a: npu_x: too wide\n"
    assert out.startswith("b: dense")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["b.safetensors"]


def test_the_operators_that_a_case_needs(tmp_path):
    def names(**options):
        return operators_of(read_layer(write_layer(tmp_path, "one", *layer(0, tokens=2, **options))))

    dense = names(is_moe=False)
    assert dense == (
        *("atb::npu_ring_mla", "npu::npu_rms_norm", "npu::npu_add_rms_norm", "npu::npu_interleave_rope"),
        "npu::npu_swiglu",
    )
    assert "npu::npu_kv_rmsnorm_rope_cache" in names(is_moe=False, kv_lora_rank=512)
    everything = set(names(is_moe=True, kind="W8A8", expert_kind="W8A8_DYNAMIC", kv_lora_rank=512))
    known = {schema.partition("(")[0] for schema in vendor.SCHEMAS}
    assert everything <= known
    new = {name for name in known if name.startswith("npu::npu_") and "attention" not in name and "gather" not in name}
    assert new - everything == set()


def test_exact_arithmetic_is_not_an_npus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "check_device", lambda *_: None)
    write_layer(tmp_path, "one", *layer(0, is_moe=False, tokens=2, kind="W8A8", arithmetic="exact"))
    assert main(["layer", str(tmp_path), str(tmp_path / "results"), "--device", "npu"]) == 2
    assert "W8A8 is computed as the vendor's kernels do" in capsys.readouterr().err


def test_one_device_needs_no_torchrun(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "0")
    assert main(["layer", str(tmp_path), str(tmp_path / "results")]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_no_npu_no_layer(tmp_path, capsys):
    write_layer(tmp_path, "one", *layer(0, is_moe=False, tokens=2))
    assert main(["layer", str(tmp_path), str(tmp_path / "results"), "--device", "npu"]) == 2
    assert capsys.readouterr().err.startswith("npu_backend: device npu: ")


# --- what is refused


def without(name):
    return lambda case, arrays: arrays.pop(name)


def config(**changes):
    return lambda case, arrays: case["config"].update(changes)


def kinds(**changes):
    return lambda case, arrays: case["kinds"].update({k.replace("__", "."): v for k, v in changes.items()})


def put(name, change):
    return lambda case, arrays: arrays.update({name: change(arrays[name])})


def say(**changes):
    return lambda case, arrays: case.update(changes)


GATE, UP, DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
WRONG = {
    "missing tensors ['hidden']": without("hidden"),
    "unknown tensors ['more']": lambda case, arrays: arrays.update(more=np.zeros(1, np.float32)),
    "tensor 'hidden' is F32; it must be F16": put("hidden", lambda x: x.astype(np.float32)),
    "tensor 'hidden' has shape [6, 127]": put("hidden", lambda x: x[:, :-1]),
    "position must be 0 to 5": put("position", lambda x: x + 1),
    "qk_nope_head_dim is 64; npu_ring_mla takes 128": config(qk_nope_head_dim=64),
    "v_head_dim is 64": config(v_head_dim=64),
    "num_attention_heads is 129": config(num_attention_heads=129),
    "rope_interleave is False": config(rope_interleave=False),
    "hidden_act is 'gelu'": config(hidden_act="gelu"),
    "model_type is 'llama'": config(model_type="llama"),
    "hidden_size is None": config(hidden_size=None),
    "rms_norm_eps is 0; it must be above 0": config(rms_norm_eps=0),
    "the rotary embedding is 'linear'": config(rope_scaling={"type": "linear"}),
    "beta_fast is 1, below beta_slow, 2": config(rope_scaling=YARN | {"beta_fast": 1, "beta_slow": 2}),
    "factor is nan; it must be a finite number": config(rope_scaling=YARN | {"factor": float("nan")}),
    "kinds does not name mlp.down_proj": lambda case, arrays: case["kinds"].pop(DOWN),
    "kinds names self_attn.kv_b_proj": kinds(self_attn__kv_b_proj="W8A8"),
    "mlp.up_proj is 'W4'; its kind must be one of": kinds(mlp__up_proj="W4"),
    "one product computes both, give one kind": kinds(mlp__up_proj="FLOAT"),
    "kinds is a JSON list": say(kinds=[]),
    "config is a JSON NoneType": lambda case, arrays: case.pop("config"),
    "arithmetic is 'fast'": say(arithmetic="fast"),
    "is_moe is '1'": say(is_moe=1),
    "has 'more', which this version does not know": say(more=1),
    "mlp.gate_proj.input_scale is 0; it must be positive": put(f"{GATE}.input_scale", lambda x: x * 0),
    "mlp.down_proj.input_offset is 0.5; npu_quantize takes a whole": put(f"{DOWN}.input_offset", lambda x: x * 0 + 0.5),
    "give one": put(f"{UP}.input_offset", lambda x: x + 1),
    "tensor 'mlp.up_proj.deq_scale' is F16": put(f"{UP}.deq_scale", lambda x: np.ones(len(x), np.float16)),
}


@pytest.mark.parametrize("message", WRONG)
def test_refused_cases(tmp_path, capsys, message):
    case, arrays = layer(0, is_moe=False, tokens=6, kind="W8A8")
    case["config"] = dict(case["config"])
    WRONG[message](case, arrays)
    write_layer(tmp_path, "one", case, arrays)
    assert main(["layer", str(tmp_path), str(tmp_path / "results")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert "one.safetensors: " in err


WRONG_EXPERTS = {
    "mlp.experts.0.gate_proj is W8A8; no grouped product": kinds(mlp__experts__0__gate_proj="W8A8"),
    "wants equal groups of more than 2": config(n_group=6),
    "topk_group is 4, above n_group, 3": config(topk_group=4),
    "num_experts_per_tok is 9, but 2 of 3 groups have only 8": config(num_experts_per_tok=9),
    "norm_topk_prob is False": config(norm_topk_prob=False),
    "scoring_func is 'softmax'": config(scoring_func="softmax"),
    "mlp.experts.0.up_proj is W4A8_DYNAMIC and mlp.experts.3.up_proj is FLOAT": kinds(mlp__experts__3__up_proj="FLOAT"),
    "weight_offset' is not 0": put("mlp.experts.1.up_proj.weight_offset", lambda x: x + 1),
    "missing tensors ['mlp.experts.2.down_proj.scale_bias']": without("mlp.experts.2.down_proj.scale_bias"),
    "tensor 'mlp.gate.weight' is F16; it must be F32": put("mlp.gate.weight", lambda x: x.astype(np.float16)),
}


@pytest.mark.parametrize("message", WRONG_EXPERTS)
def test_refused_cases_with_experts(tmp_path, message):
    case, arrays = layer(0, is_moe=True, tokens=3, expert_kind="W4A8_DYNAMIC")
    case["config"] = dict(case["config"])
    WRONG_EXPERTS[message](case, arrays)
    path = write_layer(tmp_path, "one", case, arrays)
    with pytest.raises(InputError) as error:
        read_layer(path)
    assert message in str(error.value)


def test_4_bit_weights_that_cannot_be_packed_are_refused(tmp_path):
    case, arrays = layer(0, is_moe=False, tokens=3, kind="W4A8_DYNAMIC", q_lora_rank=44)
    with pytest.raises(InputError, match="44 rows; 4-bit weights need a multiple of 8"):
        read_layer(write_layer(tmp_path, "one", case, arrays))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "cpjax.case"}, "metadata 'format' is 'cpjax.case'; it must be 'cpjax.layer'"),
        ({"version": "2"}, "metadata 'version' is '2'"),
        ({"name": "two"}, "metadata 'name' is 'two'; it must be 'one'"),
        ({"digest": "0"}, "does not have the digest"),
        ({"case": "{"}, "metadata 'case' is not JSON"),
    ],
)
def test_refused_files(tmp_path, changes, message):
    path = write_layer(tmp_path, "one", *layer(0, is_moe=False, tokens=3), **changes)
    with pytest.raises(InputError) as error:
        read_layer(path)
    assert message in str(error.value)


def test_refused_places(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.safetensors").write_bytes(b"123")
    file = write_layer(tmp_path / "cases", "one", *layer(0, is_moe=False, tokens=3))
    for cases, results, message in (
        ("none", "results", "does not exist"),
        ("empty", "results", "holds no case"),
        ("half.safetensors", "results", "is not a whole safetensors file"),
        ("cases", "half.safetensors", "is no folder"),
    ):
        assert main(["layer", str(tmp_path / cases), str(tmp_path / results)]) == 2
        assert message in capsys.readouterr().err
    assert main(["layer", str(file), str(file / "below")]) == 2
    assert "cannot be made or written" in capsys.readouterr().err
