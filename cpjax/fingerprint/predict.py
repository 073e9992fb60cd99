"""New inputs, the bits that a card predicts for them, and the share of those that the kernel gives."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint.card import Card
from cpjax.fingerprint.computes import Assumed, arithmetic_of, compute
from cpjax.fingerprint.last_bits import FEWEST
from cpjax.fingerprint.probe import HEAD_DIM, Answer, Probe
from cpjax.trial.draw import whole

STREAM = 11
"""Keeps these random numbers apart from those of the probes."""
MOST_KEYS, MOST_ROWS = 1500, 96


class Predicted(NamedTuple):
    """One input: the shares of numbers with equal bits, and of out's numbers that are at most one spacing away."""

    batch: int
    queries: int
    keys: int
    heads: int
    is_causal: bool
    out: float
    within_one: float
    lse: float | None
    """None if the kernel hands over none, or another than the card can compute."""
    is_small: bool
    """Fewer queries or keys than those from which on the card's orders of addition hold."""


class Prediction(NamedTuple):
    """What a card predicted, and what it had to assume."""

    inputs: tuple[Predicted, ...]
    assumed: tuple[Assumed, ...]
    failures: dict[str, str]
    """Input → why the kernel gave no answer."""

    def share(self, what: str, *, is_small: bool = False) -> float | None:
        """The mean of `out`, `within_one` or `lse` over the small inputs, or over the others; None if there is none."""
        found = [x for one in self.inputs if one.is_small == is_small and (x := getattr(one, what)) is not None]
        return float(np.mean(found)) if found else None

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "out": self.share("out"),
            "within_one": self.share("within_one"),
            "lse": self.share("lse"),
            "small": {what: self.share(what, is_small=True) for what in ("out", "within_one", "lse")},
            "inputs": [one._asdict() for one in self.inputs],
            "assumed": [one._asdict() for one in self.assumed],
            "failures": self.failures,
        }


def drawn(dtype: str, count: int, head_dims: tuple[int, int] = (HEAD_DIM, HEAD_DIM), seed: int = 0) -> dict[str, Probe]:
    """`count` inputs of normal data by name: 2 to 96 queries, 2 to 1,500 keys, one in three causal.

    Not a row alone: whether a kernel computes that in another way is a line of the card.

    >>> {name: asked.query.shape for name, asked in drawn("float16", 2).items()}
    {'predict-0': (2, 13, 1, 64), 'predict-1': (2, 3, 4, 64)}
    """
    fmt, made = FORMATS[dtype], {}
    for number in range(count):
        rng = np.random.default_rng([STREAM, seed, number])
        keys, rows = whole(rng, 2, MOST_KEYS), whole(rng, 2, MOST_ROWS)
        is_causal = bool(rng.random() < 1 / 3)
        if is_causal:
            keys = rows = min(keys, 4 * MOST_ROWS)
        batch, heads = int(rng.choice([1, 2])), int(rng.choice([1, 2, 4]))
        sizes = ((rows, head_dims[0]), (keys, head_dims[0]), (keys, head_dims[1]))
        arrays = (fmt.round(rng.standard_normal((batch, n, heads, dim))).astype(np.float32) for n, dim in sizes)
        made[f"predict-{number}"] = Probe(*arrays, scale=float(head_dims[0] ** -0.5), is_causal=is_causal)
    return made


def predicted(
    card: Card, asked: Mapping[str, Probe], answers: Mapping[str, Answer], failures: dict[str, str]
) -> Prediction:
    """Compare what the card computes with the answers.

    Args:
      asked: inputs by name, as of `drawn`; those without an answer are left out.
      failures: of the kernel, by input, for the report.
    """
    arithmetic, assumed = arithmetic_of(card.dtype, {line.name: line for line in card.lines})
    least = {name: int(card.line(name).code or 1) for name in FEWEST}
    inputs = []
    for name, given in answers.items():
        one = asked[name]
        is_small = one.query.shape[1] < least["fewest queries"] or one.key.shape[1] < least["fewest keys"]
        inputs.append(_compared(one, given, compute(arithmetic, one), card.dtype, is_small=is_small))
    return Prediction(tuple(inputs), assumed, failures)


def _compared(asked: Probe, given: Answer, found: Answer, dtype: str, *, is_small: bool) -> Predicted:
    batch, queries, heads, _ = asked.query.shape
    with np.errstate(invalid="ignore"):
        near = np.abs(given.out - found.out) <= FORMATS[dtype].spacing(np.nan_to_num(given.out))
    lse = None
    if given.lse is not None and found.lse is not None:
        lse = float((given.lse == found.lse).mean())
    equal = float((given.out == found.out).mean())
    shape = batch, queries, asked.key.shape[1], heads
    return Predicted(*shape, asked.is_causal, equal, float(near.mean()), lse, is_small)
