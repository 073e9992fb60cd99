"""A diagnosis in sentences: which rank, at which ring step, which chunk, and how sure that is."""

from collections import defaultdict
from typing import Any

import numpy as np
from jaxtyping import Bool

from cpjax.crosscheck.diagnosis.dictionary import Fault
from cpjax.crosscheck.diagnosis.places import holders, numbers, ranks
from cpjax.crosscheck.judging.evidence import RowTable
from cpjax.crosscheck.judging.problem import Problem
from cpjax.mask import Tokens, visible
from cpjax.wording import is_are

UNKNOWN = "The result is wrong, and no fault in the judge's list explains it: the cause is unknown"

MOST_NAMES, MOST_EQUALS, MOST_AHEAD = 8, 6, 100
"""What a sentence lists: heads or chunks, faults that are equals, the largest power of ten by which one is ahead."""

MOST_LOG = 30
"""Terms whose logarithm is larger are no number of keys."""

COUNTED = 2e-3
"""A term this near to a whole number, relative to itself, may be so many keys of score 0."""

MOST_RUNS = 4
"""Runs of positions that a sentence names."""

LOOKED_AT = 64
"""Rows with and without a NaN whose products are looked at."""

FP16_MAX = 65504.0

BROKEN_END = "with a NaN or an infinity."

BROKEN_LSE = "lse is NaN or infinite"


def causes(problem: Problem, found: tuple[Any, ...]) -> list[str]:
    """One sentence for each kind of cause, those with a place first; chunks with the same cause share one."""
    together: dict[tuple, list[Any]] = defaultdict(list)
    for cause in found:
        names = tuple(_told_by(fault) for fault in cause.faults)
        together[names].append(cause)
    sentences, unknown = [], []
    for names, group in sorted(together.items(), key=lambda item: -len(item[1])):
        chunks = np.array([cause.query_chunk for cause in group])
        if not names:
            unknown.append(f"{UNKNOWN}{_held_by(problem, chunks)}.")
            continue
        said = [_sentence(problem, fault, group) for fault in group[0].faults]
        if len(said) > 1:
            said = [f"one of {len(said)} that the outputs cannot tell apart: " + "; or ".join(said[:MOST_EQUALS])]
        sentences.append(f"{said[0]} {_evidence(group)}")
    return sentences + unknown


def _told_by(fault: Fault) -> tuple:
    """What its sentence says of a fault besides where: faults that differ in it do not share a sentence.

    Weights are fitted in each query chunk, and are the same if two digits are.
    """
    number = fault.number
    number = None if number != number else float(f"{number:.2g}") if fault.kind == "weight" else number
    places = (fault.chunks, fault.sources, fault.unrescaled, fault.run, fault.key, fault.keys_of, fault.values_of)
    words = (fault.mask, fault.lse, fault.merge, fault.cut, fault.logits, fault.rule)
    return (fault.kind, number, fault.value_shift, fault.extra, *places, *words)


def _held_by(problem: Problem, chunks: np.ndarray) -> str:
    """Where there is one chunk there is no place to tell."""
    if int(problem.q_chunk.max()) == 0:
        return ""
    held = f", held by rank {ranks(problem, chunks)}" if problem.cp > 1 else ""
    return f" (query chunk {numbers(chunks)}{held})"


def _evidence(group: list[Any]) -> str:
    worst, before = max(cause.z for cause in group), max(cause.z_right for cause in group)
    ahead = min(cause.ahead for cause in group) / np.log(10)
    times = f"10^{ahead:.0f}" if ahead < MOST_AHEAD else f"more than 10^{MOST_AHEAD}"
    against = f"; the next explanation is {times} times less likely" if np.isfinite(ahead) else ""
    return (
        f"(with this fault errors of {worst:.2f} σ are left, and rounding leaves about 1; as stated they are "
        f"{before:.3g} σ{against})."
    )


