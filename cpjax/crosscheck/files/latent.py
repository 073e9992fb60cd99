"""Keys and values that are made of a latent (MLA).

    k[n] = [c_kv W_UK[n] ; k_rope]        v[n] = c_kv W_UV[n]        DeepSeek-V2, arXiv 2405.04434, §2.1

A case means: exactly multiplied, rounded once to FP16. Whether a backend's own ones are that is judged by
`cpjax.crosscheck.judging.expansion`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.exact.formats import FORMATS

TOKENS = 512
"""Of a stretch, which is compared at once and counted by itself."""


@dataclass(frozen=True)
class Latent:
    """What travels of each token, and what makes keys and values of it; float16."""

    c_kv: Float[np.ndarray, "B S C"]
    k_rope: Float[np.ndarray, "B S R"]
    w_uk: Float[np.ndarray, "C N D"]
    w_uv: Float[np.ndarray, "C N V"]


def expanded(latent: Latent) -> tuple[Float[np.ndarray, "B S N H"], Float[np.ndarray, "B S N V"]]:
    """Keys (D + R wide) and values of all heads: the product in float64, rounded once to float16.

    >>> one = np.ones((1, 1, 3), np.float16)
    >>> key, value = expanded(Latent(one, 5 * one, np.ones((3, 2, 4), np.float16), np.ones((3, 2, 1), np.float16)))
    >>> key[0, 0, 1], value[0, 0]
    (array([3., 3., 3., 3., 5., 5., 5.], dtype=float16), array([[3.],
           [3.]], dtype=float16))
    """
    key, value = (
        np.concatenate([half(product(latent.c_kv[:, at], weight)) for at in stretches(latent)], axis=1)
        for weight in (latent.w_uk, latent.w_uv)
    )
    rope = np.broadcast_to(latent.k_rope[:, :, None], (*key.shape[:3], latent.k_rope.shape[2]))
    return np.concatenate([key, rope], axis=3), value


def stretches(latent: Latent) -> list[slice]:
    """Stretches of `TOKENS` tokens."""
    tokens = latent.c_kv.shape[1]
    return [slice(start, min(start + TOKENS, tokens)) for start in range(0, tokens, TOKENS)]


def product(c_kv: Float[np.ndarray, "B s C"], weight: Float[np.ndarray, "C N D"]) -> Float[np.ndarray, "B s N D"]:
    """In float64, where at most a last place of 53 bits is lost."""
    with np.errstate(invalid="ignore"):  # pads may hold NaN
        product = c_kv.astype(np.float64) @ weight.astype(np.float64).reshape(weight.shape[0], -1)
    return product.reshape(*c_kv.shape[:2], *weight.shape[1:])


def half(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Rounded to float16; beyond its range infinite."""
    return FORMATS["float16"].round(x).astype(np.float16)
