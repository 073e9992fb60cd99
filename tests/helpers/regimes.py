"""Correct results in data in which one term of the error model is larger than the others: one function for each.

They are seeded and small. What makes the term large is said in each; `test_power` asserts the share that it then has.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property

import numpy as np
from power import ARITHMETIC, Regime, one_row

from cpjax.trial import faults
from cpjax.trial.emulators import as_result, attend, chunk_results, cut, fold, merge, rounded, visits
from cpjax.trial.problem import Problem, Result

TINY = 2.0**-24
"""The least number of FP16."""

EPS = 2.0**-24
"""Unit roundoff of float32."""


ROWS = 8
"""Of most regimes, each a problem of its own: a tile, for the judge."""


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([16, *seed])


@cache
def normal(
    profile: str, *, logits: float = 1.0, mean: float = 0.0, keys: int = 256, cp: int = 1, seed: int = 0
) -> Regime:
    """Ordinary data: 8 queries of one head of 32."""
    some = rng(1, seed)
    dtype = {"float32": "float32", "float64": "float64"}.get(profile, "float16")
    query, key, value = (some.standard_normal((1, n, 1, 32)) for n in (8, keys, keys))
    return Regime(Problem(query * logits, key, value + mean, 32**-0.5, cp=cp, cuts=2 * (cp == 1)).cast(dtype), profile)


@cache
def least(profile: str, low: float, high: float) -> Regime:
    """A sink of value 0, and keys whose p lies between `low` and `high` times the least FP16 number.

    The output is what they add up to, so near 0 that its own rounding is small. Where they fill a half of a cell, as
    from 12 to 12.5, all of them err to the same side, a quarter of the least number on average.
    """
    some = rng(2, int(10 * low))
    scores = np.log(some.uniform(low, high, (4, 400)) * TINY)
    scores = np.concatenate([np.zeros((4, 1)), scores], axis=1)
    values = some.uniform(0.5, 1.5, (4, 401, 16))
    values[:, 0] = 0
    return Regime(one_row(scores, values), profile)


@cache
def lost(profile: str = "flash_fp16") -> Regime:
    """As `least`, but every p is below half the least number: all become 0, and the loss is the whole sum."""
    return least(profile, 0.1, 0.45)


def centred(scores: np.ndarray, values: np.ndarray, chunks: int = 2) -> np.ndarray:
    """Values less the average of their chunk, so that outputs are about 0, and their roundings are too."""
    values, size = values.copy(), -(-scores.shape[1] // chunks)
    for start in range(0, scores.shape[1], size):
        some = slice(start, start + size)
        p = np.exp(scores[:, some] - scores.max(axis=1, keepdims=True))[:, :, None]
        values[:, some] -= (p * values[:, some]).sum(axis=1, keepdims=True) / p.sum(axis=1, keepdims=True)
    return values


@cache
def tied(
    spread: tuple[float, ...], *, others: int = 0, cell: float = 2.0**-14, profile: str = "flash_fp16", cells: int = 40
) -> Regime:
    """Keys in groups, whose scores differ by `spread` cells within a group: their roundings are one rounding.

    Groups lie many cells apart, and a group has one value, so that equal errors add up. `others` are keys of little
    weight in cells of their own, which make the tied ones a smaller part of all keys. The output is about 0.
    """
    some = rng(3, len(spread), others)
    groups = -np.sort(some.choice(np.arange(64, 8192, 64), (8, cells))) * 1.0
    scores = (groups[:, :, None] + np.array(spread)).reshape(8, -1) * cell
    scores = np.concatenate([np.zeros((8, 1)), scores, -some.uniform(6.0, 12.0, (8, others))], axis=1)
    values = some.standard_normal((8, scores.shape[1], 16))
    values[:, 1 : 1 + cells * len(spread)] = np.repeat(some.standard_normal((8, cells, 16)), len(spread), axis=1)
    return Regime(one_row(scores, centred(scores, values)), profile)


def rows_of(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, *, scale: float = 1.0, cp: int = 1, dtype: str = "float32"
) -> Problem:
    """Queries `[B, H]`, keys `[B, S, H]`, values `[B, S, V]`: each a problem of its own."""
    return Problem(query[:, None, None], key[:, :, None], value[:, :, None], scale, cp=cp, cuts=2 * (cp == 1)).cast(
        dtype
    )


@cache
def near_the_best(low: float, high: float) -> Regime:
    """Two chunks whose outputs lie `low` to `high` spacings from their best key's value, large and of opposite sign.

    The other key has p = 1/2, and what the merge leaves is small, with finer spacings than the chunks' outputs.
    """
    some = rng(4, int(10 * low))
    first = some.uniform(65, 80, (ROWS, 1, 1, 16))
    best = np.float16(np.concatenate([first, -first * np.exp(0.4)], axis=1)).astype(np.float64)
    away = some.uniform(low, high, (ROWS, 2, 1, 16)) * some.choice([-1, 1], (ROWS, 2, 1, 16)) * 2.0**-4
    values = np.concatenate([best, best + 3 * away], axis=2).reshape(ROWS, 4, 16)
    scores = np.log([1.0, 0.5, np.exp(-0.4), 0.5 * np.exp(-0.4)])
    return Regime(one_row(np.tile(scores, (ROWS, 1)), values), "flash_fp16")


@cache
def slow_merges(low: float, high: float) -> Regime:
    """A heavy first chunk, and 15 that move the output by `low` to `high` spacings each, upwards. One key a chunk."""
    some = rng(5, int(10 * low))
    share = 2.0**-7
    scores = np.log(np.concatenate([[1.0], np.full(15, share)]))
    start = np.float16(some.uniform(1.1, 1.3, (ROWS, 1, 16)))
    moves = some.uniform(low, high, (ROWS, 15, 16)) * 2.0**-10
    running = start + np.cumsum(moves, axis=1)
    weight = 1 + share * np.arange(1, 16)[:, None]
    before = np.concatenate([start, running[:, :-1]], axis=1)
    values = np.float16(before + moves * weight / share)
    return Regime(one_row(np.tile(scores, (ROWS, 1)), np.concatenate([start, values], axis=1), cp=8), "flash_fp16")


def alone(key: np.ndarray, value: np.ndarray, far: float) -> tuple[np.ndarray, np.ndarray]:
    """These keys as a chunk, and a second chunk of as many from `far` on, which have no weight worth speaking of."""
    away = far + np.sign(far) * 0.01 * np.arange(key.shape[1]).reshape(1, -1, *[1] * (key.ndim - 2))
    return np.concatenate([key, np.broadcast_to(away, key.shape)], axis=1), np.concatenate([value, value], axis=1)


@cache
def large_scores() -> Regime:
    """Four keys with scores near 100, all about as large: |s| is what a score's error is made of."""
    some = rng(6)
    query = some.uniform(10, 11, (ROWS, 1))
    key, value = alone(some.uniform(13, 13.1, (ROWS, 4, 1)), some.standard_normal((ROWS, 4, 16)), -10.0)
    return Regime(rows_of(query, key, value, scale=0.7), "float32")


