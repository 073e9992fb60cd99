"""A quantised checkpoint, from files to logits: one device is a NumPy twin, a mesh is one device; what is refused."""

import functools
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from source_mutant import mutant
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.deepseek import parallel, quantized_checkpoint, quantized_linear, quantized_matrix, quantized_ties, simulate
from cpjax.deepseek.cache import CacheCut
from cpjax.deepseek.calibration import Range, input_ranges
from cpjax.deepseek.checkpoint import load, load_mtp, open_checkpoint, random_tensors, write_random
from cpjax.deepseek.config import SMALL
from cpjax.deepseek.description import DESCRIPTION, FLOAT
from cpjax.deepseek.model import forward, logits_of
from cpjax.deepseek.module import read_module
from cpjax.deepseek.names import shapes
from cpjax.deepseek.one_device import Checked, on_one_device
from cpjax.deepseek.parallel import model_mesh, prefill, setup, specs
from cpjax.deepseek.quantized import DynamicW4A8, DynamicW8A8, StaticW8A8
from cpjax.deepseek.quantized_checkpoint import SCHEMES, files_of, write_quantized
from cpjax.deepseek.quantized_cut import bias_once, quantized_part, quantized_specs
from cpjax.deepseek.quantizers import dynamic_w4a8, dynamic_w8a8, static_w8a8
from cpjax.deepseek.rope import frequencies
from cpjax.errors import InputError

