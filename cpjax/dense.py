"""The definition: softmax(scale · q kᵀ + mask) v, in NumPy float64. The oracle that everything else is held against."""

import numpy as np
from jaxtyping import Float

from cpjax.mask import Mask, Tokens, visible
from cpjax.partial import Partial

QUERY_TILE = 256  # bounds memory; each query's row of scores is still whole


def dense_attention(
    query: Float[np.ndarray, "B T N H"],
    key: Float[np.ndarray, "B S K H"],
    value: Float[np.ndarray, "B S K V"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    *,
    mask: Mask,
    scale: float,
) -> Partial:
    """Exact attention: `out` `[B, T, N, V]` and `lse` `[B, T, N]` in float64; (0, −inf) where a query sees no key.

    Args:
      query, key, value: any float dtype, converted exactly to float64; N is a multiple of K.
    """
    group = query.shape[2] // key.shape[2]
    out = np.empty((*query.shape[:3], value.shape[3]))
    lse = np.empty(query.shape[:3])
    for start in range(0, query.shape[1], QUERY_TILE):
        rows = slice(start, start + QUERY_TILE)
        seen = visible(mask, Tokens(q_tokens.position[:, rows], q_tokens.segment[:, rows]), kv_tokens)
        for b, n in np.ndindex(query.shape[0], query.shape[2]):
            k, v = key[b, :, n // group].astype(np.float64), value[b, :, n // group].astype(np.float64)
            s = np.where(seen[b], scale * (query[b, rows, n].astype(np.float64) @ k.T), -np.inf)
            m = np.where(seen[b].any(axis=1), s.max(axis=1, initial=-np.inf), 0.0)
            p = np.exp(s - m[:, None])
            total = p.sum(axis=1)
            with np.errstate(divide="ignore"):  # log 0 = −inf is the lse of a query that sees no key
                lse[b, rows, n] = m + np.log(total)
            out[b, rows, n] = (p @ v) / np.where(total == 0, 1.0, total)[:, None]
    return Partial(out, lse)
