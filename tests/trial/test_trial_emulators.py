"""The emulators, which make the correct results of the trial: bit for bit a twin written with scalars."""

from dataclasses import replace
from math import inf

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import dense

from cpjax.trial.emulators import PROFILES, Arithmetic, attend, cut, dtype_of, rounded, visits
from cpjax.trial.problem import Problem, visible
from cpjax.trial.summation import SUMMATIONS, product, total

ORDERS = ("ascending", "ring", "gather", "shuffled")


def drawn(seed: int, profile: str, logits: float = 2.0, cp: int = 2) -> Problem:
    """Seven queries of four heads over 22 keys of two; the first sees nothing, windows are narrow or none."""
    rng = np.random.default_rng(seed)
    places = np.sort(rng.integers(-2, 22, (2, 7)), axis=1).astype(np.int32)
    places[0, 0] = -1  # before every key
    problem = Problem(
        query=rng.standard_normal((2, 7, 4, 5)) * logits,
        key=rng.standard_normal((2, 22, 2, 5)),
        value=rng.standard_normal((2, 22, 2, 3)),
        scale=5**-0.5,
        is_causal=True,
        q_positions=places,
        kv_positions=np.broadcast_to(np.arange(22, dtype=np.int32), (2, 22)),
        window=int(rng.choice([3, 30])),
        cp=cp,
    )
    return problem.cast(dtype_of(profile))


def chosen(order: str, chunks: int, seed: int) -> str | tuple[int, ...]:
    return tuple(np.random.default_rng(seed).permutation(chunks).tolist()) if order == "shuffled" else order


def scalar_row(problem: Problem, arithmetic: Arithmetic, chunks: list[int], b: int, t: int, n: int):
    """`out` and `lse` of one row, one number at a time, as the module's table says it. `chunks` in merging order."""
    number = np.dtype(arithmetic.compute).type
    query, key, value = (x.astype(number) for x in (problem.query, problem.key, problem.value))
    kv_head = n // (query.shape[2] // key.shape[2])
    size = -(-key.shape[1] // problem.chunk_count)

    def to(fmt: str, x):
        with np.errstate(over="ignore"):
            return number(np.dtype(fmt).type(x))

    def factor(h: int):
        x = query[b, t, n, h]
        return to(arithmetic.query, x * number(problem.scale)) if arithmetic.query else x

    def score(j: int):
        raw = factor(0) * key[b, j, kv_head, 0]
        for h in range(1, query.shape[3]):
            raw = raw + factor(h) * key[b, j, kv_head, h]
        scale = number(1 if arithmetic.query else problem.scale)
        return to(arithmetic.score, to(arithmetic.score, raw) * to(arithmetic.scale or arithmetic.score, scale))

    def sees(j: int) -> bool:
        ahead = int(problem.q_positions[b, t]) - int(problem.kv_positions[b, j])
        return ahead >= 0 and abs(ahead) < problem.window

    def block(chunk: int):
        m, weight, acc = number(-inf), number(0), [number(0)] * value.shape[3]
        keys = range(chunk * size, min((chunk + 1) * size, key.shape[1]))
        width = size if arithmetic.is_normalised else arithmetic.tile
        for start in range(0, len(keys), width):
            tile = [(score(j), j) for j in keys[start : start + width] if sees(j)]
            higher = max([m] + [s for s, _ in tile])
            if not tile:
                continue
            distance = arithmetic.distance or arithmetic.score
            shrink = np.exp(to(distance, m - higher))
            p = [np.exp(to(distance, s - higher)) for s, _ in tile]
            summed = [to(arithmetic.summed or arithmetic.compute, x) for x in p]
            p_sum = summed[0]
            for x in summed[1:]:
                p_sum = p_sum + x
            weight = weight * shrink + p_sum
            if arithmetic.is_normalised:
                p = [x / weight for x in p]
            for v in range(len(acc)):
                terms = [
                    to(arithmetic.probability, x) * value[b, j, kv_head, v] for x, (_, j) in zip(p, tile, strict=True)
                ]
                part = terms[0]
                for x in terms[1:]:
                    part = part + x
                acc[v] = acc[v] * shrink + part
            m = higher
        if weight == 0:
            return [number(0)] * len(acc), number(-inf)
        by = number(1) if arithmetic.is_normalised else weight
        return [to(arithmetic.block or arithmetic.carry, x / by) for x in acc], m + np.log(weight)

    out, lse = block(chunks[0])
    for chunk in chunks[1:]:
        new_out, new_lse = block(chunk)
        if new_lse == -inf:
            continue
        if lse == -inf:
            out, lse = new_out, new_lse
            continue
        m = max(lse, new_lse)
        a, c = np.exp(lse - m), np.exp(new_lse - m)
        out = [to(arithmetic.carry, (a * x + c * y) / (a + c)) for x, y in zip(out, new_out, strict=True)]
        lse = m + np.log(a + c)
    return np.array(out).astype(arithmetic.out), lse


def met(problem: Problem, order: str | tuple[int, ...], t: int) -> list[int]:
    """The merging order of docs/formats.md, written out for one query."""
    chunks, cp = problem.chunk_count, problem.cp
    if isinstance(order, tuple):
        return list(order)
    if order == "ascending" or cp == 1:
        return list(range(chunks))
    mine = t // -(-problem.query.shape[1] // chunks)
    rank = mine if mine < cp else chunks - 1 - mine
    ranks = [(rank - s) % cp if order == "ring" else s for s in range(cp)]
    return [c for r in ranks for c in (r, chunks - 1 - r)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("profile", PROFILES)
def test_bits_are_those_of_a_twin_written_with_scalars(profile, order):
    for seed, tile, cp in ((0, 512, 2), (1, 2, 1), (2, 3, 3), (3, 1, 2)):
        problem = drawn(seed, profile, cp=cp)
        arithmetic = replace(PROFILES[profile], tile=tile, summation="sequential")
        order_of_rows = chosen(order, problem.chunk_count, seed)
        result = attend(problem, arithmetic, order_of_rows)
        assert result.out.dtype == arithmetic.out
        assert np.isneginf(result.lse).any(), "no row that sees nothing"
        for b, t, n in np.ndindex(result.lse.shape):
            out, lse = scalar_row(problem, arithmetic, met(problem, order_of_rows, t), b, t, n)
            np.testing.assert_array_equal(result.out[b, t, n], out)
            np.testing.assert_array_equal(result.lse[b, t, n], lse)


@pytest.mark.parametrize("profile", PROFILES)
def test_all_summations_agree_where_sums_are_exact(profile):
    """Queries are zero, so every p is 1; values are whole numbers."""
    rng = np.random.default_rng(7)
    problem = drawn(7, profile)
    whole = [np.clip(np.rint(x), -2, 2) for x in (problem.query * 0, problem.key, problem.value)]
    problem = replace(problem, query=whole[0], key=whole[1], value=whole[2])
    results = [
        attend(problem, replace(PROFILES[profile], summation=how, tile=int(rng.integers(1, 9)))) for how in SUMMATIONS
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].out, other.out)
        np.testing.assert_allclose(results[0].lse, other.lse, rtol=1e-6)


@pytest.mark.parametrize("how", SUMMATIONS)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40))
def test_sums_in_any_order_are_sums(how, seed, n):
    a, b = np.random.default_rng(seed).integers(-8, 9, (2, 3, 4, n)).astype(np.float32)
    np.testing.assert_array_equal(product(a, b.swapaxes(-1, -2), how), np.einsum("xin,xjn->xij", a, b))
    np.testing.assert_array_equal(total(a, how), a.astype(int).sum(axis=-1))


