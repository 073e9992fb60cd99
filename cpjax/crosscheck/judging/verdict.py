"""From evidence to a verdict: which tests a result fails, in words. Thresholds follow from `statistic.LIMIT` (§4)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.error_model.arithmetic import HALVES
from cpjax.crosscheck.judging.asked import asked_of
from cpjax.crosscheck.judging.evidence import Evidence, RowTable
from cpjax.crosscheck.judging.problem import Problem
from cpjax.crosscheck.judging.score_tests import Score, z_score
from cpjax.crosscheck.judging.statistic import (
    LIMIT,
    RowErrors,
    binomial_z_score,
    expected_maximum,
    spread_z_score,
    worst_row_z_score,
)
from cpjax.wording import counted, is_are

LATTICE_SHARE = 2 / 7
"""Of outputs that should be no BF16 numbers, rounding errors typically move at most this share onto one: of the seven
FP16 numbers between two BF16 numbers two are their neighbours."""


SCALE_LIMIT = LIMIT + 1
"""z-score beyond which the scale is said to be off: its errors are the sum over all rows, of which rows share some."""

LEAST_CHANGE, MOST_CHANGE = 0.25, 2.0
"""A key is said to have entered with another weight if the weight changed by this much: lost is 1, doubled is 1."""

EXPLAINED = 0.5
"""Of the excess of Σ (error/σ)², what a directed test must explain to be named beside other failures."""

TELLING = 1.05
"""RMS(error / σ) from which on it is told; below, some rows stand out and the mean says nothing of them."""

APPROXIMATE_EXP = 1e-4
"""Kernels in half precision may approximate exp this well, as PyTorch's for CPUs do (docs/trial.md). A scale off by
less, where nothing else is wrong, cannot be told from that, and is not called wrong."""

ALIKE = (
    "approximate exponentials, as in PyTorch's FP16 and BF16 kernels for CPUs, look the same, so it is not called wrong"
)

MOST_NAMES = 8
"""Heads, chunks or ranks that a sentence names: words, which no test pins."""

Failure = tuple[str, str | None]
"""A test's name, and a sentence unless others say it already."""


@runtime_checkable
class Explanation(Protocol):
    """What a search for the cause finds; `cpjax.crosscheck.diagnosis` has one."""

    sentences: list[str]
    """What went wrong and where, most likely first."""
    chunk_weights: Float[np.ndarray, "Q C"]
    """Weight with which each key/value chunk entered each query chunk; NaN where not determined."""


@dataclass(frozen=True)
class Part:
    """A head, a query chunk or a rank on its own. `z_score` beyond 6, less what the worst of so many has, fails."""

    name: str
    z: float
    lse_z: float | None
    z_score: float


@dataclass(frozen=True)
class Verdict:
    """The judge's answer. Floats are NaN where nothing was measured (no lse given, no row judged)."""

    passed: bool
    """Correct arithmetic in the stated precision explains the result."""
    judgeable: bool
    """False: nothing is wrong where it could be judged, but somewhere it could not (out of the format's range)."""
    hard_ratio: float
    """Largest |error| / bound of `out`; beyond 1 no rounding explains it."""
    z: float
    """RMS(error / σ) of `out`: about 1 for correct arithmetic, less where it is better than claimed."""
    lse_hard_ratio: float
    lse_z: float
    max_error: float
    """Largest |error| of `out`; infinite where an output lies beyond its bound or is NaN."""
    lse_max_error: float
    reasons: list[str]
    """Why it did not pass, one sentence each; empty when it did."""
    failed_tests: tuple[str, ...]
    """Names of all tests that failed: form, expansion, range, bound, spread, worst row, lse bound, lse spread, lse
    worst row, heads, query chunks, ranks, scale, key, bfloat16, unjudged. A test that adds nothing to others has no
    sentence.
    """
    precision: str
    order: str
    rows: int
    """Rows (batch, position, head) that there are, pads not counted."""
    rows_judged: int
    """Rows that were judged; fewer than `rows` where they were sampled or out of range."""
    bias: float
    """Mean of error / σ: correct results have one too, so it decides nothing."""
    scale_error: float
    """The scale fitted to the errors, relative to the stated one: 1e-3 is 0.1 % too large."""
    scale_z_score: float
    parts: list[Part] = field(repr=False, default_factory=list)
    asked: dict[str, Any] = field(repr=False, default_factory=dict)
    """The question that this answers, and what was assumed (`cpjax.crosscheck.judging.asked`)."""
    remarks: list[str] = field(default_factory=list)
    """What was seen and does not count: errors of a scale that is off by less than an approximate exp explains."""
    search: Callable[[], Explanation] | None = field(repr=False, compare=False, default=None)
    """Looks for what went wrong; None when passed. It takes seconds, so it runs when somebody asks."""

    @property
    def diagnosis(self) -> list[str]:
        """What went wrong and where, most likely first (docs/diagnosis.md); empty when passed."""
        return [] if self.explanation is None else self.explanation.sentences

    @property
    def chunk_weights(self) -> Float[np.ndarray, "Q C"] | None:
        """Weight with which each key/value chunk entered each query chunk, 1 where right; NaN where not determined.

        None when passed.
        """
        return None if self.explanation is None else self.explanation.chunk_weights

    @cached_property
    def explanation(self) -> Explanation | None:
        """The whole diagnosis; None when passed."""
        return None if self.search is None else self.search()

    def __bool__(self) -> bool:
        """Refused, so that nobody takes the object itself for the answer.

        Raises:
          TypeError: always.
        """
        raise TypeError("a Verdict is neither true nor false; ask .passed")


