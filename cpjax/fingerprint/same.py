"""Bits that change from call to call, or with what else is in the batch."""

import numpy as np

from cpjax.crosscheck.exact.formats import Format
from cpjax.fingerprint.probe import HEAD_DIM, Answer, Answers, Line, Probe, missing

KEYS, ROWS, BATCH = 512, 64, 4


def probes(fmt: Format) -> dict[str, Probe]:
    """The same problem twice, in a batch of four, and one of its rows alone."""
    rng = np.random.default_rng(5)
    query, key, value = (
        fmt.round(rng.standard_normal((BATCH, length, 2, HEAD_DIM))).astype(np.float32) for length in (ROWS, KEYS, KEYS)
    )
    one = Probe(query[:1], key[:1], value[:1], scale=0.125)
    return {
        "once": one,
        "again": one,
        "in-a-batch": Probe(query, key, value, scale=0.125),
        "one-row": one._replace(query=query[:1, :1]),
    }


def read(fmt: Format, asked: dict[str, Probe], answers: Answers) -> list[Line]:
    """Three comparisons, bit for bit."""
    first = answers.get("once")
    pairs = (
        ("from call to call", "again", "the same call twice"),
        ("in another batch", "in-a-batch", f"alone, and first in a batch of {BATCH}"),
        ("a row alone", "one-row", f"one query row, alone and with {ROWS - 1} others"),
    )
    return [_compared(name, first, answers.get(other), what) for name, other, what in pairs]


def _compared(name: str, one: Answer | None, other: Answer | None, what: str) -> Line:
    if one is None or other is None:
        return missing(name)
    rows = slice(0, min(one.out.shape[1], other.out.shape[1]))
    a, b = one.out[0, rows], other.out[0, rows]
    same = float((a == b).mean())
    if one.lse is not None and other.lse is not None:
        same = min(same, float((one.lse[0, rows] == other.lse[0, rows]).mean()))
    if same == 1.0:
        return Line(name, "the same bits", what, "same")
    return Line(name, f"other bits: {same:.1%} of the numbers are the same", what, "differ")
