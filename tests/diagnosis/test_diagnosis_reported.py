"""Faults that people report most, made by plain NumPy that the diagnosis does not use: named, each in its words.

And faults that have no entry: there the answer is where, and that the cause is not known.
"""

import functools
import re

import numpy as np
import pytest

from cpjax.crosscheck import judge

T, N, H = 128, 4, 32
SCALE = H**-0.5
LN2 = np.log(2.0)


@functools.cache
def inputs(seed):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((1, T, N, H)).astype(np.float16) for _ in range(3))


def scores(query, key, scale=SCALE):
    return np.einsum("btnh,bsnh->btns", query.astype(float), key.astype(float)) * scale


def partial(score, value, seen, weight=None):
    """out and lse over the keys that are seen; weights multiply exponentials."""
    score = np.where(seen, score, -np.inf)
    m = np.maximum(score.max(-1, keepdims=True), -1e300)
    p = np.exp(score - m) * (1.0 if weight is None else weight)
    total = p.sum(-1)
    with np.errstate(divide="ignore"):
        out = np.einsum("btns,bsnv->btnv", p, value.astype(float)) / np.maximum(total, 1e-300)[..., None]
        return out, m[..., 0] + np.log(total)


def merged(parts, exp=np.exp, log=np.log):
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    m = np.maximum(lses.max(0), -1e300)
    weight = exp(lses - m)
    return (weight[..., None] * outs).sum(0) / weight.sum(0)[..., None], m + log(weight.sum(0))


def not_divided(parts):
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    weight = np.exp(lses - np.maximum(lses.max(0), -1e300))
    return (weight[..., None] * outs).sum(0), np.logaddexp.reduce(lses, axis=0)


CAUSAL = np.tri(T, dtype=bool)[None, :, None]


def right(seed):
    query, key, value = inputs(seed)
    return partial(scores(query, key), value, CAUSAL)


def parts(seed, part):
    query, key, value = inputs(seed)
    return [partial(scores(query, key), value, CAUSAL & (part == c)) for c in range(int(part.max()) + 1)]


def with_sink(out, lse, x):
    total = np.logaddexp(lse, x)
    return out * np.exp(lse - total)[..., None], total


def weighted(seed, weight):
    query, key, value = inputs(seed)
    return partial(scores(query, key), value, CAUSAL, weight)


def run(start, stop, weight):
    return np.where((np.arange(T) >= start) & (np.arange(T) < stop), weight, 1.0)


def stale(seed, start, stop, source):
    query, key, value = (x.copy() for x in inputs(seed))
    key[:, start:stop], value[:, start:stop] = (x[:, source : source + stop - start] for x in (key, value))
    return partial(scores(query, key), value, CAUSAL)


def changed_data(seed, key_map=lambda x: x, value_map=lambda x: x):
    query, key, value = inputs(seed)
    return partial(scores(query, key_map(key)), value_map(value), CAUSAL)


def limited(seed, count):
    query, key, value = inputs(seed)
    return partial(scores(query, key), value, (np.arange(T)[None] < count[:, None])[None, :, None])


def unwritten(seed, rows):
    out, lse = (x.copy() for x in right(seed))
    out[:, rows], lse[:, rows] = 0, 0
    return out, lse


CHUNK4, TURN4 = np.arange(T) * 4 // T, np.arange(T) % 4
SINKS = np.array([1.0, 0.5, 2.0, 3.0])
INDEX = np.arange(T)
RANK2 = np.array([0, 1, 1, 0])[CHUNK4]
LOCAL = np.array([*range(64), *range(32, 64), *range(32, 64)]) - 32 * (CHUNK4 == 1)

