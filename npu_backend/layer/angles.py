"""Cosines and sines of positions, as npu_interleave_rope takes them: 32 angles a token, twice beside each other.

    angle[t, i]  =  position[t] · ω[i]                              i = 0 … 31
    ω[i]         =  θ^(−2i/64)                                      plain
    ω[i]         =  θ^(−2i/64) · (1 − ramp[i] + ramp[i] / factor)   YaRN (arXiv 2309.00071, §3.2)

In float64, rounded once to FP16, the dtype that the operators take. Engines make a table in float32 and round that.
"""

import math

import numpy as np

from npu_backend.contracts.ring_mla import ROPE
from npu_backend.layer.config import LayerConfig


def frequencies(config: LayerConfig) -> np.ndarray:
    """ω in radians a token, `[32]` float64.

    ω of YaRN goes from the trained one, where an angle turns more than beta_fast times over the trained length, to one
    `factor` times slower, where it turns less than beta_slow times.
    """
    plain = config.rope_theta ** (-np.arange(0, ROPE, 2) / ROPE)
    if (yarn := config.yarn) is None:
        return plain
    length = yarn.original_max_position_embeddings

    def dimension(turns: float) -> float:
        return ROPE * math.log(length / (2 * math.pi * turns)) / (2 * math.log(config.rope_theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, ROPE - 1)
    high = high + 0.001 if low == high else high  # DeepSeek's own way out of 0/0
    ramp = np.clip((np.arange(ROPE // 2) - low) / (high - low), 0, 1)
    return plain * (1 - ramp + ramp / yarn.factor)


def cos_sin(config: LayerConfig, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[T, 64]` float16 each, YaRN's factor on them."""
    angle = position.astype(np.float64)[:, None] * frequencies(config)
    factor = 1.0 if config.yarn is None else config.yarn.cos_factor
    cos, sin = (np.tile(f(angle) * factor, 2).astype(np.float16) for f in (np.cos, np.sin))
    return cos, sin
