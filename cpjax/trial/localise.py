"""How often is the place right? `python -m cpjax.trial.localise`: every (rank, step, chunk) fault, counted.

A fault happens when one rank, at one ring step, merges one key/value chunk into its queries: the chunk is dropped,
counted twice, enters with weight 0.9, or in its place the data of the next chunk enters. "exchanged" takes the two
chunks of the source rank for each other; "unmasked" leaves the mask of the diagonal away.

Of each fault the worst that is said of any query chunk is counted: "alone" (all equals name the place and the kind),
"among equals" (some do), "refused" (nothing explains it), "wrong". Faults that cannot be seen are counted apart:
"changes nothing" (no bit of what is shown to the judge), "within rounding" (the judge passes it). From `out` alone,
query chunks that see fewer than three key/value chunks are counted apart as well.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, NamedTuple

import numpy as np
import typer

from cpjax.crosscheck import judge
from cpjax.crosscheck.diagnosis import Cause, Diagnosis, diagnose
from cpjax.crosscheck.diagnosis.words import UNKNOWN
from cpjax.crosscheck.judging.evidence import collect
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.crosscheck.judging.sampling import chosen_rows
from cpjax.crosscheck.judging.verdict import Verdict
from cpjax.crosscheck.run.workers import each
from cpjax.trial.emulators import PROFILES, attend, chunk_results, cut, fold, visits
from cpjax.trial.faults import Bench, changes
from cpjax.trial.problem import Problem, Result

KINDS = ("dropped", "doubled", "unrescaled", "stale", "exchanged", "unmasked")
CHUNK = 16
"""Tokens in a chunk."""

ENOUGH = 3
"""From `out` alone, a query chunk that sees one key/value chunk shows no weight, one that sees two their ratio."""

FEW = ", few chunks"


class Place(NamedTuple):
    """Where a fault is: the rank that computes, the step, the key/value chunk that it meets then."""

    rank: int
    step: int
    chunk: int


def problem(seed: int, *, cp: int, is_causal: bool, logits: float, heads: int = 1) -> Problem:
    """Normal data, 16 tokens a chunk."""
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((1, 2 * cp * CHUNK, heads, 32)) for _ in range(3))
    return Problem(query * logits, key, value, 32**-0.5, is_causal, cp=cp).cast("float16")


def places(cp: int) -> Iterator[Place]:
    """All of them."""
    for rank in range(cp):
        for step in range(cp):
            source = (rank - step) % cp
            yield from (Place(rank, step, chunk) for chunk in (source, 2 * cp - 1 - source))


def wrong_result(bench: Bench, kind: str, place: Place) -> Result:
    """The result with the fault in that place; both query chunks of the rank suffer it."""
    p, cp, c = bench.problem, bench.problem.cp, place.chunk
    other = (c + 1) % (2 * cp) if kind == "stale" else 2 * cp - 1 - c
    out, lse = bench.blocks.out.copy(), bench.blocks.lse.copy()
    mine = np.isin(np.arange(p.query.shape[1]) // CHUNK, (place.rank, 2 * cp - 1 - place.rank))
    if kind == "dropped":
        out[c][..., mine, :], lse[c][..., mine] = 0, -np.inf
    elif kind == "unrescaled":
        lse[c][..., mine] += np.float32(np.log(0.9))
    elif kind in ("stale", "exchanged"):
        pairs = [(c, other)] if kind == "stale" else [(c, other), (other, c)]
        for slot, source in pairs:
            block = _in_place_of(bench, slot, source)
            out[slot][..., mine, :], lse[slot][..., mine] = block.out[..., mine, :], block.lse[..., mine]
    elif kind == "unmasked":
        own = np.arange(p.query.shape[1]) // CHUNK == c
        full = chunk_results(replace(p, is_causal=False), bench.arithmetic, cut(p.key.shape[1], 2 * cp)[c : c + 1])
        rows = mine & own
        out[c][..., rows, :], lse[c][..., rows] = full.out[0][..., rows, :], full.lse[0][..., rows]
    order = visits(p, bench.order)
    if kind != "doubled":
        return fold(Result(out, lse), order, bench.arithmetic)
    # One more visit: of the chunk again for the rank's rows, of nothing for all others.
    out, lse = np.concatenate([out, 0 * out[:1]]), np.concatenate([lse, np.full_like(lse[:1], -np.inf)])
    again = np.where(mine, c, 2 * cp)[:, None]
    return fold(Result(out, lse), np.concatenate([order, again], axis=1), bench.arithmetic)


def _in_place_of(bench: Bench, slot: int, source: int) -> Result:
    """Attention to the data of chunk `source` by a kernel that takes it for `slot` and masks it so."""
    p, chunks = bench.problem, cut(bench.problem.key.shape[1], bench.problem.chunk_count)
    key, value = p.key.copy(), p.value.copy()
    key[:, chunks[slot]], value[:, chunks[slot]] = p.key[:, chunks[source]], p.value[:, chunks[source]]
    changed = replace(p, key=key, value=value)
    block = chunk_results(changed, bench.arithmetic, chunks[slot : slot + 1])
    return Result(block.out[0], block.lse[0])


def verdict(bench: Bench, result: Result, *, with_lse: bool) -> Verdict:
    """The judge's."""
    p = bench.problem
    lse = result.lse if with_lse else None
    return judge(p.query, p.key, p.value, result.out, lse, **p.judge_arguments(), order=str(bench.order))