@cache
def capped() -> Regime:
    """Small scores under a softcap of 4,096: 2 sigmoid(2y) - 1 errs by some roundings of 1, whatever y is."""
    some = rng(50)
    problem = one_row(some.uniform(-1, 1, (ROWS, 64)), some.standard_normal((ROWS, 64, 16)))
    arithmetic = replace(ARITHMETIC["float32"], tanh_of_sigmoid=True)
    return Regime(replace(problem, softcap=4096.0), "float32", arithmetic=arithmetic)


@cache
def biased() -> Regime:
    """Small scores and a bias near 1,000: their sum has the bias's spacing."""
    some = rng(51)
    problem = one_row(some.uniform(-1, 1, (ROWS, 64)), some.standard_normal((ROWS, 64, 16)))
    bias = some.uniform(1000, 1001, (ROWS, 1, 1, 64)).astype(np.float32)
    return Regime(replace(problem, bias=bias, cuts=1), "float32")


@cache
def distant_keys() -> Regime:
    """3,000 keys with scores in one cell lie 8 below a sink: together they have half the weight.

    Their errors are one error; |s| and |q||k| are small for them, only the distance is not. Each p is a whole number of
    spacings of the sum, which is below 2: it loses nothing when it is added, and sums do not drift.
    """
    some = rng(7)
    p = some.integers(2400, 2780, (ROWS, 1)) * 2.0**-23
    key = np.concatenate([-np.log(p), some.uniform(-1, 1, (ROWS, 3000)) * 2.0**-20], axis=1)
    value = np.concatenate([np.full((ROWS, 1, 4), 1.0), -some.uniform(0.9, 1.1, (ROWS, 3000, 4))], axis=1)
    key, value = alone(key[:, :, None], value, -60.0)
    arithmetic = replace(ARITHMETIC["float32"], summation="pairwise")
    return Regime(rows_of(np.ones((ROWS, 1)), key, value), "float32", arithmetic=arithmetic)


