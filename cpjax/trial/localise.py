"""How often is the place right? `python -m cpjax.trial.localise`: every (rank, step, chunk) fault, counted.

A fault happens when one rank, at one ring step, merges one key/value chunk into its queries: the chunk is dropped,
counted twice, enters with weight 0.9, or in its place the data of another rank's chunk of the same step parity enters.
"exchanged" takes the two chunks of the source rank for each other; "unmasked" leaves the mask of the diagonal away.

Faults that change nothing are counted apart: the result has no wrong bit in what is shown to the judge, or
the judge passes it. From `out` alone, a query chunk that sees one key/value chunk shows no weight at all, and one that
sees two shows only their ratio: what is not localised there is counted as "two chunks or fewer".
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
import typer

from cpjax.crosscheck import judge
from cpjax.trial.emulators import PROFILES, attend, chunk_results, cut, fold, visits
from cpjax.trial.faults import Bench, changes
from cpjax.trial.problem import Problem, Result
from cpjax.trial.workers import each

KINDS = ("dropped", "doubled", "unrescaled", "stale", "exchanged", "unmasked")
CHUNK = 16
"""Tokens in a chunk."""


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


def effect(bench: Bench, wrong: Result, place: Place, kind: str, *, with_lse: bool) -> str | None:
    """Why the fault cannot be seen, or None."""
    right = bench.correct
    if not changes(wrong if with_lse else wrong._replace(lse=right.lse), right):
        return "changes nothing"
    if verdict(bench, wrong, with_lse=with_lse).passed:
        return "within rounding"
    return None


def verdict(bench: Bench, result: Result, *, with_lse: bool):
    """The judge's."""
    p = bench.problem
    lse = result.lse if with_lse else None
    return judge(p.query, p.key, p.value, result.out, lse, **p.question(), order=str(bench.order))


def localised(bench: Bench, wrong: Result, place: Place, kind: str, *, with_lse: bool) -> bool:
    """Whether the first explanation of every wrong query chunk names this chunk, and the kind of fault."""
    found = verdict(bench, wrong, with_lse=with_lse).found
    if found is None or not found.causes:
        return False
    last = 2 * bench.problem.cp - 1
    names = {"unrescaled": {"weight"}, "stale": {"stale", "exchanged"}, "exchanged": {"stale", "exchanged"}}
    for cause in found.causes:
        right = any(
            fault.kind in names.get(kind, {kind})
            and (place.chunk in fault.chunks or (kind == "exchanged" and last - place.chunk in fault.chunks))
            for fault in cause.faults
        )
        if not right or min(cause.query_chunk, last - cause.query_chunk) != place.rank:
            return False
    return True


def count_one(logits: float, task: tuple[int, bool, str, Place, int]) -> dict[str, str]:
    """One fault, judged with lse and without: "right", "wrong", or why it cannot be seen."""
    cp, is_causal, kind, place, seed = task
    bench = Bench(problem(seed, cp=cp, is_causal=is_causal, logits=logits), PROFILES["flash_fp16"], "ring")
    wrong = wrong_result(bench, kind, place)
    said = {"key": f"{cp} {'causal' if is_causal else 'full'} {kind}"}
    for name, with_lse in (("with lse", True), ("out alone", False)):
        why = effect(bench, wrong, place, kind, with_lse=with_lse)
        said[name] = why or ("right" if localised(bench, wrong, place, kind, with_lse=with_lse) else "wrong")
        if said[name] == "wrong" and not with_lse and is_causal and min(place.rank, 2 * cp - 1 - place.rank) < 2:
            said[name] = "two chunks or fewer"
    return said


def count_correct(task: tuple[int, bool, int, float]) -> int:
    """Diagnoses on one correct result: the number of sentences."""
    cp, is_causal, seed, logits = task
    bench = Bench(problem(seed, cp=cp, is_causal=is_causal, logits=logits), PROFILES["flash_fp16"], "ring")
    p, (out, lse) = bench.problem, attend(bench.problem, bench.arithmetic, "ring")
    return len(judge(p.query, p.key, p.value, out, lse, **p.question(), order="ring").diagnosis)


def main(
    cp: Annotated[list[int] | None, typer.Option(help="Ranks; may be repeated.")] = None,
    logits: Annotated[float, typer.Option(help="Standard deviation of the logits.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    every: Annotated[int, typer.Option(min=1, help="Only one in so many of the faults.")] = 1,
    correct: Annotated[int, typer.Option(min=0, help="Correct results to judge as well.")] = 1000,
    workers: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Count, and print one JSON line for each cp, mask and kind. Example: python -m cpjax.trial.localise --cp 2."""
    sizes = cp or [2, 4, 8]
    tasks = [
        (n, is_causal, kind, place, seed + i)
        for n in sizes
        for is_causal in (False, True)
        for kind in KINDS
        for i, place in enumerate(places(n))
        if kind != "unmasked" or (is_causal and place.chunk in (place.rank, 2 * n - 1 - place.rank))
    ][::every]
    counts: dict[tuple[str, str], Counter] = {}
    for said in each(partial(count_one, logits), tasks, workers):
        for name in ("with lse", "out alone"):
            counts.setdefault((said["key"], name), Counter())[said[name]] += 1
    for (key, name), count in sorted(counts.items()):
        print(json.dumps({"cp, mask, kind": key, "judged": name, **count}))
    draws = [(sizes[i % len(sizes)], i % 2 == 0, seed + i, logits) for i in range(correct)]
    said = sum(each(count_correct, draws, workers))
    print(json.dumps({"correct results": correct, "diagnoses": said}))


if __name__ == "__main__":
    typer.run(main)
