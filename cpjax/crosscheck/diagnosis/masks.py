"""The masks that faults apply, as families with a number: keys enter one after the other as the number grows.

Each key has a threshold for each row, and is visible under the number n if its threshold is at most n:

shift            causal, off by n tokens: n = 0 is the causal mask, n = ∞ none at all
diagonal         the same in the query's own chunk only; all other chunks are seen, or skipped, as they should be
window           the n nearest keys to either side, the query's own included; n = ∞ is no window
limit            the keys of the row's request at positions below n
chunks           a triangle in every chunk (n = 0): the causal mask by the indices in the chunk, not by positions
blocks N         the same in each of N equal runs of a request's tokens, whatever the chunks are
rank index       causal, by the index of each token among those that its rank holds
own rank         of what should be seen the keys that the query's own rank holds
both sides       the n nearest keys to either side, though the mask is causal; left side: all keys behind it, too
pads             the first n pads too, by positions; pads in place: by the places in the row
requests         the n nearest keys of other requests too, those before only if causal; requests by position: by theirs
request i        the n last keys of the request before i, seen by request i
prefix           of the keys before the first query only the n last
"""

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.diagnosis.cuts import part_of
from cpjax.crosscheck.diagnosis.sample import Sample, index_in_chunk
from cpjax.crosscheck.judging.problem import Problem

ALWAYS, NEVER = -np.inf, np.inf

Thresholds = Float[np.ndarray, "R S"]


def mask_of(sample: Sample, problem: Problem, family: str, number: float) -> Bool[np.ndarray, "R S"]:
    """The mask of a fault."""
    threshold = thresholds(sample, problem, family)
    return (threshold <= number) & (threshold < NEVER)


def thresholds(sample: Sample, problem: Problem, family: str) -> Thresholds:
    """From which number on each key is visible; `NEVER` where it is hidden whatever the number."""
    b, at = sample.batch, sample.position
    position, segment = (np.asarray(x)[b, at] for x in problem.q_tokens)
    kv_position, kv_segment = (np.asarray(x)[b] for x in problem.kv_tokens)
    ahead = position[:, None].astype(float) - kv_position[None]
    same = (segment[:, None] == kv_segment[None]) & (segment[:, None] >= 0)
    is_causal, window = problem.mask.is_causal, problem.mask.window
    inside = np.ones_like(same) if window is None else np.abs(ahead) < window
    right = np.where(sample.seen, ALWAYS, NEVER)
    if family == "shift":
        return np.where(same & inside, -ahead, NEVER)
    if family == "diagonal":
        own = (sample.chunk == sample.own)[None]
        return np.where(own, np.where(same & inside, -ahead, NEVER), right)
    if family == "window":
        return np.where(same & ((ahead >= 0) | (not is_causal)), np.abs(ahead) + 1, NEVER)
    if family == "limit":
        return np.where(same, kv_position[None].astype(float) + 1, NEVER)
    if family == "chunks":
        return np.where(sample.seen & sample.triangle, 0.0, NEVER)
    if family.startswith("blocks "):
        index = index_in_chunk(part_of(family.replace("blocks", "runs"), sample.chunk, kv_segment))
        return np.where(sample.seen & (index[None] <= index[at][:, None]), 0.0, NEVER)
    if family in ("both sides", "left side"):
        return np.where(same, (np.abs(ahead) if family == "both sides" else np.maximum(ahead, -1)) + 1, NEVER)
    if family in ("rank index", "own rank"):
        q_rank, kv_rank = (
            np.array([-1 if (r := problem.partition.rank(int(c))) is None else r for c in chunk])
            for chunk in (problem.q_chunk, problem.kv_chunk)
        )
        if family == "own rank":
            return np.where(sample.seen & (kv_rank[None] == q_rank[at][:, None]), 0.0, NEVER)
        index = index_in_chunk(kv_rank)
        return np.where(same & inside & (index[None] <= index[at][:, None]), 0.0, NEVER)
    if family == "prefix":
        return np.where(sample.seen, np.maximum(first_query(problem)[b] - kv_position, 0)[None], NEVER)
    place = at[:, None] - np.arange(len(kv_position), dtype=float)[None]
    before = {"by position": ahead >= 0, "in place": place >= 0}
    if family.startswith("pads"):
        is_pad = kv_segment < 0
        shown = before["in place" if family.endswith("in place") else "by position"] | (not is_causal)
        return np.where(is_pad[None] & shown, np.cumsum(is_pad)[None].astype(float), right)
    others = (kv_segment >= 0)[None] & ~same & (segment >= 0)[:, None]
    if family == "requests by position":
        return np.where(others & (before["by position"] | (not is_causal)), 1.0, right)
    distance = _distance(segment, kv_segment, place)
    shown = others & ((place > 0) | (not is_causal))
    if family.startswith("request "):
        number = int(family.removeprefix("request "))
        shown = shown & (segment == number)[:, None] & (kv_segment == before_of(kv_segment, number))[None]
    return np.where(shown, distance, right)


def _distance(segment: np.ndarray, kv_segment: np.ndarray, place: Float[np.ndarray, "R S"]) -> Thresholds:
    """How far each key lies before the first, or behind the last, key of the row's own request."""
    index = np.arange(len(kv_segment), dtype=float)
    first, last = np.zeros(len(segment)), np.zeros(len(segment))
    for number in np.unique(segment):
        own = np.flatnonzero(kv_segment == number)
        first[segment == number], last[segment == number] = (own[0], own[-1]) if len(own) else (0, 0)
    return np.where(place > 0, first[:, None] - index[None], index[None] - last[:, None])


def before_of(kv_segment: np.ndarray, number: int) -> int:
    """The request that stands before this one in the row; −2, which nothing has, where there is none."""
    own = np.flatnonzero(kv_segment == number)
    earlier = kv_segment[: own[0]] if len(own) else kv_segment[:0]
    earlier = earlier[earlier >= 0]
    return int(earlier[-1]) if len(earlier) else -2


def is_cached(problem: Problem, batch: int) -> Bool[np.ndarray, " S"]:
    """The keys of one batch row that stand before every query of their request."""
    return np.asarray(problem.kv_tokens.position)[batch] < first_query(problem)[batch]


def first_query(problem: Problem) -> np.ndarray:
    """For every key the least position of a query of its request, `[B, S]`."""
    q_position, q_segment = (np.asarray(x) for x in problem.q_tokens)
    kv_segment = np.asarray(problem.kv_tokens.segment)
    least = np.zeros(kv_segment.shape, np.int64)
    for b in range(len(kv_segment)):
        for s in np.unique(kv_segment[b]):
            mine = q_position[b][q_segment[b] == s]
            least[b][kv_segment[b] == s] = mine.min() if len(mine) else 0
    return least
