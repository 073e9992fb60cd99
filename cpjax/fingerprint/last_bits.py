"""What only the last bits tell: which exp, in which order the row sum, whether out is divided or multiplied.

The rest of the card makes an emulator (computes.py). What it leaves open is varied, one line after the other, until the
emulator's numbers for normal data come nearest to the kernel's. A line is told where all bits are equal, and no other
value of it gives them. Then fewer queries and keys are asked: libraries add small products in other orders.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.fingerprint import sums
from cpjax.fingerprint.computes import (
    LAST_BITS,
    Arithmetic,
    arithmetic_of,
    compute,
    is_asked,
    of_scores,
    scores,
    with_code,
)
from cpjax.fingerprint.probe import HEAD_DIM, UNTOLD, Answer, Answers, Line, Probe, untold

SCALE = 0.11
"""No power of two: where it is multiplied, it is rounded."""
SHAPES = {"bits": (32, 64, 3), "bits-ragged": (32, 61, 2), "bits-tiles": (64, 1100, 1), "bits-many": (64, 32, 16)}
"""Queries, keys and heads."""
COLUMNS = np.array([*range(0, HEAD_DIM, 8), HEAD_DIM - 1])
FEW_QUERIES, FEW_KEYS = (1, 2, 3, 4, 8, 16), (2, 4, 8, 16, 32)
"""Asked with the keys, or the queries, of the first shape."""
FEWEST = {"fewest queries": FEW_QUERIES, "fewest keys": FEW_KEYS}
OTHER = "other numbers of keys"
ROUNDS = 4
"""Times that each line is looked at again, unless nothing changes."""

WORDS = {
    **{("exp, bit for bit", name): words for name, words in {
        "nearest": "the exact value rounded to float32",
        "numpy": "NumPy's float32 exp",
        "polynomial": "a polynomial of degree 5 (exp_u20 of PyTorch's vectors)",
        "bits": "bits and a polynomial of degree 3 (Malossi 2015; fexp_u20 of PyTorch's vectors)",
        "cephes": "Cephes' polynomial, as XLA's on CPUs",
        "sleef": "SLEEF's polynomial",
    }.items()},
    **{("order of the row sum", name): words for name, words in sums.ROW_SUMS.items()},
    ("place of the scale, in float32", "score"): "multiplies q·k",
    ("place of the scale, in float32", "query"): "multiplies q",
    ("place of the scale, in float32", "root"): "its square root multiplies q and k",
    ("products and sums", "fused"): "fused: a product is added unrounded",
    ("products and sums", "rounded"): "a product is rounded before it is added",
    ("division by the row sum", "out"): "out is divided",
    ("division by the row sum", "out by 1/l"): "out is multiplied with the reciprocal",
    ("division by the row sum", "p"): "p is divided, before p·v",
    ("division by the row sum", "p by 1/l"): "p is multiplied with the reciprocal, before p·v",
    ("p·v from tile to tile", "added"): "a tile's sum is added to the sum so far",
    ("p·v from tile to tile", "goes on"): "a tile's sum starts with the sum so far",
    ("log of lse", "nearest"): "the exact value rounded to float32",
    ("log of lse", "numpy"): "NumPy's float32 log",
    ("log of lse", "libm"): "the C library's logf",
}  # fmt: skip
"""(Line, code) → words, where the code is none."""


def probes(fmt: Format) -> dict[str, Probe]:
    """Normal data: whole vectors of keys, a few keys more, more than one tile; few queries, few keys."""
    queries, keys, heads = SHAPES["bits"]
    shapes = SHAPES | {f"bits-of-{n}-queries": (n, keys, heads) for n in FEW_QUERIES}
    shapes |= {f"bits-of-{n}-keys": (queries, n, heads) for n in FEW_KEYS}
    made = {}
    for number, (name, (rows, length, count)) in enumerate(shapes.items()):
        rng = np.random.default_rng([7, number])
        arrays = (rng.standard_normal((1, n, count, HEAD_DIM)) for n in (rows, length, length))
        made[name] = Probe(*(fmt.round(x).astype(np.float32) for x in arrays), scale=SCALE)
    return made


def read(fmt: Format, lines: Mapping[str, Line], asked: dict[str, Probe], answers: Answers) -> list[Line]:
    """A line for each of `LAST_BITS` that the others leave open, and three on how far they hold.

    Args:
      lines: of all other rooms, by name.
    """
    given = {name: answer for name in SHAPES if (answer := answers.get(name)) is not None}
    arithmetic, _ = arithmetic_of(fmt.name, lines)
    open_lines = [name for name in LAST_BITS if is_asked(name, arithmetic, lines)]
    if "bits" not in given or not all(np.isfinite(answer.out).all() for answer in given.values()):
        names = [*open_lines, *FEWEST, OTHER]
        return [untold(name, "the kernel gave no numbers for normal data") for name in names]
    compared = Compared(asked, given)
    known = {name: _code_of(name, arithmetic) for name in open_lines}
    for _ in range(ROUNDS):
        before = dict(known)
        for name in open_lines:
            near = {code: compared.nearness(with_code(arithmetic, name, code)) for code in LAST_BITS[name]}
            best = max(near, key=lambda code: near[code])
            if near[best] > near[known[name]]:
                known[name], arithmetic = best, with_code(arithmetic, name, best)
        if known == before:
            break
    for _ in range(ROUNDS):  # a few columns of out may not tell what all of them do
        before_share = best_share = compared.share(arithmetic)
        for name in open_lines:
            if best_share == 1:
                break
            share = {code: compared.share(with_code(arithmetic, name, code)) for code in LAST_BITS[name]}
            best = max(share, key=lambda code: share[code])
            if share[best] > best_share:
                known[name], arithmetic, best_share = best, with_code(arithmetic, name, best), share[best]
        if best_share in (1, before_share):
            break
    shares = {name: compared.only([name]).share(arithmetic) for name in given}
    # Compilers make another program for each shape: then what is told is told of the shapes that it explains.
    is_told = shares["bits"] == 1
    told = compared.only(name for name, share in shares.items() if share == 1) if is_told else compared
    found = [_line(name, known[name], arithmetic, told) for name in open_lines]
    return [*found, *_fewest(arithmetic, asked, answers, is_told=is_told), _other(shares)]


def _fewest(arithmetic: Arithmetic, asked: dict[str, Probe], answers: Answers, *, is_told: bool) -> list[Line]:
    """From how many queries and how many keys on all bits are those that are predicted."""
    lines = []
    for name, numbers in FEWEST.items():
        what = name.split()[1]
        names = {n: f"bits-of-{n}-{what}" for n in numbers}
        shares = {
            n: Compared(asked, {one: answers[one]}).share(arithmetic)
            for n, one in names.items()
            if answers.get(one) is not None
        }
        evidence = ", ".join(f"{n} {what}: {share:.0%} of the bits" for n, share in shares.items())
        if not is_told or not shares:
            lines.append(Line(name, f"{UNTOLD}: not all bits are told of more {what} either", evidence))
            continue
        holds = [n for n in shares if all(share == 1 for m, share in shares.items() if m >= n)]
        if not holds:
            lines.append(
                Line(
                    name, f"more than {max(shares)}; fewer are computed in another way", evidence, str(max(shares) + 1)
                )
            )
        elif holds[0] == min(shares):
            lines.append(Line(name, f"{holds[0]}: all are computed alike", evidence, str(holds[0])))
        else:
            lines.append(Line(name, f"{holds[0]}; fewer are computed in another way", evidence, str(holds[0])))
    return lines


def _other(shares: dict[str, float]) -> Line:
    """Whether what holds for whole vectors of keys holds for others."""
    told = ", ".join(f"{SHAPES[name][1]:,} keys: {share:.1%} of the bits" for name, share in shares.items())
    if shares["bits"] < 1:
        return Line(OTHER, f"{UNTOLD}: not all bits are told of any", told)
    if all(share == 1 for share in shares.values()):
        return Line(OTHER, "are computed alike", told, "alike")
    return Line(OTHER, "another order for another number of keys", told, "other")


def _code_of(line: str, arithmetic: Arithmetic) -> str:
    """The code that the arithmetic has."""
    return next(code for code in LAST_BITS[line] if with_code(arithmetic, line, code) == arithmetic)


def _line(name: str, code: str, arithmetic: Arithmetic, compared: "Compared") -> Line:
    share = compared.share(arithmetic)
    others = {one: compared.share(with_code(arithmetic, name, one)) for one in LAST_BITS[name] if one != code}
    words = {one: WORDS.get((name, one), one) for one in LAST_BITS[name]}
    second = max(others, key=lambda one: others[one])
    evidence = f"normal data: {share:.2%} of the bits are equal; {others[second]:.2%} if it is: {words[second]}"
    alike = [words[other] for other, one in others.items() if one == share]
    if len(alike) > 3:
        return Line(name, f"{UNTOLD}: {len(alike) + 1} ways give the same bits", evidence, nearest=code)
    if alike:
        return Line(name, f"{UNTOLD}: {' or '.join([words[code], *alike])}", evidence, nearest=code)
    if share < 1:
        said = f"{UNTOLD}: no arithmetic that this probe knows gives all bits; nearest is: {words[code]}"
        return Line(name, said, evidence, nearest=code)
    return Line(name, words[code], evidence, code)


Arrays = list[tuple[np.ndarray, np.ndarray, Format]]
"""The kernel's numbers, the emulator's, and their format."""


class Compared:
    """The kernel's answers beside the emulator's; scores are computed once for all arithmetic that agrees on them."""

    def __init__(self, asked: Mapping[str, Probe], given: Mapping[str, Answer]):
        """Of the probes in `given`."""
        self.asked, self.given = asked, given
        self._scores: dict[tuple[Any, ...], np.ndarray] = {}

    def only(self, names: Iterable[str]) -> "Compared":
        """Of these probes."""
        other = Compared(self.asked, {name: self.given[name] for name in names})
        other._scores = self._scores
        return other

    def _arrays(self, name: str, arithmetic: Arithmetic, columns: np.ndarray) -> Arrays:
        asked, answer = self.asked[name], self.given[name]
        key = (name, *of_scores(arithmetic))
        if key not in self._scores:
            self._scores[key] = scores(arithmetic, asked)
        found = compute(arithmetic, asked._replace(value=asked.value[..., columns]), self._scores[key])
        pairs = [(answer.out[..., columns], found.out, FORMATS[arithmetic.dtype])]
        if answer.lse is not None and found.lse is not None:
            pairs.append((answer.lse, found.lse, FORMATS["float32"]))
        return pairs

    def share(self, arithmetic: Arithmetic) -> float:
        """The share of numbers of out and of lse, each kind counted alike, that have the kernel's bits."""
        every = np.arange(HEAD_DIM)
        return float(np.mean([(a == b).mean() for n in self.given for a, b, _ in self._arrays(n, arithmetic, every)]))

    def nearness(self, arithmetic: Arithmetic) -> float:
        """1 where all bits are equal; a number that is n spacings away counts 1 / (1 + n). Of a few columns of out."""
        near = []
        for name in self.given:
            for a, b, fmt in self._arrays(name, arithmetic, COLUMNS):
                with np.errstate(invalid="ignore"):
                    near.append(np.nan_to_num(1 / (1 + np.abs(a - b) / fmt.spacing(a))).mean())
        return float(np.mean(near))