def _sentence(problem: Problem, fault: Fault, group: list[Any]) -> str:
    where = np.array([cause.query_chunk for cause in group])
    if (where < 0).any():
        return _global(fault)
    if problem.cp == 1 and not fault.chunks:
        return _global(fault) + _held_by(problem, where)
    place = f"rank {ranks(problem, where)}"
    steps = {problem.partition.step(problem.order, int(q), c) for q in where for c in fault.chunks} - {None}
    if fault.chunks and steps:
        place += f", step {numbers(np.array(sorted(s for s in steps if s is not None)))}"
    mine = f"query chunk {numbers(where)}"
    theirs = " and ".join(str(c) for c in fault.chunks)
    theirs = f"key/value chunk {theirs} ({holders(problem, fault.chunks)})"
    weights = [f.number for cause in group for f in cause.faults if f.kind == fault.kind and f.chunks == fault.chunks]
    texts = {
        "dropped": f"{place}: {theirs} never entered {mine} (weight 0)",
        "doubled": f"{place}: {theirs} entered {mine} twice (weight 2)",
        "weight": f"{place}: {theirs} entered {mine} with weight {np.mean(weights):.4g} instead of 1",
        "stale": f"{place}: in the place of {theirs} the data of chunk {_list(fault.sources)} entered {mine} (stale)",
        "exchanged": f"{place}: key/value chunks {_list(fault.chunks)} were exchanged in {mine}",
        "masked": f"{place}: {mine} must see all of {theirs}, but a causal mask was applied there",
        "unmasked": f"{place}: {mine} saw all of its own chunk: no causal mask was applied on the diagonal",
        "shown": f"{place}: {mine} must not see {theirs}, but it was used",
        "not rescaled": f"{place}: {mine} was not rescaled at merge {_list(fault.unrescaled)} of its order",
    }
    return texts.get(fault.kind) or f"{place}, {mine}: {_global(fault)}"


def _list(values: tuple[int, ...]) -> str:
    return " and ".join(map(str, values))


def _global(fault: Fault) -> str:
    if fault.mask:
        return _mask(fault)
    if fault.precision is not None:
        return f"consistent with {fault.kind.removeprefix('precision: ')}"
    if fault.extra:
        return _extra(fault)
    if fault.logits:
        return LOGITS[fault.logits].format(fault.number)
    if fault.limits:
        return f"rows see too many or too few keys: {fault.rule}"
    if fault.run:
        return _run(fault)
    if fault.merge:
        return _merge(fault)
    texts = {
        "scale": f"the scale is {fault.number:.6g} times the stated one",
        "scale not applied": "the scale was not applied: it is 1",
        "scale applied twice": "the scale was applied twice",
        "scale inverted": "the scale is the inverse of the stated one",
        "scale without its root": "the scale was applied by its root only, as to queries and not to keys",
        "scale of a head_dim": f"the scale is 1/√{fault.number:.0f}, that of a head_dim of {fault.number:.0f}:"
        f" {fault.scale:.6g} times the stated one",
        "scale log2(e)": "the scale is log2(e): only the base of the exponential was applied",
        "scale ln 2": "the scale is ln 2: only the base of the exponential was applied",
        "scale with mscale once": "the scale lacks one of YaRN's two factors mscale (DeepSeek: 1.3689)",
        "scale with mscale too often": "the scale has YaRN's factor mscale once more (DeepSeek: 1.3689)",
        "scale without mscale": "the scale lacks YaRN's factor mscale² (DeepSeek: 1.8738 for a factor of 40)",
        "scale with mscale twice": "the scale has YaRN's factor mscale² twice (DeepSeek: 1.8738 for a factor of 40)",
        "scale negated": "the scale has the other sign",
        "scale zero": "queries and keys were ignored: out is the plain average of the visible values",
        "inexact exponentials": f"consistent with exponentials (or scores) that err by about {fault.number:.2g}",
        "lse log2": "lse is the logarithm to base two",
        "lse log10": "lse is the logarithm to base ten",
        "lse negated": "lse has the other sign",
        "lse maximum only": "lse is the row maximum; the logarithm of the sum was not added",
        "lse without its maximum": "lse is the logarithm of the sum; the row maximum was not added",
        "lse sum itself": "lse is the sum itself, not its logarithm",
        "lse whole sum": "lse is the sum of the exponentials of whole scores, not its logarithm",
        "lse natural for base two": "lse is ln 2 times the natural logarithm: it was taken for one to base two",
        "lse without the sink": "lse does not count the sink",
        "lse without the scale": "lse is that of scores without the scale",
        "out times a number": f"out is {fault.number:.6g} times what it should be, and nothing else is wrong",
        "lse zero": "lse is zero, as if never written",
        "lse with log2 of the sum": "lse is the row maximum plus log2 of the sum: only the sum is in base two",
        "keys of another head": f"the keys of key/value head {fault.keys_of} were used, with the right values",
        "values of another head": f"the values of key/value head {fault.values_of} were used, with the right keys",
        "values of the neighbour": f"each key entered with the value of the token {_beside(fault.value_shift)} it",
        "lse off by a constant": f"lse is off by {fault.number:+.4g}",
        "key lost": f"key {fault.key} was lost",
        "key doubled": f"key {fault.key} was counted twice",
    }
    return texts.get(fault.kind, fault.kind)


