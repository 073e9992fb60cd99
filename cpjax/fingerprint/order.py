"""In which order products are added, within q·k and within p·v, and how many digits the sums keep.

The order may depend on the row and the column of a matrix product (edges of its tiles). So each pair of terms has a
head of its own, where all rows and columns ask the same, and there is one tree for each row and column.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.fingerprint.probe import (
    HEAD_DIM,
    NONE,
    ROWS,
    UNTOLD,
    Answer,
    Answers,
    Line,
    Probe,
    missing,
    probe,
    scored,
    untold,
)
from cpjax.fingerprint.tree import Tree, tree_of, words

TERMS = HEAD_DIM
"""Terms of a sum whose order is asked: the head dim in q·k, 64 keys in p·v."""
FAR, FAR_TERMS = 1024, 16
"""Keys of the probe of many tiles, and its terms, 64 keys apart."""
UNIT, BASE = 2.0**-4, 2.0
"""In the probe of q·k: what one term adds to a score, and the score of the first key; no share is too small to read."""
BATCH = 16
"""Batch rows over which the heads of a probe are spread: 126 of them in each, and kernels take 128."""


def pairs(terms: int) -> np.ndarray:
    """All pairs of `terms` terms, `[n, 2]`."""
    return np.argwhere(np.triu(np.ones((terms, terms), bool), 1))


class Sizes(NamedTuple):
    """Of the terms of a sum over keys."""

    large: float
    """M, the value of two keys of score 0."""
    value: float
    """Of the other keys."""
    score: float

    @property
    def weight(self) -> float:
        """p of the other keys: a number of the format."""
        return float(FORMATS["float16"].round(np.exp([self.score]))[0]) if self.score else 1.0


def sizes(fmt: Format) -> Sizes:
    """M is 2^36 units and more, so that it swallows 62 of them, also where sums are cut off; and units are seen in out.

    FP16 has no such numbers: there the units are products of a small value and a small p.
    """
    return Sizes(2.0**15, 2.0**-11, -6.9375) if fmt.name == "float16" else Sizes(2.0**60, 1.0, 0.0)


def probes(fmt: Format) -> dict[str, Probe]:
    """The two trees, the tree over many keys, and digits."""
    return {
        "terms-of-pv": _of_values(fmt, TERMS, TERMS),
        "terms-of-pv-far": _of_values(fmt, FAR, FAR_TERMS),
        "terms-of-qk": _of_products(fmt),
        "digits": _digits(fmt, TERMS),
        "digits-far": _digits(fmt, FAR),
    }


def _of_values(fmt: Format, keys: int, terms: int) -> Probe:
    """A head a pair: values are M, −M and units in every (keys/terms)th key; the others have no weight."""
    size = sizes(fmt)
    used = np.arange(terms) * (keys // terms) + keys // terms // 2
    pair = pairs(terms)
    row = np.arange(len(pair))
    one, other = used[pair[:, 0]], used[pair[:, 1]]
    value, score = np.zeros((len(pair), keys)), np.full((len(pair), keys), NONE)
    value[:, used], score[:, used] = size.value, size.score
    value[row, one], value[row, other] = size.large, -size.large
    score[row, one] = score[row, other] = 0
    made = scored(np.repeat(score[:, None], ROWS, axis=1), np.zeros((len(pair), keys, HEAD_DIM)), fmt)
    return _batched(made.query[0], made.key[0], np.repeat(value.T[..., None], HEAD_DIM, axis=2))


def _of_products(fmt: Format) -> Probe:
    """A head a pair: a key of a known score, and 63 whose products with q are M, −M and units in the head's dims."""
    half = fmt.name == "float16"
    query, large, unit = (2.0**15, 2.0**15, UNIT / 2.0**15) if half else (1.0, 2.0**40, UNIT)
    pair = pairs(TERMS)
    one = np.full((len(pair), HEAD_DIM), unit)
    row = np.arange(len(pair))
    one[row, pair[:, 0]], one[row, pair[:, 1]] = large, -large
    key = np.repeat(one[None], TERMS, axis=0)
    key[0], key[0, :, 0] = 0, BASE / query
    queries = np.full((ROWS, len(pair), HEAD_DIM), query)
    return _batched(queries, key, np.broadcast_to(np.eye(TERMS)[:, None], key.shape))