NAMED = {
    "natural lse merged by exp2, chunks": (
        lambda s: merged(parts(s, CHUNK4), np.exp2, np.log2),
        {"cp": 2},
        "partial results of the chunks were merged in the wrong base: their lse is natural, the merge took exp2",
    ),
    "lse in base two merged by exp, chunks": (
        lambda s: merged([(out, lse / LN2) for out, lse in parts(s, CHUNK4)]),
        {"cp": 2},
        "partial results of the chunks were merged in the wrong base: their lse is in base two, the merge took exp of",
    ),
    "natural lse merged by exp2, ranks nobody named": (
        lambda s: merged(parts(s, TURN4), np.exp2, np.log2),
        {},
        "partial results of parts (as of tokens dealt to 4 ranks in turn) were merged in the wrong base",
    ),
    "right lse, merged by exp2": (
        lambda s: (merged(parts(s, CHUNK4), np.exp2, np.log2)[0], right(s)[1]),
        {"cp": 2},
        "partial results of the chunks were merged in the wrong base",
    ),
    "lse is max + log2 of the sum": (
        lambda s: (
            right(s)[0],
            (m := np.where(CAUSAL, scores(*inputs(s)[:2]), -np.inf).max(-1)) + (right(s)[1] - m) / LN2,
        ),
        {},
        "lse is the row maximum plus log2 of the sum: only the sum is in base two",
    ),
    "sink added": (lambda s: with_sink(*right(s), SINKS), {}, "one more term exp(x), of value 0 (x of head"),
    "sink added, right lse": (
        lambda s: (with_sink(*right(s), SINKS)[0], right(s)[1]),
        {},
        "one more term exp(x), of value 0 (x of head",
    ),
    "a page of zeros": (lambda s: with_sink(*right(s), np.log(16)), {}, "as of 16 keys that are zero"),
    "last three never written": (
        lambda s: unwritten(s, slice(-3, None)),
        {},
        "12 rows of out are zero, as if never written: positions 125–127 (the last 3 of the text)",
    ),
    "keys of one head lost": (
        lambda s: tuple(
            np.where((np.arange(N) == 2)[(...,) + (None,) * (x.ndim - 3)], y, x)
            for x, y in zip(right(s), weighted(s, run(30, 72, 1e-30)), strict=True)
        ),
        {},
        "42 keys 30 to 71 were lost",
    ),
    "keys doubled": (lambda s: weighted(s, run(20, 52, 2.0)), {}, "32 keys 20 to 51 were counted twice"),
    "stale block": (
        lambda s: stale(s, 32, 64, 96),
        {},
        "in the place of 32 keys 32 to 63 those from 96 to 127 were used",
    ),
    "values of the next token": (
        lambda s: changed_data(s, value_map=lambda x: np.roll(x, -1, axis=1)),
        {},
        "each key entered with the value of the token after it",
    ),
    "keys of another head": (
        lambda s: changed_data(s, key_map=lambda x: x[:, :, [1, 0, 3, 2]]),
        {},
        "were used, with the right values",
    ),
    "values of another head": (
        lambda s: changed_data(s, value_map=lambda x: x[:, :, [1, 0, 3, 2]]),
        {},
        "were used, with the right keys",
    ),
    "the scale inverted": (
        lambda s: partial(scores(*inputs(s)[:2], 1 / SCALE), inputs(s)[2], CAUSAL),
        {},
        "the scale is the inverse of the stated one",
    ),
    "the scale without mscale": (
        lambda s: partial(scores(*inputs(s)[:2], SCALE / (0.1 * np.log(40) + 1) ** 2), inputs(s)[2], CAUSAL),
        {},
        "the scale lacks YaRN's factor mscale²",
    ),
    "one key too few for every 32 queries": (
        lambda s: limited(s, INDEX + 1 - INDEX // 32),
        {},
        "a query sees one key too few for every 32 queries before it",
    ),
    "as many keys as one of four ranks holds": (
        lambda s: limited(s, -(-(INDEX + 1) // 4)),
        {},
        "as many as one of 4 ranks holds",
    ),
    "a causal mask in each of four blocks": (
        lambda s: partial(
            scores(*inputs(s)[:2]), inputs(s)[2], CAUSAL & ((INDEX % 32)[None] <= (INDEX % 32)[:, None])[None, :, None]
        ),
        {},
        "in each of 4 equal blocks, by its own index",
    ),
    "parts added and not divided, ranks nobody named": (
        lambda s: not_divided(parts(s, TURN4)),
        {},
        "partial results of parts (as of tokens dealt to 4 ranks in turn) were added with weights exp(lse − max lse)",
    ),
    "parts averaged": (
        lambda s: (np.mean([out for out, _ in parts(s, INDEX * 5 // T)], axis=0), right(s)[1]),
        {},
        "partial results of parts (as of 5 runs of the tokens) were averaged without weights",
    ),
    "parts added": (
        lambda s: (np.sum([out for out, _ in parts(s, TURN4)], axis=0), right(s)[1]),
        {},
        "partial results of parts (as of tokens dealt to 4 ranks in turn) were added up without weights",
    ),
    "a rank's part left out": (
        lambda s: merged([x for r, x in enumerate(parts(s, TURN4)) if r != 2]),
        {},
        "the tokens of rank 2, of tokens dealt to 4 ranks in turn, never entered",
    ),
    "a rank's part twice": (
        lambda s: merged([*parts(s, TURN4), parts(s, TURN4)[3]]),
        {},
        "the tokens of rank 3, of tokens dealt to 4 ranks in turn, entered twice",
    ),
    "the scale of the values": (
        lambda s: (3.7 * right(s)[0], right(s)[1]),
        {},
        "times what it should be, and nothing else is wrong",
    ),
    "causal by the index on the rank": (
        lambda s: partial(scores(*inputs(s)[:2]), inputs(s)[2], (LOCAL[None] <= LOCAL[:, None])[None, :, None]),
        {"cp": 2},
        "the causal mask was applied by the index among the tokens of a rank (local positions)",
    ),
    "nothing was exchanged": (
        lambda s: partial(
            scores(*inputs(s)[:2]), inputs(s)[2], CAUSAL & (RANK2[None] == RANK2[:, None])[None, :, None]
        ),
        {"cp": 2},
        "each rank saw only the keys that it holds itself",
    ),
    "the window, and the future": (
        lambda s: partial(scores(*inputs(s)[:2]), inputs(s)[2], (INDEX[:, None] - INDEX < 20)[None, :, None]),
        {"window": 20},
        "no causal mask was applied",
    ),
    "a window to both sides": (
        lambda s: partial(scores(*inputs(s)[:2]), inputs(s)[2], (abs(INDEX[:, None] - INDEX) < 20)[None, :, None]),
        {"window": 20},
        "no causal mask was applied",
    ),
    "lse is of scores without the scale": (
        lambda s: (right(s)[0], partial(scores(*inputs(s)[:2], 1.0), inputs(s)[2], CAUSAL)[1]),
        {},
        "lse is that of scores without the scale",
    ),
    "lse is the whole sum": (
        lambda s: (right(s)[0], np.exp(right(s)[1])),
        {},
        "lse is the sum of the exponentials of whole scores",
    ),
    "lse is natural and was taken for base two": (
        lambda s: (right(s)[0], right(s)[1] * LN2),
        {},
        "lse is ln 2 times the natural logarithm",
    ),
    "axes exchanged in memory": (
        lambda s: (right(s)[0].swapaxes(1, 2).reshape(1, T, N, H), right(s)[1]),
        {},
        "out lies in memory as [batch, heads, tokens, dim]",
    ),
}


def said(result, options, has_lse):
    out, lse = result[0].astype(np.float16), result[1].astype(np.float32)
    verdict = judge(*inputs(0), out, lse if has_lse else None, **options)
    assert not verdict.passed
    return verdict


@pytest.mark.parametrize("has_lse", [True, False], ids=["with lse", "out only"])
@pytest.mark.parametrize("fault", NAMED)
def test_what_is_reported_most_is_named(fault, has_lse):
    make, options, words = NAMED[fault]
    if fault.startswith("lse is") and not has_lse:
        return  # its out is right
    verdict = said(make(0), options, has_lse)
    assert words in verdict.diagnosis[0], verdict.diagnosis
    assert "cannot tell apart" not in verdict.diagnosis[0], verdict.diagnosis
    assert not any("scale" in reason for reason in verdict.reasons), verdict.reasons


def test_the_plain_results_are_right():
    assert judge(*inputs(0), right(0)[0].astype(np.float16), right(0)[1].astype(np.float32)).passed
    together = merged(parts(0, CHUNK4))
    assert judge(*inputs(0), together[0].astype(np.float16), together[1].astype(np.float32), cp=2).passed


def column(out, rng):
    out[..., 5] *= 1.01


def element(out, rng):
    out[0, 100, 1, 7] *= 1.1


def row(out, rng):
    out[0, 100, 1] *= 1.003


def tile(out, rng):
    out[0, 64:80, 1, 8:16] = rng.standard_normal((16, 8))


def noise_in_a_head(out, rng):
    out[:, :, 3] += 0.01 * rng.standard_normal(out[:, :, 3].shape)


def foreign_rows(out, rng):
    out[0, 40:56] = rng.standard_normal((16, N, H)) * 0.3


COLUMNS = {column: "column 5 is", element: "column 7 is", tile: "columns 8–15 are"}
"""What is said of columns, where some are right."""


@pytest.mark.parametrize("has_lse", [True, False], ids=["with lse", "out only"])
@pytest.mark.parametrize("change", [column, element, row, tile, noise_in_a_head, foreign_rows])
def test_what_has_no_entry_is_unknown_and_no_cause_is_told(change, has_lse):
    out, lse = right(0)
    out = out.copy()
    change(out, np.random.default_rng(1))
    verdict = said((out, lse), {}, has_lse)
    assert verdict.diagnosis[0].startswith("The result is wrong, and no fault in the judge's list explains it"), (
        verdict.diagnosis
    )
    assert np.isfinite(verdict.hard_ratio)
    where = list(verdict.diagnosis[1:])
    if change in COLUMNS:
        assert where.pop() == f"Of {H} columns only {COLUMNS[change]} wrong."
    assert len(where) == (change is not column), verdict.diagnosis
    assert all(re.match(r"\d+ of \d+ judged rows (are|is) wrong: ", sentence) for sentence in where)


def test_the_worst_output_is_the_worst():
    """Rows that see one key must be exact: an error of one unit there is not the worst."""
    out, lse = (x.copy() for x in right(0))
    out = out.astype(np.float16)
    out[0, 0, 0, 0] = np.nextafter(out[0, 0, 0, 0], np.float16(np.inf))
    out[0, 77, 2, 3] += np.float16(3.0)
    verdict = judge(*inputs(0), out, lse.astype(np.float32))
    assert "position 77, head 2, is off by 3" in verdict.reasons[0]


def test_scores_beyond_fp16_are_said():
    rng = np.random.default_rng(0)
    query, key = ((rng.standard_normal((1, T, N, H)) + mean).astype(np.float16) for mean in (20, 102))
    value = inputs(0)[2]
    product = scores(query, key, 1.0)
    out = partial(product * SCALE, value, CAUSAL)[0].astype(np.float16)
    over = np.where(CAUSAL, product, 0).max(-1) > 65504
    out[over] = np.nan
    assert 0 < over.sum() < over.size
    told = judge(query, key, value, out).diagnosis
    assert any("q·k, before it is scaled, exceeds 65,504" in sentence for sentence in told), told


def test_batch_rows_exchanged():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((3, T, N, H)).astype(np.float16) for _ in range(3))
    out, lse = partial(scores(query, key), value, CAUSAL)
    told = judge(query, key, value, out[[1, 0, 2]].astype(np.float16), lse.astype(np.float32)).diagnosis
    assert told[0].startswith(
        "Batch rows are exchanged: row 0 has the outputs of row 1, row 1 has the outputs of row 0"
    )


def test_a_wrong_lse_is_no_exchange_of_heads():
    """All heads have the same keys, and out is right."""
    query, key, value = inputs(0)
    same = [np.repeat(x[:, :, :1], N, axis=2) for x in (key, value)]
    out, lse = partial(scores(query, same[0]), same[1], CAUSAL)
    told = judge(query, *same, out.astype(np.float16), (lse / LN2).astype(np.float32)).diagnosis
    assert "lse is the logarithm to base two" in told[0]


def bent(seed, softcap=None, sink=None, alibi=None, bias=None):
    """Attention with these, over logits that are large enough for a softcap to matter."""
    query, key, value = inputs(seed)
    x = 4 * scores(query, key)
    x = x if softcap is None else softcap * np.tanh(x / softcap)
    x = x if alibi is None else x - alibi[:, None] * np.abs(INDEX[:, None, None] - INDEX)
    x = x if bias is None else x + bias
    out, lse = partial(x, value, CAUSAL)
    return (out, lse) if sink is None else with_sink(out, lse, sink)


SLOPES = 2.0 ** (-8 / N * np.arange(1, N + 1))
BIAS = np.random.default_rng(5).standard_normal((1, T, N, T)).swapaxes(1, 2).astype(np.float32)
HIDING = np.where(np.random.default_rng(6).random(BIAS.shape) < 0.2, -np.inf, BIAS)
HIDING[..., 0] = BIAS[..., 0]
TERMS = {
    "softcap": (5.0, "the softcap was not applied"),
    "sink": (SINKS, "the sink was not added to the sums"),
    "alibi": (SLOPES, "the ALiBi slopes were not applied"),
    "bias": (BIAS, "the bias was not added"),
}


@pytest.mark.parametrize("has_lse", [True, False], ids=["with lse", "out only"])
@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_the_logits_that_was_stated_and_dropped(term, has_lse):
    number, words = TERMS[term]
    asked = {"scale": 4 * SCALE, term: number}
    computed = {term: number.swapaxes(1, 2) if term == "bias" else number}
    for result, passes in ((bent(0, **computed), True), (bent(0), False)):
        out, lse = result[0].astype(np.float16), result[1].astype(np.float32)
        verdict = judge(*inputs(0), out, lse if has_lse else None, **asked)
        assert verdict.passed == passes, verdict.reasons
    assert verdict.diagnosis[0].startswith(words), verdict.diagnosis


@pytest.mark.parametrize(
    ("computed", "words"),
    [
        ({"softcap": 10.0}, "a softcap of 10 was applied that was not stated"),
        ({"alibi": SLOPES}, "ALiBi was applied, with the slopes of the paper, that was not stated"),
    ],
)
def test_a_term_of_the_logits_that_nobody_stated(computed, words):
    out, lse = bent(0, **computed)
    verdict = judge(*inputs(0), out.astype(np.float16), lse.astype(np.float32), scale=4 * SCALE)
    assert verdict.diagnosis[0].startswith(words), verdict.diagnosis


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stated", "computed", "words"),
    [
        ({"sink": SINKS}, {"sink": SINKS + LN2}, "the sink was added twice to the sums"),
        ({"sink": SINKS}, {"sink": SINKS / LN2}, "the sink was multiplied by log2(e)"),
        ({"sink": SINKS}, {"sink": SINKS * 4 * SCALE}, "the sink was multiplied by the scale"),
        ({"sink": SINKS}, {"sink": -SINKS}, "the sink was added with the other sign of its logit"),
        ({"sink": SINKS}, {"sink": np.roll(SINKS, -1)}, "each head has the sink of the head after it"),
        ({"sink": SINKS}, {"sink": np.roll(SINKS, 1)}, "each head has the sink of the head before it"),
        ({"sink": SINKS}, {"sink": np.full(N, SINKS[0])}, "every head has the sink of head 0"),
        (
            {"sink": SINKS},
            {"sink": SINKS + 0.7},
            "every row's sum has another term than that of the stated sink: exp(x)",
        ),
        ({"alibi": SLOPES}, {"alibi": 2 * SLOPES}, "the ALiBi slopes were applied twice"),
        ({"alibi": SLOPES}, {"alibi": 4 * SCALE * SLOPES}, "the ALiBi slopes were multiplied by the scale"),
        ({"bias": BIAS}, {"bias": 2 * BIAS}, "the bias was added twice"),
        ({"bias": BIAS}, {"bias": 4 * SCALE * BIAS}, "the bias was multiplied by the scale"),
        ({"bias": HIDING}, {"bias": BIAS * 0}, "the bias was not added"),
        ({"bias": HIDING}, {"bias": np.where(HIDING < -9, -np.inf, 0)}, "the bias was not added, but the keys that it"),
    ],
)
def test_a_term_of_the_logits_that_is_another(stated, computed, words):
    out, lse = bent(0, **{term: x.swapaxes(1, 2) if term == "bias" else x for term, x in computed.items()})
    for given in (lse.astype(np.float32), None):
        verdict = judge(*inputs(0), out.astype(np.float16), given, scale=4 * SCALE, **stated)
        assert words in verdict.diagnosis[0], verdict.diagnosis
        # Of one head, that of head 0 is that of the head before head 1.
        is_sure = "cannot tell apart" not in verdict.diagnosis[0]
        assert is_sure or "of the head" in verdict.diagnosis[0], verdict.diagnosis


def test_an_lse_that_does_not_count_the_sink():
    out, lse = bent(0, sink=SINKS)[0].astype(np.float16), bent(0)[1].astype(np.float32)
    told = judge(*inputs(0), out, lse, scale=4 * SCALE, sink=SINKS).diagnosis
    assert told[0].startswith("lse does not count the sink"), told


@pytest.mark.parametrize("few", [1, 3])
def test_decode_without_the_last_keys_of_each_request(few):
    """One query a request, all its keys seen: the length is too small."""
    lengths = np.array([17, 40, 30, 41])
    segment = np.repeat(np.arange(4), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    query, key, value = inputs(0)
    seen = (np.arange(4)[:, None] == segment) & (position < (lengths - few)[:, None])
    out, lse = partial(scores(query[:, :4], key), value, seen[None, :, None])
    told = judge(
        query[:, :4],
        key,
        value,
        out.astype(np.float16),
        lse.astype(np.float32),
        is_causal=False,
        segment_ids=(np.arange(4)[None], segment[None]),
    ).diagnosis
    keys = "1 key" if few == 1 else "3 keys"
    assert f"each query misses the last {keys} of its request: its length is taken {few} too small" in told[0], told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda n: np.log2(n), "base two"),
        (lambda n: np.log(n) + 0.5, "lse"),
        (lambda n: 0 * np.log(n), "lse"),
    ],
)
def test_constant_outputs_that_are_right_were_written(wrong, says):
    """q = 0 and one-hot values: every output is 1/n. Only lse is wrong, so nothing may be said of rows of out."""
    count = 64
    query, key = np.zeros((1, count, 4, 64), np.float16), np.ones((1, count, 2, 64), np.float16)
    value = np.broadcast_to(np.eye(count, dtype=np.float16)[None, :, None], (1, count, 2, count)).copy()
    out = np.full((1, count, 4, count), 1 / count, np.float16)
    lse = np.full((1, count, 4), wrong(count), np.float32)
    found = judge(query, key, value, out, lse, scale=0.125, is_causal=False, cp=2, precision="flash_fp16")
    assert not found.passed
    text = " ".join(found.diagnosis)
    assert "rows of out" not in text, text
    assert says in text, text