def unseen(bench: Bench, wrong: Result, said: Verdict, *, with_lse: bool) -> str | None:
    """Why the fault cannot be seen, or None."""
    right = bench.correct
    if not changes(wrong if with_lse else wrong._replace(lse=right.lse), right):
        return "changes nothing"
    return "within rounding" if said.passed else None


NAMES = {"unrescaled": {"weight"}, "stale": {"stale", "exchanged"}, "exchanged": {"stale", "exchanged"}}
"""By which kinds of the dictionary a fault is named, if not by its own: where the mask hides one of two exchanged
chunks, the other holds stale data and nothing else happened."""


def named(cp: int, cause: Cause, place: Place, kind: str) -> str:
    """What the diagnosis of one query chunk says of the place: "alone", "among equals", "refused", "wrong"."""
    last = 2 * cp - 1
    chunks = {place.chunk, last - place.chunk} if kind == "exchanged" else {place.chunk}
    if not cause.faults:
        return "refused"
    if min(cause.query_chunk, last - cause.query_chunk) != place.rank:
        return "wrong"
    right = [fault.kind in NAMES.get(kind, {kind}) and bool(chunks & set(fault.chunks)) for fault in cause.faults]
    return "alone" if all(right) else "among equals" if any(right) else "wrong"


def outcome(cp: int, said: Verdict, place: Place, kind: str, query_chunks: set[int]) -> str | None:
    """The worst that is said of these query chunks; None where none of them is said to be wrong."""
    found = said.explanation
    if not isinstance(found, Diagnosis) or not found.causes or found.common:
        return "wrong"
    each_one = [named(cp, cause, place, kind) for cause in found.causes if cause.query_chunk in query_chunks]
    return next((name for name in ("wrong", "refused", "among equals", "alone") if name in each_one), None)


def count_one(task: tuple[int, bool, str, Place, int, float]) -> dict[str, str]:
    """One fault, judged with lse and from out alone: what is said, or why it cannot be seen."""
    cp, is_causal, kind, place, seed, logits = task
    bench = Bench(problem(seed, cp=cp, is_causal=is_causal, logits=logits), PROFILES["flash_fp16"], "ring")
    wrong = wrong_result(bench, kind, place)
    said = {"key": f"{cp} {'causal' if is_causal else 'full'} ×{logits:g} {kind}"}
    every = set(range(2 * cp))
    few = {chunk for chunk in every if is_causal and chunk + 1 < ENOUGH}
    for name, with_lse, groups in (("with lse", True, {"": every}), ("out alone", False, {"": every - few, FEW: few})):
        judged = verdict(bench, wrong, with_lse=with_lse)
        why = unseen(bench, wrong, judged, with_lse=with_lse)
        for more, query_chunks in groups.items():
            answer = why or outcome(cp, judged, place, kind, query_chunks)
            if query_chunks and answer is not None:
                said[name + more] = answer
    if {"wrong", "refused"} & set(said.values()):
        said["task"] = f"{task[:3]} {place} seed {seed}"
    return said


