"""Are a backend's own keys and values what correct arithmetic makes of the latent? Number by number (§10).

A kernel sums in float32, in an order of its own, so that a sum near the middle between two FP16 numbers may come out as
either. Attention is judged on the keys and values that the backend really used; that these are right is judged here.
For k = Σ_c x_c w_c of C terms, float32 sums in any order are off by at most (C − 1) 2^-24 Σ|x_c w_c| = δ (Jeannerod &
Rump, doi 10.1137/120894488; products of FP16 numbers are exact in float32), and rounding is monotonic:

    fl16(k − δ)  ≤  given  ≤  fl16(k + δ)

δ is a worst case. Rounding errors that do not conspire grow like √C (Higham & Mary, doi 10.1137/18M1226312), and move a
number across a middle with probability q = √C 2^-24 Σ|x_c w_c| over the spacing, at most: so many may be another
number, in each head, in each stretch of tokens, and in all.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.files.latent import TOKENS, Latent, half, product, stretches
from cpjax.crosscheck.judging.statistic import LIMIT, expected_maximum
from cpjax.wording import counted, is_are


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
    nope = latent.w_uk.shape[2]
    reasons, differing, total = [], 0, 0
    for name, given, weight in (("key", key[..., :nope], latent.w_uk), ("value", value, latent.w_uv)):
        found = _compare(latent, given, weight, is_real)
        total += int(found.total.sum())
        differing += int(found.differing.sum())
        if found.outside:
            made_of = f"c_kv·{'W_UK' if name == 'key' else 'W_UV'}"
            reasons.append(
                f"{name}: {found.outside:,} of {is_real.sum() * weight[0].size:,} numbers are not {made_of} with "
                f"float32 sums, the first at {found.first}"
            )
        elif (too_many := _too_many(found)) is not None:
            reasons.append(f"{name}: {too_many}")
    rope = (key[..., nope:] != latent.k_rope[:, :, None]).any(axis=3) & is_real[..., None]
    if rope.any():
        b, s, n = np.argwhere(rope)[0]
        reasons.append(
            f"key: the last {counted(latent.k_rope.shape[2], 'number')} of {counted(rope.sum(), 'key')} are not "
            f"k_rope, the first at batch {b}, token {s}, head {n}"
        )
    return Expansion(reasons, differing / max(1, total))


class _Counts(NamedTuple):
    """Of one of the two products; counts `[stretches, N]`, of different latents of real tokens."""

    total: Int[np.ndarray, "I N"]
    differing: Int[np.ndarray, "I N"]
    explained: Float[np.ndarray, "I N"]
    """How many may differ, Σq."""
    outside: int
    first: str


@np.errstate(invalid="ignore")  # what is not finite in a case is refused when attention is asked about
def _compare(latent: Latent, given: np.ndarray, weight: np.ndarray, is_real: np.ndarray) -> _Counts:
    c_kv, terms = np.where(is_real[..., None], latent.c_kv, 0), weight.shape[0]  # pads may hold NaN
    is_counted = is_real & _is_first(c_kv)
    counts, outside, first = [], 0, ""
    for at in stretches(latent):
        exact = product(c_kv[:, at], weight)
        size = product(np.abs(c_kv[:, at]), np.abs(weight))
        mine, real, nearest = given[:, at], is_real[:, at, None, None], half(exact)
        delta = (terms - 1) * FORMATS["float32"].u * size
        wrong = ~((half(exact - delta) <= mine) & (mine <= half(exact + delta))) & real
        if wrong.any() and not first:
            b, s, n, d = np.argwhere(wrong)[0]
            numbers = f"{mine[b, s, n, d]} instead of {nearest[b, s, n, d]}"
            first = f"batch {b}, token {at.start + s}, head {n}, dim {d}: {numbers}"
        outside += int(wrong.sum())
        counted = np.broadcast_to(is_counted[:, at, None, None], exact.shape)
        q = np.minimum(1.0, np.sqrt(terms) * FORMATS["float32"].u * size / FORMATS["float16"].spacing(exact))
        columns = (counted, counted & (mine != nearest), np.where(counted, q, 0.0))
        counts.append([x.sum(axis=(0, 1, 3)) for x in columns])
    total, differing, explained = (np.array(x) for x in zip(*counts, strict=True))
    return _Counts(total, differing, explained, outside, first)


def _too_many(found: _Counts) -> str | None:
    """Where more numbers differ than float32 sums explain: some heads, some stretches of tokens, or all of it."""
    places = (
        (0, lambda n: f"of head {n}"),
        (1, lambda i: f"of tokens {i * TOKENS} to {(i + 1) * TOKENS - 1}"),
        ((0, 1), lambda _: "in all"),
    )
    for axis, name in places:
        counts = (found.total, found.differing, found.explained)
        total, differing, explained = (np.atleast_1d(x.sum(axis=axis)) for x in counts)
        z_score = (differing - explained) / np.sqrt(explained + 1)
        wrong = ~(z_score - expected_maximum(len(z_score)) <= LIMIT)
        if wrong.any() and (axis == (0, 1) or not wrong.all()):  # that all of them are wrong says nothing about where
            worst = int(np.argmax(z_score))
            return (
                f"{differing[worst]:,} of {counted(total[worst], 'number')} {name(worst)} "
                f"{is_are(differing[worst])} not the FP16 number next to the "
                f"product, where float32 sums explain {explained[worst]:,.0f}"
            )
    return None


def _is_first(c_kv: Float[np.ndarray, "B S C"]) -> Bool[np.ndarray, "B S"]:
    """Tokens whose latent is none of an earlier token's: equal ones have equal sums, which differ together."""
    rows = np.ascontiguousarray(c_kv + np.float16(0)).view(np.dtype((np.void, 2 * c_kv.shape[2])))[..., 0]
    is_first = np.zeros(rows.size, bool)
    is_first[np.unique(rows, return_index=True)[1]] = True
    return is_first.reshape(rows.shape)
