"""The definition of attention, in float64 NumPy, once more and by itself: it imports neither half of the project."""

import numpy as np


def dense(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, *, scale: float, visible: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`out` `[B, T, N, V]` and `lse` `[B, T, N]`; `visible` is bool `[B, T, S]`; (0, −inf) where nothing is visible."""
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x.astype(np.float64), group, axis=2) for x in (key, value))
    score = scale * np.einsum("btnh,bsnh->btns", query.astype(np.float64), key)
    score = np.where(visible[:, :, None, :], score, -np.inf)
    top = score.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0.0, top)
    weight = np.exp(score - top)
    total = weight.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return np.einsum("btns,bsnv->btnv", weight / np.where(total == 0, 1.0, total), value), lse
