"""The product c_kv·W that makes keys and values of a latent, term by term and summed exactly."""

import numpy as np


def terms(c_kv, weight) -> np.ndarray:
    """`[C, B, S, N, D]` float32; exact."""
    return np.einsum("bsc,cnd->cbsnd", c_kv.astype(np.float32), weight.astype(np.float32))


def exact(c_kv, weight) -> np.ndarray:
    """`[B, S, N, D]` float64; exact for FP16."""
    return np.einsum("bsc,cnd->bsnd", c_kv.astype(np.float64), weight.astype(np.float64))