@cache
def common_factor() -> Regime:
    """A sink of value 1, and 3,000 keys of value −1 and half of the weight some 8 below it, in base two.

    Their own errors are independent and average out; what scale · log2 e is off by, here by nearly as much as it can,
    does not.
    """
    some = rng(44)
    key = np.concatenate([np.zeros((ROWS, 1)), -some.uniform(7.5, 8.5, (ROWS, 3000))], axis=1)
    value = np.concatenate([np.full((ROWS, 1, 4), 1.0), np.full((ROWS, 3000, 4), -1.0)], axis=1)
    arithmetic = replace(ARITHMETIC["float32"], base_two=True, summation="pairwise")
    key, value = alone(key[:, :, None], value, -60.0)
    return Regime(
        rows_of(np.ones((ROWS, 1)), key / 184 * 256, value, scale=184 / 256), "float32", arithmetic=arithmetic
    )


@cache
def cut_off() -> Regime:
    """Products of 128 positive terms, scores of about 100, by units that cut the sum off after each block of 8."""
    some = rng(47)
    query, key = (some.uniform(0.5, 1.5, (1, n, 1, 128)) for n in (ROWS, 64))
    problem = Problem(query, key, some.standard_normal((1, 64, 1, 16)), 100 / 128).cast("float16")
    return Regime(problem, "flash_fp16", arithmetic=replace(ARITHMETIC["flash_fp16"], summation="cut"))


@cache
def cut_off_values() -> Regime:
    """65,536 values that make an output a little below 2, added by units that cut the sum off after each block of 8.

    Below 2 the rounding of the output is smallest beside it; those of so many probabilities average out.
    """
    some = rng(48)
    key, value = some.uniform(-0.5, 0.5, (ROWS, 65536)), some.uniform(1.8, 2.0, (ROWS, 65536, 4))
    problem = one_row(key, value, dtype="float16")
    problem = replace(problem, cuts=1)
    return Regime(problem, "flash_fp16", arithmetic=replace(ARITHMETIC["flash_fp16"], summation="cut"))


@cache
def orthogonal() -> Regime:
    """Products q·k of large numbers that cancel: |q||k| is thousands of times as large as |s|."""
    some = rng(8)
    query, key = some.standard_normal((ROWS, 32)) * 30, some.standard_normal((ROWS, 4, 32)) * 30
    key -= (key @ query[:, :, None]) * query[:, None] / np.square(query).sum(axis=1)[:, None, None]
    return Regime(rows_of(query, key, some.standard_normal((ROWS, 4, 16))), "float32")


