"""A plain loop that adds one key after the other to one accumulator: it is correct, and however long, it must pass."""

import numpy as np
import pytest

from cpjax.crosscheck import judge
from cpjax.crosscheck.judging.statistic import SLACK

QUERIES, HEAD_DIM, SCALE = 8, 64, 0.125


def drawn(keys: int, scores: float, values: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value in float32: scores of so small a deviation, values near 1, one value, or one for half."""
    some = np.random.default_rng([keys, int(1e7 * scores)])
    query = scores * some.standard_normal((1, QUERIES, 1, HEAD_DIM))
    key = some.standard_normal((1, keys, 1, HEAD_DIM))
    value = 1 + 0.3 * some.standard_normal((1, keys, 1, 8))
    if values != "many":
        value[:, : keys // (1 if values == "one" else 2)] = 1.3
    query, key, value = (x.astype(np.float32) for x in (query, key, value))
    return query, key, value


def loop(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, *, lost: int = -1, divides_first: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(q kᵀ scale) v, maximum first; the key `lost` is left out. Probabilities are divided last, or first."""
    score = query[0, :, 0] @ key[0, :, 0].T * np.float32(SCALE)
    most = score.max(axis=1, keepdims=True)
    p = np.exp(score - most)
    total, product = np.zeros((QUERIES, 1), np.float32), np.zeros((QUERIES, value.shape[3]), np.float32)
    for j in range(key.shape[1]):
        total += p[:, j : j + 1] * np.float32(j != lost)
    divisor = total if divides_first else np.ones_like(total)
    for j in range(key.shape[1]):
        product += p[:, j : j + 1] / divisor * value[0, j] * np.float32(j != lost)
    out = product if divides_first else product / total
    return out[None, :, None], (most + np.log(total))[None, :, :]


def judged(query: np.ndarray, key: np.ndarray, value: np.ndarray, out: np.ndarray, lse: np.ndarray | None):
    return judge(query, key, value, out, lse, scale=SCALE, is_causal=False, cp=1, layout="contiguous")


@pytest.mark.parametrize("values", ["many", "one", "half"])
@pytest.mark.parametrize("scores", [0.0, 1e-6, 1e-5, 1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("keys", [300, 4096, 9000])
def test_a_correct_loop_passes_however_long_and_however_alike_its_terms(keys, scores, values):
    query, key, value = drawn(keys, scores, values)
    out, lse = loop(query, key, value)
    verdict = judged(query, key, value, out, lse)
    assert verdict.passed, verdict.reasons
    assert verdict.lse_z < SLACK**0.5
    assert not verdict.z > SLACK**0.5  # NaN where every output must be exact
    assert judged(query, key, value, out, None).passed


@pytest.mark.parametrize("keys", [300, 2653, 9000])
def test_a_loop_that_divides_first_passes(keys):
    """Its products are p/Σp · v. Sums of v itself are exact here: each column has one value, of few digits."""
    query, key, value = drawn(keys, 0.0, "one")
    value[:] = np.random.default_rng(keys).uniform(0.5, 2, 8).astype(np.float16)
    verdict = judged(query, key, value, *loop(query, key, value, divides_first=True))
    assert verdict.passed, verdict.reasons


def few(keys: int, tokens: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value of a text of so many different tokens: keys and values of one token are equal."""
    some = np.random.default_rng([keys, tokens, seed])
    token, other = some.integers(tokens, size=(2, keys))
    query = 0.5 * some.standard_normal((1, QUERIES, 1, HEAD_DIM))
    key, value = some.standard_normal((1, tokens, 1, HEAD_DIM)), some.standard_normal((1, tokens, 1, 8))
    # Of every second draw the values are those of other tokens: then each p meets each value.
    return tuple(x.astype(np.float32) for x in (query, key[:, token], value[:, token if seed % 2 else other]))


@pytest.mark.parametrize("divides_first", [False, True])
@pytest.mark.parametrize("tokens", [2, 5, 9])
@pytest.mark.parametrize("keys", [300, 1132, 9000])
def test_sums_of_a_few_products_pass(keys, tokens, divides_first):
    """Each product is met often, and loses the same each time: of as many as there are tokens, with either sign."""
    z = []
    for seed in range(4):
        query, key, value = few(keys, tokens, seed)
        out, lse = loop(query, key, value, divides_first=divides_first)
        verdict = judged(query, key, value, out, lse)
        assert verdict.passed, verdict.reasons
        z.append(verdict.z)
    assert max(z) < SLACK**0.5
    assert max(z) > 0.15


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_a_sum_that_starts_with_a_sink_passes(share):
    """All other terms are added to a sum of nearly the final size."""
    query, key, value = drawn(2000, 0.1, "many")
    query[..., 0] = 10.0
    key[..., 0] = 0.0
    key[:, 0, :, 0] = np.log(share / (1 - share) * 2000) / (10 * SCALE)
    out, lse = loop(query, key, value)
    verdict = judged(query, key, value, out, lse)
    assert verdict.passed, verdict.reasons
    assert max(verdict.z, verdict.lse_z) < 1.2


@pytest.mark.parametrize("scores", [1e-2, 0.3])
def test_a_lost_key_is_seen_all_the_same(scores):
    query, key, value = drawn(4096, scores, "many")
    assert not judged(query, key, value, *loop(query, key, value, lost=1000)).passed
