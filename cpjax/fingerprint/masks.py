"""What hides a key from a query, what a NaN in a hidden key does, and which key head a query head takes."""

import numpy as np

from cpjax.crosscheck.exact.formats import Format
from cpjax.fingerprint.probe import HEAD_DIM, UNTOLD, Answer, Answers, Line, Probe, finite, missing, probe, scores_of

TOKENS = 64
FEW = 16
"""Queries beside `TOKENS` keys, and keys beside `TOKENS` queries: how is the causal mask aligned?"""

SIZES = 2.0 ** np.arange(8, 36)
"""Visible scores are minus these: a mask of a finite number is above some of them. Beside −2^35, float32 forgets a
thousand that is added; 64 products of FP16 numbers reach 2^36."""


def probes(fmt: Format) -> dict[str, Probe]:
    """Causal probes: scores far below 0, NaN in keys that are hidden, and heads that share keys."""
    none = np.zeros((TOKENS, 1, HEAD_DIM))
    rows = np.arange(TOKENS)
    hidden = np.zeros((TOKENS, 1, HEAD_DIM))
    hidden[-1] = 1  # the last key is seen by the last row alone
    # A row's score is −q · k with one k for all. What one product cannot be is spread over the head's dimensions.
    size = np.resize(SIZES, TOKENS)
    each = 2.0 ** np.floor(np.log2(size) / 2)
    half = fmt.name == "float16"
    query, key = none.copy(), none.copy()
    query[:, 0] = (size / HEAD_DIM / 2.0**15 if half else each / HEAD_DIM)[:, None]
    key[:, 0] = -(2.0**15) if half else -1
    if not half:
        query[:, 0] *= (size / each)[:, None]
    wrong_value, wrong_key = hidden.copy(), none.copy()
    wrong_value[-1, 0, 0] = np.nan
    wrong_key[-1] = np.nan
    heads = np.broadcast_to(np.array([1.0, 2.0])[None, :, None], (TOKENS, 2, HEAD_DIM))
    return {
        "far-below": probe(query, key, hidden, is_causal=True),
        "nan-in-value": probe(none, none, wrong_value, is_causal=True),
        "nan-in-key": probe(none, wrong_key, hidden, is_causal=True),
        "heads": probe(np.zeros((TOKENS, 4, HEAD_DIM)), np.zeros((TOKENS, 2, HEAD_DIM)), heads),
        "causal": probe(none, none, np.eye(TOKENS)[rows][:, None], is_causal=True),
        "few-queries": probe(none[:FEW], none, np.eye(TOKENS)[:, None], is_causal=True),
        "few-keys": probe(none, none[:FEW], np.eye(FEW, HEAD_DIM)[:, None], is_causal=True),
    }


def read(fmt: Format, asked: dict[str, Probe], answers: Answers) -> list[Line]:
    """Lines on the causal mask, its number, NaN and heads."""
    return [
        _causal(answers.get("causal")),
        _alignment(answers.get("few-queries")),
        _nothing(answers.get("few-keys")),
        _number(asked["far-below"], answers.get("far-below")),
        *(_nan(where, answers.get(f"nan-in-{where}")) for where in ("value", "key")),
        _heads(answers.get("heads")),
    ]


def _causal(answer: Answer | None) -> Line:
    name = "causal mask"
    if answer is None or not finite(answer):
        return missing(name)
    seen = answer.out[0, :, 0] > 0
    evidence = f"all scores equal, one-hot values: row t sees {', '.join(str(n) for n in seen.sum(axis=1)[:4])} … keys"
    if (seen == np.tri(TOKENS, dtype=bool)).all():
        return Line(name, "a query sees its own key and those before it", evidence, "causal")
    return Line(name, f"{UNTOLD}: other keys than those up to the query's own are seen", evidence)


def _alignment(answer: Answer | None) -> Line:
    """Causal with fewer queries than keys: are the first ones at the same place, or the last ones?"""
    name = "causal mask, T < S"
    if answer is None or not finite(answer):
        return missing(name)
    seen = answer.out[0, :, 0] > 0
    evidence = f"{FEW} queries, {TOKENS} keys: query 0 sees {seen[0].sum()} keys, the last one {seen[-1].sum()}"
    for code, words, after in (
        ("top-left", "the first query and the first key are at one place (top-left)", 0),
        ("bottom-right", "the last query and the last key are at one place (bottom-right)", TOKENS - FEW),
    ):
        if (seen == np.tri(FEW, TOKENS, after, dtype=bool)).all():
            return Line(name, words, evidence, code)
    return Line(name, f"{UNTOLD}: neither aligned at the first tokens nor at the last", evidence)


