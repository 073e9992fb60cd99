"""Partial results merged with an lse in the wrong base, whatever the parts were.

Partials have weights exp(lse_c) / Σ exp(lse). Merged with exp2 where lse is natural, or with exp where it is in base
two, the weights are exp(β lse_c), with β = ln 2 or 1 / ln 2:

    out'  =  Σ a_c^β out_c / Σ a_c^β                a_c, out_c: the right weight and the result of part c
    lse'  =  ln(Σ a_c^β) + β lse                    or the same in the other base

Where the parts are not known, those that are usual are tried: runs, and tokens dealt out in turn.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.diagnosis.cuts import COUNTS, part_of, pattern
from cpjax.crosscheck.diagnosis.dictionary import RARE, Fault
from cpjax.crosscheck.diagnosis.guards import LEAST_SUM
from cpjax.crosscheck.exact.attention import Rows

BASES = {"exp2": float(np.log(2.0)), "exp": float(1 / np.log(2.0))}
"""What merged, of an lse in the other base, and β."""

HEAVY = 0.01
"""A part with less weight than this does not decide how much larger the roundings have become."""


def base_faults(
    chunk: Int[np.ndarray, " S"], segment: Int[np.ndarray, " S"], is_cached: Bool[np.ndarray, " S"], *, has_lse: bool
) -> Iterator[Fault]:
    """Merges in the wrong base, of the chunks of the partition, or of parts that nobody named."""
    cuts: dict[bytes, str] = {pattern(chunk): "chunks"} if len(np.unique(chunk)) > 1 else {}
    if is_cached.any():
        cuts.setdefault(pattern(part_of("prefix", chunk, segment, is_cached)), "prefix")
    for cut in (f"{kind} {count}" for kind in ("interleaved", "runs") for count in COUNTS):
        cuts.setdefault(pattern(part_of(cut, chunk, segment)), cut)
    cost = RARE + 2 * float(np.log(2 * len(cuts)))
    for cut in cuts.values():
        for merge in BASES:
            for lse in ("", "of the merge", "of the merge, other base") if has_lse else ("",):
                extra = 0.0 if cut == "chunks" else 1.0  # what was said goes before what is guessed
                yield Fault("wrong base", merge=merge, cut=cut, lse=lse, cost=cost + extra)


def merged_wrongly(
    rows: Rows, fault: Fault
) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """out and lse of such a merge, and by how much its roundings may be larger. The rows' chunks are the parts."""
    beta, a = BASES[fault.merge], rows.chunk_weight
    weight = np.where(a > 0, a, 0.0) ** beta * (a > 0)
    total = np.maximum(weight.sum(axis=1), LEAST_SUM)
    share = weight / total[:, None]
    factor = np.divide(share, a, out=np.zeros_like(a), where=a > 0)
    out = (factor[..., None] * rows.chunk_part).sum(axis=1)
    growth = np.maximum(1.0, np.where(share > HEAVY, factor, 0.0).max(axis=1))
    with np.errstate(invalid="ignore"):
        natural = np.log(total) + beta * rows.lse
    lse = {"": rows.lse, "of the merge": natural / beta, "of the merge, other base": natural}[fault.lse]
    return out, lse, growth
