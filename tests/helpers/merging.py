"""Attention over ranks whose merge is chosen: the order, the formula, what is rounded. Float32 in plain NumPy.

It answers probes of `cpjax.fingerprint.ranks`, and shares no code with what reads them. All rows of a chunk of queries
are the same there, and one row a chunk is computed: where a mask is causal, only the first key of a chunk has weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cpjax.fingerprint.probe import Answer, Probe

single = np.float32
DTYPE = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

ORDERS: dict[str, Callable[[int, int], list[int]]] = {
    "ring": lambda rank, cp: [(rank - step) % cp for step in range(cp)],
    "ring upward": lambda rank, cp: [(rank + step) % cp for step in range(cp)],
    "both ways": lambda rank, cp: [(rank + step) % cp for step in (0, -1, 1, -2, 2, -3)[:cp]],
    "gather": lambda rank, cp: list(range(cp)),
    "gather downward": lambda rank, cp: list(range(cp))[::-1],
    "tree": lambda rank, cp: list(range(cp)),
    "own first": lambda rank, cp: [rank, *(other for other in range(cp) if other != rank)],
}


@dataclass(frozen=True)
class Merge:
    """How partial results become one.

    Attributes:
      order: a name of `ORDERS`, or `ascending` chunks.
      form: `max`: exp(lse − m), divided by their sum at each merge; `lse`: exp(lse − both's lse); `quotient`:
        exp(lse − m) / Σ before the multiplication; `sigmoid`: out − σ(b − a)(out − other); `mix`: (1 − σ) out + σ
        other; `running`: never divided but in the end, behind a running maximum; `gathered`, `gathered lse`: all at
        once, behind the maximum of all lses or with exp(lse − lse of all).
      sums: `log`: m + log Σ; `log1p`: m + log1p; `apart`: the maximum and the sum are carried.
      block, carry: formats of a chunk's out and of the merged out (of the sum, where it is divided once).
      block_lse, carry_lse: those of lse.
      per_rank: both chunks of a rank are one block.
      empty: what a rank whose keys nobody sees adds: `nothing` or `nan`.
      has_maximum: no maximum is taken off before exp, if False.
    """

    order: str = "ring"
    form: str = "max"
    sums: str = "log"
    block: str = "float16"
    carry: str = "float16"
    block_lse: str = "float32"
    carry_lse: str = "float32"
    per_rank: bool = False
    empty: str = "nothing"
    has_maximum: bool = True
    has_lse: bool = True


class State(NamedTuple):
    """`[n, V]` and `[n]`; `total` and `base` only where sum and maximum are apart: there lse = base + ln total."""

    out: np.ndarray
    lse: np.ndarray
    total: np.ndarray


def rounded(x: np.ndarray, fmt: str) -> np.ndarray:
    return x.astype(DTYPE[fmt]).astype(single)


def is_sensible(merge: Merge) -> bool:
    """Whether there is such a merge: a sigmoid is of two lses; all at once has no tree, and carries no lse."""
    if merge.form in ("sigmoid", "mix") and merge.sums == "apart":
        return False
    if merge.form.startswith("gathered"):
        return merge.order != "tree" and merge.sums == "log" and merge.carry_lse == "float32"
    if merge.form == "running" or merge.sums == "apart":
        return merge.sums == "apart" and {merge.block_lse, merge.carry_lse} == {"float32"}
    return merge.order != "tree" or merge.form != "running"


def merging(merge: Merge) -> Callable[[Probe], Answer]:
    """The kernel."""

    def kernel(asked: Probe) -> Answer:
        with np.errstate(all="ignore"):
            return answer(asked, merge)

    return kernel


def answer(asked: Probe, merge: Merge) -> Answer:
    batch, tokens, heads, dims = asked.value.shape
    count = 2 * asked.cp
    chunk = tokens // count
    real = asked.length or tokens
    out, lse = np.zeros((batch, tokens, heads, dims)), np.zeros((batch, tokens, heads))
    parts = _parts(asked, count)
    known: dict[tuple[int, ...], State] = {}
    for mine in range(count):
        rank = min(mine, count - 1 - mine)
        order = _order(merge, rank, asked.cp)
        seen = [c for c in order if (c <= mine or not asked.is_causal) and c * chunk < real]
        if merge.per_rank:
            pairs = list(dict.fromkeys((min(c, count - 1 - c), max(c, count - 1 - c)) for c in seen))
            which = [tuple(c for c in pair if c in seen) for pair in pairs]
        else:
            which = [(c,) for c in seen]
        for some in which:
            if some not in known:
                known[some] = _block(parts, some, merge)
        result = _all([known[some] for some in which], merge)
        if merge.empty == "nan" and len(seen) < count:
            result = State(result.out * np.nan, result.lse * np.nan, result.total)
        rows = slice(mine * chunk, (mine + 1) * chunk)
        shape = (batch, heads)
        out[:, rows, :, : result.out.shape[-1]] = result.out.reshape(*shape, 1, -1).swapaxes(1, 2)
        lse[:, rows] = result.lse.reshape(*shape, 1).swapaxes(1, 2)
    return Answer(out.astype(np.float16).astype(np.float64), lse if merge.has_lse else None)


def _order(merge: Merge, rank: int, cp: int) -> list[int]:
    if merge.order == "ascending":
        return list(range(2 * cp))
    return [c for source in ORDERS[merge.order](rank, cp) for c in (source, 2 * cp - 1 - source)]


def _parts(asked: Probe, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores `[n, C, keys]` and values `[n, C, keys, V]` of the first query row of all heads."""
    batch, tokens, heads, _ = asked.value.shape
    score = np.einsum("bnh,bsnh->bns", asked.query[:, 0], asked.key).astype(single) * single(asked.scale)
    used = np.flatnonzero(asked.value.any(axis=(0, 1, 2)))
    dims = int(used[-1]) + 1 if len(used) else 1  # the other columns of out are 0
    value = asked.value.swapaxes(1, 2)[..., :dims]
    return (
        score.reshape(batch * heads, count, tokens // count),
        value.reshape(batch * heads, count, tokens // count, dims).astype(single),
    )


def _block(parts: tuple[np.ndarray, np.ndarray], which: tuple[int, ...], merge: Merge) -> State:
    """FlashAttention of the keys of some chunks, probabilities in FP16."""
    score, value = (np.concatenate([x[:, c] for c in which], axis=1) for x in parts)
    base = score.max(axis=1)
    p = np.exp(score - base[:, None])
    total = p.sum(axis=1, dtype=single)
    weighted = (p.astype(np.float16).astype(single)[..., None] * value).sum(axis=1, dtype=single)
    out = rounded(weighted / total[:, None], merge.block)
    if merge.sums == "apart" or merge.form == "running":
        return State(out, base, total)
    return State(out, rounded(base + np.log(total), merge.block_lse), np.ones_like(total))


def _all(blocks: list[State], merge: Merge) -> State:
    if merge.form.startswith("gathered"):
        return _at_once(blocks, merge)
    if merge.form == "running":
        blocks = [State(rounded(b.out * b.total[:, None], merge.block), b.lse, b.total) for b in blocks]
    if merge.order == "tree":
        size = 1 if merge.per_rank else 2
        blocks = [_chain(blocks[i : i + size], merge) for i in range(0, len(blocks), size)]
        while len(blocks) > 1:
            blocks = [_chain(blocks[i : i + 2], merge) for i in range(0, len(blocks), 2)]
        result = blocks[0]
    else:
        result = _chain(blocks, merge)
    out = result.out / result.total[:, None] if merge.form == "running" else result.out
    if merge.sums == "apart" or merge.form == "running":
        return State(out, result.lse + np.log(result.total), result.total)
    return result._replace(out=out)


def _chain(blocks: list[State], merge: Merge) -> State:
    result = blocks[0]
    for block in blocks[1:]:
        result = _two(result, block, merge)
    return result


def _two(a: State, b: State, merge: Merge) -> State:
    top = np.maximum(a.lse, b.lse) if merge.has_maximum else np.zeros_like(a.lse)
    of_a, of_b = np.exp(a.lse - top) * a.total, np.exp(b.lse - top) * b.total
    total = of_a + of_b
    if merge.form == "running":
        out = a.out * np.exp(a.lse - top)[:, None] + b.out * np.exp(b.lse - top)[:, None]
        return State(rounded(out, merge.carry), top, total)
    if merge.sums == "apart":
        lse, kept = top, total
    else:
        if merge.sums == "log":
            lse = top + np.log(total)
        elif merge.has_maximum:
            lse = top + np.log1p(np.exp(-np.abs(a.lse - b.lse)))
        else:
            lse = a.lse + np.log1p(np.exp(b.lse - a.lse))
        lse, kept = rounded(lse, merge.carry_lse), np.ones_like(total)
    if merge.form == "max":
        out = (of_a[:, None] * a.out + of_b[:, None] * b.out) / total[:, None]
    elif merge.form == "quotient":
        out = (of_a / total)[:, None] * a.out + (of_b / total)[:, None] * b.out
    elif merge.form == "lse":
        both = lse + np.log(kept)
        out = (np.exp(a.lse - both) * a.total)[:, None] * a.out + (np.exp(b.lse - both) * b.total)[:, None] * b.out
    else:
        gate = (single(1) / (single(1) + np.exp(a.lse - b.lse)))[:, None]
        out = a.out - gate * (a.out - b.out) if merge.form == "sigmoid" else (1 - gate) * a.out + gate * b.out
    return State(rounded(out, merge.carry), lse, kept)


def _at_once(blocks: list[State], merge: Merge) -> State:
    lses = [b.lse + np.log(b.total) for b in blocks]
    top = np.max(lses, axis=0) if merge.has_maximum else np.zeros_like(lses[0])
    total = np.zeros_like(top)
    for lse in lses:
        total = total + np.exp(lse - top)
    both = top + np.log(total)
    base = both if merge.form == "gathered lse" else top
    out = np.zeros_like(blocks[0].out)
    for block, lse in zip(blocks, lses, strict=True):
        out = rounded(out + np.exp(lse - base)[:, None] * block.out, merge.carry)
    return State(out if merge.form == "gathered lse" else out / total[:, None], both, np.ones_like(total))