TINY = replace(
    SMALL,
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    q_lora_rank=24,
    kv_lora_rank=16,
)
ONE = replace(TINY, num_hidden_layers=1, first_k_dense_replace=0)
"""Attention and experts alone: half of what is compiled."""
IDS = np.random.default_rng(0).integers(0, 48, (1, 13))
F32 = np.float32


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Scheme, model → folder of its checkpoint; "groups" is w4a8 with two scales over 16 columns (MindIE's older form).

    "short" is w4a8 whose scale_bias has few bits: float32 sums of its 16 parts are the same in every order.
    """
    root = tmp_path_factory.mktemp("quantised")

    @functools.cache
    def made(scheme, config):
        folder = root / f"{scheme}-{config.num_hidden_layers}"
        if scheme not in ("groups", "short"):
            write_quantized(folder, config, 2, scheme, shard_bytes=2**15)
            return folder
        shutil.copytree(made("w4a8", config), folder)
        if scheme == "short":
            biases = {name: x for name, x in tensors(folder).items() if name.endswith("scale_bias")}
            rewritten(folder, {name: np.round(x * 2**12) / F32(2**12) for name, x in biases.items()})
            return folder
        floats, change = random_tensors(config, 2, "float16"), {}
        for name in json.loads((folder / DESCRIPTION).read_text()):
            if name in shapes(config) and ".mlp.experts." in name:
                parts = 16 if "down_proj" in name else 1
                change |= files_of(name, dynamic_w4a8(floats[name].astype(float), 16, parts))
        rewritten(folder, change, {"group_size": 16} | dict.fromkeys(change, "W4A8_DYNAMIC"))
        return folder

    return lambda scheme, config=TINY: made(scheme, config)


def tensors(folder):
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def rewritten(folder, change, description=None):
    """Tensors exchanged (None: taken out), all in one file; entries of the description too."""
    found = {name: x for name, x in (tensors(folder) | change).items() if x is not None}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(found, folder / "quant_model_weights.safetensors")
    described(folder, description or {})


def described(folder, change):
    path = next(folder.glob("quant_model_description*.json"))
    said = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: kind for name, kind in said.items() if kind is not None}))


@pytest.fixture(scope="module")
def one_device(folders):
    """Scheme and model → its weights on one device."""
    made = functools.cache(lambda scheme, config: load(open_checkpoint(folders(scheme, config)), "float64"))
    return lambda scheme, config=TINY: made(scheme, config)


@pytest.fixture(scope="module")
def expected(one_device):
    """Scheme, model, arithmetic → logits of the text on one device."""

    @functools.cache
    def made(scheme, config, arithmetic):
        return np.asarray(on_one_device(config, one_device(scheme, config), jnp.asarray(IDS, jnp.int32), arithmetic))

    return lambda scheme, config, arithmetic="exact": made(scheme, config, arithmetic)


# The twin: the whole model in NumPy, from the tensors of the files ---------------------------------------------------


def top_19_bits(x):
    return (np.asarray(x, F32).view(np.uint32) & np.uint32(0xFFFFE000)).view(F32)


def nibbles(packed):
    """Rows 2i and 2i + 1 of row i."""
    bytes_ = packed.astype(int) % 256
    rows = np.stack([bytes_ % 16, bytes_ // 16], axis=1).reshape(-1, packed.shape[1])
    return rows - 16 * (rows > 7)


class Twin:
    """Dequantised weights on dequantised activations; with "vendor" the hardware's roundings after the integers."""

    def __init__(self, folder, config, arithmetic):
        self.found, self.config, self.arithmetic = tensors(folder), config, arithmetic
        self.kinds = json.loads((folder / DESCRIPTION).read_text())

    def linear(self, name, x):
        kind, get = self.kinds[f"{name}.weight"], lambda last: self.found[f"{name}.{last}"]
        if kind == FLOAT:
            return x @ get("weight").astype(float).T
        if kind == "W8A8":
            deq = get("deq_scale").astype(np.uint32).view(F32)
            scale, offset = get("input_scale"), get("input_offset")
            a = np.clip(np.rint(x.astype(F32) / scale + offset), -128, 127).astype(int)
            if self.arithmetic == "vendor":
                sums = a @ get("weight").astype(int).T + get("quant_bias")
                return (sums.astype(F32) * top_19_bits(deq)).astype(float)
            weight = get("weight") * (deq.astype(float) / scale.astype(float))[:, None]
            return ((a - offset.astype(float)) * scale.astype(float)) @ weight.T
        x = x.astype(F32)
        token = np.abs(x).max(axis=-1, keepdims=True) / F32(127)
        a, scale = np.rint(x / token).astype(int), get("weight_scale")
        if kind == "W8A8_DYNAMIC":
            if self.arithmetic == "vendor":
                return ((a @ get("weight").astype(int).T).astype(F32) * scale[:, 0] * token).astype(float)
            return (a * token.astype(float)) @ (get("weight") * scale.astype(float)).T
        weight, scales = nibbles(get("weight")), scale.astype(float)
        if f"{name}.weight_scale_second" in self.found:
            scales = scales * get("weight_scale_second")
        if self.arithmetic == "vendor":
            high = a // 16
            halves = [
                ((half @ weight.T).astype(F32) * top_19_bits(scales[:, 0])).astype(np.float16).astype(F32)
                for half in (high, a - 16 * high - 8)
            ]
            return ((F32(16) * halves[0] + halves[1] + get("scale_bias").sum(axis=1)) * token).astype(float)
        dequantized = weight * np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1)
        return (a * token.astype(float)) @ dequantized.T

    def norm(self, name, x, eps):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * self.found[f"{name}.weight"].astype(float)

    def mlp(self, name, x):
        gate = self.linear(f"{name}.gate_proj", x)
        return self.linear(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * self.linear(f"{name}.up_proj", x))

    def experts(self, name, x):
        """Token by token, the chosen ones only."""
        score = 1 / (1 + np.exp(-self.linear(f"{name}.gate", x)))
        choice = score + self.found[f"{name}.gate.e_score_correction_bias"]
        out = self.mlp(f"{name}.shared_experts", x)
        for t in range(len(x)):
            groups = choice[t].reshape(self.config.n_group, -1)
            best = np.argsort(np.sort(groups)[:, -2:].sum(axis=1))[-TINY.topk_group :]
            allowed = np.full_like(groups, -np.inf)
            allowed[best] = groups[best]
            chosen = np.argsort(allowed.ravel())[-TINY.num_experts_per_tok :]
            for e in chosen:
                weight = TINY.routed_scaling_factor * score[t, e] / score[t, chosen].sum()
                out[t] += weight * self.mlp(f"{name}.experts.{e}", x[t : t + 1])[0]
        return out

    def attention(self, name, x):
        angle = np.arange(len(x))[:, None] * frequencies(TINY)

        def rotated(pairs):
            a, b, angles = pairs[..., 0::2], pairs[..., 1::2], angle.reshape(len(x), *(1,) * (pairs.ndim - 2), -1)
            cos, sin = np.cos(angles) * TINY.yarn.cos_factor, np.sin(angles) * TINY.yarn.cos_factor
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        nope, heads = TINY.qk_nope_head_dim, TINY.num_attention_heads
        query = self.norm(f"{name}.q_a_layernorm", self.linear(f"{name}.q_a_proj", x), 1e-6)
        query = self.linear(f"{name}.q_b_proj", query).reshape(len(x), heads, -1)
        query = np.concatenate([query[..., :nope], rotated(query[..., nope:])], axis=-1)
        latent = self.linear(f"{name}.kv_a_proj_with_mqa", x)
        c_kv = self.norm(f"{name}.kv_a_layernorm", latent[:, : TINY.kv_lora_rank], 1e-6)
        expanded = self.linear(f"{name}.kv_b_proj", c_kv).reshape(len(x), heads, -1)
        k_rope = rotated(latent[:, TINY.kv_lora_rank :])[:, None].repeat(heads, axis=1)
        key = np.concatenate([expanded[..., :nope], k_rope], axis=-1)
        scores = np.einsum("tnd,snd->nts", query, key) * TINY.softmax_scale
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = np.einsum("nts,snv->tnv", share / share.sum(axis=-1, keepdims=True), expanded[..., nope:])
        return self.linear(f"{name}.o_proj", out.reshape(len(x), -1))

    def logits(self, ids):
        x = self.found["model.embed_tokens.weight"][ids].astype(float)
        for i in range(self.config.num_hidden_layers):
            at = f"model.layers.{i}"
            x = x + self.attention(f"{at}.self_attn", self.norm(f"{at}.input_layernorm", x, TINY.rms_norm_eps))
            inner = self.norm(f"{at}.post_attention_layernorm", x, TINY.rms_norm_eps)
            x = x + (self.experts if self.config.is_moe(i) else self.mlp)(f"{at}.mlp", inner)
        return self.linear("lm_head", self.norm("model.norm", x, TINY.rms_norm_eps))


