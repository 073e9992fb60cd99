"""Wrong results: what a broken backend would hand over, each computed by the emulator with one thing changed.

Chunk 0 and early keys are the ones that go wrong, because under a causal mask nearly every row sees them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from cpjax.trial.emulators import Arithmetic, Order, attend, chunk_results, cut, fold, merge, rounded, visits, with_sink
from cpjax.trial.problem import Problem, Result, visible


@dataclass(frozen=True)
class Bench:
    """A problem, cast to its profile's input dtype, and the correct result that the faults are made from."""

    problem: Problem
    arithmetic: Arithmetic
    order: Order = "ascending"

    @cached_property
    def blocks(self) -> Result:
        """Attention over each chunk alone, as `chunk_results` gives it."""
        return chunk_results(self.problem, self.arithmetic, cut(self.problem.key.shape[1], self.problem.chunk_count))

    @cached_property
    def correct(self) -> Result:
        """What a correct backend hands over."""
        return self.folded(self.blocks)

    def folded(self, blocks: Result, join: Callable[..., Result] = merge) -> Result:
        """These chunk results, merged in the bench's order."""
        order = visits(self.problem, self.order)
        return fold(*with_sink(self.problem, self.arithmetic, blocks, order), self.arithmetic, join)


Fault = Callable[[Bench], Result]


def keys_dropped(bench: Bench, size: float) -> Result:
    """`size` early keys are lost, as by a loop bound or a page that was not copied."""
    chunks = cut(bench.problem.key.shape[1], bench.problem.chunk_count)
    return _with_chunk_zero(bench, np.where(np.isin(chunks[:1], _early(chunks, int(size))), -1, chunks[:1]))


def key_doubled(bench: Bench) -> Result:
    """One early key is counted twice."""
    chunks = cut(bench.problem.key.shape[1], bench.problem.chunk_count)
    return _with_chunk_zero(bench, np.concatenate([chunks[:1], _early(chunks, 1)[None]], axis=1))


def mask_shifted(bench: Bench, size: int) -> Result:
    """Causal mask off by `size` tokens: +1 lets a query see the next token, −1 hides its own."""
    length, batch = bench.problem.query.shape[1], bench.problem.query.shape[0]
    here = bench.problem.q_positions
    here = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)) if here is None else here
    return attend(replace(bench.problem, q_positions=here + np.int32(size)), bench.arithmetic, bench.order)


def mask_shifted_late(bench: Bench, size: int) -> Result:
    """As `mask_shifted`, but only for the last quarter of the queries: those that see most keys."""
    wrong, right = mask_shifted(bench, size), bench.correct
    late = np.arange(right.out.shape[1]) >= right.out.shape[1] * 3 // 4
    return Result(np.where(late[:, None, None], wrong.out, right.out), np.where(late[:, None], wrong.lse, right.lse))


def diagonal_unmasked(bench: Bench) -> Result:
    """The last query chunk sees all keys of its own chunk: "no mask" where a triangle was due."""
    problem = bench.problem
    chunks = cut(problem.key.shape[1], problem.chunk_count)
    last = int(np.flatnonzero(chunks[:, 0] >= 0)[-1])
    full = chunk_results(replace(problem, is_causal=False), bench.arithmetic, chunks[last : last + 1])
    rows = visible(problem, chunks[last, :1])[0, :, 0]  # the rows that see its first key are the rows on the diagonal
    out, lse = bench.blocks.out.copy(), bench.blocks.lse.copy()
    out[last][..., rows, :], lse[last][..., rows] = full.out[0][..., rows, :], full.lse[0][..., rows]
    return bench.folded(Result(out, lse))


def scale_off(bench: Bench, size: float) -> Result:
    """The scale is larger by the fraction `size`."""
    return attend(replace(bench.problem, scale=bench.problem.scale * (1 + size)), bench.arithmetic, bench.order)


def heads_swapped(bench: Bench) -> Result:
    """The first two heads are exchanged."""
    heads = np.arange(bench.problem.query.shape[2])
    heads[:2] = heads[:2][::-1]
    return Result(bench.correct.out[:, :, heads], bench.correct.lse[:, :, heads])