def malformed(problem: Problem, reason: str) -> Verdict:
    """The verdict on something that is no result at all."""
    nan = float("nan")
    return Verdict(
        passed=False,
        judgeable=True,
        hard_ratio=float("inf"),
        z=nan,
        lse_hard_ratio=nan,
        lse_z=nan,
        max_error=float("inf"),
        lse_max_error=nan,
        reasons=[reason],
        failed_tests=("form",),
        precision=problem.precision.name,
        order=problem.order,
        rows=int(problem.is_judged.sum()) * problem.query.shape[2],
        rows_judged=0,
        bias=nan,
        scale_error=nan,
        scale_z_score=nan,
        asked=asked_of(problem),
    )


def decide(problem: Problem, evidence: Evidence, *, has_lse: bool, row_count: int, out_of_range: int) -> Verdict:
    """The verdict that follows from the evidence.

    Args:
      row_count: rows that could have been judged.
      out_of_range: rows with an output that no average of visible values can be (all rows are looked at for this).
    """
    table = evidence.rows
    out_errors = RowErrors(table.mean_square, table.dof, table.same)
    lse_errors = RowErrors(table.lse_square, table.lse_dof, table.same)
    parts = list(_parts(problem, table, has_lse))
    scale = _scale_score(evidence)
    scale_z_score = float(z_score(scale))
    scale_error = float(scale.value / scale.information) if scale.information > 0 else float("nan")
    failures: list[Failure] = []
    if out_of_range:
        failures.append(("range", f"out: {_count(out_of_range, row_count)} no average of the values it may see"))
    failures += _bound(table, "out", table.ratio, table.outside)
    failures += _errors(problem, "out", out_errors, _z(table))
    if has_lse:
        failures += _bound(table, "lse", table.lse_ratio, ~(table.lse_ratio <= 1.0))
        failures += _errors(problem, "lse", lse_errors, _lse_z(table))
    failures += _worst_parts(parts)
    # A gross fault makes every directed test fail. It counts only if it explains most of what is wrong, and it has a
    # sentence only where no other test has failed: then errors are small, as its estimate takes them to be. Of others
    # the diagnosis says what they are.
    enough = EXPLAINED * _excess(table) if failures else 0.0
    directed: list[Failure] = []
    if not abs(scale_z_score) <= SCALE_LIMIT and _gain(scale) >= enough:
        directed.append(("scale", _scale_sentence(scale_error, scale_z_score)))
    directed += _keys(evidence, enough)
    failures += [(name, None) for name, _ in directed] if failures else directed
    failures += _bfloat16(evidence)
    remarks: list[str] = []
    may_approximate = problem.precision.probability in HALVES and abs(scale_error) < APPROXIMATE_EXP
    if may_approximate and [name for name, _ in failures] == ["scale"]:
        remarks, failures = [f"{failures[0][1]}; {ALIKE}"], []
    unjudged = int(table.unjudged.sum())
    wrong = bool(failures)
    if unjudged:
        sentence = f"{_count(unjudged, row_count)} not judgeable: scores or outputs leave what the format can hold"
        failures.append(("unjudged", sentence))
    return Verdict(
        passed=not failures,
        judgeable=wrong or not unjudged,
        hard_ratio=float(table.ratio.max(initial=0.0)),
        z=_z(table),
        lse_hard_ratio=float(table.lse_ratio.max(initial=0.0)) if has_lse else float("nan"),
        lse_z=_lse_z(table) if has_lse else float("nan"),
        max_error=float(table.error.max(initial=0.0)),
        lse_max_error=float(table.lse_error.max(initial=0.0)) if has_lse else float("nan"),
        reasons=[sentence for _, sentence in failures if sentence is not None],
        failed_tests=tuple(name for name, _ in failures),
        precision=problem.precision.name,
        order=problem.order,
        rows=row_count,
        rows_judged=len(table.position) - unjudged,
        bias=_mean(table.bias, table.rounded),
        scale_error=scale_error,
        scale_z_score=scale_z_score,
        parts=parts,
        asked=asked_of(problem),
        remarks=remarks,
    )