def _beside(shift: int) -> str:
    return "after" if shift > 0 else "before"


def _run(fault: Fault) -> str:
    start, stop = fault.run
    which = f"{_count(stop - start, 'key')} {start} to {stop - 1}" if stop - start > 1 else f"key {start}"
    if fault.kind == "run stale":
        source = int(fault.number)
        return f"in the place of {which} those from {source} to {source + stop - start - 1} were used"
    return f"{which} {'were lost' if fault.kind == 'run lost' else 'were counted twice'}"


LOGITS = {
    "softcap applied": "a softcap of {:g} was applied that was not stated",
    "softcap ignored": "the softcap was not applied",
    "sink dropped": "the sink was not added to the sums",
    "alibi ignored": "the ALiBi slopes were not applied",
    "alibi negated": "the ALiBi slopes were applied with the other sign",
    "alibi applied": "ALiBi was applied, with the slopes of the paper, that was not stated",
    "bias ignored": "the bias was not added",
    "bias a mask only": "the bias was not added, but the keys that it hides (-inf) were hidden",
    "bias twice": "the bias was added twice",
    "bias scaled": "the bias was multiplied by the scale, as if added before it",
    "alibi twice": "the ALiBi slopes were applied twice",
    "alibi scaled": "the ALiBi slopes were multiplied by the scale, as if applied before it",
    "sink twice": "the sink was added twice to the sums",
    "sink times log2(e)": "the sink was multiplied by log2(e)",
    "sink scaled": "the sink was multiplied by the scale",
    "sink negated": "the sink was added with the other sign of its logit",
    "sink of the head after": "each head has the sink of the head after it",
    "sink of the head before": "each head has the sink of the head before it",
    "sink of head 0": "every head has the sink of head 0",
}

CUTS = {
    "interleaved": "tokens dealt to {} ranks in turn",
    "runs": "{} runs of the tokens",
    "prefix": "the cached tokens and those of the queries",
}


def _merge(fault: Fault) -> str:
    kind, _, count = fault.cut.partition(" ")
    parts = "the chunks" if fault.cut == "chunks" else f"parts (as of {CUTS[kind].format(count)})"
    if fault.merge in ("lost", "twice"):
        entered = "never entered" if fault.merge == "lost" else "entered twice"
        return f"the tokens of rank {int(fault.number)}, of {CUTS[kind].format(count)}, {entered}"
    unweighted = {
        "not divided": "were added with weights exp(lse − max lse), and not divided by the sum of these weights",
        "mean": "were averaged without weights",
        "sum": "were added up without weights",
    }
    if fault.merge in unweighted:
        return f"partial results of {parts} {unweighted[fault.merge]}"
    is_natural = fault.merge == "exp2"
    bases = ("natural", "the merge took exp2 of it") if is_natural else ("in base two", "the merge took exp of it")
    return f"partial results of {parts} were merged in the wrong base: their lse is {bases[0]}, {bases[1]}"


def _extra(fault: Fault) -> str:
    x = fault.extra[0][1]
    each = ", ".join(f"head {n}: {x:.6g}" for n, x in fault.extra[:MOST_NAMES])
    each += ", …" if len(fault.extra) > MOST_NAMES else ""
    if fault.kind == "another sink":
        return f"every row's sum has another term than that of the stated sink: exp(x), x of {each}"
    term = float(np.exp(min(x, MOST_LOG)))
    zeros = f"; exp(x) = {term:.6g}, as of {_count(round(term), 'key')} that are zero, with values of zero"
    return (
        f"every row's sum has one more term exp(x), of value 0 (x of {each}): an attention sink of this logit that was "
        f"not stated, or an empty part with this lse{zeros if _is_count(term) else ''}"
    )


def _is_count(term: float) -> bool:
    return round(term) >= 1 and abs(term / round(term) - 1) < COUNTED


