"""Results with one fault put in on purpose, for the tests of the diagnosis: computed by the trial's emulator."""

from dataclasses import replace

import numpy as np

from cpjax.crosscheck import judge
from cpjax.trial.emulators import PROFILES, attend, chunk_results, cut, fold, merge, rounded, visits
from cpjax.trial.localise import CHUNK, problem
from cpjax.trial.problem import Problem, Result

FLASH = PROFILES["flash_fp16"]


def posed(seed, *, cp=2, is_causal=True, logits=1.0, heads=(2, 2)) -> Problem:
    """Normal data, 16 tokens a chunk; query heads, key/value heads."""
    p = problem(seed, cp=cp, is_causal=is_causal, logits=logits, heads=heads[0])
    return replace(p, key=p.key[:, :, : heads[1]], value=p.value[:, :, : heads[1]])


def said_of(p: Problem, result, *, order="ring", precision="flash_fp16", with_lse=True, **changes):
    """The verdict on it."""
    lse = result.lse if with_lse else None
    return judge(
        p.query, p.key, p.value, result.out, lse, **(p.judge_arguments() | changes), order=order, precision=precision
    )


def index(p: Problem) -> np.ndarray:
    """0, 1, 2, … for each batch row."""
    return np.broadcast_to(np.arange(p.query.shape[1], dtype=np.int32), p.query.shape[:2])


def of_ranks(p: Problem, *ranks: int) -> np.ndarray:
    """Which tokens these ranks hold."""
    chunk = np.arange(p.query.shape[1]) // CHUNK
    return np.isin(np.minimum(chunk, 2 * p.cp - 1 - chunk), ranks)


def block_otherwise(p: Problem, other: Problem, chunk: int, rows: np.ndarray, order="ring") -> Result:
    """The result if these rows met one key/value chunk as `other` says, all else as `p` says."""
    chunks = cut(p.key.shape[1], p.chunk_count)
    right, wrong = (chunk_results(x, FLASH, chunks) for x in (p, other))
    out, lse = right.out.copy(), right.lse.copy()
    out[chunk][..., rows, :], lse[chunk][..., rows] = wrong.out[chunk][..., rows, :], wrong.lse[chunk][..., rows]
    return fold(Result(out, lse), visits(p, order), FLASH)


def shifted(p: Problem, k: int, order="ring") -> Result:
    """The causal mask off by k: +1 shows the next token."""
    return attend(replace(p, q_positions=index(p) + np.int32(k)), FLASH, order)


def shifted_on_the_diagonal(p: Problem, k: int, order="ring") -> Result:
    """The same, but a rank skips chunks as it should: only the diagonal chunk has the wrong mask."""
    wrong = replace(p, q_positions=index(p) + np.int32(k))
    chunks = cut(p.key.shape[1], p.chunk_count)
    right, off = (chunk_results(x, FLASH, chunks) for x in (p, wrong))
    out, lse = right.out.copy(), right.lse.copy()
    for c in range(p.chunk_count):
        own = np.arange(p.query.shape[1]) // CHUNK == c
        out[c][..., own, :], lse[c][..., own] = off.out[c][..., own, :], off.lse[c][..., own]
    return fold(Result(out, lse), visits(p, order), FLASH)


def triangle(p: Problem, chunk: int, rank: int) -> Result:
    """A rank masks one chunk, where it sees all of it, as if it were the diagonal."""
    own = index(p) % CHUNK
    rows = of_ranks(p, rank)
    if p.is_causal:
        rows &= index(p)[0] // CHUNK > chunk
    return block_otherwise(p, replace(p, is_causal=True, q_positions=own, kv_positions=own), chunk, rows)


def packed(p: Problem, lengths, *, pads=0) -> Problem:
    """Requests of these lengths one after the other, behind each `pads` pads at position 0, then pads to the end."""
    segment, position = np.full(p.query.shape[1], -1, np.int32), np.zeros(p.query.shape[1], np.int32)
    start = 0
    for number, length in enumerate(lengths):
        segment[start : start + length], position[start : start + length] = number, np.arange(length)
        start += length + pads
    return replace(p, segments=segment[None], q_positions=position[None], kv_positions=position[None])


def with_prefix(p: Problem, length: int) -> Problem:
    """Only the last tokens are queries; `length` keys stand before them."""
    tokens = p.key.shape[1]
    places = np.arange(tokens, dtype=np.int32)[None]
    return replace(p, query=p.query[:, length:], q_positions=places[:, length:], kv_positions=places)


def without_keys(p: Problem, lost: np.ndarray, order="ring") -> Result:
    """Nobody sees these keys."""
    chunks = cut(p.key.shape[1], p.chunk_count)
    blocks = chunk_results(p, FLASH, np.where(np.isin(chunks, lost), -1, chunks))
    return fold(blocks, visits(p, order), FLASH)


def bleeding(p: Problem, count: int, order="ring") -> Result:
    """Request 1 sees the last `count` keys of request 0, as if its offset in the row were smaller by so much."""
    own = p.segments.copy()
    first = np.flatnonzero(own[0] == 0)
    own[0, first[len(first) - count :]] = 1
    wrong = attend(replace(p, segments=own, q_positions=index(p), kv_positions=index(p)), FLASH, order)
    right = attend(p, FLASH, order)
    is_first = (p.segments == 0)[..., None]
    return Result(np.where(is_first[..., None], right.out, wrong.out), np.where(is_first, right.lse, wrong.lse))


def weighted(p: Problem, weights: dict[tuple[int, int], float], order="ring") -> Result:
    """At (rank, chunk) the chunk enters with another weight than 1."""
    blocks = chunk_results(p, FLASH, cut(p.key.shape[1], p.chunk_count))
    lse = blocks.lse.copy()
    for (rank, chunk), weight in weights.items():
        lse[chunk][..., of_ranks(p, rank)] += np.float32(np.log(weight))
    return fold(Result(blocks.out, lse), visits(p, order), FLASH)


def rescaled_except(p: Problem, step: int, order="ring") -> Result:
    """One merge adds its part without scaling down what was there."""
    merges = []

    def join(a: Result, b: Result, arithmetic) -> Result:
        merges.append(1)
        joined = merge(a, b, arithmetic)
        if len(merges) != step:
            return joined
        with np.errstate(invalid="ignore"):
            share = np.where(np.isneginf(b.lse), 0, np.exp(b.lse - joined.lse))
        return Result(rounded(a.out + share[..., None] * b.out, arithmetic.carry), joined.lse)

    blocks = chunk_results(p, FLASH, cut(p.key.shape[1], p.chunk_count))
    return fold(blocks, visits(p, order), FLASH, join)
