"""The judge's power is pinned: a constant that is doubled or halved makes a test fail.

Three sorts of pins. *Smallest faults*: this size is caught and the next smaller is not, so that a laxer judge and a
stricter one both show. *Correct results* in data in which one term is the largest, whose measured z lies in an
interval: a term that is larger makes z smaller. *Limits*: what is still judged, or still named, and what is no more.

Each constant has pins that guard it; `test_twice_or_half_of_a_constant_is_noticed` changes it and looks that one of
them breaks. A constant without pins has its reason in `EXPLAINED`, and beside itself in the source.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import regimes
from power import Edge, Pin, Regime, changed, constants, of_constant, of_text, of_twelfth, unchecked
from regimes import bench

from cpjax.crosscheck.judging.range_check import rows_out_of_range
from cpjax.crosscheck.judging.sampling import chosen_rows
from cpjax.precision import PROFILES
from cpjax.trial import faults
from cpjax.trial.emulators import rounded
from cpjax.trial.problem import Problem, Result

MODEL, JUDGING = "cpjax.crosscheck.error_model", "cpjax.crosscheck.judging"
MODULES = (
    *(f"{MODEL}.{name}" for name in ("arithmetic", "drift", "lse", "model", "outputs", "probabilities")),
    *(f"{MODEL}.{name}" for name in ("row_covariance", "running_max", "scores", "sums", "terms", "ties")),
    *(f"{JUDGING}.{name}" for name in ("error_budget", "evidence", "expansion", "pairwise", "problem", "range_check")),
    *(f"{JUDGING}.{name}" for name in ("sampling", "score_tests", "statistic", "verdict")),
)
"""Whose constants are pinned or explained here; those of the bound are in test_bound.py."""

# Correct results: the regime, the terms that are the largest there, their least share of σ², and z. The reason why
# they are stands in each function of tests/helpers/regimes.py.

OUT: dict[str, tuple[Callable[[], Regime], tuple[str, ...], float, float]] = {
    "keys at 12 least numbers": (partial(regimes.least, "flash_fp16", 12, 12.5), ("least probabilities",), 0.9, 0.9781),
    "keys at 24 least numbers": (partial(regimes.least, "flash_fp16", 23.5, 24.5), ("probabilities",), 0.7, 1.191),
    "keys below half a least number": (regimes.lost, ("probabilities that become 0",), 0.9, 1.715),
    "pairs in one cell": (partial(regimes.tied, (-0.3, 0.3)), ("probabilities",), 0.9, 1.024),
    "pairs one cell apart": (partial(regimes.tied, (0.0, 1.0)), ("probabilities",), 0.9, 1.21),
    "one key in seven tied": (
        partial(regimes.tied, (0.0, 0.1, 0.2, 0.3, -0.1, -0.2), others=1400), ("probabilities",), 0.9, 0.8212,
    ),
    "one key in fourteen tied": (
        partial(regimes.tied, (0.0, 0.1, 0.2, 0.3, -0.1, -0.2), others=2800), ("probabilities",), 0.9, 2.243,
    ),
    "keys 2^16 below": (partial(regimes.far_below, 2.0**16), ("probabilities", "outputs of chunks"), 0.9, 0.7394),
    "keys 2^15 below": (partial(regimes.far_below, 2.0**15), ("probabilities", "outputs of chunks"), 0.9, 1.067),
    "chunks 5 to 8 spacings from the best": (
        partial(regimes.near_the_best, 4.5, 7.5), ("outputs of chunks",), 0.8, 0.9476,
    ),
    "chunks 2 to 4 spacings from the best": (
        partial(regimes.near_the_best, 2.2, 3.8), ("outputs of chunks, one-signed",), 0.8, 0.4784,
    ),
    "merges of 5 to 8 spacings": (partial(regimes.slow_merges, 4.5, 7.5), ("outputs of merges",), 0.9, 1.026),
    "merges of 2 to 4 spacings": (
        partial(regimes.slow_merges, 2.2, 3.8), ("outputs of merges, stagnation",), 0.9, 0.1509,
    ),
    "merges in an unknown order": (regimes.unknown_order, ("outputs of merges",), 0.9, 0.202),
    "a last rounding": (regimes.last_rounding, ("the last rounding",), 0.8, 0.9754),
    "large scores": (regimes.large_scores, ("scores",), 0.9, 0.3507),
    "distant keys": (regimes.distant_keys, ("scores",), 0.5, 0.05618),
    "a factor in base two": (regimes.common_factor, ("factor of q·k",), 0.5, 0.5794),
    "scores under a softcap": (regimes.capped, ("scores",), 0.9, 0.3662),
    "scores with a bias": (regimes.biased, ("scores",), 0.9, 0.163),
    "orthogonal": (regimes.orthogonal, ("scores",), 0.9, 0.3278),
    "long products": (regimes.long_products, ("scores",), 0.8, 1.104),
    "coarse products": (regimes.coarse_products, ("scores",), 0.9, 0.9287),
    "coarse scaling": (regimes.coarse_scaling, ("scores",), 0.9, 0.8848),
    "coarse differences": (regimes.coarse_differences, ("scores",), 0.8, 0.6914),
    "a fine maximum": (regimes.fine_maximum, ("maxima and rescales",), 0.5, 1.411),
    "a rescale after 512 keys": (
        partial(regimes.coarse_rescale, 512, 4.5, 512), ("maxima and rescales",), 0.4, 1.111,
    ),
    "a rescale after 16 keys": (partial(regimes.coarse_rescale, 16, 2.5, 16), ("maxima and rescales",), 0.4, 1.176),
    # No tile of 16 keys ends there, so nothing is rescaled.
    "a new maximum after 8 keys": (partial(regimes.coarse_rescale, 8, 2.1, 16), ("scores",), 0.9, 1.072),
    "pairs in one cell of scores": (partial(regimes.tied_scores, (-0.3, 0.3)), ("scores",), 0.9, 0.9338),
    "pairs one cell of scores apart": (partial(regimes.tied_scores, (0.1, 0.9)), ("scores",), 0.9, 1.32),
    "few keys": (regimes.few_keys, ("exponentials and products",), 0.9, 0.1876),
    "4,096 terms": (partial(regimes.long_sums, 4096), ("row sums",), 0.9, 0.8408),
    "terms that err alike": (partial(regimes.drifting_sums, 0.1), ("terms that err alike",), 0.9, 0.3263),
    "terms that err nearly alike": (partial(regimes.drifting_sums, 0.9), ("terms that err alike",), 0.7, 0.7312),
    "one product for all keys": (partial(regimes.drifting_products, 1.0), ("terms that err alike",), 0.9, 0.2517),
    "one product for one key in eight": (
        partial(regimes.drifting_products, 0.125), ("terms that err alike",), 0.9, 0.0546,
    ),
    "one product for one key in fourteen": (partial(regimes.drifting_products, 0.07), ("equal terms",), 0.8, 0.2295),
    "products of 12 tokens": (
        partial(regimes.few_terms, 12), ("equal terms", "terms that err alike"), 0.9, 0.3786,
    ),
    "merges at lse 100": (partial(regimes.merge_weights, 100, 64, 16), ("weights of the merge",), 0.9, 0.1842),
    # The most that two chunks make at lse 0 is a third: 4 roundings of Σ A|v| are always more.
    "merges at lse 0": (partial(regimes.merge_weights, 0, 16, 2), ("weights of the merge",), 0.2, 0.2552),
    "totals at lse 70": (partial(regimes.split, 70), ("totals of the merge",), 0.9, 0.719),
    "totals at lse 70 in an unknown order": (
        partial(regimes.split, 70, order="unknown"), ("totals of the merge",), 0.9, 0.5609,
    ),
    "products that become 0": (partial(regimes.flushed, 0.7, signs=False), ("underflow",), 0.9, 0.9999),
    "sums that become 0": (partial(regimes.flushed, 8.0, signs=True), ("sums that pass 0",), 0.9, 0.8956),
    "absorbed keys": (partial(regimes.absorbed, 0.7, 0.95), ("absorbed terms",), 0.8, 0.3155),
    "keys of 5 to 7 roundings": (partial(regimes.absorbed, 5, 7), ("absorbed terms",), 0.9, 0.02096),
    "keys of 9 to 15 roundings": (partial(regimes.absorbed, 9, 15), ("row sums", "factor of q·k"), 0.8, 0.6176),
    "float64": (partial(regimes.long_sums, 500, "float64"), ("row sums",), 0.7, 0.4351),
    "values that are cut off": (regimes.cut_off_values, ("values cut off",), 0.7, 0.8677),
    "stored lse": (regimes.stored_lse, ("stored lse",), 0.9, 0.932),
}  # fmt: skip

LSE: dict[str, tuple[Callable[[], Regime], tuple[str, ...], float, float]] = {
    "absorbed chunks": (partial(regimes.absorbed_chunks, 0.7, 0.95), ("absorbed terms",), 0.6, 1.25),
    "chunks of 5 to 7 roundings": (partial(regimes.absorbed_chunks, 5, 7), ("absorbed terms",), 0.6, 0.08844),
    "chunks of 9 to 15 roundings": (
        partial(regimes.absorbed_chunks, 9, 15),
        ("row sums", "logarithm and merges"),
        0.9,
        0.2218,
    ),
    "products that are cut off": (regimes.cut_off, ("products cut off",), 0.8, 0.4823),
    "small merges": (regimes.many_small_merges, ("logarithm and merges",), 0.3, 0.1064),
}


# Smallest faults: the fault, with lse or without, the values' mean, the test that must catch it, and the size.

SIZED = {
    "scale": faults.scale_off,
    "smaller scale": lambda bench, size: faults.scale_off(bench, -size),
    "chunk": faults.chunk_weighted,
    "row": faults.row_off,
    "lse": faults.lse_off,
}
SMALLEST: dict[tuple[str, str, bool, float, str], float] = {
    ("flash_fp16", "scale", False, 0.0, "scale"): 7.28e-05,
    ("flash_fp16", "scale", True, 0.0, "scale"): 1.46e-06,
    # Matrix units make scores smaller, so that a smaller scale is seen later.
    ("flash_fp16", "smaller scale", False, 0.0, "scale"): 9.41e-05,
    ("flash_fp16", "smaller scale", True, 0.0, "scale"): 1.83e-06,
    ("flash_fp16", "chunk", False, 0.0, "spread"): 0.00118,
    ("flash_fp16", "chunk", True, 1.0, "lse spread"): 1.17e-05,
    ("flash_fp16", "row", False, 1.0, "worst row"): 0.000763,
    ("flash_fp16", "row", False, 0.0, "worst row"): 0.00172,
    ("flash_fp16", "lse", True, 0.0, "lse spread"): 3.12e-06,
    ("ring_mla_fp16", "scale", False, 0.0, "scale"): 0.000239,
    ("ring_mla_fp16", "scale", True, 0.0, "scale"): 0.000239,
    ("ring_mla_fp16", "chunk", False, 0.0, "spread"): 0.00327,
    ("ring_mla_fp16", "chunk", True, 1.0, "lse spread"): 0.000537,
    ("ring_mla_fp16", "row", False, 1.0, "worst row"): 0.000763,
    ("ring_mla_fp16", "row", False, 0.0, "worst row"): 0.0118,
    ("ring_mla_fp16", "lse", True, 0.0, "lse spread"): 0.000148,
    ("flash_bf16", "scale", False, 0.0, "scale"): 0.00059,
    ("flash_bf16", "scale", True, 0.0, "scale"): 1.46e-06,
    ("flash_bf16", "chunk", False, 0.0, "spread"): 0.0101,
    ("flash_bf16", "chunk", True, 1.0, "lse spread"): 1.17e-05,
    ("flash_bf16", "row", False, 1.0, "worst row"): 0.0172,
    ("flash_bf16", "row", False, 0.0, "worst row"): 0.0257,
    ("flash_bf16", "lse", True, 0.0, "lse spread"): 3.12e-06,
    ("decode_fp16_lse", "chunk", False, 0.0, "spread"): 0.00588,
    ("decode_fp16_lse", "chunk", True, 1.0, "lse spread"): 0.00486,
    ("decode_fp16_lse", "row", False, 1.0, "worst row"): 0.000769,
    ("decode_fp16_lse", "row", False, 0.0, "worst row"): 0.0152,
    ("decode_fp16_lse", "lse", True, 0.0, "lse spread"): 0.00125,
    ("fia_fp16", "scale", False, 0.0, "scale"): 6.15e-05,
    ("fia_fp16", "scale", True, 0.0, "scale"): 1.46e-06,
    ("fia_fp16", "chunk", False, 0.0, "spread"): 0.00107,
    ("fia_fp16", "chunk", True, 1.0, "lse spread"): 1.17e-05,
    ("fia_fp16", "row", False, 1.0, "worst row"): 0.000473,
    ("fia_fp16", "row", False, 0.0, "worst row"): 0.00179,
    ("fia_fp16", "lse", True, 0.0, "lse spread"): 3.09e-06,
    ("softmax_fp16", "scale", False, 0.0, "scale"): 0.00011,
    ("softmax_fp16", "scale", True, 0.0, "scale"): 1.46e-06,
    ("softmax_fp16", "chunk", False, 0.0, "spread"): 0.00132,
    ("softmax_fp16", "chunk", True, 1.0, "lse spread"): 1.17e-05,
    ("softmax_fp16", "row", False, 1.0, "worst row"): 0.000742,
    ("softmax_fp16", "row", False, 0.0, "worst row"): 0.00247,
    ("softmax_fp16", "lse", True, 0.0, "lse spread"): 3.09e-06,
    ("eager_fp16", "scale", False, 0.0, "scale"): 0.000355,
    ("eager_fp16", "scale", True, 0.0, "scale"): 0.000126,
    ("eager_fp16", "chunk", False, 0.0, "spread"): 0.00307,
    ("eager_fp16", "chunk", True, 1.0, "lse spread"): 0.000444,
    ("eager_fp16", "row", False, 1.0, "worst row"): 0.000758,
    ("eager_fp16", "row", False, 0.0, "worst row"): 0.0114,
    ("eager_fp16", "lse", True, 0.0, "lse spread"): 0.000128,
    ("rounded_sum_fp16", "scale", False, 0.0, "scale"): 7.51e-05,
    ("rounded_sum_fp16", "scale", True, 0.0, "scale"): 2.67e-05,
    ("rounded_sum_fp16", "chunk", False, 0.0, "spread"): 0.00117,
    ("rounded_sum_fp16", "chunk", True, 1.0, "lse spread"): 0.000162,
    ("rounded_sum_fp16", "row", False, 1.0, "worst row"): 0.000754,
    ("rounded_sum_fp16", "row", False, 0.0, "worst row"): 0.00172,
    ("rounded_sum_fp16", "lse", True, 0.0, "lse spread"): 4.23e-05,
    ("scaled_query_fp16", "scale", False, 0.0, "scale"): 5.95e-05,
    ("scaled_query_fp16", "scale", True, 0.0, "scale"): 5.11e-05,
    ("scaled_query_fp16", "chunk", False, 0.0, "spread"): 0.00113,
    ("scaled_query_fp16", "chunk", True, 1.0, "lse spread"): 1.22e-05,
    ("scaled_query_fp16", "row", False, 1.0, "worst row"): 0.000754,
    ("scaled_query_fp16", "row", False, 0.0, "worst row"): 0.00191,
    ("scaled_query_fp16", "lse", True, 0.0, "lse spread"): 3.09e-06,
    ("fia_bf16", "scale", False, 0.0, "scale"): 0.000473,
    ("fia_bf16", "scale", True, 0.0, "scale"): 1.46e-06,
    ("fia_bf16", "chunk", False, 0.0, "spread"): 0.00839,
    ("fia_bf16", "chunk", True, 1.0, "lse spread"): 1.17e-05,
    ("fia_bf16", "row", False, 1.0, "worst row"): 0.0059,
    ("fia_bf16", "row", False, 0.0, "worst row"): 0.0143,
    ("fia_bf16", "lse", True, 0.0, "lse spread"): 3.09e-06,
    ("softmax_bf16", "scale", False, 0.0, "scale"): 0.000897,
    ("softmax_bf16", "scale", True, 0.0, "scale"): 1.46e-06,
    ("softmax_bf16", "chunk", False, 0.0, "spread"): 0.0112,
    ("softmax_bf16", "chunk", True, 1.0, "lse spread"): 1.17e-05,
    ("softmax_bf16", "row", False, 1.0, "worst row"): 0.0178,
    ("softmax_bf16", "row", False, 0.0, "worst row"): 0.0289,
    ("softmax_bf16", "lse", True, 0.0, "lse spread"): 3.09e-06,
    ("eager_bf16", "scale", False, 0.0, "scale"): 0.00259,
    ("eager_bf16", "scale", True, 0.0, "scale"): 0.00124,
    ("eager_bf16", "chunk", False, 0.0, "spread"): 0.0248,
    ("eager_bf16", "chunk", True, 1.0, "lse spread"): 0.00453,
    ("eager_bf16", "row", False, 1.0, "worst row"): 0.0181,
    ("eager_bf16", "row", False, 0.0, "worst row"): 0.097,
    ("eager_bf16", "lse", True, 0.0, "lse spread"): 0.00116,
    ("rounded_sum_bf16", "scale", False, 0.0, "scale"): 0.000611,
    ("rounded_sum_bf16", "scale", True, 0.0, "scale"): 0.000234,
    ("rounded_sum_bf16", "chunk", False, 0.0, "spread"): 0.00982,
    ("rounded_sum_bf16", "chunk", True, 1.0, "lse spread"): 0.00132,
    ("rounded_sum_bf16", "row", False, 1.0, "worst row"): 0.0173,
    ("rounded_sum_bf16", "row", False, 0.0, "worst row"): 0.0256,
    ("rounded_sum_bf16", "lse", True, 0.0, "lse spread"): 0.000309,
    ("scaled_query_bf16", "scale", False, 0.0, "scale"): 0.000916,
    ("scaled_query_bf16", "scale", True, 0.0, "scale"): 0.000436,
    ("scaled_query_bf16", "chunk", False, 0.0, "spread"): 0.00982,
    ("scaled_query_bf16", "chunk", True, 1.0, "lse spread"): 1.22e-05,
    ("scaled_query_bf16", "row", False, 1.0, "worst row"): 0.0173,
    ("scaled_query_bf16", "row", False, 0.0, "worst row"): 0.0256,
    ("scaled_query_bf16", "lse", True, 0.0, "lse spread"): 3.09e-06,
    ("float32", "scale", False, 0.0, "scale"): 6.99e-07,
    ("float32", "scale", True, 0.0, "scale"): 6.15e-07,
    ("float32", "chunk", False, 0.0, "spread"): 8.85e-06,
    ("float32", "chunk", True, 1.0, "lse spread"): 1.17e-05,
    ("float32", "row", False, 1.0, "worst row"): 1.75e-06,
    ("float32", "row", False, 0.0, "worst row"): 8.72e-06,
    ("float32", "lse", True, 0.0, "lse spread"): 2.62e-06,
    ("float64", "scale", False, 0.0, "scale"): 2.55e-15,
    ("float64", "scale", True, 0.0, "scale"): 2.33e-15,
    ("float64", "chunk", False, 0.0, "spread"): 3.24e-14,
    ("float64", "chunk", True, 1.0, "lse spread"): 4.58e-14,
    ("float64", "row", False, 1.0, "worst row"): 4.33e-15,
    ("float64", "row", False, 0.0, "worst row"): 3.17e-14,
    ("float64", "lse", True, 0.0, "lse spread"): 1.12e-14,
}


@cache
def wrong(profile: str, fault: str, mean: float, size: float) -> Result:
    return SIZED[fault](bench(profile, mean), size)


def caught(profile: str, fault: str, with_lse: bool, mean: float, test: str, size: float) -> bool:
    """Whether this test catches the fault of this size, and no other result of the judge is meant."""
    return test in bench(profile, mean).failed(wrong(profile, fault, mean, size), with_lse=with_lse)


# Limits: what is judged, what is named, what is in range.


def key_is_named(regime: Callable[[], Regime], with_lse: bool, change: float) -> bool:
    one = regime()
    return "key" in one.verdict(reweighted(regime, change), with_lse=with_lse).failed_tests


@cache
def reweighted(regime: Callable[[], Regime], change: float) -> Result:
    return regimes.key_reweighted(regime().problem, 5, change)


def lattice_is_named(count: float) -> bool:
    """The first `count` outputs of ordinary data are rounded to BF16."""
    one = bench("flash_fp16")
    out = one.correct.out.copy().ravel()
    out[: round(count)] = rounded(out[: round(count)], "bfloat16")
    return "bfloat16" in one.failed(one.correct._replace(out=out.reshape(one.correct.out.shape)), with_lse=False)


def small_lattice_is_named(least: float) -> bool:
    """All outputs lie between `least` and twice that, and are rounded to BF16."""
    some = regimes.rng(40)
    value = some.uniform(1.2, 1.8, (8, 1, 16)) * least + some.uniform(0, 0.1 * least, (8, 64, 16))
    one = Regime(regimes.one_row(some.uniform(-1, 1, (8, 64)), value), "flash_fp16")
    result = one.result._replace(out=rounded(one.result.out, "bfloat16"))
    return "bfloat16" in one.verdict(result, with_lse=False).failed_tests


def scale_is_not_named(noise: float) -> bool:
    """A scale that is off, and errors of `noise` σ besides, which no scale explains."""
    one = bench("float32")
    result = wrong("float32", "scale", 0.0, 1e-4)
    signs = regimes.rng(41).choice([-1.0, 1.0], result.out.shape) * 2.18e-7
    result = result._replace(out=(result.out + noise * signs).astype(np.float32))
    return "scale" not in one.failed(result, with_lse=False)


def scale_is_wrong(size: float) -> bool:
    """Whether FP16 outputs of a scale that is off by so much are called wrong, and not only remarked on."""
    one = Regime(bench("flash_fp16").problem, "flash_fp16")
    return not one.verdict(wrong("flash_fp16", "scale", 0.0, size), with_lse=False).passed


def is_out_of_range(dtype: str, keys: int, value: float, beyond: float) -> bool:
    """Whether an output that exceeds all values by `beyond` is garbage."""
    key = np.zeros((1, keys, 1, 1))
    one = Regime(Problem(key[:, :1], key, key + value, 1.0).cast(dtype), {"float16": "flash_fp16"}.get(dtype, dtype))
    return bool(rows_out_of_range(one.asked, np.full((1, 1, 1, 1), value + beyond), None).any())


def rows_chosen(keys: float, queries: int = 4096) -> float:
    """The share of the rows that are judged."""
    query, key = (np.zeros((1, n, 1, 1), np.float16) for n in (queries, round(keys)))
    return float(chosen_rows(Regime(Problem(query, key, key, 1.0), "flash_fp16").asked, 0).mean())


def share_of_a_large_problem() -> float:
    """The least share of rows that are judged, as of a problem of a billion times `WORK`."""
    with changed(f"{JUDGING}.sampling", "WORK", 1):
        return rows_chosen(1024, queries=1024)


EDGES: dict[str, tuple[Callable[[float], bool], float]] = {
    "least change of a key": (partial(key_is_named, regimes.many_rows, True), 0.2423),
    "most change of a key": (lambda size: not key_is_named(regimes.many_rows, True, size), 3.0445),
    "a key like the output": (partial(key_is_named, regimes.nearly_constant, False), 0.396),
    "outputs on the BF16 lattice": (lattice_is_named, 378),
    "noise beside a scale": (scale_is_not_named, 52),
    "range of float32, few keys": (partial(is_out_of_range, "float32", 4, 1.0), 8.705e-6),
    "range of float16": (partial(is_out_of_range, "float16", 4, 1.0), 4.894e-3),
    "rows of which a sample is judged": (lambda keys: rows_chosen(keys) < 1, 2**28 / 4096),
    "a scale that is no exponential": (scale_is_wrong, 1.07e-4),
    "range near 0": (partial(is_out_of_range, "float16", 4, 0.0), 4 * 2.0**-24),
}


def spread_counts(spacings: float) -> float:
    """1 where outputs with so small a σ are in the spread test."""
    return float(np.isfinite(regimes.beside_a_sink(spacings).verdict().z))


def scale_z(offset: float) -> float:
    return abs(regimes.shared_cells(offset).verdict(with_lse=False).scale_z_score)


NUMBERS: dict[str, tuple[Callable[[], float], float]] = {
    "σ of 2^-9.5 spacings counts": (partial(spread_counts, 0.7 * 2.0**-10), 1.0),
    "σ of 2^-10.5 spacings does not": (lambda: 1 - spread_counts(0.35 * 2.0**-10), 1.0),
    "rows a tenth of a spacing apart": (partial(scale_z, 0.09), 0.5518),
    "rows a fifth of a spacing apart": (partial(scale_z, 0.19), 1.136),
    "products that are kept": (lambda: regimes.flushed(1.5, signs=False).share("underflow"), 0.0),
    "one row in 128": (share_of_a_large_problem, 1 / 128),
    "BF16 lattice of normal numbers": (lambda: float(small_lattice_is_named(2.0**-14)), 1.0),
    "no BF16 lattice of subnormal ones": (lambda: 1 - float(small_lattice_is_named(2.0**-15)), 1.0),
}


# What guards what.

WIDTH = 0.04
"""z of a correct result lies so near its place, relative to it. Other exponentials move it by less."""

PINS: dict[str, Pin | Edge] = {
    **{name: Pin(lambda one=one: one().z(), z * (1 - WIDTH), z * (1 + WIDTH)) for name, (one, _, _, z) in OUT.items()},
    **{
        name: Pin(lambda one=one: one().lse_z(), z * (1 - WIDTH), z * (1 + WIDTH))
        for name, (one, _, _, z) in LSE.items()
    },
    **{name: Pin(measure, z * (1 - WIDTH), z * (1 + WIDTH)) for name, (measure, z) in NUMBERS.items()},
    **{name: Edge(says, at) for name, (says, at) in EDGES.items()},
    # In float64 the oracle's own errors depend on the order in which a library sums.
    **{
        " ".join((fault[0], *fault[1:2], "with lse" if fault[2] else "out", fault[4], f"mean {fault[3]:g}")): Edge(
            partial(caught, *fault), size, 1.5 if fault[0] == "float64" else 1.05
        )
        for fault, size in SMALLEST.items()
    },
}


GUARDS = (
    of_constant(f"{MODEL}.probabilities", "LEAST_CELLS", "keys at 12 least numbers", "keys at 24 least numbers"),
    of_constant(f"{MODEL}.probabilities", "LEAST_ERROR", "keys at 12 least numbers"),
    of_text(
        f"{MODEL}.probabilities", "typical=1 / np.sqrt(3)", "typical=2 / np.sqrt(3)", "typical=0.5 / np.sqrt(3)",
        "keys below half a least number",
    ),
    of_twelfth(f"{MODEL}.probabilities", "/ np.sqrt(12)", "pairs in one cell"),
    of_text(f"{MODEL}.probabilities", "variance_of_sum(sigma, a.ties) if", "2 * variance_of_sum(sigma, a.ties) if",
        "0.5 * variance_of_sum(sigma, a.ties) if", "rounded_sum_fp16 lse with lse lse spread mean 0"),
    of_text(f"{MODEL}.arithmetic", "rows.per_key(rows.chunk_weight), 0", "rows.per_key(2 * rows.chunk_weight), 0",
        "rows.per_key(0.5 * rows.chunk_weight), 0", "softmax_fp16 chunk out spread mean 0"),
    of_constant(
        f"{MODEL}.outputs", "NEAR", "chunks 5 to 8 spacings from the best", "chunks 2 to 4 spacings from the best"
    ),
    of_constant(f"{MODEL}.outputs", "NEAR", "merges of 5 to 8 spacings", "merges of 2 to 4 spacings"),
    of_twelfth(f"{MODEL}.outputs", "weight * spacing / np.sqrt(12)", "chunks 5 to 8 spacings from the best"),
    of_twelfth(f"{MODEL}.outputs", "done * spacing / np.sqrt(12)", "merges of 5 to 8 spacings"),
    of_twelfth(f"{MODEL}.outputs", "np.sqrt(merges / 12)", "merges in an unknown order"),
    of_twelfth(f"{MODEL}.outputs", "a.out.spacing(a.rows.out) ** 2 / 12", "a last rounding"),
    of_constant(f"{MODEL}.scores", "OF_SCORE", "large scores"),
    of_constant(f"{MODEL}.scores", "OF_DISTANCE", "distant keys"),
    of_constant(f"{MODEL}.scores", "OF_PRODUCT", "orthogonal"),
    of_constant(f"{MODEL}.scores", "OF_TANH", "scores under a softcap"),
    of_constant(f"{MODEL}.scores", "OF_ADDED", "scores with a bias"),
    of_text(
        f"{MODEL}.scores",
        "a.head_dim * (rows",
        "2 * a.head_dim * (rows",
        "a.head_dim / 2 * (rows",
        "long products",
    ),
    of_text(f"{MODEL}.scores", "(a.eps**2 / 3)", "(a.eps**2 / 1.5)", "(a.eps**2 / 6)", "large scores"),
    of_twelfth(f"{MODEL}.scores", "a.scale_size)) ** 2 / 12", "coarse products"),
    of_twelfth(f"{MODEL}.scores", "np.where(is_exact, 0.0, spacing / np.sqrt(12))", "coarse scaling"),
    of_twelfth(f"{MODEL}.running_max", "np.where(rises, step, 0.0) / np.sqrt(12)", "a rescale after 512 keys"),
    of_twelfth(f"{MODEL}.running_max", "self._steps()[0] / np.sqrt(12)", "coarse differences"),
    of_twelfth(f"{MODEL}.running_max", "self._steps()[1] / np.sqrt(12)", "a fine maximum"),
    of_constant(f"{MODEL}.running_max", "LEAST_TILE", "a rescale after 16 keys", "a new maximum after 8 keys"),
    of_constant(f"{MODEL}.sums", "OF_TERM", "few keys"),
    of_constant(f"{MODEL}.sums", "OF_ADDITION", "4,096 terms"),
    of_text(f"{MODEL}.sums", "out = 2 * (sigma", "out = 4 * (sigma", "out = (sigma", "4,096 terms"),
    of_constant(f"{MODEL}.drift", "CHANCE", "terms that err nearly alike"),
    of_constant(
        f"{MODEL}.drift", "FEW_VALUES", "one product for one key in eight", "one product for one key in fourteen"
    ),
    of_twelfth(f"{MODEL}.drift", "_share_of_additions(total) / np.sqrt(12)", "products of 12 tokens"),
    of_constant(f"{MODEL}.sums", "OF_MERGE", "merges at lse 100"),
    of_constant(f"{MODEL}.sums", "MERGE_SIZE", "merges at lse 0"),
    of_twelfth(f"{MODEL}.sums", "spacing**2 / 12", "totals at lse 70"),
    of_text(f"{MODEL}.sums", "np.sqrt(merges) *", "2 * np.sqrt(merges) *", "0.5 * np.sqrt(merges) *",
        "totals at lse 70 in an unknown order"),
    of_text(f"{MODEL}.sums", "product < least", "product < least * 2", "product < least / 2", "products that become 0",
        "products that are kept"),
    of_text(f"{MODEL}.sums", "least**2 / 3", "least**2 / 1.5", "least**2 / 6", "sums that become 0"),
    of_constant(f"{MODEL}.scores", "OF_SCALE", "a factor in base two"),
    of_constant(f"{MODEL}.arithmetic", "BLOCK", "products that are cut off"),
    of_constant(f"{MODEL}.arithmetic", "BLOCK", "values that are cut off"),
    of_text(f"{MODEL}.sums", "typical=1 / np.sqrt(3)", "typical=2 / np.sqrt(3)", "typical=0.5 / np.sqrt(3)",
        "values that are cut off"),
    of_constant(f"{MODEL}.sums", "ABSORBED", "absorbed keys"),
    of_constant(f"{MODEL}.sums", "ABSORBED", "absorbed chunks"),
    of_constant(f"{MODEL}.sums", "SMALL", "keys of 5 to 7 roundings", "keys of 9 to 15 roundings"),
    of_constant(f"{MODEL}.sums", "SMALL", "chunks of 5 to 7 roundings", "chunks of 9 to 15 roundings"),
    of_constant(f"{MODEL}.lse", "LOG_SIZE", "small merges"),
    of_twelfth(f"{MODEL}.lse", "a.chunk_lse_spacing**2 / 12", "stored lse"),
    of_constant(f"{MODEL}.arithmetic", "ORACLE", "float64"),
    of_constant(f"{MODEL}.ties", "CELLS", "pairs in one cell", "pairs one cell apart"),
    of_constant(f"{MODEL}.ties", "FURTHEST", "keys 2^16 below", "keys 2^15 below"),
    of_constant(f"{MODEL}.ties", "MANY", "one key in seven tied", "one key in fourteen tied"),
    # It is a logarithm: a cell that is twice or half as wide.
    of_constant(
        f"{MODEL}.ties", "CELL_DIGITS", "pairs in one cell of scores", "pairs one cell of scores apart", twice=2, half=4
    ),
    of_constant(f"{MODEL}.row_covariance", "EIGHTH", "rows a tenth of a spacing apart"),
    # Twice as many digits would follow float32, with an array of a hundred gigabytes.
    of_constant(f"{MODEL}.row_covariance", "DIGITS", "rows a tenth of a spacing apart", twice=6),
    of_constant(f"{MODEL}.model", "LEAST_SIGMA", "σ of 2^-9.5 spacings counts", "σ of 2^-10.5 spacings does not"),
    of_constant(f"{JUDGING}.statistic", "SLACK", "flash_fp16 chunk out spread mean 0"),
    of_constant(f"{JUDGING}.statistic", "SLACK", "flash_fp16 lse with lse lse spread mean 0"),
    of_constant(f"{JUDGING}.statistic", "SLACK", "ring_mla_fp16 row out worst row mean 1"),
    of_constant(f"{JUDGING}.statistic", "LIMIT", "flash_fp16 chunk out spread mean 0"),
    of_constant(f"{JUDGING}.statistic", "LIMIT", "ring_mla_fp16 row out worst row mean 1"),
    of_constant(f"{JUDGING}.statistic", "LIMIT", "float32 lse with lse lse spread mean 0"),
    of_constant(f"{JUDGING}.verdict", "SCALE_LIMIT", "flash_fp16 scale out scale mean 0"),
    of_constant(f"{JUDGING}.verdict", "SCALE_LIMIT", "float32 scale with lse scale mean 0"),
    of_constant(f"{JUDGING}.verdict", "LEAST_CHANGE", "least change of a key"),
    of_constant(f"{JUDGING}.verdict", "MOST_CHANGE", "most change of a key"),
    of_constant(f"{JUDGING}.verdict", "LATTICE_SHARE", "outputs on the BF16 lattice"),
    of_constant(f"{JUDGING}.verdict", "EXPLAINED", "noise beside a scale"),
    of_constant(f"{JUDGING}.score_tests", "OWN_ERROR", "a key like the output"),
    of_constant(
        f"{JUDGING}.score_tests",
        "LEAST_NORMAL",
        "BF16 lattice of normal numbers",
        "no BF16 lattice of subnormal ones",
    ),
    of_constant(f"{JUDGING}.sampling", "WORK", "rows of which a sample is judged"),
    of_constant(f"{JUDGING}.sampling", "TILE", "one row in 128"),
    of_constant(f"{JUDGING}.range_check", "GENEROUS", "range of float32, few keys", "range of float16"),
    of_constant(f"{JUDGING}.range_check", "OTHER", "range of float32, few keys"),
    of_constant(f"{JUDGING}.verdict", "APPROXIMATE_EXP", "a scale that is no exponential"),
    of_constant(f"{JUDGING}.range_check", "STORED", "range near 0"),
)  # fmt: skip

EXPLAINED = {
    "drift.HALVINGS": "costs time: the first eighth of a sum has an eighth of the keys, and a finer spacing",
    "drift.RANDOM": "costs time: terms that err at random do so in finer spacings, too",
    "drift.WINDOW": "costs time, as ALIKE",
    "drift.SAME": "what differs hardly ever agrees so far; what is equal, to the digits of float64",
    "drift.SAMPLE": "costs time: values that are compared",
    "drift.ALIKE": "costs time: where p is of many sizes, so are products, and none drifts",
    "ties.WORK": "costs time: above it a ratio of four columns stands for all",
    "ties.COLUMNS": "costs time: columns of which the ratio is measured",
    "evidence.FP16_NUMBERS": "there are so many",
    "evidence.SEVERAL": "costs time: from when on there are threads",
    "sampling.ELEMENTS": "costs memory",
    "sampling.ROWS": "costs memory",
    "sampling.LEAST_ROWS": "costs time",
    "statistic.LEAST_PROBABILITY": "a z-score of 37 is beyond LIMIT, as are those of its double and its half",
    "verdict.MOST_NAMES": "words: how many names a sentence has",
    "verdict.TELLING": "words: below it the mean is not told",
    "evidence.BEYOND": "words: what lies beyond its bound is not told as 100 % of it",
    "problem.FURTHEST": "positions beyond it are refused, and none is meant to be near it",
    "problem.PAIRS": "costs memory",
}
"""Constants that no pin guards, and why."""


@pytest.fixture(autouse=True)
def _unchecked():
    with unchecked():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", PINS)
def test_the_judge_is_where_it_was(name):
    one = PINS[name]
    assert one.holds(), one.measure() if isinstance(one, Pin) else one


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["twice", "half"])
@pytest.mark.parametrize("guard", GUARDS, ids=[guard.name for guard in GUARDS])
def test_twice_or_half_of_a_constant_is_noticed(guard, direction):
    """Else the judge could become laxer, or stricter, and no test would say so."""
    with guard.twice() if direction == "twice" else guard.half():
        assert not all(PINS[name].holds() for name in guard.pins)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OUT, *LSE])
def test_the_term_is_what_makes_sigma_there(name):
    """A pin speaks of the term that it is said to speak of, and of a result that passes."""
    regime, terms, least, _ = (OUT if name in OUT else LSE)[name]
    assert regime().share(*terms, lse=name in LSE) >= least
    assert regime().verdict().passed


@pytest.mark.parametrize(("regime", "of_lse"), [(regimes.cut_off, True), (regimes.cut_off_values, False)])
def test_sums_that_are_cut_off_move_as_far_as_their_terms_say(regime, of_lse):
    """On average between nothing and twice the mean, in its direction: of lse, and of `out`."""
    together = size = 0.0
    for rows, model, result in regime().models():
        mean = model.lse_mean if of_lse else model.mean
        error = result.lse - rows.lse if of_lse else result.out - rows.out
        together, size = together + float((error * mean).sum()), size + float((mean**2).sum())
    assert 0.5 < together / size < 1.5


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize(
    ("profile", "size", "is_remark"),
    [("flash_fp16", 8e-5, True), ("flash_fp16", 2e-4, False), ("float32", 1e-6, False)],
)
def test_a_scale_as_little_off_as_approximate_exponentials_is_a_remark(profile, size, is_remark, with_lse):
    """It is one only where nothing else is wrong: with lse the errors of lse show it."""
    one = Regime(bench(profile).problem, profile).verdict(wrong(profile, "scale", 0.0, size), with_lse=with_lse)
    if with_lse and profile == "flash_fp16":
        assert {"lse spread", "scale"} <= set(one.failed_tests)
        assert (one.passed, one.remarks) == (False, [])
        return
    assert one.passed is is_remark
    assert one.failed_tests == (() if is_remark else ("scale",))
    assert [("approximate exponentials" in remark) for remark in one.remarks] == [True] * is_remark
    assert not any("approximate" in reason for reason in one.reasons)
    assert len(one.reasons) == (0 if is_remark else 1)


def test_a_scale_a_little_off_beside_another_fault_counts():
    """A row of another place is wrong as well: then both are told."""
    result = wrong("flash_fp16", "scale", 0.0, 8e-5)
    out = result.out.copy()
    out[0, 3, 0] = out[0, 4, 0]
    one = Regime(bench("flash_fp16").problem, "flash_fp16").verdict(result._replace(out=out), with_lse=False)
    assert not one.passed
    assert not one.remarks


@pytest.mark.parametrize("module", MODULES)
def test_every_constant_is_pinned_or_explained(module):
    short = module.rpartition(".")[2]
    guarded = {guard.name for guard in GUARDS}
    for name in (f"{short}.{name}" for name in constants(module)):
        assert (name in guarded) != (name in EXPLAINED), name


def test_what_is_explained_exists():
    there = {f"{module.rpartition('.')[2]}.{name}" for module in MODULES for name in constants(module)}
    assert set(EXPLAINED) <= there


def test_every_profile_has_faults_of_out_and_of_lse():
    kinds = {(profile, with_lse) for profile, _, with_lse, _, _ in SMALLEST}
    assert kinds == {(profile, with_lse) for profile in PROFILES for with_lse in (False, True)}
