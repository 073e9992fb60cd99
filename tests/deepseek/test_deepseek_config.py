"""config.json: both spellings, the real models' numbers, all else refused in one line; crosscheck takes its scale."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from cpjax.deepseek.config import KNOWN, SMALL, DeepseekConfig, Yarn, config_of, read_config
from cpjax.errors import InputError
from cpjax.mindie.crosscheck import cases_of

V3 = KNOWN["DeepSeek-V3"]
SAID = SMALL.as_json()
# As in the models' own config.json.
OLD = {
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
NEW = {
    "rope_parameters": {
        "rope_theta": 10000.0, "rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "factor": 40.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


def without_rope():
    return {key: value for key, value in V3.as_json().items() if key not in OLD}


@pytest.mark.parametrize("said", [OLD, NEW, OLD | NEW])
def test_both_spellings_of_rope(said):
    assert config_of(without_rope() | said) == V3


def test_the_real_scale():
    """192^-½ · (0.1 ln 40 + 1)², and nothing on cos and sin."""
    assert V3.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-12)
    assert V3.yarn.cos_factor == 1
    assert replace(V3, yarn=None).softmax_scale == 192**-0.5
    assert replace(V3.yarn, mscale=None).cos_factor == pytest.approx(0.1 * math.log(40) + 1)


def test_plain_rope():
    assert config_of(without_rope()).yarn is None
    assert config_of(without_rope() | {"rope_scaling": None}).yarn is None
    plain = config_of(without_rope() | {"rope_parameters": {"rope_type": "default", "rope_theta": 50}})
    assert (plain.yarn, plain.rope_theta) == (None, 50.0)


def test_crosscheck_takes_the_scale_of_the_model():
    prompt, decode = cases_of(None, tokens=40, decode=True)[0]
    assert (prompt.scale, decode.scale) == (V3.softmax_scale, V3.softmax_scale)
    assert (prompt.query.shape[2:], decode.value.shape[3]) == ((16, 192), V3.kv_lora_rank)
    (unknown,), _ = cases_of(None, tokens=40, geometry="128,128,64,128")
    assert unknown.scale == 192**-0.5


REFUSED = [
    ({"model_type": "deepseek_v2"}, "model_type is 'deepseek_v2'; it must be deepseek_v3 or deepseekv2"),
    ({"hidden_size": "64"}, "hidden_size is '64'; it must be a whole number"),
    ({"hidden_size": True}, "hidden_size is True; it must be a whole number"),
    ({"hidden_size": 0}, "hidden_size is 0; it must be a positive number"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; it must be a finite number"),
    ({"scoring_func": "softmax"}, "scoring_func is 'softmax', which is not computed here; only 'sigmoid' is"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ({"num_key_value_heads": 1}, "num_key_value_heads is 1; latent attention has as many as heads, 4"),
    ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; pairs are rotated, make it even"),
    ({"n_group": 3}, "n_group is 3; it must divide the 16 experts"),
    ({"n_group": 16}, "n_group is 16; it must divide the 16 experts into groups of at least 2"),
    ({"topk_group": 5}, "topk_group is 5; it must be from 1 to n_group, 4"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but 2 of 4 groups have only 8 experts"),
    ({"n_routed_experts": 0}, "n_routed_experts is 0, but layers from 1 on have experts"),
    ({"rope_scaling": {"type": "longrope"}}, "rope_scaling has type 'longrope'; only 'yarn' and 'default' are"),
    ({"rope_scaling": {"type": "yarn", "factor": -1}}, "YaRN's factor is -1"),
    ({"rope_scaling": {"type": "yarn", "beta_fast": 1, "beta_slow": 2}}, "YaRN's beta_fast is 1.0, below beta_slow"),
    ({"rope_scaling": 40}, "rope_scaling is 40; it must be an object"),
    ({"rope_theta": 0}, "rope_theta is 0.0; it must be a positive number"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters and rope_scaling say different things"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_is_refused(change, message):
    with pytest.raises(InputError) as error:
        config_of(SAID | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in SAID if name in ("vocab_size", "kv_lora_rank", "v_head_dim")])
def test_what_is_missing(name):
    with pytest.raises(InputError, match=f"{name} is missing"):
        config_of({key: value for key, value in SAID.items() if key != name})


JUNK = (
    st.none() | st.booleans() | st.integers(-3, 10**30) | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
)
PLACES = st.sampled_from([*SAID, "rope_parameters"]) | st.sampled_from(
    [("rope_scaling", x) for x in OLD["rope_scaling"]]
)


@examples(4)
@given(PLACES, JUNK)
def test_junk_is_refused_or_read(place, junk):
    """Never another exception, and never a config that is not written and read back as itself."""
    said = json.loads(json.dumps(SAID))
    (said if isinstance(place, str) else said[place[0]])[place if isinstance(place, str) else place[1]] = junk
    try:
        config = config_of(said)
    except InputError:
        return
    assert isinstance(config, DeepseekConfig)
    assert isinstance(config.yarn, Yarn | None)
    assert config_of(config.as_json()) == config


def test_files(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match="is not there; give the folder of a checkpoint"):
        read_config(path)
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "model_type is None"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message) as error:
            read_config(tmp_path)
        assert str(path) in str(error.value)
    path.write_text(json.dumps(SAID))
    assert read_config(path) == SMALL