@pytest.fixture(scope="module")
def twin(folders):
    """As `expected`."""

    @functools.cache
    def made(scheme, config, arithmetic):
        return Twin(folders(scheme, config), config, arithmetic).logits(IDS[0])[None]

    return lambda scheme, config, arithmetic="exact": made(scheme, config, arithmetic)


def near(a, b):
    assert a.shape == b.shape
    assert np.abs(a - b).max() < 1e-10


def far(a, b):
    """NaN is not far."""
    assert np.abs(a - b).max() > 1e-4


# One device ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "config"),
    [("w4a8", TINY), ("w8a8-dynamic", ONE), ("groups", ONE)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_one_device_is_the_twin(expected, twin, scheme, config):
    """W4A8 has all three kinds in one model."""
    near(expected(scheme, config), twin(scheme, config))


def test_one_device_is_the_twin_in_the_vendor_s_arithmetic(expected, twin):
    """Also to 1e-10, for float32 operations in the same order are the same; and it is another arithmetic."""
    near(expected("short", ONE, "vendor"), twin("short", ONE, "vendor"))
    far(twin("short", ONE, "vendor"), twin("w4a8", ONE))
    far(twin("w8a8-dynamic", ONE), twin("w4a8", ONE))


BROKEN = {
    "scale_bias forgotten": ("w4a8_vendor", "+ bias", "", "vendor"),
    "nibbles exchanged": ("unpack_int4", "[low, high]", "[high, low]", "exact"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_on_purpose_it_is_not_the_twin(monkeypatch, one_device, twin, name):
    function, old, new, arithmetic = BROKEN[name]
    mutant(monkeypatch, quantized_linear, function, old, new)
    again = jax.jit(lambda weights, ids: forward(weights, ONE, ids, arithmetic=arithmetic))
    far(np.asarray(again(one_device("short", ONE), jnp.asarray(IDS, jnp.int32))), twin("short", ONE, arithmetic))


# On a mesh -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_mesh(folders):
    """Model, cp, tp, arithmetic → setup and weights, W4A8."""

    @functools.cache
    def made(config, cp, tp, arithmetic):
        how = setup(config, model_mesh(cp, tp), dtype="float64", arithmetic=arithmetic)
        return how, load(open_checkpoint(folders("w4a8", config)), "float64", mesh=how.mesh, specs=specs(config))

    return lambda config, cp, tp, arithmetic="exact": made(config, cp, tp, arithmetic)


def prefilled(how, weights):
    return np.asarray(logits_of(weights, how.config, prefill(how, weights, IDS).hidden))


@pytest.mark.slow
@pytest.mark.parametrize("which", [(ONE, 2, 1), (TINY, 1, 2)], ids=["cp 2", "tp 2"])
def test_a_quantised_model_on_a_mesh_is_one_device(on_mesh, expected, which):
    near(prefilled(*on_mesh(*which)), expected("w4a8", which[0]))


def test_a_quantised_model_token_by_token_is_one_device(on_mesh, expected):
    """cp 2 · tp 2: prefill, and the text's own tokens one after the other."""
    how, weights = on_mesh(ONE, 2, 2)
    cut, found = CacheCut(2, 2, 13), []
    outcome = prefill(how, weights, IDS[:, :9])
    found.append(np.asarray(logits_of(weights, ONE, outcome.hidden)))
    cache = parallel.extended_cache(how, cut, outcome, [9])
    for token in IDS[0, 9:]:
        logits, _, cache = parallel.decode_step(how, cut, weights, jnp.asarray([[token]], jnp.int32), cache)
        found.append(np.asarray(logits))
    near(np.concatenate(found, axis=1), expected("w4a8", ONE))


def test_the_vendor_s_arithmetic_depends_on_tp(on_mesh, expected):
    """Under cp alone it is one device's; each rank of tp takes its own maximum, and sums are rounded on each."""
    near(prefilled(*on_mesh(ONE, 2, 1, "vendor")), expected("w4a8", ONE, "vendor"))
    far(prefilled(*on_mesh(ONE, 1, 2, "vendor")), expected("w4a8", ONE, "vendor"))


@pytest.fixture
def traced_anew(monkeypatch):
    """What is patched is seen by the prefill."""
    unjitted = parallel._prefill.__wrapped__
    monkeypatch.setattr(parallel, "_prefill", jax.jit(lambda *x: unjitted(*x), static_argnums=(0, 1)))


def test_own_maxima_are_not_one_device(monkeypatch, traced_anew, on_mesh, expected):
    """In exact arithmetic: the maximum over tp is what makes integers the same."""
    real = quantized_matrix.quantized_linear
    monkeypatch.setattr(quantized_matrix, "quantized_linear", lambda *x: real(*x[:4], None))
    far(prefilled(*on_mesh(ONE, 1, 2)), expected("w4a8", ONE))


def test_quant_bias_on_every_rank_is_seen(monkeypatch, traced_anew, on_mesh, expected):
    monkeypatch.setattr(quantized_matrix, "bias_once", lambda stored, rank: stored)
    far(prefilled(*on_mesh(ONE, 1, 2)), expected("w4a8", ONE))


@pytest.mark.parametrize("cut", ["rows", "columns"])
@pytest.mark.parametrize("kind", ["static", "dynamic", "w4a8", "w4a8 in groups"])
def test_a_mesh_cuts_as_quantized_part_does(kind, cut):
    """scale_bias and scales of groups too, which exact arithmetic or one scale a row would not show."""
    weight = np.random.default_rng(3).normal(size=(8, 64))
    made = {
        "static": lambda: static_w8a8(weight, 0.1, 3.0, np.ones(8)),
        "dynamic": lambda: dynamic_w8a8(weight),
        "w4a8": lambda: dynamic_w4a8(weight, None, 16),
        "w4a8 in groups": lambda: dynamic_w4a8(weight, 16, 16),
    }[kind]()
    mesh, spec = model_mesh(1, 2), jax.P("tp") if cut == "rows" else jax.P(None, "tp")
    where = jax.tree.map(lambda one: jax.NamedSharding(mesh, one), quantized_specs(made, spec))
    held = jax.tree.map(jax.device_put, jax.tree.map(jnp.asarray, made), where)
    for rank in range(2):
        mine = jax.tree.map(lambda x, rank=rank: x.addressable_shards[rank].data, held)
        if cut == "columns":
            mine = bias_once(mine, jnp.asarray(rank))
        for a, b in zip(mine, quantized_part(made, cut, rank, 2), strict=True):
            np.testing.assert_array_equal(a, b)


def test_each_device_holds_its_part(on_mesh):
    _, weights = on_mesh(TINY, 2, 2)
    shape = lambda x: x.sharding.shard_shape(x.shape)  # noqa: E731
    attention, feed = weights.layers[1].self_attn, weights.layers[1].mlp
    assert [shape(x) for x in attention.q_b_proj] == [(2 * 24, 24), (1,), (1,), (2 * 24,), (2 * 24,)], "rows"
    assert [shape(x) for x in attention.o_proj] == [(32, 2 * 16), (1,), (1,), (32,), (32,)], "columns"
    assert [shape(x) for x in feed.shared_experts.down_proj] == [(32, 16), (32,)]
    packed, scale, bias, second = feed.experts.down_proj
    assert [shape(x) for x in (packed, scale, bias)] == [(2, 16, 32), (2, 32), (2, 32, 16)], "2 of 8 experts"
    assert second is None
    assert [x.dtype for x in attention.o_proj] == ["int8", "float32", "float32", "float32", "int32"]


# What is written -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Input ranges that are not looked for."""
    monkeypatch.setattr(
        quantized_checkpoint, "input_ranges", lambda config, found, names, seed: dict.fromkeys(names, Range(-4, 4))
    )


def test_names_and_kinds_are_the_vendor_s(quick, folders, tmp_path):
    found, said = tensors(folders("w4a8")), json.loads((folders("w4a8") / DESCRIPTION).read_text())
    assert set(found) == {name for name in said if "." in name}
    assert (said["group_size"], said["model_quant_type"]) == (0, "W8A8_DYNAMIC")
    at = "model.layers.1"
    for name, kind, rest in (
        ("self_attn.o_proj", "W8A8", {"input_scale", "input_offset", "deq_scale", "quant_bias"}),
        ("self_attn.kv_b_proj", FLOAT, set()),
        ("mlp.shared_experts.up_proj", "W8A8_DYNAMIC", {"weight_scale", "weight_offset"}),
        ("mlp.experts.3.down_proj", "W4A8_DYNAMIC", {"weight_scale", "weight_offset", "scale_bias"}),
        ("mlp.gate", FLOAT, {"e_score_correction_bias"}),
        ("input_layernorm", FLOAT, set()),
    ):
        every = [key for key in found if key.startswith(f"{at}.{name}.")]
        assert {key.rpartition(".")[2] for key in every} == rest | {"weight"}
        assert {said[key] for key in every} == {kind}
    assert found[f"{at}.mlp.experts.3.down_proj.scale_bias"].shape == (32, 16)
    assert found[f"{at}.mlp.experts.3.up_proj.scale_bias"].shape == (32, 1)
    assert found[f"{at}.self_attn.o_proj.deq_scale"].dtype == np.int64
    words = json.loads((folders("w4a8") / "config.json").read_text())
    assert (words["moe_quantize"], words["mla_quantize"]) == ("w4a8_dynamic", "w8a8")
    assert {said[name] for name in said if ".layers.2." in name} == {FLOAT}, "the MTP module"
    assert load_mtp(open_checkpoint(folders("w4a8")), "float64")[0].eh_proj.shape == (32, 64)
    write_quantized(tmp_path / "mixed", TINY, 2, "w8a8")
    mixed = open_checkpoint(tmp_path / "mixed").quantized
    assert {mixed[f"{at}.{name}.weight"] for name in ("mlp.experts.3.up_proj", "mlp.shared_experts.up_proj")} == {
        "W8A8_DYNAMIC"
    }
    assert mixed[f"{at}.self_attn.o_proj.weight"] == "W8A8"
    assert set(open_checkpoint(folders("w8a8-dynamic")).quantized.values()) == {"W8A8_DYNAMIC"}


def test_beside_bfloat16_deq_scale_is_float32(quick, folders, tmp_path, one_device):
    write_quantized(tmp_path / "model", TINY, 2, "w8a8", dtype="bfloat16")
    name = "model.layers.0.self_attn.o_proj.deq_scale"
    written = tensors(tmp_path / "model")[name]
    assert written.dtype == F32
    loaded = load(open_checkpoint(tmp_path / "model"), "float64").layers[0].self_attn.o_proj
    np.testing.assert_array_equal(loaded.deq_scale, written)
    low = tensors(folders("w4a8"))[name].astype(np.uint32).view(F32)
    np.testing.assert_array_equal(one_device("w4a8").layers[0].self_attn.o_proj.deq_scale, low)


def test_the_float_checkpoint_of_the_seed_is_what_is_quantised(folders):
    """Half a step of a row's scale at most; what is FLOAT is the same."""
    floats, found = random_tensors(TINY, 2, "float16"), tensors(folders("w8a8-dynamic"))
    for name, x in floats.items():
        scale = found.get(f"{name}_scale", np.zeros(1))
        assert np.all(np.abs(found[name] * np.where(scale > 0, scale, 1) - x) <= 0.501 * scale), name


def test_input_ranges_are_those_of_the_float_model(folders):
    """The inputs of the first layer, computed here: nothing of the text is cut off, the ends are −128 and 127."""
    name, floats = "model.layers.0.self_attn.q_a_proj.weight", random_tensors(ONE, 2, "float16")
    found = input_ranges(ONE, floats, [name], seed=2)[name]
    x = floats["model.embed_tokens.weight"][np.random.default_rng(2).integers(0, 48, 128)].astype(float)
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6) * floats["model.layers.0.input_layernorm.weight"]
    np.testing.assert_allclose(found, (x.min(), x.max()), rtol=1e-5)
    stored = tensors(folders("w4a8", ONE))
    scale, offset = (stored[name.replace("weight", f"input_{last}")] for last in ("scale", "offset"))
    np.testing.assert_allclose(scale, (found.high - found.low) / 255, rtol=1e-6)
    a = np.rint(x / scale + offset)
    assert abs(a.min() + 128) <= 1
    assert abs(a.max() - 127) <= 1


def test_what_is_not_written(quick, tmp_path, folders):
    for config, scheme, message in (
        (TINY, "w4a16", "quantisation 'w4a16' is unknown; known are w8a8, w8a8-dynamic, w4a8"),
        (replace(TINY, moe_intermediate_size=24), "w4a8", "down_proj.weight: 24 columns do not come in 16 parts"),
    ):
        with pytest.raises(InputError, match=message):
            write_quantized(tmp_path / "model", config, 2, scheme)
    with pytest.raises(InputError, match="nothing is overwritten"):
        write_quantized(folders("w4a8"), TINY, 2, "w4a8")
    assert list(tmp_path.iterdir()) == []


# What is read --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders("w4a8"), tmp_path / "copy")


def test_names_of_files_say_nothing(copy, one_device):
    """MindIE's names, as the vendor's W4A8 script has them."""
    rewritten(copy, {})
    (copy / "quant_model_weights.safetensors").rename(copy / "quant_model_weight_w8a8_dynamic.safetensors")
    (copy / DESCRIPTION).rename(copy / "quant_model_description_w8a8_dynamic.json")
    found = load(open_checkpoint(copy), "float64")
    assert jax.tree.structure(found) == jax.tree.structure(one_device("w4a8"))
    for a, b in zip(*map(jax.tree.leaves, (found, one_device("w4a8"))), strict=True):
        np.testing.assert_array_equal(a, b)
    kinds = [type(found.layers[1].self_attn.o_proj), type(found.layers[0].mlp.up_proj)]
    assert [*kinds, type(found.layers[1].mlp.experts.up_proj)] == [StaticW8A8, DynamicW8A8, DynamicW4A8]


O_PROJ, EXPERT = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.experts.3.down_proj"
KV_B, EMBEDDING = "model.layers.0.self_attn.kv_b_proj.weight", "model.embed_tokens.weight"
DAMAGE = {
    "a kind that is not computed": (
        {f"{O_PROJ}.weight": "W8A16"},
        {},
        f"tensor {O_PROJ}.weight is 'W8A16'; only FLOAT, W",
    ),
    "a kind that is no word": ({f"{O_PROJ}.weight": 8}, {}, f"tensor {O_PROJ}.weight is 8; only FLOAT"),
    "not named": ({f"{O_PROJ}.weight": None}, {}, f"does not name tensor {O_PROJ}.weight"),
    "of another checkpoint": ({"model.layers.7.x.weight": FLOAT}, {}, "names tensor model.layers.7.x.weight, which no"),
    "half float": (
        {f"{O_PROJ}.weight": FLOAT},
        {},
        f"tensor {O_PROJ}.weight is FLOAT, but {O_PROJ}.input_scale is W8A8",
    ),
    "integers that are said to be floats": (
        {},
        {KV_B: np.zeros((4 * 32, 16), np.int8)},
        f"tensor {KV_B} has dtype I8; by the description it must be F64 or",
    ),
    "a static weight that is said to be dynamic": (
        {f"{O_PROJ}.weight": "W8A8_DYNAMIC"},
        {},
        f"tensor {O_PROJ}.weight is W8A8_DYNAMIC, but {O_PROJ}.input_scale is W8A8; what belongs",
    ),
    "a weight that absorbs": (
        {KV_B: "W8A8_DYNAMIC"},
        {},
        f"tensor {KV_B} is W8A8_DYNAMIC; it is computed only as FLOAT",
    ),
    "an embedding": ({EMBEDDING: "W8A8_DYNAMIC"}, {}, f"tensor {EMBEDDING} is W8A8_DYNAMIC; it is computed only as"),
    "groups that are not there": ({"group_size": 16}, {}, "weight_scale_second is missing; by the description it must"),
    "groups that do not come out even": (
        {"group_size": 7},
        {},
        "group_size is 7, which does not divide the 32 columns",
    ),
    "no number of columns": ({"group_size": "16"}, {}, "group_size is '16'; it must be a whole number"),
    "no scale": (
        {f"{EXPERT}.weight_scale": None},
        {f"{EXPERT}.weight_scale": None},
        f"tensor {EXPERT}.weight_scale is missing; by the description it must be there",
    ),
    "not packed": (
        {},
        {f"{EXPERT}.weight": np.zeros((32, 32), np.int8)},
        f"tensor {EXPERT}.weight has shape [32, 32]; by config.json and the description it must be [16, 32]",
    ),
    "3 parts": (
        {},
        {f"{EXPERT}.scale_bias": np.zeros((32, 3), F32)},
        "scale_bias has shape [32, 3]; by config.json and the description it must be [32, 1] or [32, 16]",
    ),
    "a bias in floats": (
        {},
        {f"{O_PROJ}.quant_bias": np.zeros(32, F32)},
        f"tensor {O_PROJ}.quant_bias has dtype F32; by the description it must be I32",
    ),
    "an expert unlike the others": (
        {},
        {f"{EXPERT}.scale_bias": np.zeros((32, 1), F32)},
        "the experts beside model.layers.1.mlp.experts.0.down_proj.weight are not all quantised in the same way",
    ),
    "smoothed outliers": (
        {"model.norm.bias": FLOAT},
        {"model.norm.bias": np.zeros(32, np.float16)},
        "tensor model.norm.bias is not understood, so results might be wrong",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_does_not_fit_is_refused(copy, what):
    """In one line, before a weight is read."""
    description, change, message = DAMAGE[what]
    if change:
        rewritten(copy, change)
    described(copy, description)
    with pytest.raises(InputError) as error:
        open_checkpoint(copy)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit_are_refused(copy, folders, tmp_path):
    shutil.copy(copy / DESCRIPTION, copy / "quant_model_description_w8a8.json")
    with pytest.raises(InputError, match="has 2 description files"):
        open_checkpoint(copy)
    (copy / "quant_model_description_w8a8.json").unlink()
    index = copy / "quant_model_weights.safetensors.index.json"
    shutil.copy(index, copy / "model.safetensors.index.json")
    with pytest.raises(InputError, match="has 2 indices and"):
        open_checkpoint(copy)
    (copy / "model.safetensors.index.json").unlink()
    for text, message in (("[]", "holds no JSON object"), ("{", "cannot be read as JSON")):
        (copy / DESCRIPTION).write_text(text)
        with pytest.raises(InputError, match=message):
            open_checkpoint(copy)
    (copy / DESCRIPTION).unlink()
    index.rename(copy / "model.safetensors.index.json")
    with pytest.raises(InputError, match=r"has dtype I8, a quantisation, and no quant_model_description\*.json"):
        open_checkpoint(copy)
    with pytest.raises(InputError, match="a module holds floats only"):
        read_module(folders("w4a8"), "float64")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            f"{EXPERT}.weight_offset",
            np.eye(32, 1, dtype=F32),
            "weight_offset has 1.0; it must be 0, weights are symmetric",
        ),
        (f"{O_PROJ}.input_scale", np.zeros(1, F32), "input_scale has 0.0; it must be a positive number"),
        (f"{O_PROJ}.input_scale", np.full(1, np.nan, F32), "input_scale has nan; it must be a positive number"),
    ],
)
def test_numbers_without_a_meaning_are_refused(copy, name, value, message):
    rewritten(copy, {name: value})
    with pytest.raises(InputError, match=message):
        load(open_checkpoint(copy), "float64")


def test_parts_of_scale_bias_that_a_mesh_cannot_cut(copy):
    """A row-parallel layer in W4A8 with one part, which no rank of two can have half of."""
    name = "model.layers.0.mlp.down_proj"
    made = files_of(f"{name}.weight", dynamic_w4a8(random_tensors(TINY, 2, "float16")[f"{name}.weight"].astype(float)))
    rewritten(copy, made, dict.fromkeys(made, "W4A8_DYNAMIC"))
    with pytest.raises(InputError, match=r"scale_bias has shape \[32, 1\], of which tp = 2 cannot cut 1 equally"):
        load(open_checkpoint(copy), "float64", mesh=model_mesh(1, 2), specs=specs(TINY))


def test_a_quantised_draft_module_is_refused(copy):
    name = "model.layers.2.self_attn.o_proj"
    made = files_of(f"{name}.weight", dynamic_w8a8(tensors(copy)[f"{name}.weight"].astype(float)))
    rewritten(copy, made, dict.fromkeys(made, "W8A8_DYNAMIC"))
    with pytest.raises(
        InputError, match=f"tensor {name}.weight is W8A8_DYNAMIC; an MTP module is computed only as FLOAT"
    ):
        load_mtp(open_checkpoint(copy), "float64")


# Ties ----------------------------------------------------------------------------------------------------------------


def test_activations_near_a_tie_are_counted(monkeypatch, one_device):
    """All of them are looked at; none is so near here; many are if near is far."""
    text = jnp.asarray(IDS, jnp.int32)
    real, more = quantized_ties.near_ties, []

    def both(x, matrix):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantized_ties, "NEAR", 1e-3)
            more.append(real(x, matrix))
        return real(x, matrix)

    monkeypatch.setattr(quantized_ties, "near_ties", both)
    found = quantized_ties.count_near_ties(ONE, one_device("w4a8", ONE), text)
    attention, experts = 32 + 32 + 24 + 64, 9 * 3 * 33  # 8 and a shared one, and each of a token's inputs has a scale
    assert found == (0, 13 * (attention + experts))
    assert sum(one.near for one in more) > found.all / 100