def _count(some: int, of: int) -> str:
    return f"{some:,} of {counted(of, 'row')} {is_are(some)}"


def _place(table: RowTable, row: int) -> str:
    return f"batch {table.batch[row]}, position {table.position[row]}, head {table.head[row]}"


def _z(table: RowTable) -> float:
    """RMS(error/σ) over all rounded outputs."""
    return float(np.sqrt(_mean(table.mean_square, table.rounded)))


def _lse_z(table: RowTable) -> float:
    return float(np.sqrt(_mean(table.lse_square, table.lse_dof)))


def _mean(x: np.ndarray, weight: np.ndarray) -> float:
    """Weighted mean; NaN if nothing has weight."""
    counts = weight > 0
    return float(np.average(x[counts], weights=weight[counts])) if counts.any() else float("nan")


def _bound(table: RowTable, name: str, ratio: np.ndarray, outside: np.ndarray) -> Iterator[Failure]:
    rows = np.flatnonzero(~(ratio <= 1.0))
    if len(rows):
        error = table.error if name == "out" else table.lse_error
        worst, largest = (int(rows[np.argmax(x[rows])]) for x in (ratio, error))
        size = f"the worst, at {_place(table, worst)}, is off by {error[worst]:.3g}, {ratio[worst]:.3g} times its bound"
        if np.isinf(ratio[worst]):
            size = f"the worst, at {_place(table, worst)}, is no finite number, or should not be one"
        elif error[largest] > error[worst]:
            size = (
                f"the largest error, {error[largest]:.3g}, is at {_place(table, largest)}; beside its bound the worst, "
                f"at {_place(table, worst)}, is {ratio[worst]:.3g} times it"
            )
        many = int(outside[rows].sum())
        yield (
            "bound" if name == "out" else "lse bound",
            f"{name}: {counted(many, 'value')} in {counted(len(rows), 'row')} {'lies' if many == 1 else 'lie'} beyond "
            f"what any rounding explains; {size}",
        )


def _errors(problem: Problem, name: str, errors: RowErrors, z: float) -> Iterator[Failure]:
    prefix = "" if name == "out" else "lse "
    together, worst = spread_z_score(errors), worst_row_z_score(errors)
    if not together <= LIMIT:
        yield (
            f"{prefix}spread",
            f"{name}: errors are {_times(z)} what {problem.precision.name} makes them ({_beside(together, LIMIT)})"
            if np.isfinite(z)
            else None,
        )
    if not worst <= LIMIT:
        alone = f"{name}: one row's errors are too large for roundings ({_beside(worst, LIMIT)})"
        yield f"{prefix}worst row", alone if together <= LIMIT else None


def _parts(problem: Problem, table: RowTable, has_lse: bool) -> Iterator[Part]:
    chunk = problem.q_chunk[table.position]
    rank_of_chunk = np.array([_rank_label(problem, c) for c in range(int(chunk.max(initial=0)) + 1)])
    rank = rank_of_chunk[chunk]
    for name, label in (("head", table.head), ("query chunk", chunk), ("rank", rank)):
        values: Int[np.ndarray, " n"] = np.unique(label)
        for value in values:
            rows: Bool[np.ndarray, " R"] = label == value
            out = RowErrors(table.mean_square[rows], table.dof[rows], table.same[rows])
            lse = RowErrors(table.lse_square[rows], table.lse_dof[rows], table.same[rows])
            z_score = max(spread_z_score(out), spread_z_score(lse)) - expected_maximum(len(values))
            z = float(np.sqrt(_mean(table.mean_square[rows], table.rounded[rows])))
            lse_z = float(np.sqrt(_mean(lse.mean_square, lse.dof))) if has_lse else None
            yield Part(f"{name} {value}", z, lse_z, z_score)