def ranks_swapped(bench: Bench) -> Result:
    """Ranks 0 and 1 hand over each other's rows."""
    length, count = bench.problem.query.shape[1], bench.problem.chunk_count
    rows = np.arange(length).reshape(count, -1)
    rows[[0, 1, count - 1, count - 2]] = rows[[1, 0, count - 2, count - 1]]
    return Result(bench.correct.out[:, rows.ravel()], bench.correct.lse[:, rows.ravel()])


def chunk_dropped(bench: Bench) -> Result:
    """Chunk 0 never arrives."""
    return bench.folded(_reweighted(bench, 0, -np.inf))


def chunk_doubled(bench: Bench) -> Result:
    """Chunk 0 arrives twice."""
    order = visits(bench.problem, bench.order)
    return fold(bench.blocks, np.concatenate([order, order[:, :1] * 0], axis=1), bench.arithmetic)


def chunk_weighted(bench: Bench, size: float) -> Result:
    """Chunk 0 enters with weight 1 − `size`."""
    return bench.folded(_reweighted(bench, 0, float(np.log1p(-size))))


def not_rescaled(bench: Bench) -> Result:
    """Merges add the new part without scaling the old one down."""

    def join(a: Result, b: Result, arithmetic: Arithmetic) -> Result:
        joined = merge(a, b, arithmetic)
        with np.errstate(invalid="ignore"):  # −inf − (−inf): neither saw a key
            share = np.where(np.isneginf(b.lse), 0, np.exp(b.lse - joined.lse))
        return Result(rounded(a.out + share[..., None] * b.out, arithmetic.carry), joined.lse)

    return bench.folded(bench.blocks, join)


def bf16_at_the_end(bench: Bench) -> Result:
    """The final output passes through BF16 once."""
    return Result(rounded(bench.correct.out, "bfloat16"), bench.correct.lse)


def bf16_at_the_start(bench: Bench) -> Result:
    """The first chunk's output passes through BF16 once, before anything is merged to it."""
    out = bench.blocks.out.copy()
    out[0] = rounded(out[0], "bfloat16")
    return bench.folded(Result(out, bench.blocks.lse))


def bf16_probabilities(bench: Bench) -> Result:
    """Probabilities are rounded to BF16 instead of the profile's format."""
    return attend(bench.problem, replace(bench.arithmetic, probability="bfloat16"), bench.order)


def lse_off(bench: Bench, size: float) -> Result:
    """lse is too large by `size`; `out` is right."""
    return bench.correct._replace(lse=bench.correct.lse + bench.correct.lse.dtype.type(size))


def lse_in_log2(bench: Bench) -> Result:
    """lse is the logarithm to base two."""
    return bench.correct._replace(lse=bench.correct.lse / bench.correct.lse.dtype.type(np.log(2)))


def row_off(bench: Bench, size: float) -> Result:
    """One row is too large by the fraction `size`."""
    out = bench.correct.out.copy()
    row = out.shape[1] // 2
    out[0, row, 0] = (out[0, row, 0].astype(np.float64) * (1 + size)).astype(out.dtype)
    return bench.correct._replace(out=out)


def zeros(bench: Bench) -> Result:
    """Nothing was written."""
    return Result(np.zeros_like(bench.correct.out), np.zeros_like(bench.correct.lse))


def plain_average(bench: Bench) -> Result:
    """The mean of the visible values: queries and keys are ignored."""
    return attend(replace(bench.problem, query=np.zeros_like(bench.problem.query)), bench.arithmetic, bench.order)


def another_case(bench: Bench) -> Result:
    """The correct result of other data of the same shape and distribution."""
    problem = bench.problem
    other = replace(problem, key=problem.key[..., ::-1], value=np.roll(problem.value, 1, axis=1))
    return attend(other, bench.arithmetic, bench.order)