def _mask(fault: Fault) -> str:
    k = int(fault.number) if np.isfinite(fault.number) else 0
    some = np.isfinite(fault.number)
    if fault.kind == "causal mask shifted":
        where = " on the diagonal (each query's own chunk)" if fault.mask == "diagonal" else ""
        sees = (
            f"queries see {_count(k, 'token')} of the future"
            if k > 0
            else f"queries miss their last {_count(-k, 'key')}"
        )
        return f"the causal mask is shifted by {k:+d}{where}: {sees}"
    if fault.kind == "requests mixed" and fault.mask.startswith("request "):
        own = int(fault.mask.removeprefix("request "))
        what = f"the last {_count(k, 'key')}" if some else "the keys"
        return f"request {own} of the packed batch sees {what} of the request before it"
    pads = f"the first {_count(k, 'pad')}" if some else "pad tokens"
    texts = {
        "causal mask absent": "no causal mask was applied",
        "causal mask applied": "a causal mask was applied where there should be none",
        "own rank only": "each rank saw only the keys that it holds itself: those of other ranks never entered",
        "causal mask by local index": (
            "the causal mask was applied by the index among the tokens of a rank (local positions), not by positions"
        ),
        "causal mask in every chunk": "a causal mask was applied in every chunk, by the index in the chunk",
        "causal mask top-left": (
            "the causal mask was aligned top-left: query i sees the first i + 1 keys, whatever the positions are"
            + (f" ({fault.rule})" if fault.rule else "")
        ),
        "causal mask in every block": (
            f"a causal mask was applied in each of {fault.mask.rpartition(' ')[2]} equal blocks, by its own index"
        ),
        "window": f"a window of {k} was applied" if some else "the window was not applied",
        "pads leaked": f"pads leaked: the keys of {pads} were seen",
        "requests mixed": f"requests of a packed batch see each other's keys{f', the {k} nearest' * bool(some)}",
        "prefix dropped": "the keys before the first query (a cached prefix) were dropped"
        + f", all but the last {k}" * (k > 0),
    }
    return texts[fault.kind] + (" (by the place in the row)" if fault.mask.endswith("in place") else "")


def _count(k: int, what: str) -> str:
    return f"{k} {what}{'s' * (k > 1)}"


def scope(
    problem: Problem, table: RowTable, wrong: Bool[np.ndarray, " R"], out: np.ndarray, lse: np.ndarray | None
) -> list[str]:
    """Which rows are wrong, where not all are; and where a NaN or an infinity first is."""
    broken = np.asarray(~np.isfinite(out[table.batch, table.position, table.head]).all(axis=1))
    sentences = []
    if broken.any():
        i = int(np.flatnonzero(broken)[0])
        where = f"batch {table.batch[i]}, position {table.position[i]}, head {table.head[i]}"
        count = int(broken.sum())
        sentences.append(f"At {where} is the {'only row' if count == 1 else f'first of {count:,} rows'} {BROKEN_END}")
        sentences += _overflow(problem, table, broken)
    elif lse is not None:
        sentences += _lse_nan(table, lse)
    if wrong.any() and not wrong.all():
        parts = []
        for name, label in (("batch", table.batch), ("head", table.head)):
            if len(np.unique(label)) > len(np.unique(label[wrong])):
                parts.append(f"{name} {numbers(label[wrong])} only")
        segment = np.asarray(problem.q_tokens.segment)[table.batch, table.position]
        if len(np.unique(segment)) > len(np.unique(segment[wrong])):
            parts.append(f"request {numbers(segment[wrong])} only")
        chunk = problem.q_chunk[table.position]
        if len(np.unique(chunk)) > len(np.unique(chunk[wrong])):
            held = f" (rank {ranks(problem, chunk[wrong])})" if problem.cp > 1 else ""
            parts.append(f"query chunk {numbers(chunk[wrong])}{held} only")
        places = np.unique(table.position[wrong])
        if len(places) < len(np.unique(table.position)) and (np.diff(places) > 1).sum() < MOST_RUNS:
            parts.append(f"position{'s' * (len(places) > 1)} {numbers(places)} only")
        if parts:
            count = int(wrong.sum())
            sentences.append(f"{count:,} of {len(wrong):,} judged rows {is_are(count)} wrong: {', '.join(parts)}.")
    return sentences


def tells_broken(sentence: str) -> bool:
    """Whether a sentence of the scope says that something is no number."""
    return sentence.endswith(BROKEN_END) or sentence.startswith(BROKEN_LSE)