def _rank_label(problem: Problem, q_chunk: int) -> int:
    """The rank of a query chunk; where every rank has all queries, the chunk stands for itself."""
    rank = problem.partition.rank(q_chunk)
    return q_chunk if rank is None or len(problem.partition.q_ranks(q_chunk)) != 1 else rank


def _times(z: float) -> str:
    """A few rows with large errors stand out though the mean over all rows is small."""
    return f"{z:.3g} times" if z >= TELLING else "in some rows larger than"


def _beside(z_score: float, limit: float) -> str:
    """How unlikely it is, and what is usual."""
    return f"z-score {z_score:.3g}; of correct results it is below {limit:g}"


def _worst_parts(parts: list[Part]) -> Iterator[Failure]:
    for kind, test in (("head", "heads"), ("query chunk", "query chunks"), ("rank", "ranks")):
        wrong = [part for part in parts if part.name.rpartition(" ")[0] == kind and not part.z_score <= LIMIT]
        if wrong:
            names = ", ".join(part.name.rpartition(" ")[2] for part in wrong[:MOST_NAMES]) + (
                ", …" if len(wrong) > MOST_NAMES else ""
            )
            many = sum(part.name.rpartition(" ")[0] == kind for part in parts)
            # That all of them are wrong says nothing about where.
            yield test, f"{test} that are wrong by themselves: {names} (of {many})" if len(wrong) < many else None


def _excess(table: RowTable) -> float:
    """Σ (error/σ)² beyond what correct results have; infinite where an output is not finite."""
    total = 0.0
    for square, count in ((table.mean_square, table.rounded), (table.lse_square, table.lse_dof)):
        counts = count > 0
        total += float(((square[counts] - 1) * count[counts]).sum())
    return total


def _gain(score: Score) -> float:
    """By how much Σ (error/σ)² falls if the fault that the score speaks of is taken out."""
    return float(score.value**2 / score.information) if score.information > 0 else 0.0


def _scale_score(evidence: Evidence) -> Score:
    """The score test for the scale; value / information estimates by which fraction it is off."""
    table = evidence.rows
    variance = table.scale_variance.sum() + evidence.scale_excess
    columns = (table.scale_mean.sum(), table.scale_bias.sum(), table.scale_information.sum())
    return Score(*(np.asarray(column) for column in (table.scale_value.sum(), variance, *columns)))


def _scale_sentence(error: float, z_score: float) -> str:
    return (
        f"the errors of all rows together are those of a scale {100 * error:+.2g} % off, too little to be seen in one "
        f"row ({_beside(abs(z_score), SCALE_LIMIT)})"
    )


def _keys(evidence: Evidence, enough: float) -> Iterator[Failure]:
    """A key that was lost, halved or doubled, and explains `enough`. Correct scores grow with the number of keys."""
    keys = evidence.keys
    change = np.divide(keys.value, keys.information, out=np.zeros_like(keys.value), where=keys.information > 0)
    z_scores = np.where((np.abs(change) >= LEAST_CHANGE) & (np.abs(change) <= MOST_CHANGE), np.abs(z_score(keys)), 0.0)
    b, k, s = np.unravel_index(np.argmax(z_scores), z_scores.shape)
    gain = _gain(Score(*(x[b, k, s] for x in keys)))
    if not z_scores[b, k, s] - expected_maximum(z_scores.size) <= LIMIT and gain >= enough:
        yield (
            "key",
            f"key {s} of batch {b}, key/value head {k} seems to enter with weight {1 + change[b, k, s]:.2g} "
            f"instead of 1 ({_beside(float(z_scores[b, k, s]), LIMIT)})",
        )


def _bfloat16(evidence: Evidence) -> Iterator[Failure]:
    lattice = evidence.lattice
    found, expected = int((lattice.found & lattice.expected).sum()), int(lattice.expected.sum())
    z_score = binomial_z_score(found, expected, LATTICE_SHARE)
    if not z_score <= LIMIT:
        yield (
            "bfloat16",
            f"out went through BF16: {found:,} of {expected:,} different outputs are BF16 numbers and should not be",
        )
