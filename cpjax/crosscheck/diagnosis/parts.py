"""Partial results merged wrongly, whatever the parts were: in the wrong base, without weights, one left out.

Partials have weights exp(lse_c) / Σ exp(lse). Merged with exp2 where lse is natural, or with exp where it is in base
two, the weights are exp(β lse_c), with β = ln 2 or 1 / ln 2:

    out'  =  Σ a_c^β out_c / Σ a_c^β                a_c, out_c: the right weight and the result of part c
    lse'  =  ln(Σ a_c^β) + β lse                    or the same in the other base

A merge that adds exp(lse_c − max lse) out_c and forgets to divide gives out / max a_c; one without weights Σ out_c, or
their mean. Where the parts are not known, those that are usual are tried: runs, and tokens dealt out in turn; of the
latter each part is left out, and counted twice (`runs` finds runs).
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.diagnosis.cuts import COUNTS, part_of, pattern
from cpjax.crosscheck.diagnosis.dictionary import RARE, Fault
from cpjax.crosscheck.diagnosis.guards import LARGEST_GROWTH, LARGEST_OUT, LEAST_SUM
from cpjax.crosscheck.exact.attention import Rows

BASES = {"exp2": float(np.log(2.0)), "exp": float(1 / np.log(2.0))}
"""What merged, of an lse in the other base, and β."""

UNWEIGHTED = ("not divided", "mean", "sum")
"""Merges whose weights do not add up to one, or are none."""

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
        extra = 0.0 if cut == "chunks" else 1.0
        for merge in UNWEIGHTED:
            yield Fault("merged without weights", merge=merge, cut=cut, cost=cost + extra)
    dealt = [cut for cut in cuts.values() if cut.startswith("interleaved")]
    counts = [int(cut.partition(" ")[2]) for cut in dealt]
    for cut, count in zip(dealt, counts, strict=True):
        for number in range(count):
            for merge in ("lost", "twice"):
                price = RARE + 2 * float(np.log(2 * sum(counts)))
                yield Fault("part of a merge", merge=merge, cut=cut, number=float(number), cost=price)
    for cut in cuts.values():
        for merge in BASES:
            for lse in ("", "of the merge", "of the merge, other base") if has_lse else ("",):
                extra = 0.0 if cut == "chunks" else 1.0  # what was said goes before what is guessed
                yield Fault("wrong base", merge=merge, cut=cut, lse=lse, cost=cost + extra)


def merged_wrongly(
    rows: Rows, fault: Fault
) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """out and lse of such a merge, and by how much its roundings may be larger. The rows' chunks are the parts."""
    if fault.merge not in BASES:
        return _merged_otherwise(rows, fault)
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


def _merged_otherwise(
    rows: Rows, fault: Fault
) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """The same of a merge without weights, or of a part that is left out or counted twice."""
    a = np.where(rows.chunk_weight > 0, rows.chunk_weight, 0.0)
    ones = np.ones_like(rows.lse)
    if fault.merge in ("lost", "twice"):
        part, sign = int(fault.number), -1.0 if fault.merge == "lost" else 1.0
        # What a cut does not have, because the text is too short, changes nothing.
        mine = a[:, part] if part < a.shape[1] else 0 * ones
        of_part = rows.chunk_part[:, part] if part < a.shape[1] else 0 * rows.out
        total = np.maximum(1 + sign * mine, LEAST_SUM)
        out = np.clip((rows.out + sign * of_part) / total[:, None], -LARGEST_OUT, LARGEST_OUT)
        return out, rows.lse + np.log(total), np.clip(1 / total, 1.0, LARGEST_GROWTH)
    if fault.merge == "not divided":
        heaviest = np.where(a.max(axis=1) > 0, a.max(axis=1), 1.0)
        return rows.out / heaviest[:, None], rows.lse, 1 / heaviest
    each = np.divide(rows.chunk_part, a[..., None], out=np.zeros_like(rows.chunk_part), where=a[..., None] > 0)
    # The part in which a row sees nothing is a result, too, and is zero.
    count = a.shape[1] * ones if fault.merge == "mean" else ones
    factor = np.divide(1.0, a * count[:, None], out=np.zeros_like(a), where=a > 0)
    return each.sum(axis=1) / count[:, None], rows.lse, np.clip(factor.max(axis=1), 1.0, LARGEST_GROWTH)
