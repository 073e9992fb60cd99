"""Whether the merged out is divided by the weights at each merge or once in the end, or whether all is summed at once.

Chunk i has the value M and chunk j has −M, with the same score 0; all other values are 0. So out is 0, but for what is
rounded between i and j. First the other scores are below 0: a sum that nobody divides is M, and 0 again, exactly; one
that is divided by the weights at each merge is not. Then the other scores are above and below: a running maximum rises
between i and j, and M is rescaled in two steps where −M is in one; a sum that takes the maximum of all first, or the
lse of all, stays exact.
"""

from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint.merge_order import node_sizes
from cpjax.fingerprint.order import pairs
from cpjax.fingerprint.probe import HEAD_DIM, Answer, Probe
from cpjax.fingerprint.ranks import chunks, out_of, over_ranks, rank_of
from cpjax.fingerprint.tree import Tree

KINDS = "each", "once", "at once"
"""What may be: a division at each merge, one in the end behind a running maximum, a sum of all at once."""
DRAWS = 3
"""How often the scores of the other ranks are drawn, for each probe."""
FEW = 0.02
"""A share of nonzero numbers below this is not taken for a way of computing."""
HALF_SIZE = 2.0**-18
"""What is left of M is below this if all is float32, above if something is rounded to a half format."""


def probes(cp: int) -> dict[str, Probe]:
    """One: of lower scores, then of higher and lower ones."""
    rng = np.random.default_rng(11)
    pair, half = pairs(chunks(cp)), FORMATS["float16"]
    row = np.arange(len(pair))
    values = np.zeros((len(pair), chunks(cp), 1, HEAD_DIM))
    large = half.round(rng.uniform(1024, 2048, (len(pair), 1, HEAD_DIM)))
    values[row, pair[:, 0]], values[row, pair[:, 1]] = large, -large
    # Both chunks of a rank have one score: where they are one block, no probability is rounded.
    rank = np.array([rank_of(chunk, cp) for chunk in range(chunks(cp))])
    is_theirs = (rank == rank[pair[:, :1]]) | (rank == rank[pair[:, 1:]])

    def asked(low: float, high: float) -> np.ndarray:
        drawn = half.round(rng.uniform(low, high, (DRAWS, len(pair), cp)))[..., rank]
        return np.where(is_theirs, 0, drawn).reshape(-1, chunks(cp))

    scores = np.concatenate([asked(-3.0, -0.1), asked(-2.0, 4.0)])
    return {"merge-division": over_ranks(scores, np.tile(values, (2 * DRAWS, 1, 1, 1)))}


class Division(NamedTuple):
    """What may be, of `KINDS`; and what was seen."""

    may_be: frozenset[str]
    evidence: str


def read(cp: int, trees: tuple[Tree, ...], answer: Answer | None) -> Division | None:
    """What explains the numbers; None if there are none. Where several do, `merge_carry` decides."""
    pair = pairs(chunks(cp))
    if answer is None or not np.isfinite(answer.out).all():
        return None
    out, others = np.split(out_of(answer, 2 * DRAWS * len(pair)), 2)
    # Where i and j meet with chunks of their own ranks alone, all scores are equal, and nothing is rounded in between.
    rank = np.array([rank_of(chunk, cp) for chunk in range(chunks(cp))])
    own = np.where(rank[pair[:, 0]] == rank[pair[:, 1]], 2, 4)
    apart = np.tile((node_sizes(trees)[:, pair[:, 0], pair[:, 1]] > own).T, (DRAWS, 1))  # [draws · pairs, C]
    if not apart.any():
        return Division(frozenset(KINDS), f"{cp} ranks of one block each are merged once, with nothing in between")
    first, second = (float((x[apart] != 0).mean()) for x in (out, others))
    left = max(float(np.abs(out).max()), float(np.abs(others).max())) / 1024
    evidence = (
        f"M and −M, merged with others in between, leave something in {first:.1%} of the sums where other scores are "
        f"lower, in {second:.1%} where some are higher; at most 2^{np.log2(left):.0f} of M"
        if left
        else "M and −M, merged with others in between, leave nothing, also where other scores are higher"
    )
    # In a half format all of them leave much.
    also = {"once", "at once"} if left > HALF_SIZE else set()
    if first > FEW:
        return Division(frozenset({"each"} | also), evidence)
    if first == 0:
        return Division(frozenset({"once"} | also if second > FEW else {"at once"} if second == 0 else ()), evidence)
    return Division(frozenset(), evidence)