def _batched(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> Probe:
    """`[T, N, H]` and so on with the heads spread over `BATCH` rows of the batch."""
    heads = -(-query.shape[1] // BATCH) * BATCH
    arrays = []
    for x in (query, key, value):
        padded = np.concatenate([x, np.repeat(x[:, -1:], heads - x.shape[1], axis=1)], axis=1).astype(np.float32)
        arrays.append(padded.reshape(len(x), BATCH, -1, x.shape[2]).swapaxes(0, 1))
    return Probe(*arrays)


EXPONENTS = np.arange(4, 28)
TERM, LARGE = 1.75, 2.0**15
"""1 + 1.75 · 2^−e in e + 2 digits: to nearest it is 1 + 2 · 2^−e, cut off 1 + 1.5 · 2^−e; `LARGE` makes it visible."""


def _spread(keys: int) -> np.ndarray:
    return np.array([0, 1, 2, keys // 2, keys // 2 + 1, keys - 1]) if keys == TERMS else np.arange(6) * (keys // 6)


def _digits(fmt: Format, keys: int) -> Probe:
    """All scores are 0. Columns: `LARGE` times 1, 1.75 · 2^−e, −1 at three keys each, for e = 4 … 27."""
    where = _spread(keys)
    columns = []
    for one in range(len(where)):
        for other in range(one + 1, len(where)):
            for small in set(range(len(where))) - {one, other}:
                block = np.zeros((len(EXPONENTS), keys))
                block[:, where[one]], block[:, where[other]] = LARGE, -LARGE
                block[:, where[small]] = LARGE * TERM * 2.0**-EXPONENTS
                columns.append(block)
    value = np.concatenate(columns)
    heads = -(-len(value) // HEAD_DIM)
    value = np.concatenate([value, np.zeros((heads * HEAD_DIM - len(value), keys))])
    value = value.reshape(heads, HEAD_DIM, keys).transpose(2, 0, 1)
    none = np.zeros((keys, heads, HEAD_DIM))
    return probe(none[:ROWS], none, fmt.round(value))


def read(fmt: Format, asked: dict[str, Probe], answers: Answers) -> list[Line]:
    """Three trees, and digits twice."""
    lines = []
    for name, probe_name in TREES.items():
        found = trees_of(fmt, probe_name, answers.get(probe_name))
        if found is None:
            lines.append(missing(name))
            continue
        count = sum(found.values())
        tree, places = found.most_common(1)[0]
        if tree is None:
            lines.append(untold(name, f"at {places / count:.0%} of the places in out, what survives fits no tree"))
            continue
        evidence = f"{len(pairs(leaves(tree))):,} sums of {leaves(tree)} terms with a large one and its negative"
        where = "" if places == count else f" (at {places / count:.0%} of the places in out; elsewhere another order)"
        lines.append(Line(name, words(tree) + where, evidence, words(tree)))
    for name, probe_name in (("digits of p·v, 64 keys", "digits"), ("digits of p·v, 1,024 keys", "digits-far")):
        lines.append(_read_digits(name, fmt, answers.get(probe_name), TERMS if probe_name == "digits" else FAR))
    return lines


TREES = {
    "order within q·k": "terms-of-qk",
    "order within p·v, 64 keys": "terms-of-pv",
    "order within p·v, 1,024 keys": "terms-of-pv-far",
}
"""Line → probe."""


def leaves(tree: Tree) -> int:
    """How many terms it has."""
    return sum(1 for _ in tree.leaves())


def trees_of(fmt: Format, probe_name: str, answer: Answer | None) -> Counter[Tree | None] | None:
    """The trees of one probe of `TREES`, each with the number of places in out where it is the order; None is no tree.

    None instead of a counter: there is no answer.
    """
    if answer is None:
        return None
    terms = FAR_TERMS if probe_name.endswith("far") else TERMS
    pair = pairs(terms)
    out = answer.out.swapaxes(1, 2).reshape(-1, answer.out.shape[1], answer.out.shape[3])[: len(pair)]  # [pairs, T, V]
    with np.errstate(divide="ignore", invalid="ignore"):
        if probe_name == "terms-of-qk":
            score = np.log(out[..., 1:] / out[..., :1]) + BASE
            lost = terms - score / UNIT
        else:
            size = sizes(fmt)
            lost = terms - out * (2 + (terms - 2) * size.weight) / (size.weight * size.value)
    return _trees(lost.reshape(len(pair), -1).T, terms)


def _trees(lost: Float[np.ndarray, "places pairs"], terms: int) -> Counter[Tree | None]:
    """How many of the terms are lost, M and −M included, for each pair, as a tree."""
    whole = np.isfinite(lost).all(axis=1) & (np.abs(lost - np.round(lost)) < 0.25).all(axis=1)
    found: Counter[Tree | None] = Counter({None: int((~whole).sum())}) if not whole.all() else Counter()
    if not whole.any():
        return found
    pair = pairs(terms)
    for counts, places in Counter(row.tobytes() for row in np.round(lost[whole]).astype(np.int16)).items():
        size = np.ones((terms, terms), int)
        size[pair[:, 0], pair[:, 1]] = size[pair[:, 1], pair[:, 0]] = np.frombuffer(counts, np.int16)
        found[tree_of(size)] += places
    return found


def _read_digits(name: str, fmt: Format, answer: Answer | None, keys: int) -> Line:
    """The least e at which 1 + 1.75 · 2^−e is rounded says how many digits the sum keeps, and how it rounds."""
    if answer is None or not np.isfinite(answer.out).all():
        return missing(name)
    seen = answer.out[0, 0].reshape(-1) * keys / LARGE
    seen = seen[: len(seen) // len(EXPONENTS) * len(EXPONENTS)].reshape(-1, len(EXPONENTS))
    exact = TERM * 2.0**-EXPONENTS
    visible = exact / keys * LARGE >= 8 * fmt.tiny
    wrong = np.abs(seen - exact) > 0.02 * exact
    rows = [row for row in range(len(seen)) if seen[row].any() and (wrong[row] & visible).any()]
    evidence = "1 + 1.75 · 2^−e − 1 at three keys, for e from 4 to 27 and all orders of six keys"
    if not rows:
        return Line(name, f"{UNTOLD}: no small term was lost or rounded", evidence)
    first = [int(EXPONENTS[visible & wrong[row]][0]) for row in rows]
    last = int(np.median(first))
    at = [float(seen[row][last == EXPONENTS][0] * 2.0**last) for row, e in zip(rows, first, strict=True) if e == last]
    up, down = any(abs(x - 2) < 0.05 for x in at), any(abs(x - 1.5) < 0.05 for x in at)
    how = "to nearest" if up and not down else "toward zero" if down and not up else "in more than one way"
    return Line(name, f"{last + 2}, rounded {how}", evidence, f"{last + 2} {how}")
