"""The definition: softmax(scale · q kᵀ + mask) v, in NumPy float64.

The oracle of the tests, and of the diagnosis where it looks for exchanged heads and ranks. The judge takes the same
attention apart (`cpjax.crosscheck.exact`).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cpjax.mask import PAD, Mask, Tokens, visible


class Dense(NamedTuple):
    """Attention in float64."""

    out: Float[np.ndarray, "B T N V"]
    lse: Float[np.ndarray, "B T N"]


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
    softcap: float | None = None,
    sink: Float[np.ndarray, " N"] | None = None,
    alibi: Float[np.ndarray, " N"] | Float[np.ndarray, "B N"] | None = None,
    bias: Float[np.ndarray, "#B #N #T #S"] | None = None,
) -> Dense:
    """Exact attention: `out` `[B, T, N, V]` and `lse` `[B, T, N]` in float64; (0, −inf) where a query sees no key.

    Args:
      query, key, value: any float dtype, converted exactly to float64; N is a multiple of K. A pad's key and value may
        hold anything, NaN included.
      softcap: logits become softcap · tanh(logit / softcap).
      alibi: slopes per head: slope · |q_position − kv_position| is taken off (arXiv 2108.12409).
      bias: added to the logits last; broadcasts to `[B, N, T, S]`; −inf hides the key.
      sink: the logit per head of one more key, of value 0, that every query sees.

    >>> from cpjax.mask import tokens
    >>> place, x = tokens(1, 2), np.array([1.0, 3.0]).reshape(1, 2, 1, 1)
    >>> dense_attention(0 * x, x, x, place, place, mask=Mask(), scale=1.0).out.ravel()  # logits 0: the mean so far
    array([1., 2.])
    """
    group = query.shape[2] // key.shape[2]
    filling = kv_tokens.segment == PAD
    slopes = None if alibi is None else np.broadcast_to(np.asarray(alibi, np.float64), (query.shape[0], query.shape[2]))
    if bias is not None:
        bias = np.broadcast_to(bias, (query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
    out = np.empty((*query.shape[:3], value.shape[3]))
    lse = np.empty(query.shape[:3])
    for start in range(0, query.shape[1], QUERY_TILE):
        rows = slice(start, start + QUERY_TILE)
        seen = visible(mask, Tokens(q_tokens.position[:, rows], q_tokens.segment[:, rows]), kv_tokens)
        for b, n in np.ndindex(query.shape[0], query.shape[2]):
            k, v = key[b, :, n // group].astype(np.float64), value[b, :, n // group].astype(np.float64)
            k, v = (np.where(filling[b, :, None], 0.0, x) for x in (k, v))
            s = scale * (query[b, rows, n].astype(np.float64) @ k.T)
            s = s if softcap is None else softcap * np.tanh(s / softcap)
            if slopes is not None:
                here, there = (np.asarray(x.position)[b].astype(np.float64) for x in (q_tokens, kv_tokens))
                s = s - slopes[b, n] * np.abs(here[rows, None] - there)
            if bias is not None:
                s = s + bias[b, n, rows].astype(np.float64)
            s = np.where(seen[b], s, -np.inf)
            if sink is not None:
                s = np.append(s, np.full((len(s), 1), np.float64(sink[n])), axis=1)
                v = np.append(v, np.zeros((1, v.shape[1])), axis=0)
            m = s.max(axis=1, initial=-np.inf)
            p = np.exp(s - np.where(np.isneginf(m), 0.0, m)[:, None])
            total = p.sum(axis=1)
            with np.errstate(divide="ignore"):  # log 0 = −inf is the lse of a query that sees no key
                lse[b, rows, n] = np.where(np.isneginf(m), 0.0, m) + np.log(total)
            out[b, rows, n] = (p @ v) / np.where(total == 0, 1.0, total)[:, None]
    return Dense(out, lse)
