"""Questions to several ranks: every chunk of keys has a partial result that is known, so that only the merge is asked.

A text over cp ranks, in zigzag, is cut into 2·cp chunks; rank r holds chunks r and 2·cp − 1 − r. All query rows ask the
same: their query is e_0, and a key holds its score in its first number. In each chunk the first `live` keys have the
chunk's score and the others none, so that its partial is the mean of their values and its lse is the score + ln live.
Each question is a head of its own. Numbers are those of FP16, as files of cases have them.
"""

import numpy as np
from jaxtyping import Float, Shaped

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint.probe import HEAD_DIM, NONE, Answer, Probe

CP, MOST_CP = 4, 4
"""Ranks that are asked; more than 4 would need more units than a sum can swallow (`merge_order`)."""
CHUNK = 8
"""Tokens of a chunk."""
HEADS = 88
"""Heads of every probe, over which its questions are spread, and then over batch rows: kernels take 128, and a program
that is compiled for a shape is compiled once."""


def chunks(cp: int) -> int:
    """How many chunks the text has."""
    return 2 * cp


def rank_of(chunk: int, cp: int) -> int:
    """Who holds it."""
    return min(chunk, 2 * cp - 1 - chunk)


def held(rank: int, cp: int) -> tuple[int, int]:
    """The early and the late chunk of a rank."""
    return rank, 2 * cp - 1 - rank


def over_ranks(
    scores: Float[np.ndarray, "n C"],
    values: Float[np.ndarray, "n C live V"],
    *,
    is_causal: bool = False,
    length: int = 0,
) -> Probe:
    """One question a head: the score of each of the C chunks, −inf for a chunk without a live key, and its values.

    Args:
      length: tokens that are real, those behind them are pads; 0 is all.

    Raises:
      ValueError: a score or a value is not exact in FP16.
    """
    asked, count, live, dims = *scores.shape, *values.shape[2:]
    batch, tokens = max(2, -(-asked // HEADS)), count * CHUNK
    # Heads that are left over ask the last question again.
    which = np.minimum(np.arange(batch * HEADS), asked - 1)
    scores, values = scores[which], values[which]
    query = np.zeros((batch, tokens, HEADS, HEAD_DIM), np.float32)
    query[..., 0] = 1
    score = np.full((batch, HEADS, count, CHUNK), NONE)
    score[..., :live] = np.where(np.isneginf(scores), NONE, scores).reshape(batch, HEADS, count, 1)
    key = np.zeros((batch, tokens, HEADS, HEAD_DIM), np.float32)
    key[..., 0] = score.reshape(batch, HEADS, tokens).swapaxes(1, 2)
    value = np.zeros((batch, HEADS, count, CHUNK, HEAD_DIM), np.float32)
    value[..., :live, :dims] = values.reshape(batch, HEADS, count, live, dims)
    value = value.reshape(batch, HEADS, tokens, HEAD_DIM).swapaxes(1, 2)
    half = FORMATS["float16"]
    if (half.round(key) != key).any() or (half.round(value) != value).any():
        raise ValueError("these scores or values are not exact in FP16")
    return Probe(query, key, value, 1.0, is_causal, cp=count // 2, length=length)


def of_chunks(x: Shaped[np.ndarray, "B T N V"], asked: int) -> Shaped[np.ndarray, "n C rows V"]:
    """Query, key, value or out, by question and by chunk."""
    batch, tokens, heads, dims = x.shape
    return x.swapaxes(1, 2).reshape(batch * heads, tokens // CHUNK, CHUNK, dims)[:asked]


def out_of(answer: Answer, asked: int) -> Float[np.ndarray, "n C rows V"]:
    """`out` by question and by the chunk of the query."""
    return of_chunks(answer.out, asked)


def lse_of(answer: Answer, asked: int, *, must_be_finite: bool = True) -> Float[np.ndarray, "n C rows"] | None:
    """`lse` alike; None if there is none, or if not all of it are numbers."""
    if answer.lse is None or (must_be_finite and not np.isfinite(answer.lse).all()):
        return None
    return of_chunks(answer.lse[..., None], asked)[..., 0]