@cache
def long_products() -> Regime:
    """A large number in the first of 128 dims: every partial sum of q·k is as large as |s|."""
    some = rng(9)
    query, key = some.standard_normal((ROWS, 128)) * 0.2, some.standard_normal((ROWS, 4, 128)) * 0.2
    query[:, 0], key[:, :, 0] = 10, some.uniform(13, 13.1, (ROWS, 4))
    return Regime(rows_of(query, key, some.standard_normal((ROWS, 4, 16)), scale=0.7), "float32")


@cache
def few_keys() -> Regime:
    """Two keys of float32 with small scores: nothing is long, merged or far away; exponentials and products remain."""
    some = rng(10)
    query, key = some.uniform(0.5, 1, (ROWS, 1)), some.uniform(-0.2, 0.2, (ROWS, 2, 1))
    return Regime(rows_of(query, key, some.uniform(1, 2, (ROWS, 2, 16))), "float32")


@cache
def long_sums(count: int, profile: str = "float32") -> Regime:
    """`count` terms of one sign and many sizes, added one after the other in one accumulator."""
    some = rng(11, count)
    scores = some.uniform(-0.5, -0.1, (ROWS, count))
    value = some.uniform(1, 2, (ROWS, count, 4))
    key, value = alone(scores[:, :, None], value, -200.0)
    arithmetic = replace(ARITHMETIC[profile], tile=count)
    return Regime(rows_of(np.ones((ROWS, 1)), key, value, dtype=profile), profile, arithmetic=arithmetic)


@cache
def drifting_sums(spread: float) -> Regime:
    """1,000 keys whose p lies a quarter of a spacing of their sum off a multiple of it, within `spread` spacings."""
    some = rng(17, int(100 * spread))
    step = 2.0**8 * 2.0**-23  # the sum is 1 + 1000 · 0.37
    p = (np.round(0.37 / step) + 0.25 + some.uniform(-0.5, 0.5, (ROWS, 1000)) * spread) * step
    scores = np.log(np.concatenate([np.ones((ROWS, 1)), p], axis=1))
    key, value = alone(scores[:, :, None], some.uniform(1, 2, (ROWS, 1001, 4)), -200.0)
    arithmetic = replace(ARITHMETIC["float32"], tile=1001)
    return Regime(rows_of(np.ones((ROWS, 1)), key, value), "float32", arithmetic=arithmetic)


@cache
def drifting_products(share: float) -> Regime:
    """10,000 keys with p = 1, whose sum is exact. So many of their values are one number with the last bits set."""
    some = rng(18, int(100 * share))
    value = some.uniform(0.5, 1, (ROWS, 10_000, 4))
    value[:, : int(10_000 * share)] = np.nextafter(np.float32(0.7), np.float32(1))
    key, value = alone(np.zeros((ROWS, 10_000, 1)), value, -200.0)
    arithmetic = replace(ARITHMETIC["float32"], tile=10_000)
    return Regime(rows_of(np.ones((ROWS, 1)), key, value), "float32", arithmetic=arithmetic)


@cache
def few_terms(tokens: int) -> Regime:
    """8,000 keys of so many tokens, in any order: p and p·v come again and again, and lose the same each time."""
    some = rng(19, tokens)
    scores = some.uniform(-1, 0, (ROWS, tokens))
    value = some.uniform(-1, 1, (ROWS, tokens, 4))
    token = some.integers(tokens, size=(ROWS, 8000))
    scores, value = np.take_along_axis(scores, token, 1), np.take_along_axis(value, token[..., None], 1)
    key, value = alone(scores[:, :, None], value, -200.0)
    arithmetic = replace(ARITHMETIC["float32"], tile=8000)
    return Regime(rows_of(np.ones((ROWS, 1)), key, value), "float32", arithmetic=arithmetic)