def _nothing(answer: Answer | None) -> Line:
    """What a row gives that sees no key: under a mask aligned at the last tokens, the first of many queries."""
    name = "rows that see no key"
    if answer is None:
        return missing(name)
    out, blind = answer.out[0, :, 0, :FEW], TOKENS - FEW
    evidence = f"{TOKENS} queries, {FEW} keys, causal"
    if np.array_equal(out > 0, np.tri(TOKENS, FEW, dtype=bool)):
        return Line(name, f"{UNTOLD}: no row of a mask aligned at the first tokens sees none", evidence)
    if not np.array_equal(out[blind:] > 0, np.tri(FEW, dtype=bool)):
        return Line(name, f"{UNTOLD}: the mask is aligned neither at the first tokens nor at the last", evidence)
    rows = out[:blind]
    if answer.lse is not None:
        lse = sorted({str(x) for x in answer.lse[0, :blind, 0]})
        evidence += f"; lse of the {blind} first rows: {', '.join(lse[:3])}"
    for code, words, is_so in (
        ("zeros", "out is 0", rows == 0),
        ("nan", "out is NaN", np.isnan(rows)),
        ("mean", "out is the mean of all values, as if nothing were hidden", rows == 1 / FEW),
    ):
        if is_so.all():
            return Line(name, words, evidence, code)
    return Line(name, f"{UNTOLD}: neither 0, nor NaN, nor the mean of all values", evidence)


def _number(asked: Probe, answer: Answer | None) -> Line:
    """The least |score| at which a hidden key is seen."""
    name = "what hides a key"
    if answer is None:
        return missing(name)
    out = answer.out[0, :-1, 0, 0]
    score = scores_of(asked)[:-1, 0]
    leaked = (out != 0) & np.isfinite(out)
    most = score[np.isfinite(out)].min() if np.isfinite(out).any() else 0.0
    evidence = f"visible scores of −256 to {most:,.0f}"
    if not np.isfinite(out).any():
        return missing(name)
    if not leaked.any():
        lost = "" if np.isfinite(out).all() else "; below that, out is not finite"
        return Line(
            name, f"−∞, or a number below {most:,.0f}; if it is added, one below −4,096", evidence + lost, "-inf"
        )
    edge = score[leaked].max()
    above = score[~leaked & (score > edge)]
    words = f"a number between {edge:,.0f} and {above.min() if above.size else 0:,.0f}, or one that is added"
    return Line(name, words, evidence + f"; a hidden key is seen from {edge:,.0f} on", f"{edge:.4g}")


def _nan(where: str, answer: Answer | None) -> Line:
    name = f"NaN in a hidden {where}"
    if answer is None:
        return missing(name)
    rows = ~np.isfinite(answer.out[0, :-1, 0]).all(axis=1)
    evidence = (
        f"the last {where} is NaN and seen by the last row alone; NaN in {int(rows.sum())} of the {TOKENS - 1} others"
    )
    return Line(
        name, "reaches other rows" if rows.any() else "stays hidden", evidence, "seen" if rows.any() else "hidden"
    )


def _heads(answer: Answer | None) -> Line:
    name = "heads that share keys"
    if answer is None or not finite(answer):
        return missing(name)
    order = [int(x) for x in np.round(answer.out[0, 0, :, 0])]
    evidence = f"four query heads, two value heads of all 1 and all 2: out is {', '.join(map(str, order))}"
    kinds: dict[tuple[int, ...], str] = {
        (1, 1, 2, 2): "neighbours: query head h takes key head h div 2",
        (1, 2, 1, 2): "h mod 2",
    }
    words = kinds.get(tuple(order))
    if words is not None:
        return Line(name, words, evidence, words.split()[0])
    return Line(name, f"{UNTOLD}: neither h div 2 nor h mod 2", evidence)