def count_correct(task: tuple[int, int, float, int]) -> Counter:
    """A correct result, judged; one in so many is diagnosed all the same, as if it had failed: is a fault named?"""
    cp, seed, logits, forced_every = task
    rng = np.random.default_rng(seed)
    profile, order = str(rng.choice(["flash_fp16", "ring_mla_fp16", "float32"])), str(rng.choice(["ring", "gather"]))
    p = problem(seed, cp=cp, is_causal=bool(rng.integers(2)), logits=logits)
    p = p.cast("float32") if profile == "float32" else p
    out, lse = attend(p, PROFILES[profile], order)
    given = lse if rng.random() < 0.5 else None
    said = judge(p.query, p.key, p.value, out, given, **p.judge_arguments(), precision=profile, order=order)
    count = Counter(failed=int(not said.passed), diagnoses=len(said.diagnosis))
    if seed % forced_every == 0:
        forced = diagnose_anyway(p, out, given, profile, order).sentences
        count += Counter(forced=1, named=sum(not sentence.startswith(UNKNOWN) for sentence in forced))
    return count


def diagnose_anyway(p: Problem, out: np.ndarray, lse: np.ndarray | None, precision: str, order: str) -> Diagnosis:
    """What the search would say of this result, whatever the verdict."""
    asked = checked_problem(p.query, p.key, p.value, **p.judge_arguments(), precision=precision, order=order)
    return diagnose(asked, collect(asked, out, lse, chosen_rows(asked, 0)), out, lse)


def tasks_of(sizes: list[int], logits: list[float], seed: int) -> list[tuple[int, bool, str, Place, int, float]]:
    """Every fault, each with its own data."""
    return [
        (n, is_causal, kind, place, seed + i, size)
        for size in logits
        for n in sizes
        for is_causal in (False, True)
        for kind in KINDS
        for i, place in enumerate(places(n))
        if kind != "unmasked" or (is_causal and place.chunk in (place.rank, 2 * n - 1 - place.rank))
    ]


def main(
    cp: Annotated[list[int] | None, typer.Option(help="Ranks; may be repeated. [2, 4, 8]")] = None,
    logits: Annotated[list[float] | None, typer.Option(help="Size of the logits; may be repeated. [1, 4]")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    every: Annotated[int, typer.Option(min=1, help="Only one in so many of the faults.")] = 1,
    correct: Annotated[int, typer.Option(min=0, help="Judge so many correct results instead.")] = 0,
    forced: Annotated[int, typer.Option(min=1, help="Of the correct results one in so many is diagnosed.")] = 100,
    workers: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Count, and print JSON lines: what was not localised, then the counts. Example: … localise --cp 2 --logits 4."""
    sizes, logits = cp or [2, 4, 8], logits or [1.0, 4.0]
    if correct:
        draws = [(sizes[i % len(sizes)], seed + i, logits[i % len(logits)], forced) for i in range(correct)]
        total = {name: 0 for name in ("failed", "diagnoses", "forced", "named")}
        for count in each(count_correct, draws, workers, chunk=8):
            total |= {name: total[name] + count[name] for name in total}
        print(json.dumps({"correct results": correct, **total}))
        return
    counts: dict[tuple[str, str], Counter] = {}
    for said in each(count_one, tasks_of(sizes, logits, seed)[::every], workers):
        if "task" in said:
            print(json.dumps(said, ensure_ascii=False), flush=True)
        for name in ("with lse", "out alone", "out alone" + FEW):
            if name in said:
                counts.setdefault((said["key"], name), Counter())[said[name]] += 1
    for (key, name), count in sorted(counts.items()):
        print(json.dumps({"cp, mask, logits, kind": key, "judged": name, **count}, ensure_ascii=False))
    for name in ("with lse", "out alone", "out alone" + FEW):
        total = sum((count for (_, judged), count in counts.items() if judged == name), Counter())
        print(json.dumps({"all": name, **total}))


if __name__ == "__main__":
    typer.run(main)
