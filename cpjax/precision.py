"""Which quantity is rounded to which format. A value that is passed in, not an accident of dtypes.

Attention in tiles, and the merge of its results, have few places where a low-precision kernel rounds. With m the
running row maximum,

    scale               → scale          p = exp(s − m)          → probability (as the factor of v; normalised: p / Σ p)
    raw = q·k           → score          Σ p                     takes p → total (as a rule the unrounded p)
    s   = raw · scale   → score          out = Σ p v / Σ p       → out, lse = m + ln Σ p → lse, once per block
    m, s − m            → distance       merged out              → carry, after each merge; the last result → out

Where queries have a format, raw = (q · scale → query)·k instead, and s = raw.

Everything else is done in `compute`, the accumulation of matrix products included. Rounding is to nearest even.

A profile is a value of its own and needs no JAX; `cpjax.rounding` does what it says.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cpjax.errors import InputError

KEY_TILE = 512
"""Keys that a kernel takes at a time: how often the maximum is raised and the sum rescaled is part of every profile."""

FORMAT = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
"""Dtypes of the half formats."""


@dataclass(frozen=True)
class Precision:
    """Formats by dtype name (see the module's table).

    Unless given, `scale` and `distance` are `score`, `carry` is `out`, `lse` and `total` are `compute`; no `query`.
    `is_normalised`: p is divided by the row sum before it is rounded. Tiles cannot do that, for they do not know it
    yet: such a profile is one to judge in, and none that the specification computes.
    """

    name: str
    compute: str
    score: str
    probability: str
    out: str
    carry: str = ""
    lse: str = ""
    scale: str = ""
    distance: str = ""
    query: str = ""
    total: str = ""
    is_normalised: bool = False

    def __post_init__(self):
        """Fill in what follows from the rest."""
        rest = {"carry": self.out, "lse": self.compute, "scale": self.score, "distance": self.score}
        for name, fmt in {**rest, "total": self.compute}.items():
            object.__setattr__(self, name, getattr(self, name) or fmt)


def _of_half(name: str, fmt: str, *, score: str = "float32", **more: Any) -> Precision:
    """One of a pair of profiles, in FP16 and in BF16."""
    suffix = {"float16": "fp16", "bfloat16": "bf16"}[fmt]
    return Precision(f"{name}_{suffix}", "float32", score, fmt, fmt, **more)


PROFILES: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("float64", "float64", "float64", "float64", "float64"),
        Precision("float32", "float32", "float32", "float32", "float32"),
        # FlashAttention-2 (arXiv 2307.08691) as GPUs and NPUs run it in FP16, and in BF16.
        Precision("flash_fp16", "float32", "float32", "float16", "float16"),
        Precision("flash_bf16", "float32", "float32", "bfloat16", "bfloat16"),
        # The vendor's npu_ring_mla, "high precision": scores and row maximum live in FP16 too (docs/precision.md).
        Precision("ring_mla_fp16", "float32", "float16", "float16", "float16"),
        # MindIE's decode: every rank's out and lse travel in FP16, the sum of all of them is float32, rounded once.
        Precision("decode_fp16_lse", "float32", "float32", "float16", "float16", carry="float32", lse="float16"),
        *(
            one
            for fmt in ("float16", "bfloat16")
            for one in (
                # The vendor's FIA: blocks' out in FP16, merged in float32 all at once, rounded once more.
                _of_half("fia", fmt, carry="float32"),
                # jax.nn.dot_product_attention: probabilities are divided by their sum before they are rounded.
                _of_half("softmax", fmt, is_normalised=True),
                # Eager PyTorch, softmax(q @ k.T * scale) @ v: the scores are tensors in FP16, too.
                _of_half("eager", fmt, score=fmt, scale="float32", distance="float32", is_normalised=True),
                # Kernels that sum the probabilities which they multiply with.
                _of_half("rounded_sum", fmt, total=fmt),
                # Kernels that are given scale · q as a tensor.
                _of_half("scaled_query", fmt, query=fmt),
            )
        ),
    )
}
"""Name → profile; docs/precision.md has the table."""


def profile(name: str) -> Precision:
    """The named profile.

    >>> profile("flash_fp16").carry
    'float16'

    Raises:
      InputError: for an unknown name; it lists the known ones.
    """
    if name not in PROFILES:
        raise InputError(f"unknown precision {name!r}; known are {', '.join(PROFILES)}")
    return PROFILES[name]


PROFILE_OF = {"float16": "flash_fp16", "float32": "float32", "float64": "float64", "bfloat16": "flash_bf16"}
"""The profile in which arrays of a dtype are computed, and judged, when none is named."""


def precision_of(precision: Precision | str | None, dtype: Any) -> Precision:
    """What is said, or else the profile that follows from the dtype of query, key and value.

    >>> precision_of(None, np.float16).name, precision_of("float32", np.float16).name
    ('flash_fp16', 'float32')

    Raises:
      InputError: an unknown name; nothing said, and no profile belongs to the dtype.
    """
    if precision is not None:
        return profile(precision) if isinstance(precision, str) else precision
    name = np.dtype(dtype).name
    if name not in PROFILE_OF:
        raise InputError(f"no precision belongs to arrays of {name}; name one of {', '.join(PROFILES)}")
    return profile(PROFILE_OF[name])


def scale_in(precision: Precision, scale: float) -> float:
    """The scale that the profile really multiplies with.

    >>> 1 - scale_in(profile("ring_mla_fp16"), 192**-0.5) * 192**0.5 < 4e-4  # less by 3.5e-4 in FP16
    True
    """
    return float(np.float64(scale).astype(precision.scale))


def query_in(precision: Precision, query: np.ndarray, scale: float) -> np.ndarray:
    """The queries that the profile really multiplies keys and `scale` with, in float64.

    Where scale · q is a tensor of its own, it is multiplied in float32 and rounded.

    >>> round(query_in(profile("scaled_query_fp16"), np.float16([1.0]), 0.1).item(), 6)  # 0.1 in FP16 is 0.099976
    0.999756
    """
    if not precision.query or scale == 0:
        return query.astype(np.float64)
    factor = np.float32(scale)
    return (query.astype(np.float32) * factor).astype(FORMAT[precision.query]).astype(np.float64) / np.float64(factor)
