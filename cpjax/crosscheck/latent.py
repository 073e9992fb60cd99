"""Keys and values that are made of a latent (MLA): what they should be, and whether a backend's own ones are that.

    k[n] = [c_kv W_UK[n] ; k_rope]        v[n] = c_kv W_UV[n]        DeepSeek-V2, arXiv 2405.04434, §2.1

The case says: exactly multiplied, rounded once to FP16. A kernel sums in float32, in an order of its own, so that a sum
near the middle between two FP16 numbers may come out as either. Attention is judged on the keys and values that the
backend really used; that these are right is judged here, number by number. For k = Σ_c x_c w_c of C terms, float32 sums
in any order are off by at most (C − 1) 2^-24 Σ|x_c w_c| = δ (Jeannerod & Rump, doi 10.1137/120894488; products of FP16
numbers are exact in float32), and rounding is monotonic:

    fl16(k − δ)  ≤  given  ≤  fl16(k + δ)

δ is a worst case. Rounding errors that do not conspire grow like √C (Higham & Mary, doi 10.1137/18M1226312), and move a
number across a middle with probability √C 2^-24 Σ|x_c w_c| over the spacing, at most: so many may be another number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.formats import FORMATS
from cpjax.crosscheck.statistic import LIMIT

TOKENS = 512
"""Tokens of a tile, which bounds memory."""


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
    key, value = (np.concatenate([half(exact) for exact, _ in _tiles(latent, w)], axis=1) for w in _weights(latent))
    rope = np.broadcast_to(latent.k_rope[:, :, None], (*key.shape[:3], latent.k_rope.shape[2]))
    return np.concatenate([key, rope], axis=3), value


class Expansion(NamedTuple):
    """What a comparison found."""

    reasons: list[str]
    """One sentence each for what no float32 sums explain; empty if they explain all."""
    differing: float
    """Share of the numbers that are not the FP16 number next to the exact product."""


def check_expanded(
    latent: Latent,
    key: Float[np.ndarray, "B S N H"],
    value: Float[np.ndarray, "B S N V"],
    is_real: Bool[np.ndarray, "B S"],
) -> Expansion:
    """Are these float16 keys and values what correct arithmetic makes of the latent? Pads may hold anything."""
    reasons, found = [], []
    nope = latent.w_uk.shape[2]
    for name, given, weight in (("key", key[..., :nope], latent.w_uk), ("value", value, latent.w_uv)):
        numbers = _compare(latent, given, weight, is_real)
        found.append(numbers)
        if numbers.outside:
            reasons.append(
                f"{name}: {numbers.outside:,} of {numbers.total:,} numbers are not c_kv·{_WEIGHT[name]} with float32 "
                f"sums, the first at {numbers.first}"
            )
        elif not numbers.differing - numbers.expected <= LIMIT * np.sqrt(numbers.expected + 1):
            reasons.append(
                f"{name}: {numbers.differing:,} of {numbers.total:,} numbers are not the FP16 number next to "
                f"c_kv·{_WEIGHT[name]}, where float32 sums explain {numbers.expected:,.0f}"
            )
    rope = (key[..., nope:] != latent.k_rope[:, :, None]).any(axis=3) & is_real[..., None]
    if rope.any():
        b, s, n = np.argwhere(rope)[0]
        reasons.append(f"key: the last {latent.k_rope.shape[2]} of {int(rope.sum()):,} keys are not k_rope, the first "
                       f"at batch {b}, token {s}, head {n}")  # fmt: skip
    return Expansion(reasons, sum(x.differing for x in found) / max(1, sum(x.total for x in found)))


_WEIGHT = {"key": "W_UK", "value": "W_UV"}


class _Numbers(NamedTuple):
    total: int
    outside: int
    differing: int
    expected: float
    first: str


def _compare(latent: Latent, given: np.ndarray, weight: np.ndarray, is_real: np.ndarray) -> _Numbers:
    count, outside, differing, expected, first = 0, 0, 0, 0.0, ""
    terms = weight.shape[0]
    for number, (exact, size) in enumerate(_tiles(latent, weight)):
        start = number * TOKENS
        mine, real = (x[:, start : start + exact.shape[1]] for x in (given, is_real))
        room = (terms - 1) * 2.0**-24 * size
        wrong = ~((half(exact - room) <= mine) & (mine <= half(exact + room))) & real[..., None, None]
        if wrong.any() and not first:
            b, s, n, d = np.argwhere(wrong)[0]
            numbers = f"{mine[b, s, n, d]} instead of {half(exact)[b, s, n, d]}"
            first = f"batch {b}, token {start + s}, head {n}, dim {d}: {numbers}"
        flips = np.minimum(1.0, np.sqrt(terms) * 2.0**-24 * size / FORMATS["float16"].spacing(exact))
        count += int(real.sum()) * weight[0].size
        outside += int(wrong.sum())
        differing += int(((mine != half(exact)) & real[..., None, None]).sum())
        expected += float(flips[real].sum())
    return _Numbers(count, outside, differing, expected, first)


def _weights(latent: Latent) -> tuple[np.ndarray, np.ndarray]:
    return latent.w_uk, latent.w_uv


def _tiles(latent: Latent, weight: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of some tokens after the other `[B, s, N, …]`: the product in float64, and the sum of its terms' sizes."""
    wide = weight.astype(np.float64).reshape(weight.shape[0], -1)
    for start in range(0, latent.c_kv.shape[1], TOKENS):
        c_kv = latent.c_kv[:, start : start + TOKENS].astype(np.float64)
        with np.errstate(invalid="ignore"):  # pads may hold NaN
            exact, size = c_kv @ wide, np.abs(c_kv) @ np.abs(wide)
        shape = (*c_kv.shape[:2], *weight.shape[1:])
        yield exact.reshape(shape), size.reshape(shape)


def half(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Rounded to float16; beyond its range infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float16)