# Commands ------------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(ONE.as_json()))
    return path


def test_commands_from_nothing_to_tokens(tmp_path, config_file):
    written = run("checkpoint", tmp_path / "m", "--quantize", "w4a8", "--like", config_file, "--json")
    said = json.loads(written.stdout)
    assert (said["quantize"], said["files"][0]) == (
        "w4a8",
        f"quant_model_weights-00001-of-{len(said['files']):05}.safetensors",
    )
    assert said["tensors"] == len(tensors(tmp_path / "m"))
    ids = ",".join(map(str, IDS[0]))  # as many as elsewhere: the programs are there
    line = ["generate", tmp_path / "m", "--prompt-ids", ids, "--cp", 2, "--steps", 1, "--check"]
    done = run(*line)
    assert done.exit_code == 0, done.output
    assert "quantised: W4A8_DYNAMIC, W8A8, W8A8_DYNAMIC; arithmetic exact" in done.stdout
    assert "agrees with one device" in done.stdout


@pytest.mark.parametrize(
    ("checked", "arithmetic", "tp", "near", "reason"),
    [
        (Checked(1e-3, 1e-10, None), "exact", 1, 0, "none of 96 quantised activations lies within 1e-13 of a tie"),
        (
            Checked(1e-3, 1e-10, None),
            "exact",
            2,
            3,
            "3 of 96 quantised activations lies within 1e-13 of a tie in rounding",
        ),
        (Checked(1e-3, 1e-10, None), "vendor", 2, 0, "each rank of tp takes the scale of a token from its own columns"),
        (Checked(1e-15, 1e-10, None), "exact", 1, 3, None),
    ],
)
def test_a_check_that_fails_says_what_may_be_why(monkeypatch, folders, checked, arithmetic, tp, near, reason):
    """And fails all the same."""
    monkeypatch.setattr(
        simulate,
        "generate",
        lambda *x, **how: simulate.Generated(
            IDS, IDS[..., None] * 1.0, {"prefill": 1.0, "first step": 1.0, "further steps": 1.0}
        ),
    )
    monkeypatch.setattr(simulate, "check", lambda *x, **more: checked)
    monkeypatch.setattr(simulate, "count_near_ties", lambda *x: quantized_ties.Near(near, 96))
    line = ["generate", folders("w4a8"), "--prompt-ids", "1,2,3", "--cp", 1, "--tp", tp, "--arithmetic", arithmetic]
    done = run(*line, "--check")
    assert done.exit_code == (0 if reason is None else 1)
    assert ("reason:" in done.stdout) == (reason is not None)
    assert (reason or "") in done.stdout
    said = json.loads(run(*line, "--check", "--json").stdout)
    assert (said["quantised"], said["arithmetic"]) == (["W4A8_DYNAMIC", "W8A8", "W8A8_DYNAMIC"], arithmetic)
    assert (said["check"]["reason"] is None) == (reason is None)


def test_bad_input_to_commands(tmp_path, folders, config_file):
    write_random(tmp_path / "float", TINY, 2)
    for line, message in (
        (
            ("checkpoint", tmp_path / "x", "--quantize", "w4"),
            "quantisation 'w4' is unknown; known are w8a8, w8a8-dynamic",
        ),
        (
            ("generate", tmp_path / "float", "--prompt-ids", 1, "--arithmetic", "vendor"),
            "is not quantised, so --arithmetic",
        ),
        (
            ("generate", folders("w4a8"), "--prompt-ids", 1, "--arithmetic", "fast"),
            "'fast' is unknown; give exact or vendor",
        ),
    ):
        done = run(*line)
        assert (done.exit_code, done.stdout) == (2, ""), done
        assert message in done.stderr
    assert set(SCHEMES) == {"w8a8", "w8a8-dynamic", "w4a8"}