def _lse_nan(table: RowTable, lse: np.ndarray) -> list[str]:
    """Which rows have an lse that is NaN or +∞; of what sees nothing, −∞ is right."""
    given = lse[table.batch, table.position, table.head]
    rows = (np.isnan(given) | np.isposinf(given)) & ~table.unjudged
    if not rows.any():
        return []
    i, count = int(np.flatnonzero(rows)[0]), int(rows.sum())
    which = "of 1 row" if count == 1 else f"of {count:,} rows"
    first = "" if count == 1 else "the first "
    where = f"batch {table.batch[i]}, position {table.position[i]}, head {table.head[i]}"
    return [f"{BROKEN_LSE} {which} whose out is finite: {first}at {where}."]


def _overflow(problem: Problem, table: RowTable, broken: Bool[np.ndarray, " R"]) -> list[str]:
    """Whether q·k leaves the range of FP16 in these rows, and in no others."""
    rng = np.random.default_rng(0)
    largest = []
    for rows in (np.flatnonzero(broken), np.flatnonzero(~broken & ~table.unjudged)):
        some = rng.permutation(rows)[:LOOKED_AT]
        found = [
            _largest_product(problem, *(int(x[i]) for x in (table.batch, table.position, table.head))) for i in some
        ]
        largest.append(np.array(found))
    inside, outside = largest
    if not (inside > FP16_MAX).all() or (outside > FP16_MAX).any():
        return []
    others = f"; in the other rows it is at most {outside.max():.5g}" if len(outside) else ""
    return [f"In these rows q·k, before it is scaled, exceeds 65,504, the largest FP16 number{others}."]


def _largest_product(problem: Problem, b: int, at: int, head: int) -> float:
    """max |q·k| over the keys that the row sees."""
    q_tokens, kv_tokens = (
        Tokens(*(np.asarray(x)[b : b + 1, rows] for x in places))
        for places, rows in ((problem.q_tokens, slice(at, at + 1)), (problem.kv_tokens, slice(None)))
    )
    seen = np.asarray(visible(problem.mask, q_tokens, kv_tokens))[0, 0]
    key = problem.key[b, seen, head // problem.group].astype(np.float64)
    return float(np.abs(key @ problem.query[b, at, head].astype(np.float64)).max(initial=0.0))


def heads(source: np.ndarray) -> str:
    """Heads that have each other's outputs."""
    moved = np.flatnonzero(source != np.arange(len(source)))
    pairs = ", ".join(f"head {i} has the outputs of head {source[i]}" for i in moved[:MOST_NAMES])
    return f"Heads are exchanged: {pairs}{', …' if len(moved) > MOST_NAMES else ''}."


def batch_rows(source: np.ndarray) -> str:
    """Batch rows that have each other's outputs."""
    moved = np.flatnonzero(source != np.arange(len(source)))
    pairs = ", ".join(f"row {i} has the outputs of row {source[i]}" for i in moved[:MOST_NAMES])
    return f"Batch rows are exchanged: {pairs}{', …' if len(moved) > MOST_NAMES else ''}."


def requests(source: dict[int, int]) -> str:
    """Requests of a packed row that have each other's outputs."""
    moved = [(i, j) for i, j in source.items() if i != j]
    pairs = ", ".join(f"request {i} has the outputs of request {j}" for i, j in moved[:MOST_NAMES])
    return f"Requests are exchanged: {pairs}{', …' if len(moved) > MOST_NAMES else ''}."


AXES = "out lies in memory as [batch, heads, tokens, dim] and was read as [batch, tokens, heads, dim]."


def kv_heads(problem: Problem, source: np.ndarray) -> str:
    """Heads that attend to the keys of others."""
    own = np.arange(len(source)) // problem.group
    moved = np.flatnonzero(source != own)
    pairs = ", ".join(f"head {i} attends to key/value head {source[i]} instead of {own[i]}" for i in moved[:MOST_NAMES])
    return f"Key/value heads are exchanged: {pairs}{', …' if len(moved) > MOST_NAMES else ''}."


def chunks(problem: Problem, source: np.ndarray) -> str:
    """Query chunks (hence ranks) that have each other's outputs."""
    moved = np.flatnonzero(source != np.arange(len(source)))
    pairs = [
        f"chunk {i} (rank {problem.partition.rank(int(i))}) has the outputs of chunk {source[i]} "
        f"(rank {problem.partition.rank(int(source[i]))})"
        for i in moved[:MOST_NAMES]
    ]
    return f"Ranks or chunks are exchanged: query {', '.join(pairs)}{', …' if len(moved) > MOST_NAMES else ''}."
