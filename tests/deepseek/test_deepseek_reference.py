"""Against Hugging Face's DeepseekV3: angles, scale, logits; float64 to 1e-10, and its own float32 to 1e-4."""

from dataclasses import replace

import huggingface_deepseek as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpjax.deepseek.checkpoint import load, open_checkpoint, write_random
from cpjax.deepseek.config import SMALL
from cpjax.deepseek.model import forward

YARN = SMALL.yarn
TINY = replace(
    SMALL, vocab_size=97, hidden_size=48, num_hidden_layers=2, yarn=replace(YARN, original_max_position_embeddings=64)
)
IDS = np.random.default_rng(0).integers(0, 97, (2, 40))
CONFIGS = {
    "as DeepSeek-V3": TINY,
    "plain rope": replace(TINY, yarn=None),
    "two mscales": replace(TINY, yarn=replace(TINY.yarn, mscale=0.707)),
    "no mscale": replace(TINY, yarn=replace(TINY.yarn, mscale=None, mscale_all_dim=None)),
    "halves": replace(TINY, rope_interleave=False),
    "no q_lora": replace(TINY, q_lora_rank=None),
    "weights not divided": replace(TINY, norm_topk_prob=False),
    "a large eps": replace(TINY, rms_norm_eps=1e-3),
    "wide values, one group": replace(TINY, v_head_dim=40, n_group=1, topk_group=1),
    "two shared experts": replace(TINY, n_shared_experts=2, first_k_dense_replace=0),
}


def ours(folder, dtype="float64"):
    checkpoint = open_checkpoint(folder)
    return np.asarray(forward(load(checkpoint, dtype), checkpoint.config, jnp.asarray(IDS, jnp.int32)))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(tmp_path, name):
    with jax.enable_x64(True):
        write_random(tmp_path / "model", CONFIGS[name], seed=1)
        expected, found = reference.logits(tmp_path / "model", IDS), ours(tmp_path / "model")
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() < 1e-10
