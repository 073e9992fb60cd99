"""Inputs on which roundings conspire: a plain loop that obeys a profile comes as near to the bound as can be reached.

All roundings are to nearest; only the numbers are chosen. Each function returns what the loop did to one number of the
bound: the error, over what the bound has for it.
"""

from functools import cache

import numpy as np

from cpjax.crosscheck.error_model.bound import Bound
from cpjax.crosscheck.error_model.model import ErrorModel
from cpjax.crosscheck.exact.attention import Rows, attention_rows
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.exact.logits import Logits
from cpjax.precision import PROFILES, Precision

EPS = 2.0**-24
"""Unit roundoff of float32."""

WIDE = Precision("fp16 probabilities, wide out", "float32", "float32", "float16", "float32")
"""Where only probabilities are rounded coarsely: the last rounding does not hide what they did."""

WIDE_RING = Precision("fp16 scores, wide out", "float32", "float16", "float32", "float32")


def rows_of(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, chunk: np.ndarray | None = None
) -> Rows:
    """One row: query `[H]`, keys `[S, H]`, values `[S, V]`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    chunk = np.zeros(len(key), int) if chunk is None else chunk
    return attention_rows(query[None], key, value, np.ones((1, len(key)), bool), chunk, scale)


def bound_of(rows: Rows, precision: Precision, head_dim: int, scale: float) -> Bound:
    return ErrorModel(rows, precision, np.arange(len(rows.chunks))[None], head_dim, scale).bound


def added(terms: np.ndarray) -> np.ndarray:
    """float32 terms added one after the other."""
    return np.add.accumulate(np.asarray(terms, np.float32), axis=0)[-1]


def product(query: np.ndarray, key: np.ndarray, scale: float, fmt: str = "float32") -> np.ndarray:
    """scale · q·k, the sum one term after the other, rounded to the format of scores after each step."""
    raw = added((np.float32(query) * np.float32(key)).T).astype(fmt).astype(np.float32)
    return (raw * np.float32(scale)).astype(fmt).astype(np.float32)


def softmax(score: np.ndarray, value: np.ndarray, probability: str = "float32") -> tuple[np.ndarray, np.float32]:
    """out and lse of one chunk in float32, from scores that are there already."""
    top = score.max()
    p = np.exp(score - top)
    weight = added(p)
    terms = p.astype(probability).astype(np.float32)[:, None] * np.float32(value)
    return added(terms) / weight, top + np.log(weight)


def merged(chunks: list[tuple[np.ndarray, np.float32]], carry: str) -> tuple[np.ndarray, np.float32]:
    """Chunks merged one after the other; the output is rounded to the carry format after each."""
    out, lse = chunks[0]
    for other, other_lse in chunks[1:]:
        base = np.maximum(lse, other_lse)
        one, two = np.exp(lse - base), np.exp(other_lse - base)
        out = ((one * out + two * other) / (one + two)).astype(carry).astype(np.float32)
        lse = base + np.log(one + two)
    return out, lse


# Probabilities.


def probabilities_above_the_middle() -> float:
    """Every p is just above the middle of two numbers at the lower end of a binade; the values are all 1."""
    score = np.log(np.concatenate([[1.0], np.full(200, 0.5 * (1 + 2.0**-11 + 2.0**-18))])).astype(np.float32)
    value = np.ones((201, 1))
    value[0] = 0
    return _of_part("probabilities", WIDE, score, value, softmax(score, value, "float16")[0])


def probabilities_above_half_the_least() -> float:
    """Every p is just more than half the least number of FP16, and becomes that."""
    score = np.log(np.concatenate([[1.0], np.full(200, 2.0**-25 * (1 + 2.0**-7))])).astype(np.float32)
    value = np.ones((201, 1))
    value[0] = 0
    return _of_part("probabilities", WIDE, score, value, softmax(score, value, "float16")[0])


def _of_part(name: str, precision: Precision, score: np.ndarray, value: np.ndarray, out: np.ndarray) -> float:
    rows = rows_of(np.ones(1), score[:, None], value, 1.0)
    return float(abs(out[0] - rows.out[0, 0]) / bound_of(rows, precision, 1, 1.0).parts[name][0, 0])


# Scores. Two keys with values +1 and −1: one score as much too large as can be, the other as much too small.


def _of_two(precision: Precision, query: np.ndarray, keys: np.ndarray, scale: float) -> float:
    value = np.array([[1.0], [-1.0]])
    rows = rows_of(query, keys, value, scale)
    out, _ = softmax(product(query, keys, scale, precision.score), value)
    return float(abs(out[0] - rows.out[0, 0]) / bound_of(rows, precision, len(query), scale).parts["scores"][0, 0])


def _extremes(query: float, keys: np.ndarray, scale: float, fmt: str) -> np.ndarray:
    """Of these keys of head dim 1 the two whose scores are rounded up and down most."""
    error = product(np.array([query]), keys[:, None], scale, fmt) - np.float64(query) * keys * scale
    return keys[[error.argmax(), error.argmin()]][:, None]


def scores_of_two_roundings() -> float:
    """Head dim 1 and |s| just above 1,024: product and scale are rounded, each the same way."""
    query, scale = float(np.float32(1.2345678)), float(np.float32(0.7654321))
    keys = np.float32(np.random.default_rng(1).uniform(1024, 1024.1, 40000) / (query * scale)).astype(np.float64)
    return _of_two(PROFILES["float32"], np.array([query]), _extremes(query, keys, scale, "float32"), scale)


def scores_of_a_long_product() -> float:
    """Head dim 64: after a first product of 1,024 each of 63 adds a little more, or less, than half a unit of it."""
    query = np.full(64, 2.0**-7)
    up, down = np.full(64, 0.51 * 2.0**-6), np.full(64, 0.49 * 2.0**-6)
    query[0], up[0], down[0] = 1.0, 1024.0, 1024.0
    return _of_two(PROFILES["float32"], query, np.stack([up, down]), 1.0)


def scores_in_fp16() -> float:
    """Scores in FP16 just above 8: product and scale are rounded the same way."""
    scale = 0.755859375
    keys = np.float32(np.random.default_rng(2).uniform(8.0, 8.2, 40000) / scale).astype(np.float64)
    return _of_two(WIDE_RING, np.ones(1), _extremes(1.0, keys, scale, "float16"), scale)


def _of_logits(products: np.ndarray, computed: np.ndarray, logits: Logits) -> float:
    """As `_of_two`, of two products `[2]`, the float32 logits that were computed from them, and what makes these."""
    value, no_chunks = np.array([[1.0], [-1.0]]), np.zeros(2, int)
    rows = attention_rows(np.ones((1, 1)), products[:, None], value, np.ones((1, 2), bool), no_chunks, 1.0, logits)
    out, _ = softmax(computed, value)
    bound = bound_of(rows, PROFILES["float32"], 1, 1.0)
    return float(abs(out[0] - rows.out[0, 0]) / bound.parts["scores"][0, 0])


def logits_of_a_softcap() -> float:
    """Small products under a softcap of 4,096, by 2 sigmoid(2y) - 1: the sum, and the quotient near 1, are rounded."""
    cap = np.float32(4096)
    products = np.float32(np.random.default_rng(7).uniform(-0.5, 0.5, 4000))
    power = np.exp(np.float64(-2) * (products / cap)).astype(np.float32)  # the nearest, whatever library there is
    computed = cap * (np.float32(2) / (1 + power) - np.float32(1))
    error = computed - cap * np.tanh(products.astype(np.float64) / cap)
    two = [error.argmax(), error.argmin()]
    return _of_logits(products[two].astype(np.float64), computed[two], Logits(softcap=float(cap)))


def logits_with_a_bias() -> float:
    """A bias of 1,000, and products of a little more and a little less than half a unit of it."""
    products, bias = np.float32([0.51, 0.49]) * np.float32(2.0**-14), np.full((1, 2), 1000.0)
    return _of_logits(products.astype(np.float64), np.float32(bias[0]) + products, Logits(bias=bias))


def _of_exponent(precision: Precision, query: float, top: float, keys: np.ndarray, scale: float) -> float:
    """Of these keys the one whose exponent is off most, beside a maximum: how much, over D of the bound."""
    all_keys = np.concatenate([[top], keys])
    fmt = precision.score
    score = product(np.array([query]), all_keys[:, None], scale, fmt)
    exact = np.float64(query) * all_keys * scale
    off = np.abs((score - score[0]).astype(fmt).astype(np.float64) - (exact - exact[0]))
    rows = rows_of(np.array([query]), all_keys[:, None], np.ones((len(all_keys), 1)), scale)
    return float((off[1:] / bound_of(rows, precision, 1, scale).of_exponent[0, 1:]).max())


def exponents_of_distant_keys() -> float:
    """float32 keys just 64 below the maximum, where numbers of the difference lie farthest apart."""
    keys = np.float32(np.random.default_rng(3).uniform(-63.75, -63.71, 4000)).astype(np.float64)
    return _of_exponent(PROFILES["float32"], 1.0, float(np.float32(0.3)), keys, 1.0)


def exponents_in_fp16() -> float:
    """FP16 keys just 16 below the maximum: product, scale, maximum and difference are all rounded."""
    keys = np.float32(np.random.default_rng(4).uniform(-20.9, -20.4, 4000)).astype(np.float64)
    return _of_exponent(WIDE_RING, 1.0, float(np.float32(0.5)), keys, 0.755859375)


# Sums.


@cache
def _sums() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.float32]:
    """A sum that starts with 1, and 511 terms of a little more than 3/2 of its unit: each is rounded up to 2.

    Times their values they are a little less than 3/2 and rounded down to 1.
    """
    score = np.log(np.concatenate([[1.0], np.full(511, 1.504 * 2.0**-23)])).astype(np.float32)
    value = np.full((512, 1), 1.496 / 1.504)
    value[0] = 1
    return score, value, *softmax(score, value)


def sums_that_round_one_way() -> float:
    score, value, out, _ = _sums()
    return _of_part("sums", PROFILES["float32"], score, value, out)


def lse_of_such_a_sum() -> float:
    score, value, _, lse = _sums()
    rows = rows_of(np.ones(1), score[:, None], value, 1.0)
    return float(abs(lse - rows.lse[0]) / bound_of(rows, PROFILES["float32"], 1, 1.0).of_lse[0])


# Outputs that are stored.


def _of_chunks(precision: Precision, score: np.ndarray, value: np.ndarray, part: str) -> float:
    """One key a chunk. Where merges are meant, the last one is the last rounding, half a spacing besides the part."""
    rows = rows_of(np.ones(1), score[:, None], value, 1.0, np.arange(len(score)))
    stored = np.float32(value).astype(precision.out).astype(np.float32)
    out, _ = merged(list(zip(stored, np.float32(score), strict=True)), precision.carry)
    most = bound_of(rows, precision, 1, 1.0).parts[part][0, 0]
    if part == "outputs of merges":
        most += FORMATS[precision.out].spacing(rows.out)[0, 0] / 2
    return float(abs(out[0] - rows.out[0, 0]) / most)


def chunks_above_the_middle() -> float:
    """Four chunks just above the middle between 1 and the next FP16 number."""
    value = np.full((4, 1), 1 + 2.0**-11 + 2.0**-18)
    return _of_chunks(PROFILES["flash_fp16"], np.zeros(4), value, "outputs of chunks")


def chunks_above_half_the_least() -> float:
    """Four chunks just above half the least FP16 number."""
    return _of_chunks(PROFILES["flash_fp16"], np.zeros(4), np.full((4, 1), 2.0**-25 * 1.001), "outputs of chunks")


def _merges(unit: float, start: float) -> tuple[np.ndarray, np.ndarray]:
    """A heavy chunk, and 40 that move the output by a little more than half a `unit` each, which becomes a whole one.

    The values that do so are found step by step, with the weights that the merge will have.
    """
    share = 2.0**-9
    score = np.log(np.concatenate([[1.0], np.full(40, share)]))
    running, values = start, [start]
    for done in range(40):
        weight = 1 + share * (done + 1)
        value = float(np.float16(running + 0.52 * unit * weight / share))
        values.append(value)
        running += unit
    return np.float32(score).astype(np.float64), np.array(values)[:, None]


def merges_that_round_up() -> float:
    return _of_chunks(PROFILES["flash_fp16"], *_merges(2.0**-10, 1.0), "outputs of merges")


def merges_of_the_least_numbers() -> float:
    return _of_chunks(PROFILES["flash_fp16"], *_merges(2.0**-24, 2.0**-20), "outputs of merges")


def weights_at_a_large_lse() -> float:
    """Two chunks of two keys near 1,024 with values +1 and −1: one lse is rounded up, the other down."""
    second = np.float32(1024 - np.random.default_rng(5).uniform(0, 0.5, 4000)).astype(np.float64)
    pairs = np.stack([np.full_like(second, 1024.25), second], axis=1)
    lse = np.array([softmax(np.float32(pair), np.ones((2, 1)))[1] for pair in pairs]).astype(np.float64)
    error = lse - np.logaddexp(*pairs.T)
    return _of_weights(PROFILES["float32"], pairs[error.argmax()], pairs[error.argmin()])


def weights_at_lse_0() -> float:
    """The same near 0, where a logarithm is exact but for its own rounding: the worst of many pairs."""
    some = np.random.default_rng(6)
    pairs = np.float32(np.log(some.uniform(0.2, 0.3, (400, 2, 2)))).astype(np.float64)
    return max(_of_weights(PROFILES["float32"], *pair) for pair in pairs)


def weights_of_lse_in_fp16() -> float:
    """Two chunks whose lse lies just above 8 and is stored in FP16: one is rounded up, the other down."""
    score = np.array([8 + 2.0**-8 * 1.01, 8 + 2.0**-8 * 0.99])
    rows = rows_of(np.ones(1), score[:, None], np.array([[1.0], [-1.0]]), 1.0, np.arange(2))
    stored = score.astype(np.float16).astype(np.float32)
    out, _ = merged([(np.float32([1]), stored[0]), (np.float32([-1]), stored[1])], "float32")
    bound = bound_of(rows, PROFILES["decode_fp16_lse"], 1, 1.0)
    return float(abs(out[0] - rows.out[0, 0]) / bound.parts["scores"][0, 0])


def _of_weights(precision: Precision, one: np.ndarray, two: np.ndarray) -> float:
    score, value = np.concatenate([one, two]), np.array([[1.0], [1.0], [-1.0], [-1.0]])
    rows = rows_of(np.ones(1), score[:, None], value, 1.0, np.array([0, 0, 1, 1]))
    chunks = [softmax(np.float32(x), np.full((2, 1), sign)) for x, sign in ((one, 1.0), (two, -1.0))]
    out, _ = merged(chunks, "float32")
    return float(abs(out[0] - rows.out[0, 0]) / bound_of(rows, precision, 1, 1.0).parts["weights of the merge"][0, 0])


# lse.


def _of_merged_lse(start: float, unit: float) -> float:
    """64 chunks of one key; each adds a little more than half a unit of lse, and becomes a whole one."""
    running, score = start, [start]
    for _ in range(63):
        more = float(np.float32(running + np.log(np.expm1(0.51 * unit))))
        score.append(more)
        running += unit
    score = np.array(score)
    rows = rows_of(np.ones(1), score[:, None], np.ones((64, 1)), 1.0, np.arange(64))
    _, lse = merged([(np.ones(1, np.float32), np.float32(s)) for s in score], "float32")
    return float(abs(lse - rows.lse[0]) / bound_of(rows, PROFILES["float32"], 1, 1.0).of_lse[0])


def merges_of_a_large_lse() -> float:
    return _of_merged_lse(1024.0, 2.0**-13)


def merges_of_an_lse_of_1() -> float:
    return _of_merged_lse(1.0, 2.0**-23)


# What is not judged.


def distortion_of_an_impossible_key(below: float) -> float:
    """A key far below the maximum whose product may be off by `below` + 8: how much the weights may be off with it.

    Query and key are large and orthogonal; there is no other way to an exponent that is off by so much.
    """
    size = np.sqrt((below + 8) / (4 * EPS))
    query, key = np.array([size, 0.0, 1.0, 0.0]), np.array([[0.0, 0.0, 0.0, 0.0], [0.0, size, -below, 0.0]])
    return float(bound_of(rows_of(query, key, np.ones((2, 1)), 1.0), PROFILES["float32"], 4, 1.0).distortion[0])
