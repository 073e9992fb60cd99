"""The judge's own formulas of a layer are those of the specification, in float64; each was written by itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpjax.crosscheck.layer.chain import compute_layer
from cpjax.crosscheck.layer.formulas import frequencies, quantised
from cpjax.crosscheck.layer.lattice import measure
from cpjax.crosscheck.layer.weights import linear_of
from cpjax.deepseek import model, moe, quantized, rope
from cpjax.deepseek.attention import MlaWeights, attend_on_one_device
from cpjax.deepseek.config import KNOWN, SMALL, Yarn
from cpjax.deepseek.layer_cases import SET, Small, layer_case
from cpjax.deepseek.quantized_linear import quantized_linear
from cpjax.deepseek.quantized_matrix import ready
from cpjax.mask import Tokens

EXACT = [small for small in SET if small.arithmetic == "exact"]
GROUPS = Small("groups", True, "w4a8", "two scales, exact", group=64)


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def stored(case, name: str):
    """A weight as the specification has it."""
    given = {key.rpartition(".")[2]: x for key, x in case.tensors.items() if key.startswith(f"{name}.")}
    kind = case.kinds.get(name, "FLOAT")
    if kind == "FLOAT":
        return jnp.asarray(given["weight"].astype(np.float64))
    if kind == "W8A8":
        return quantized.StaticW8A8(*(jnp.asarray(given[x]) for x in quantized.StaticW8A8._fields))
    given["weight_scale"] = given["weight_scale"][:, 0]
    of = quantized.DynamicW8A8 if kind == "W8A8_DYNAMIC" else quantized.DynamicW4A8
    return of(**{x: jnp.asarray(given[x]) for x in of._fields if x in given})


def weights_of(case) -> model.LayerWeights:
    def norm(name):
        return jnp.asarray(case.tensors[f"{name}.weight"].astype(np.float64))

    names = [name for name in MlaWeights._fields if f"self_attn.{name}.weight" in case.tensors]
    attention = {x: (norm if "norm" in x else lambda y: stored(case, y))(f"self_attn.{x}") for x in names}

    def mlp(where):
        return moe.MlpWeights(*(stored(case, f"{where}{x}") for x in moe.MlpWeights._fields))

    feed = mlp("mlp.") if not case.is_moe else None
    if feed is None:
        each = [mlp(f"mlp.experts.{e}.") for e in range(case.config.n_routed_experts)]
        together = jax.tree.map(lambda *x: jnp.stack(x), *each)
        gate = (
            jnp.asarray(case.tensors[f"mlp.gate.{x}"].astype(np.float64)) for x in ("weight", "e_score_correction_bias")
        )
        assert len(each) == 16
        feed = moe.MoeWeights(*gate, together, mlp("mlp.shared_experts."))
    return model.LayerWeights(norm("input_layernorm"), MlaWeights(**attention), norm("post_attention_layernorm"), feed)


@pytest.mark.slow
@pytest.mark.parametrize("small", [*EXACT, GROUPS], ids=lambda small: small.name)
def test_the_chain_of_stages_is_the_layer_of_the_specification(small):
    case = layer_case(small, seed=3, tokens=24)
    position = jnp.asarray(case.tensors["position"])[None]
    place = Tokens(position, jnp.zeros_like(position))
    found = {}

    def attending(number, query, latent, up):
        found.update(query=query, c_kv=latent.c_kv, k_rope=latent.k_rope)
        found["attention"] = attend_on_one_device(
            query, latent, up, place, place, model.attention_for(case.config, "float64", "float64")
        )
        return found["attention"]

    x = jnp.asarray(case.tensors["hidden"].astype(np.float64))[None]
    angles = rope.cos_sin(case.config, position, "float64")
    found["out"] = model.layer(ready(weights_of(case)), case.config, 0, x, angles, attending, model.Parts())[0]
    ours = compute_layer(case)
    for name, y in found.items():
        np.testing.assert_allclose(ours[name], np.asarray(y)[0], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    "config",
    [KNOWN["DeepSeek-V3"], SMALL, replace(SMALL, yarn=None), replace(SMALL, yarn=Yarn(8.0, 2048, truncate=False))],
)
def test_frequencies_are_those_of_the_specification(config):
    np.testing.assert_allclose(frequencies(config, config.yarn), rope.frequencies(config), rtol=1e-14)


@pytest.mark.parametrize("small", SET[3:], ids=lambda small: small.name)
def test_quantised_products_of_the_specification_in_fp16_are_within_their_bounds(small):
    """In the arithmetic of the case: the specification's own, float32 and FP16."""
    case = layer_case(small, seed=4, tokens=24)
    name = "mlp.experts.5.down_proj" if case.is_moe else "mlp.down_proj"
    x = np.random.default_rng(0).standard_normal((24, linear_of(case, name).weight.shape[1])).astype(np.float32)
    given = quantized_linear(jnp.asarray(x), stored(case, name), "float16", case.arithmetic)
    a = quantized.quantize_per_token(jnp.asarray(x))
    scale = np.asarray(a.scale)[:, 0].astype(np.float64)
    expected = quantised(np.asarray(a.integers).astype(np.float64), scale, linear_of(case, name), case.arithmetic)
    found = measure(np.asarray(given), expected)
    assert not found.outside.any()
    assert (found.moved != 0).mean() < 0.005