def one_nan(bench: Bench) -> Result:
    """NaN in one place."""
    out = bench.correct.out.copy()
    out[0, out.shape[1] // 2, 0, 0] = np.nan
    return bench.correct._replace(out=out)


FAULTS: dict[str, Fault] = {
    "one key dropped": partial(keys_dropped, size=1.0),
    "one key doubled": key_doubled,
    "causal mask +1": partial(mask_shifted, size=1),
    "causal mask −1": partial(mask_shifted, size=-1),
    "causal mask +1, late": partial(mask_shifted_late, size=1),
    "causal mask −1, late": partial(mask_shifted_late, size=-1),
    "diagonal unmasked": diagonal_unmasked,
    "scale +0.03 %": partial(scale_off, size=3e-4),
    "scale +0.1 %": partial(scale_off, size=1e-3),
    "scale +1 %": partial(scale_off, size=1e-2),
    "heads exchanged": heads_swapped,
    "ranks exchanged": ranks_swapped,
    "chunk dropped": chunk_dropped,
    "chunk doubled": chunk_doubled,
    "chunk × 0.9": partial(chunk_weighted, size=0.1),
    "chunk × 0.99": partial(chunk_weighted, size=0.01),
    "not rescaled": not_rescaled,
    "BF16 at the end": bf16_at_the_end,
    "BF16 at the start": bf16_at_the_start,
    "BF16 probabilities": bf16_probabilities,
    "lse + 1e-4": partial(lse_off, size=1e-4),
    "lse in log2": lse_in_log2,
    "one row + 1 %": partial(row_off, size=0.01),
    "zeros": zeros,
    "plain average": plain_average,
    "another case": another_case,
    "one NaN": one_nan,
}

SIZED: dict[str, tuple[Callable[[Bench, float], Result], tuple[float, ...]]] = {
    "keys dropped": (keys_dropped, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)),
    "scale off by": (scale_off, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "chunk weight off by": (chunk_weighted, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "lse off by": (lse_off, (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "one row off by": (row_off, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
}
"""Faults that have a size, from the smallest to the largest that is tried."""


def changes(wrong: Result, right: Result) -> bool:
    """Whether a fault had anything to act on; one that changes no bit (no mask to shift, say) is none."""
    return not all(np.array_equal(a, b) for a, b in zip(wrong, right, strict=True))


def _early(chunks: np.ndarray, count: int) -> np.ndarray:
    """`count` keys of chunk 0, spread over it, the very first one (often the only one a row sees) left out."""
    return np.unique(np.linspace(1, chunks.shape[1] - 1, count + 1, dtype=int)[:count])


def _with_chunk_zero(bench: Bench, chunk: np.ndarray) -> Result:
    """The bench's result, had chunk 0 consisted of the keys `[1, L]`."""
    changed = chunk_results(bench.problem, bench.arithmetic, chunk)
    out, lse = (np.concatenate([new, old[1:]]) for new, old in zip(changed, bench.blocks, strict=True))
    return bench.folded(Result(out, lse))


def _reweighted(bench: Bench, chunk: int, log_weight: float) -> Result:
    lse = bench.blocks.lse.copy()
    lse[chunk] += lse.dtype.type(log_weight)
    out = bench.blocks.out.copy()
    if log_weight == -np.inf:
        out[chunk] = 0
    return Result(out, lse)


def sink_dropped(bench: Bench) -> Result:
    """The attention sink is forgotten."""
    return _with(bench, sink=None)


def softcap_ignored(bench: Bench) -> Result:
    """Logits are not capped."""
    return _with(bench, softcap=None)


def alibi_ignored(bench: Bench) -> Result:
    """No ALiBi."""
    return _with(bench, alibi=None)


def alibi_negated(bench: Bench) -> Result:
    """The slope has the wrong sign: far keys are preferred."""
    return _with(bench, alibi=None if bench.problem.alibi is None else -bench.problem.alibi)


def alibi_of_next_head(bench: Bench) -> Result:
    """Each head has the slope of the next."""
    return _with(bench, alibi=None if bench.problem.alibi is None else np.roll(bench.problem.alibi, -1, axis=1))


def bias_ignored(bench: Bench) -> Result:
    """No bias; what it hides is seen."""
    return _with(bench, bias=None)


def bias_shifted(bench: Bench) -> Result:
    """Each key has the bias of the key before it."""
    return _with(bench, bias=None if bench.problem.bias is None else np.roll(bench.problem.bias, 1, axis=3))


def _with(bench: Bench, **changes: np.ndarray | None) -> Result:
    return attend(replace(bench.problem, **changes), bench.arithmetic, bench.order)


LOGIT_FAULTS: dict[str, Fault] = {
    "sink dropped": sink_dropped,
    "softcap ignored": softcap_ignored,
    "ALiBi ignored": alibi_ignored,
    "ALiBi negated": alibi_negated,
    "ALiBi of the next head": alibi_of_next_head,
    "bias ignored": bias_ignored,
    "bias shifted": bias_shifted,
}
"""Of problems that have a softcap, a sink, ALiBi slopes or a bias (`held_out.with_other_logits`)."""
