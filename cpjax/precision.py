"""Which quantity is rounded to which format. A value that is passed in, not an accident of dtypes.

Attention in tiles has few places where a low-precision kernel rounds. With m the running row maximum,

    raw = q·k           → score          p = exp(s − m)          → probability (only as the factor of v; the row
    s   = raw · scale   → score                                    sum is taken of the unrounded p)
    m, s − m            → score          out = Σ p v / Σ p       → out, after each block and after each merge

Everything else is done in `compute`, the accumulation of matrix products included. Rounding is to nearest even.

Rounding is written as a cast to the format and back after the operation, because XLA on a CPU keeps float32 inside a
fused loop whatever the dtype says, while it never removes a cast that loses bits.
"""

from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)


@dataclass(frozen=True)
class Precision:
    """Formats by dtype name (see the module's table). `scale` is itself rounded to the format of the scores."""

    name: str
    compute: str
    score: str
    probability: str
    out: str


def _profile(name: str, compute: str, score: str, probability: str, out: str) -> tuple[str, Precision]:
    return name, Precision(name, compute, score, probability, out)


PROFILES: dict[str, Precision] = dict(
    [
        _profile("float64", "float64", "float64", "float64", "float64"),
        _profile("float32", "float32", "float32", "float32", "float32"),
        # FlashAttention-2 (arXiv 2307.08691) as GPUs and NPUs run it in FP16.
        _profile("flash_fp16", "float32", "float32", "float16", "float16"),
        # The vendor's npu_ring_mla, "high precision": scores and row maximum live in FP16 too (docs/precision.md).
        _profile("ring_mla_fp16", "float32", "float16", "float16", "float16"),
    ]
)


def profile(name: str) -> Precision:
    """The named profile.

    Raises:
      ValueError: for an unknown name; it lists the known ones.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown precision {name!r}; known are {', '.join(PROFILES)}")
    return PROFILES[name]


def rounded(x: Array, fmt: str) -> Array:
    """`x` rounded to the format `fmt`, in the dtype it came in.

    >>> float(rounded(np.float32([1 + 2**-12])[0:1], "float16")[0])
    1.0
    """
    return x if x.dtype == fmt else x.astype(fmt).astype(x.dtype)


def scale_in(precision: Precision, scale: float) -> float:
    """The scale that the profile really multiplies with: 192**-0.5 becomes 3.5e-4 less in FP16."""
    return float(np.float64(scale).astype(precision.score))