@cache
def merge_weights(shift: float, keys: int, chunks: int) -> Regime:
    """Chunks whose outputs are +1 and −1 by turns, lse near `shift`: weights of the merge decide what is left."""
    some = rng(12, keys, chunks)
    scores = some.uniform(-0.1, 0.1, (ROWS, keys * chunks)) + shift - np.log(keys * chunks)
    sign = np.repeat(np.where(np.arange(chunks) % 2, -1.0, 1.0), keys)
    return Regime(one_row(scores, np.tile(sign[:, None], (1, 4)), cp=chunks // 2), "float32")


@cache
def absorbed(low: float, high: float) -> Regime:
    """A heavy key, and 400 whose weight is `low` to `high` unit roundoffs of it. The heavy one has a small value."""
    some = rng(13, int(100 * low))
    light = some.uniform(low, high, (ROWS, 400)) * EPS
    scores = np.log(np.concatenate([np.ones((ROWS, 1)), light], axis=1))
    value = np.full((ROWS, 401, 1), 10.0)
    value[:, 0] = 2.0**-10
    scores, value = alone(scores, value, -60.0)
    return Regime(one_row(scores, value), "float32")


@cache
def absorbed_chunks(low: float, high: float) -> Regime:
    """As `absorbed`, but each light key is a chunk of its own, and what loses it is the sum of the merge."""
    some = rng(14, int(100 * low))
    scores = np.log(np.concatenate([np.ones((ROWS, 1)), some.uniform(low, high, (ROWS, 63)) * EPS], axis=1))
    return Regime(one_row(scores, some.standard_normal((ROWS, 64, 1)), cp=32), "float32")


@cache
def many_small_merges() -> Regime:
    """32 chunks of 16 keys and lse near 0: nothing is large but the number of logarithms."""
    some = rng(15)
    scores = some.uniform(-0.1, 0.1, (ROWS, 512)) - np.log(512)
    return Regime(one_row(scores, some.standard_normal((ROWS, 512, 1)), cp=16), "float32")


@cache
def far_below(furthest: float) -> Regime:
    """Four ordinary keys, and 4,000 that lie 1.1 to 1.9 times `furthest` below them: p is 0 for all of these.

    σ has half of the least number for each, as if they erred; together if they count as equal.
    """
    some = rng(18)
    scores = np.concatenate(
        [some.uniform(-0.5, 0, (ROWS, 4)), -some.uniform(1.1, 1.9, (ROWS, 4000)) * furthest], axis=1
    )
    scores[:, 0] = 0
    value = some.uniform(0.05, 0.1, (ROWS, 4004, 8))
    value[:, 4:] = 1
    scores, value = alone(scores, value, -2e5)
    return Regime(one_row(scores, value), "flash_fp16")


@cache
def coarse_products() -> Regime:
    """Scores in FP16 near 100, scale 1: q·k is rounded to a multiple of 1/16, and nothing else nearly as coarsely."""
    some = rng(19)
    return Regime(one_row(some.uniform(98, 100, (ROWS, 100)), some.standard_normal((ROWS, 100, 16))), "ring_mla_fp16")


@cache
def coarse_scaling() -> Regime:
    """q·k below 128 and scale · q·k above, where numbers lie twice as far apart."""
    some = rng(20)
    key = some.uniform(124.5, 127.9, (16, 100, 1))
    return Regime(rows_of(np.ones((16, 1)), key, some.standard_normal((16, 100, 16)), scale=1.03), "ring_mla_fp16")


@cache
def coarse_differences() -> Regime:
    """Small scores, whose numbers lie close together, and a maximum of 8: the difference is rounded, for each key."""
    some = rng(21)
    scores = np.concatenate([np.full((ROWS, 1), 8.0), some.uniform(0.2, 0.9, (ROWS, 400))], axis=1)
    value = some.standard_normal((ROWS, 401, 16))
    value[:, 0] = 0
    scores, value = alone(scores, value, -60.0)
    return Regime(one_row(scores, value), "ring_mla_fp16")


@cache
def fine_maximum() -> Regime:
    """A maximum near −1, finer than the scores near −5 and than their differences from it: all these lose the same."""
    some = rng(22)
    scores = np.concatenate([-some.uniform(1.0, 1.9, (ROWS, 1)), -some.uniform(4.1, 4.9, (ROWS, 60))], axis=1)
    value = np.concatenate([np.full((ROWS, 1, 2), -1.0), np.full((ROWS, 60, 2), 1.0)], axis=1)
    scores, value = alone(scores, value, -60.0)
    return Regime(one_row(scores, value), "ring_mla_fp16")


@cache
def coarse_rescale(before: int, top: float, tile: int) -> Regime:
    """`before` keys near 0.1, and then one from `top` on: where a tile ends there, one exponent is rounded for all.

    The old maximum is a finer number than the difference, and the values are +1 before and −1 for the new maximum.
    """
    some = rng(23, before, tile)
    scores = some.uniform(-0.1, 0.1, (ROWS, 2 * before))
    scores[:, 0] = some.uniform(0.2, 0.24, ROWS)
    scores[:, before:] = -8
    scores[:, before] = some.uniform(top, top + 0.5, ROWS)
    value = np.full((ROWS, 2 * before, 2), 1.0)
    value[:, before] = -1
    scores, value = alone(scores, value, -60.0)
    arithmetic = replace(ARITHMETIC["ring_mla_fp16"], tile=tile)
    return Regime(one_row(scores, value), "ring_mla_fp16", arithmetic=arithmetic)


@cache
def tied_scores(spread: tuple[float, ...]) -> Regime:
    """As `tied`, where scores have a format: near 100 a cell is 2^-7, an eighth of a spacing."""
    some = rng(ROWS, len(spread))
    places = np.sort(np.stack([some.choice(np.arange(2, 322, 4), 40, replace=False) for _ in range(ROWS)]))
    scores = 97.5 + (places[:, :, None] + np.array(spread)).reshape(ROWS, -1) * 2.0**-7
    value = np.repeat(some.standard_normal((ROWS, 40, 16)), len(spread), axis=1)
    scores, value = alone(scores, value, 0.0)
    return Regime(one_row(scores, value), "ring_mla_fp16")


class Decode(Regime):
    """Each chunk's out and lse travel in FP16; their sum is float32 and rounded once."""

    @cached_property
    def result(self) -> Result:
        arithmetic = ARITHMETIC["flash_fp16"]
        blocks = chunk_results(self.problem, arithmetic, cut(self.problem.key.shape[1], self.problem.chunk_count))
        blocks = Result(blocks.out, rounded(blocks.lse, "float16"))
        return fold(blocks, visits(self.problem, "ascending"), replace(arithmetic, carry="float32"))


@cache
def stored_lse() -> Regime:
    """Four chunks whose outputs are +1 and −1 by turns, their lse near 10 in FP16: coarse weights."""
    some = rng(25)
    scores = (
        some.uniform(-0.1, 0.1, (ROWS, 64))
        + 10
        - np.log(16)
        + np.repeat(some.uniform(-0.5, 0.5, (ROWS, 4)), 16, axis=1)
    )
    sign = np.repeat([1.0, -1.0, 1.0, -1.0], 16)
    return Decode(one_row(scores, np.tile(sign[:, None], (1, 2)), cp=2), "decode_fp16_lse")


@cache
def last_rounding() -> Regime:
    """Sixteen chunks of one mean, summed in float32: their roundings average out, the last one does not."""
    some = rng(26)
    scores = some.uniform(-1, 1, (ROWS, 512))
    return Decode(one_row(scores, 1.3 + 0.05 * some.standard_normal((ROWS, 512, 16)), cp=8), "decode_fp16_lse")


class Split(Regime):
    """Chunks are weighed by exp(lse_c − lse), and the weights are not divided by their sum: lse is what is rounded."""

    @cached_property
    def result(self) -> Result:
        arithmetic = ARITHMETIC["float32"]
        blocks = chunk_results(self.problem, arithmetic, cut(self.problem.key.shape[1], self.problem.chunk_count))
        top = blocks.lse.max(axis=0)
        lse = top + np.log(np.exp(blocks.lse - top).sum(axis=0))
        out = (np.exp(blocks.lse - lse)[..., None] * blocks.out).sum(axis=0)
        return as_result(Result(np.moveaxis(out, 3, 0), np.moveaxis(lse, 3, 0)), arithmetic)


@cache
def split(lse: float, order: str = "ascending") -> Regime:
    """Four chunks of one mean, and a large lse, whose last place every output feels."""
    some = rng(42)
    scores = some.uniform(-1, 1, (64, 64)) + lse - np.log(64) + some.uniform(-1, 1, (64, 1))
    return Split(one_row(scores, 1.3 + 0.05 * some.standard_normal((64, 64, 4)), cp=2), "float32", order)


class Flushed(Regime):
    """Weights in float32, and 0 for each product and each sum that is less than the least normal number."""

    @cached_property
    def result(self) -> Result:
        problem, least = self.problem, np.float32(2.0**-126)
        score = problem.key[:, :, 0, 0].astype(np.float32)
        p = np.exp(score - score.max(axis=1, keepdims=True))
        weight, out = p / p.sum(axis=1, keepdims=True), np.float32(0)
        for j in range(score.shape[1]):
            part = weight[:, j, None] * problem.value[:, j, 0].astype(np.float32)
            out = out + np.where(np.abs(part) < least, np.float32(0), part)
            out = np.where(np.abs(out) < least, np.float32(0), out)
        lse = attend(problem, ARITHMETIC["float32"]).lse
        return Result(out[:, None, None], lse)


@cache
def flushed(products: float, *, signs: bool) -> Regime:
    """Products of about so many least normal numbers, all positive or with random `signs`.

    Where they are less than one, all are lost; else sums may be, that pass 0.
    """
    some = rng(43, int(signs))
    value = some.uniform(0.8, 1.2, (ROWS, 512, 16)) * products * 512 * 2.0**-126
    if signs:
        value *= some.choice([-1.0, 1.0], value.shape)
    return Flushed(one_row(some.uniform(-0.1, 0.1, (ROWS, 512)), value), "float32")


@cache
def unknown_order() -> Regime:
    """Sixteen chunks merged in FP16 in an order that is not told, all with the same keys: no merge moves the output."""
    some = rng(27)
    scores = some.uniform(-1, 1, (ROWS, 512))
    scores, value = (
        np.tile(x[:, :32], (1, 16, *[1] * (x.ndim - 2))) for x in (scores, 2 + some.standard_normal((ROWS, 32, 16)))
    )
    return Regime(one_row(scores, value, cp=8), "flash_fp16", order="unknown")


class Bench(faults.Bench):
    """The trial's bench; for `decode_fp16_lse`, with chunks whose lse travels in FP16 and a sum in float32."""

    profile: str

    def __init__(self, problem: Problem, profile: str):
        super().__init__(problem, ARITHMETIC["flash_fp16" if profile == "decode_fp16_lse" else profile])
        object.__setattr__(self, "profile", profile)

    @cached_property
    def blocks(self) -> Result:
        blocks = chunk_results(self.problem, self.arithmetic, cut(self.problem.key.shape[1], self.problem.chunk_count))
        return Result(blocks.out, rounded(blocks.lse, "float16")) if self.profile == "decode_fp16_lse" else blocks

    def folded(self, blocks: Result, join: Callable[..., Result] = merge) -> Result:
        arithmetic = replace(self.arithmetic, carry="float32") if self.profile == "decode_fp16_lse" else self.arithmetic
        return fold(blocks, visits(self.problem, self.order), arithmetic, join)

    def failed(self, result: Result, *, with_lse: bool) -> tuple[str, ...]:
        """The tests that a result fails; and `scale`, where it is only remarked that it is off."""
        verdict = Regime(self.problem, self.profile).verdict(result, with_lse=with_lse)
        return (*verdict.failed_tests, *(["scale"] if verdict.remarks else []))


@cache
def bench(profile: str, mean: float = 0.0, rows: int = 16, keys: int = 256) -> Bench:
    """Ordinary data: two heads of 32, normal logits, values with a mean or without, four chunks."""
    some = rng(28, int(mean))
    dtype = {"float32": "float32", "float64": "float64"}.get(profile, "float16")
    query, key, value = (some.standard_normal((1, n, 2, 32)) for n in (rows, keys, keys))
    return Bench(Problem(query, key, value + mean, 32**-0.5, cp=2).cast(dtype), profile)


def key_reweighted(problem: Problem, key: int, change: float) -> Result:
    """What comes out if one key enters with weight 1 + `change`: its score is larger by the logarithm of that."""
    query = np.concatenate([problem.query, np.full_like(problem.query[..., :1], 1 / problem.scale)], axis=3)
    more = np.zeros_like(problem.key[..., :1])
    more[:, key] = np.log1p(change)
    changed = replace(problem, query=query, key=np.concatenate([problem.key, more], axis=3))
    return attend(changed, ARITHMETIC["float64" if problem.key.dtype == np.float64 else "flash_fp16"])


@cache
def many_rows() -> Regime:
    """One head of 200 queries and 64 keys, flat: what one key does is seen in all rows together, down to a tenth."""
    some = rng(29)
    query, key, value = (some.standard_normal((1, n, 1, 16)) for n in (200, 64, 64))
    return Regime(Problem(0.5 * query, key, value, 0.25, cuts=2).cast("float32"), "flash_fp16")


@cache
def nearly_constant() -> Regime:
    """Values of float64 that are 1 but for a millionth, key 5's for 1.2 millionths: its square is 0.7 of the floor."""
    some = rng(30)
    query, key, value = (some.standard_normal((1, n, 1, 8)) for n in (16, 32, 32))
    value = 1 + 1e-9 * value
    value[:, 5] = 1 + 1.2e-6
    return Regime(Problem(0.1 * query, key, value, 1.0, cuts=2).cast("float64"), "float64")


@cache
def beside_a_sink(spacings: float) -> Regime:
    """Outputs that lie `spacings` of FP16 from the sink's value, and are rounded to it: σ is as small as that."""
    some = rng(31, int(1e6 * spacings))
    value = np.float16(some.uniform(1.1, 1.9, (8, 1, 8))).astype(np.float64)
    value = np.concatenate([value, value + spacings * 2.0**-10 * 2.0**12], axis=1)
    scores, value = alone(np.tile([0.0, np.log(2.0**-12)], (8, 1)), value, -60.0)
    return Regime(one_row(scores, value), "flash_fp16")


@cache
def large_logits(score: float) -> Regime:
    """Two keys of one score in FP16, so large that its rounding may move much of the weight."""
    scores, value = alone(np.full((4, 2), score), rng(32).standard_normal((4, 2, 4)), -60.0)
    return Regime(one_row(scores, value), "ring_mla_fp16")


@cache
def large_products(product: float) -> Regime:
    """q·k near the largest number of FP16, the scale so small that the scores are ordinary."""
    key, value = alone(np.full((4, 2, 1), product), rng(33).standard_normal((4, 2, 4)), -product / 2)
    return Regime(rows_of(np.ones((4, 1)), key, value, scale=2.0**-14), "ring_mla_fp16")


@cache
def shared_cells(offset: float, profile: str = "flash_fp16") -> Regime:
    """Rows of which each has the same few probabilities, `offset` spacings further along than the row before it.

    Whether roundings that near count as one decides the variance of the scale test.
    """
    some = rng(34, int(100 * offset))
    p = some.uniform(0.6, 0.8, 40) + (np.arange(16)[:, None] % 2) * offset * 2.0**-11
    scores = np.concatenate([np.zeros((16, 1)), np.log(p)], axis=1)
    value = centred(scores[:1], some.standard_normal((1, 41, 4)), 1)
    scores, value = alone(scores, np.broadcast_to(value, (16, 41, 4)).copy(), -60.0)
    return Regime(one_row(scores, value), profile)
