"""Which quantity is rounded to which format. A value that is passed in, not an accident of dtypes.

Attention in tiles, and the merge of its results, have few places where a low-precision kernel rounds. With m the
running row maximum,

    raw = q·k           → score          p = exp(s − m)          → probability (only as the factor of v; the row
    s   = raw · scale   → score                                    sum is taken of the unrounded p)
    m, s − m            → score          out = Σ p v / Σ p       → out, lse = m + ln Σ p → lse, once per block
                                         merged out              → carry, after each merge; the last result → out

Everything else is done in `compute`, the accumulation of matrix products included. Rounding is to nearest even.

A profile is a value of its own and needs no JAX; `cpjax.rounding` does what it says.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpjax.errors import InputError

KEY_TILE = 512
"""Keys that a kernel takes at a time: how often the maximum is raised and the sum rescaled is part of every profile."""


@dataclass(frozen=True)
class Precision:
    """Formats by dtype name (see the module's table). `scale` is itself rounded to the format of the scores.

    `carry` is `out` unless given, `lse` is `compute` unless given.
    """

    name: str
    compute: str
    score: str
    probability: str
    out: str
    carry: str = ""
    lse: str = ""

    def __post_init__(self):
        """Fill in what follows from the rest."""
        object.__setattr__(self, "carry", self.carry or self.out)
        object.__setattr__(self, "lse", self.lse or self.compute)


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
    )
}


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
"""The profile in which arrays of a dtype are computed when none is named."""


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
    return float(np.float64(scale).astype(precision.score))
