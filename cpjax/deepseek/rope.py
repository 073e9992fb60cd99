"""Rotary position embedding as DeepSeek-V3 uses it: pairs of neighbouring numbers are turned by an angle.

    angle[t, i]  =  position[t] · ω[i]                                  i = 0 … R/2 − 1
    ω[i]         =  θ^(−2i/R)                                           plain
    ω[i]         =  θ^(−2i/R) · (1 − ramp[i] + ramp[i] / factor)        YaRN (arXiv 2309.00071, §3.2), ramp from 0 to 1

ω does not depend on the length of the text. Pairs are (0, 1), (2, 3), … in the checkpoint (`rope_interleave`), or
(i, i + R/2). What comes out has the first of all pairs in its first half and the second in the other, either way, as in
Hugging Face transformers: q·k does not care, but a `k_rope` in a cache has this order, and another backend's may have
another.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpjax.deepseek.config import DeepseekConfig


def frequencies(config: DeepseekConfig) -> Float[np.ndarray, " r"]:
    """ω in radians a token, `[R/2]`, float64 whatever the model is computed in.

    >>> from cpjax.deepseek.config import KNOWN
    >>> w = frequencies(KNOWN["DeepSeek-V3"])
    >>> w[0], round(40 * w[-1] / 10000 ** (-62 / 64), 12)  # the fastest is as trained, the slowest 40 times slower
    (np.float64(1.0), np.float64(1.0))
    """
    dims, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn
    plain = base ** -(np.arange(0, dims, 2) / dims)
    if yarn is None:
        return plain

    def dimension(turns: float) -> float:
        """The dimension whose angle turns so often over the length of the training."""
        return dims * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001  # DeepSeek's own way out of 0/0
    ramp = np.clip((np.arange(dims // 2) - low) / (high - low), 0.0, 1.0)
    return plain * (1.0 - ramp) + plain / yarn.factor * ramp


def cos_sin(
    config: DeepseekConfig, position: Int[Array, "B T"], dtype: str
) -> tuple[Float[Array, "B T r"], Float[Array, "B T r"]]:
    """Cosines and sines of all angles, `[B, T, R/2]`, YaRN's factor on them; angles are computed in `dtype`.

    In float32 an angle near position 160,000 is wrong by up to 0.01, in this model as in every other that does so.

    >>> from cpjax.deepseek.config import KNOWN
    >>> cos, sin = cos_sin(KNOWN["DeepSeek-V3"], jnp.array([[0, 1]]), "float32")
    >>> cos[0, :, 0], sin.shape
    (Array([1.       , 0.5403023], dtype=float32), (1, 2, 32))
    """
    angle = position[:, :, None].astype(dtype) * jnp.asarray(frequencies(config), dtype)[None, None]
    factor = 1.0 if config.yarn is None else config.yarn.cos_factor
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "B T N R"], cos: Float[Array, "B T r"], sin: Float[Array, "B T r"], *, is_interleaved: bool
) -> Float[Array, "B T N R"]:
    """Each pair (a, b) becomes (a cos − b sin, b cos + a sin); first halves of the pairs first.

    >>> one, zero = jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 2))
    >>> rotate(jnp.arange(4.0).reshape(1, 1, 1, 4), zero, one, is_interleaved=True).ravel()  # a quarter turn
    Array([-1., -3.,  0.,  2.], dtype=float32)
    """
    a, b = (x[..., 0::2], x[..., 1::2]) if is_interleaved else jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