@given(seed=st.integers(0, 2**32 - 1), order=st.sampled_from(ORDERS), cp=st.integers(1, 4), base_two=st.booleans())
def test_float64_is_dense_attention(seed, order, cp, base_two):
    problem = drawn(seed, "float64", cp=cp)
    arithmetic = replace(PROFILES["float64"], tile=4, base_two=base_two)
    result = attend(problem, arithmetic, chosen(order, problem.chunk_count, seed))
    seen = visible(problem, np.arange(22))
    out, lse = dense(problem.query, problem.key, problem.value, scale=problem.scale, visible=seen)
    np.testing.assert_allclose(result.out, out, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.lse, lse, rtol=0, atol=1e-12)


def test_visible_is_the_rule_written_out():
    places = np.array([[0, 1, 2, 3, 0, 1, 9]], np.int32)
    segments = np.array([[0, 0, 0, 0, 1, 1, -1]], np.int32)
    x = np.zeros((1, 7, 1, 1))
    problem = Problem(x, x, x, 1.0, is_causal=True, q_positions=places, kv_positions=places, segments=segments)
    rows = ["1000000", "1100000", "1110000", "1111000", "0000100", "0000110", "0000000"]
    want = np.array([[c == "1" for c in row] for row in rows])
    np.testing.assert_array_equal(visible(problem, np.arange(7))[0], want)
    np.testing.assert_array_equal(visible(problem, np.array([3, -1, 4]))[0], want[:, [3, 0, 4]] & [True, False, True])
    narrow = replace(problem, window=2, is_causal=False)
    rows = ["1100000", "1110000", "0111000", "0011000", "0000110", "0000110", "0000000"]
    want = np.array([[c == "1" for c in row] for row in rows])
    np.testing.assert_array_equal(visible(narrow, np.arange(7))[0], want)


def test_without_positions_tokens_are_where_they_lie():
    x = np.zeros((1, 3, 1, 1))
    np.testing.assert_array_equal(
        visible(Problem(x, x, x, 1.0, is_causal=True), np.arange(3))[0], np.tri(3, dtype=bool)
    )


@given(length=st.integers(1, 40), cp=st.integers(1, 5))
def test_every_key_is_in_one_chunk_and_every_row_meets_every_chunk_once(length, cp):
    count = 2 * cp if cp > 1 else 1
    chunks = cut(length, count)
    assert sorted(chunks[chunks >= 0].tolist()) == list(range(length))
    x = np.zeros((1, length, 1, 1))
    for order in ("ascending", "ring", "gather", tuple(range(count))[::-1]):
        met = visits(Problem(x, x, x, 1.0, cp=cp), order)
        assert met.shape == (length, count)
        np.testing.assert_array_equal(np.sort(met, axis=1), np.broadcast_to(np.arange(count), met.shape))


@given(seed=st.integers(0, 2**32 - 1))
def test_bfloat16_is_rounded_as_in_ml_dtypes(seed):
    bits = np.random.default_rng(seed).integers(0, 0x7F000000, 200).astype(np.uint32)  # any finite size, subnormals too
    ties = (bits & 0xFFFF0000) | 0x8000
    x = np.concatenate([bits, ties]).view(np.float32) * np.float32(-1)
    np.testing.assert_array_equal(rounded(x, "bfloat16"), x.astype(ml_dtypes.bfloat16).astype(np.float32))
