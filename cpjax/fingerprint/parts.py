"""Where a product of p and v begins a sum anew: parts of the keys within a tile, whose sums are added together.

Key k has the value M, key k + 1 has −M, all others are units with M + unit = M. One after the other, the units from the
beginning of the sum to k are lost, those before it were added up elsewhere and survive: their number is where the sum
that k belongs to begins. Each column of the values has units at 16 keys only, so that few digits are enough to count;
k is 13, 29, 45, …, so that k and k + 1 are no pair.
"""

from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.fingerprint.probe import HEAD_DIM, ROWS, UNTOLD, Answer, Answers, Line, Probe, finite, missing, scored

KEYS, FEW = 1024, 304
"""Keys of the two probes: many parts; and fewer than two of 153 and more."""
EACH = 16
"""Keys with a unit in one column."""
PLACE = 13
"""Of k among sixteen keys."""
NAME = "parts of p·v"


class Sizes(NamedTuple):
    """M, the unit and the score of keys other than the two: FP16 has units only as small values times a small p."""

    large: float
    unit: float
    score: float


def sizes(fmt: Format) -> Sizes:
    """Units are seen in out, and 1,024 of them are lost beside M."""
    return Sizes(2.0**15, 2.0**-6, -6.9375) if fmt.name == "float16" else Sizes(2.0**60, 1.0, 0.0)


def probes(fmt: Format) -> dict[str, Probe]:
    """A head for each k."""
    return {"parts": _asked(fmt, KEYS), "parts-of-few": _asked(fmt, FEW)}


def _asked(fmt: Format, keys: int) -> Probe:
    size = sizes(fmt)
    heads, place = keys // EACH, np.arange(keys)
    value = np.zeros((heads, keys, HEAD_DIM))
    value[:, place, place // EACH] = size.unit
    score = np.full((heads, keys), size.score)
    for head in range(heads):
        one = head * EACH + PLACE
        score[head, one : one + 2] = 0
        value[head, one], value[head, one + 1] = size.large, -size.large
    return scored(np.repeat(score[:, None], ROWS, axis=1), value, fmt)


def begins(fmt: Format, keys: int, answer: Answer) -> set[int] | None:
    """The keys at which a sum begins; None if what survives is no running sum."""
    size = sizes(fmt)
    heads = keys // EACH
    weight = float(FORMATS["float16"].round(np.exp([size.score]))[0]) if size.score else 1.0
    row_sum = 2 + (keys - 2) * weight
    survived = answer.out[0, 0, :, :heads] * row_sum / (weight * size.unit)  # [heads, columns]
    number = np.round(survived)
    if (np.abs(survived - number) > 0.3).any():
        return None
    found = set()
    for head, columns in enumerate(number):
        behind = EACH - PLACE - 2
        begin = int(columns[: head + 1].sum()) - behind
        expected = np.clip(begin - EACH * np.arange(heads), 0, EACH)
        expected[head] += behind
        expected[head + 1 :] = EACH
        if (columns != expected).any():
            return None
        found.add(begin)
    return found if 0 in found else None  # the first of running sums begins at key 0


def read(fmt: Format, asked: dict[str, Probe], answers: Answers) -> list[Line]:
    """One line, of the parts within a tile; the beginnings of tiles are among those of sums."""
    many, few = answers.get("parts"), answers.get("parts-of-few")
    if many is None or not finite(many):
        return [missing(NAME)]
    found = begins(fmt, KEYS, many)
    if found is None:
        return [Line(NAME, f"{UNTOLD}: what survives is no running sum of one product after the other", "")]
    evidence = f"of {KEYS:,} keys, sums begin at keys {', '.join(map(str, sorted(found)))}"
    if found == {0}:
        return [Line(NAME, "none: one sum", evidence, "0")]
    part = min(found - {0})
    other = begins(fmt, FEW, few) if few is not None and finite(few) else None
    if other == {0, FEW // 2} and part < FEW < 2 * part:
        return [
            Line(
                NAME,
                f"{part} keys; fewer than {2 * part} are two equal parts",
                f"{evidence}; of {FEW} at keys 0, {FEW // 2}",
                f"{part} halves",
            )
        ]
    return [Line(NAME, f"{part} keys", evidence, str(part))]
