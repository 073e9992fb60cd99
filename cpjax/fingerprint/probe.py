"""A question to a kernel, its answer, a line of the card; and questions whose scores are exact in every format."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.exact.formats import FORMATS, Format

HEAD_DIM = 64
"""Head dim of queries, keys and values."""
ROWS = HEAD_DIM // 2
"""Query rows: each takes two of the head's dimensions for its scores."""
NONE = -30_000.0
"""The score of a key that has no weight: its exponential is 0 beside that of a score near 0."""


class Probe(NamedTuple):
    """Inputs in global token order, as float32 arrays whose numbers are exact in the format that is asked about."""

    query: Float[np.ndarray, "B T N H"]
    key: Float[np.ndarray, "B S K H"]
    value: Float[np.ndarray, "B S K V"]
    scale: float = 1.0
    is_causal: bool = False
    """Query and key of the same index are at the same position. Where T ≠ S, that is what is asked: `masks.py`."""
    cp: int = 1
    """Ranks over which the tokens are cut, in zigzag; then T = S (`ranks.py`)."""
    length: int = 0
    """Where tokens are cut over ranks: so many are real, those behind them are pads; 0 is all."""


class Answer(NamedTuple):
    """What the kernel gave, in float64."""

    out: Float[np.ndarray, "B T N V"]
    lse: Float[np.ndarray, "B T N"] | None


Kernel = Callable[[Probe], Answer]
Answers = Mapping[str, Answer]
"""By the probe's name; a probe that the kernel did not answer is not there."""


class Line(NamedTuple):
    """One line of the card."""

    name: str
    value: str
    """What it is, or `UNTOLD` with the reason."""
    evidence: str
    """The measurement that says so."""
    code: str = ""
    """The value as a word that programs read: a format's name, a number; "" where it cannot be told."""
    nearest: str = ""
    """Where it cannot be told: the code that came nearest, which a prediction of bits assumes."""


UNTOLD = "cannot be told"


def untold(name: str, reason: str) -> Line:
    """A line without a value."""
    return Line(name, f"{UNTOLD}: {reason}", "")


def missing(name: str) -> Line:
    """The line of a probe that was not answered, or not with numbers."""
    return untold(name, "the kernel gave no numbers for this probe")


def settled(name: str, shares: Mapping[tuple[str, str], float], what: str, *, enough: float = 0.97) -> Line:
    """The one candidate that explains nearly all measurements, if no other does.

    Args:
      shares: (code, words) of each candidate → the share of the measurements that it explains.
      what: what was measured, for the evidence.
    """
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    good = [names for names, share in ranked if share >= enough]
    told = "; ".join(f"{words} explains {share:.1%}" for (_, words), share in ranked[:3])
    evidence = f"{what}: {told}"
    if not good:
        return Line(name, f"{UNTOLD}: no arithmetic that this probe knows explains it", evidence)
    if len(good) > 1:
        return Line(name, f"{UNTOLD}: {' or '.join(words for _, words in good)}", evidence)
    return Line(name, good[0][1], evidence, good[0][0])


def scored(scores: Float[np.ndarray, "N T S"], values: Float[np.ndarray, "N S V"], fmt: Format) -> Probe:
    """The probe in which q·k is exactly `scores`, row by row, whatever the order of addition; T <= 32, scale 1.

    Row t has the query e_2t + e_2t+1, and a key holds its score for that row in two numbers of the format, high and
    low: all other products are 0. So scores may have twice the format's digits.

    Raises:
      ValueError: a score or a value is not exact.
    """
    heads, rows, keys = scores.shape
    if rows > ROWS:
        raise ValueError(f"{rows} rows; a probe has at most {ROWS}")
    high = fmt.round(scores)
    low = fmt.round(scores - high)
    if (high + low != scores).any() or (fmt.round(values) != values).any():
        raise ValueError(f"these scores or values are not exact in {fmt.name}")
    key = np.zeros((heads, keys, HEAD_DIM))
    key[:, :, : 2 * rows : 2], key[:, :, 1 : 2 * rows : 2] = high.swapaxes(1, 2), low.swapaxes(1, 2)
    query = np.zeros((rows, HEAD_DIM))
    query[np.arange(rows), 2 * np.arange(rows)] = query[np.arange(rows), 2 * np.arange(rows) + 1] = 1
    return probe(np.repeat(query[:, None], heads, axis=1), key.swapaxes(0, 1), values.swapaxes(0, 1))


def probe(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, *, scale: float = 1.0, is_causal: bool = False
) -> Probe:
    """Of one batch row: `[T, N, H]`, `[S, K, H]`, `[S, K, V]`."""
    query, key, value = (x[None].astype(np.float32) for x in (query, key, value))
    return Probe(query, key, value, scale, is_causal)


def scores_of(asked: Probe) -> Float[np.ndarray, "T S"]:
    """The exact q·k of batch row 0 and head 0, in float64; the scale is left out."""
    return asked.query[0, :, 0].astype(np.float64) @ asked.key[0, :, 0].astype(np.float64).T


def padded(asked: Probe, head_dims: tuple[int, int]) -> Probe:
    """The probe with zeros behind the head's dimensions, for kernels that take other head dims.

    Args:
      head_dims: of query and key, and of value; each at least 64.
    """
    query, key, value = (
        np.pad(x, [(0, 0)] * 3 + [(0, dim - x.shape[3])])
        for x, dim in zip(asked[:3], (head_dims[0], *head_dims), strict=True)
    )
    return asked._replace(query=query, key=key, value=value)


def squared(asked: Probe) -> Probe:
    """The probe with as many queries as keys, for kernels that take no others: its rows again and again."""
    return asked._replace(query=np.resize(asked.query.swapaxes(0, 1), _square(asked)).swapaxes(0, 1))


def _square(asked: Probe) -> tuple[int, ...]:
    batch, _, heads, dim = asked.query.shape
    return asked.key.shape[1], batch, heads, dim


def with_head_dims(kernel: Kernel, head_dims: tuple[int, int]) -> Kernel:
    """`kernel` asked with `padded` probes; its answers are those of the unpadded ones."""

    def asked_padded(asked: Probe) -> Answer:
        answer = kernel(padded(asked, head_dims))
        return answer._replace(out=answer.out[..., : asked.value.shape[3]])

    return asked_padded


def answered(
    kernel: Kernel, asked: Mapping[str, Probe], advance: Callable[..., None] = lambda *_: None, what: str = "probes"
) -> tuple[dict[str, Answer], dict[str, str]]:
    """The kernel's answers by name, and the words of what it raised for the others.

    Args:
      advance: called with `what`, how much is done, of how much.
    """
    answers: dict[str, Answer] = {}
    failures: dict[str, str] = {}
    for done, (name, one) in enumerate(asked.items(), 1):
        try:
            answers[name] = kernel(one)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        advance(what, done, len(asked))
    return answers, failures


def digits_of(x: np.ndarray, digits: int) -> np.ndarray:
    """`x` rounded to so many significant digits, base two, with any exponent."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.round(np.ldexp(fraction, digits)), exponent - digits)


def toward_zero(x: np.ndarray, fmt: Format) -> np.ndarray:
    """`x` cut off to the format."""
    spacing = fmt.spacing(x)
    return np.trunc(x / spacing) * spacing


def finite(answer: Answer | None) -> bool:
    """Whether there is an answer, all of it numbers."""
    return answer is not None and bool(np.isfinite(answer.out).all())


HALF = {"float16": FORMATS["float16"], "bfloat16": FORMATS["bfloat16"]}
"""The formats to which a kernel may round scores and probabilities."""
