"""The faults that people report most, made in plain NumPy, with the words that name each (docs/diagnosis.md).

Nothing is imported from the diagnosis: a fault changes what `plain_attention` computes with, or what it hands over.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cpjax.trial.emulators import Arithmetic
from cpjax.trial.plain_attention import Join, Work, attend, work_of
from cpjax.trial.problem import Problem, Result, places
from cpjax.trial.settings import DIM, PREFIX, REQUESTS, TOKENS, Setting

LN2 = float(np.log(2.0))
MSCALE_SQUARED = (0.1 * np.log(40) + 1) ** 2
"""DeepSeek's YaRN."""


class Name(NamedTuple):
    """Words of a right answer: a regular expression, and the number that its first group must be near to."""

    pattern: str
    number: float | None = None
    tolerance: float = 0.01


class Made(NamedTuple):
    """A wrong result, and the names of which each is right."""

    result: Result
    names: tuple[Name, ...] = ()


@dataclass(frozen=True)
class Case:
    """What a fault is made of."""

    setting: Setting
    problem: Problem
    work: Work
    right: Result
    rng: np.random.Generator

    def with_(self, **changes: Any) -> Result:
        """What is computed with these changes."""
        return attend(replace(self.work, **changes))


Maker = Callable[[Case], Made | None]
"""None where the setting has nothing that could go wrong so."""


@dataclass(frozen=True)
class Reported:
    """A fault, and what the problem must have for it: a softcap, a sink, a window, …"""

    make: Maker
    states: Callable[[Problem, np.random.Generator], Problem] = lambda problem, rng: problem


def case_of(setting: Setting, problem: Problem, arithmetic: Arithmetic, rng: np.random.Generator) -> Case:
    """With the right result."""
    work = work_of(problem, arithmetic, setting.order)
    return Case(setting, problem, work, attend(work), rng)


def _name(pattern: str) -> tuple[Name, ...]:
    return (Name(pattern),)


# Merges


def _in_parts(case: Case) -> Work:
    """Cut as the partition says; where it says nothing, as is usual: prefix and suffix, tokens in turn, four runs."""
    index, layout = np.arange(TOKENS), case.setting.layout
    if case.setting.cp > 1:
        return case.work
    if layout == "prefix":
        part = (index >= PREFIX).astype(int)
    else:
        part = index % 4 if layout in ("packed", "decode") else index * 4 // TOKENS
    return replace(
        case.work, part=part, order=np.broadcast_to(np.arange(part.max() + 1), (len(case.work.order), part.max() + 1))
    )


def wrong_base(case: Case, is_natural: bool) -> Made:
    """Partial results merged by the exponential of the other base; lse is the merge's or is right."""
    join = Join(np.exp2, np.log2) if is_natural else Join(factor=1 / LN2)
    result = attend(replace(_in_parts(case), join=join))
    if case.rng.random() < 0.5:
        result = result._replace(lse=case.right.lse)
    words = "is natural, the merge took exp2" if is_natural else "is in base two, the merge took exp"
    return Made(result, _name(f"merged in the wrong base: their lse {words} of it"))


def not_rescaled(case: Case) -> Made | None:
    """Merges add what is new without scaling down what is there."""
    if case.setting.cp == 1:
        return None
    return Made(case.with_(join=Join(rescales=False)), _name("was not rescaled at merge"))


# lse


def lse_as(case: Case, form: str, words: str) -> Made:
    """Something else is handed over as lse; `out` is right."""
    lse = case.right.lse.astype(np.float64)
    top = _maximum(case)
    with np.errstate(invalid="ignore", over="ignore"):
        wrong = {
            "log2": lse / LN2,
            "log10": lse / np.log(10),
            "negated": -lse,
            "maximum": top,
            "sum": np.exp(lse - top),
            "log of the sum": lse - top,
            "maximum + log2": top + (lse - top) / LN2,
            "zero": 0 * top,
            "+ 0.25": lse + 0.25,
        }[form]
    return Made(case.right._replace(lse=np.where(np.isneginf(lse), lse, wrong).astype(np.float32)), _name(words))


def _maximum(case: Case) -> np.ndarray:
    score = np.einsum("btnh,bsnh->btns", *(x.astype(np.float64) for x in (case.work.query, case.work.key)))
    top = np.where(case.work.seen[:, :, None], score * case.work.scale, -np.inf).max(axis=-1)
    return np.where(np.isneginf(top), 0.0, top)


def lse_nan(case: Case) -> Made:
    """lse of one row is NaN."""
    lse = case.right.lse.copy()
    lse[0, -1, 0] = np.nan
    return Made(case.right._replace(lse=lse), _name("lse is NaN or infinite of 1 row"))


# The denominator


def sink_added(case: Case) -> Made:
    """A sink that nobody stated."""
    sink = case.rng.uniform(0, 3, case.problem.query.shape[2]).astype(np.float32)
    return Made(case.with_(sink=sink), _name(r"one more term exp\(x\), of value 0"))


def page_of_zeros(case: Case) -> Made:
    """16 keys of zero with values of zero, as of a page that was never filled."""
    sink = np.full(case.problem.query.shape[2], np.log(16), np.float32)
    return Made(case.with_(sink=sink), _name(r"one more term exp\(x\), of value 0"))


# Rows


def _last_of_requests(case: Case, count: int) -> np.ndarray:
    """`[B, T]`: the last queries of each request."""
    batch, length = case.problem.query.shape[:2]
    rows = np.zeros((batch, length), bool)
    for b, numbers in enumerate(_requests(case)):
        for number in np.unique(numbers[numbers >= 0]):
            rows[b, np.flatnonzero(numbers == number)[-count:]] = True
    return rows


def _requests(case: Case) -> np.ndarray:
    batch, length = case.problem.query.shape[:2]
    return np.zeros((batch, length), int) if case.problem.segments is None else case.problem.segments


def unwritten(case: Case, fill: float) -> Made:
    """The last 3 rows of each request were never written."""
    rows = _last_of_requests(case, 3)
    out, lse = (x.copy() for x in case.right)
    out[rows], lse[rows] = fill, 0
    what = "zero" if fill == 0 else f"{fill:g} in every column"
    return Made(Result(out, lse), _name(f"{what}, as if never written: .*the last 3 of"))


def all_zero(case: Case) -> Made:
    """Nothing was written."""
    return Made(
        Result(np.zeros_like(case.right.out), np.zeros_like(case.right.lse)),
        _name("as if never written: .*all of"),
    )


def batch_exchanged(case: Case) -> Made | None:
    """The first two batch rows have each other's results."""
    if case.setting.batch < 2:
        return None
    rows = np.arange(case.setting.batch)
    rows[:2] = 1, 0
    return Made(
        Result(*(x[rows] for x in case.right)), _name("Batch rows are exchanged: row 0 has the outputs of row 1")
    )


def requests_exchanged(case: Case) -> Made | None:
    """Two requests of a packed row have each other's results."""
    if case.setting.layout != "packed":
        return None
    first = TOKENS - sum(REQUESTS)
    rows = np.arange(TOKENS)
    rows[first : first + 80] = np.roll(rows[first : first + 80], 40)
    return Made(Result(*(x[:, rows] for x in case.right)), _name("Requests are exchanged"))


def heads_exchanged(case: Case) -> Made | None:
    """The first two heads have each other's results."""
    if case.setting.one_head:
        return None
    heads = np.arange(case.setting.heads)
    heads[:2] = 1, 0
    return Made(
        Result(*(x[:, :, heads] for x in case.right)), _name("Heads are exchanged: head 0 has the outputs of head 1")
    )


def ranks_exchanged(case: Case) -> Made | None:
    """Ranks 0 and 1 hand over each other's rows."""
    if case.setting.cp == 1:
        return None
    count = 2 * case.setting.cp
    rows = np.arange(TOKENS).reshape(count, -1)
    rows[[0, 1, count - 1, count - 2]] = rows[[1, 0, count - 2, count - 1]]
    return Made(
        Result(*(x[:, rows.ravel()] for x in case.right)),
        _name(r"Ranks or chunks are exchanged: query chunk 0 \(rank 0\) has the outputs of chunk 1"),
    )


def axes_exchanged(case: Case) -> Made | None:
    """`out` lies in memory as [B, N, T, V]."""
    if case.setting.one_head:
        return None
    out = np.ascontiguousarray(case.right.out.swapaxes(1, 2)).reshape(case.right.out.shape)
    return Made(case.right._replace(out=out), _name(r"out lies in memory as \[batch, heads, tokens, dim\]"))


# Masks


def _queries(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """For each query its index among those of its request, and how many there are, `[B, T]`."""
    numbers = _requests(case)
    index, count = np.zeros_like(numbers), np.ones_like(numbers)
    for b, row in enumerate(numbers):
        for number in np.unique(row):
            own = row == number
            index[b, own], count[b, own] = np.arange(own.sum()), own.sum()
    return index, count


def _limited(case: Case, off: np.ndarray) -> Result:
    """Each query sees the keys of its request up to its own place plus `off` `[B, T]`."""
    here, there = places(case.problem)
    seen = there[:, None] <= (here + off)[:, :, None]
    return case.with_(seen=seen & _same_request(case))


def _same_request(case: Case) -> np.ndarray:
    numbers = case.problem.segments
    if numbers is None:
        return np.ones_like(case.work.seen)
    return (numbers[:, :, None] == numbers[:, None]) & (numbers >= 0)[:, :, None]


def shifted(case: Case, most: int) -> Made | None:
    """The causal mask is off by a number of tokens."""
    if not case.setting.is_causal:
        return None
    k = int(case.rng.integers(1, most + 1)) * int(case.rng.choice([-1, 1]))
    names = _name(re.escape(f"the causal mask is shifted by {k:+d}") + r"\b")
    return Made(_limited(case, np.full(case.work.seen.shape[:2], k)), names)


def fewer_every(case: Case) -> Made | None:
    """One key too few for every 8 queries before."""
    if not case.setting.is_causal or case.setting.layout == "decode":
        return None
    every = 8
    return Made(
        _limited(case, -(_queries(case)[0] // every)),
        _name(f"a query sees one key too few for every {every} queries before it"),
    )


def drafts_alike(case: Case) -> Made | None:
    """All queries of a decode step see as much as the last one."""
    if case.setting.layout != "decode":
        return None
    index, count = _queries(case)
    return Made(_limited(case, count - 1 - index), _name(r"sees 1·\(n − 1 − i\) keys too many"))


def local_lengths(case: Case) -> Made | None:
    """Each query sees as many keys as its rank of four holds."""
    if not case.setting.is_causal or case.setting.layout == "packed":
        return None
    wanted = places(case.problem)[0] + 1
    return Made(_limited(case, -(-wanted // 4) - wanted), _name("as many as one of 4 ranks holds"))


def off_by_request(case: Case) -> Made | None:
    """The lengths of a pack are off by one, two, three."""
    if case.setting.layout != "packed":
        return None
    return Made(_limited(case, -1 - np.maximum(_requests(case), 0)), _name("off by one number a request"))


def top_left(case: Case) -> Made | None:
    """Queries after a prefix take themselves for the first tokens."""
    if case.setting.layout != "prefix":
        return None
    return Made(
        _limited(case, np.full((1, TOKENS - PREFIX), -PREFIX)),
        _name(f"the causal mask is shifted by -{PREFIX}:|the causal mask was aligned top-left"),
    )


def mask_absent(case: Case) -> Made | None:
    """All keys of the request are seen."""
    if not case.setting.is_causal:
        return None
    return Made(case.with_(seen=_same_request(case)), _name("no causal mask was applied|the causal mask is absent"))


def mask_applied(case: Case) -> Made | None:
    """Causal, where all keys should be seen."""
    if case.setting.is_causal:
        return None
    return Made(
        _limited(case, np.zeros((1, TOKENS), int)), _name("a causal mask was applied where there should be none")
    )


def mask_in_blocks(case: Case) -> Made | None:
    """A triangle in each chunk; in each of four runs where there is one chunk."""
    if case.setting.layout != "text":
        return None
    size = TOKENS // (2 * case.setting.cp if case.setting.cp > 1 else 4)
    index = np.arange(TOKENS) % size
    words = "in every chunk, by the index" if case.setting.cp > 1 else "in each of 4 equal blocks, by its own index"
    count = TOKENS // size
    return Made(
        case.with_(seen=case.work.seen & (index <= index[:, None])),
        _name(f"a causal mask was applied ({words}|in each of {count} equal blocks)"),
    )


def window_applied(case: Case) -> Made | None:
    """A window that nobody stated."""
    least, most = (8, 60) if case.setting.layout == "decode" else (4, 30)
    size = int(case.rng.integers(least, most))
    near = case.work.distance < size
    return Made(case.with_(seen=case.work.seen & near), _name(rf"a window of {size} was applied"))


def window_ignored(case: Case) -> Made:
    """The stated window is not applied."""
    seen = work_of(replace(case.problem, window=None), case.work.arithmetic, case.setting.order).seen
    return Made(case.with_(seen=seen), _name("the window was not applied"))


def requests_mixed(case: Case) -> Made | None:
    """Requests of a pack see those before them."""
    if case.setting.layout != "packed":
        return None
    numbers = case.problem.segments
    assert numbers is not None
    here, there = places(case.problem)
    seen = (there[:, None] <= here[:, :, None]) & (numbers >= 0)[:, None]
    return Made(case.with_(seen=seen), _name("requests of a packed batch see each other's keys"))


def pads_leaked(case: Case) -> Made | None:
    """The pads are seen."""
    if case.setting.layout != "packed":
        return None
    numbers = case.problem.segments
    assert numbers is not None
    return Made(case.with_(seen=case.work.seen | (numbers < 0)[:, None]), _name("pads leaked"))


def prefix_dropped(case: Case) -> Made | None:
    """Cached keys are not seen."""
    if case.setting.layout != "prefix":
        return None
    return Made(
        case.with_(seen=case.work.seen & (np.arange(TOKENS) >= PREFIX)),
        _name(
            r"the keys before the first query \(a cached prefix\) were dropped"
            rf"|{PREFIX} keys 0 to {PREFIX - 1} were lost"
        ),
    )


# Keys and values


def _run(case: Case, size: int) -> tuple[int, int]:
    """A run that every setting has a query for: decode reads 66 keys at least, a pack sees its own."""
    first = TOKENS - sum(REQUESTS) if case.setting.layout == "packed" else 1
    last = 60 if case.setting.layout == "decode" else 100
    start = int(case.rng.integers(first, last - size))
    return start, start + size


def run_weighted(case: Case, weight: float) -> Made:
    """A run of keys lost or counted twice."""
    start, stop = _run(case, int(case.rng.integers(5, 40)))
    index = np.arange(TOKENS)
    result = case.with_(weight=np.where((index >= start) & (index < stop), weight, 1.0))
    return Made(result, _name(f"keys {start} to {stop - 1} were {'lost' if weight == 0 else 'counted twice'}"))


def _border(case: Case) -> int:
    """Where a chunk, a request, a cached prefix or a page ends, that later queries see beyond."""
    layout = case.setting.layout
    if case.setting.cp > 1:
        return TOKENS // case.setting.cp // 2 * int(case.rng.integers(1, case.setting.cp))
    first = TOKENS - sum(REQUESTS) + REQUESTS[0]
    return {"packed": first, "prefix": PREFIX, "decode": 48}.get(layout, TOKENS // 2)


def run_across(case: Case, weight: float) -> Made:
    """A run of keys lost or counted twice on both sides of a border."""
    border = _border(case)
    start = max(border - int(case.rng.integers(3, 30)), 1)
    stop = border + int(case.rng.integers(3, 30 if case.setting.layout != "decode" else 15))
    index = np.arange(TOKENS)
    result = case.with_(weight=np.where((index >= start) & (index < stop), weight, 1.0))
    return Made(result, _name(f"keys {start} to {stop - 1} were {'lost' if weight == 0 else 'counted twice'}"))


def page_of_one_row(case: Case) -> Made | None:
    """One batch row misses a page of 16 keys."""
    if case.setting.batch == 1:
        return None
    row, page = int(case.rng.integers(case.setting.batch)), int(case.rng.integers(0, 3))
    lost = np.arange(TOKENS) // 16 == page
    result = case.with_(weight=np.where(lost, 0.0, 1.0))
    mine = np.arange(case.setting.batch) == row
    out = np.where(mine[:, None, None, None], result.out, case.right.out)
    lse = np.where(mine[:, None, None], result.lse, case.right.lse)
    first = 16 * page
    return Made(Result(out, lse), _name(f"keys {first} to {first + 15} were lost"))


def key_weighted(case: Case, weight: float) -> Made:
    """One key lost or counted twice."""
    at = int(case.rng.integers(8, 40))
    words = "lost" if weight == 0 else "counted twice"
    return Made(
        case.with_(weight=np.where(np.arange(TOKENS) == at, weight, 1.0)),
        _name(f"key {at} was(?:re)? {words}|key {at} were {words}"),
    )


def stale_block(case: Case) -> Made:
    """A block of 16 keys and their values is that of another place."""
    slot, source = 16 * case.rng.choice(np.arange(1, 4), 2, replace=False)
    key, value = case.work.key.copy(), case.work.value.copy()
    for new, old in ((key, case.work.key), (value, case.work.value)):
        new[:, slot : slot + 16] = old[:, source : source + 16]
    words = f"in the place of 16 keys {slot} to {slot + 15} those from {source} to {source + 15} were used"
    chunk = f"in the place of key/value chunk {slot // 16} .* the data of chunk {source // 16} entered"
    return Made(case.with_(key=key, value=value), _name(f"{words}|{chunk}" if case.setting.cp == 4 else words))


def keys_of_another(case: Case) -> Made | None:
    """Keys of the next key/value head, with the right values."""
    heads = _other_heads(case)
    return (
        None
        if heads is None
        else Made(case.with_(key=case.work.key[:, :, heads]), _name(r"the keys of key/value head \d+ were used"))
    )


def values_of_another(case: Case) -> Made | None:
    """Values of the next key/value head, with the right keys."""
    heads = _other_heads(case)
    return (
        None
        if heads is None
        else Made(case.with_(value=case.work.value[:, :, heads]), _name(r"the values of key/value head \d+ were used"))
    )


def _other_heads(case: Case) -> np.ndarray | None:
    """For each query head one of the next key/value head."""
    heads, group = case.setting.heads, case.setting.heads // case.setting.kv_heads
    return None if case.setting.kv_heads < 2 else (np.arange(heads) + group) % heads


def head_mod(case: Case) -> Made | None:
    """Head h takes key/value head h mod K instead of h div G."""
    group = case.setting.heads // case.setting.kv_heads
    if group == 1 or case.setting.kv_heads == 1:
        return None
    heads = np.arange(case.setting.heads) % case.setting.kv_heads * group
    return Made(
        case.with_(key=case.work.key[:, :, heads], value=case.work.value[:, :, heads]),
        _name("Key/value heads are exchanged: head 1 attends to key/value head 1 instead of 0"),
    )


def neighbours_value(case: Case, shift: int) -> Made:
    """Each key enters with the value of the token beside it."""
    side = "after" if shift > 0 else "before"
    return Made(case.with_(value=np.roll(case.work.value, -shift, axis=1)), _name(f"the value of the token {side} it"))


# Logits


def scaled(case: Case, factor: float, words: str) -> Made:
    """The scale times a factor."""
    return Made(case.with_(scale=case.work.scale * factor), _name(words))


def scaled_near(case: Case, factor: float) -> Made:
    """The scale times a factor near to one that has a name, and none of that name."""
    number = factor * float(np.exp(case.rng.choice([-1, 1]) * case.rng.uniform(0.005, 0.02)))
    words = r"the scale is ([\d.e+-]+) times the stated one"
    return Made(case.with_(scale=case.work.scale * number), (Name(words, number, 0.003),))


def scaled_by_any(case: Case) -> Made:
    """The scale off by 3 to 100 per cent."""
    factor = float(np.exp(case.rng.choice([-1, 1]) * case.rng.uniform(0.03, 0.7)))
    return Made(
        case.with_(scale=case.work.scale * factor), (Name(r"the scale is ([\d.e+-]+) times the stated one", factor),)
    )


def averaged(case: Case) -> Made:
    """Queries and keys are ignored."""
    return Made(case.with_(query=0 * case.work.query), _name("queries and keys were ignored"))


def softcap_applied(case: Case) -> Made:
    """A usual softcap that nobody stated."""
    softcap = float(case.rng.choice([50.0, 30.0, 20.0, 15.0, 10.0]))
    return Made(case.with_(softcap=softcap), _name(f"a softcap of {softcap:g} was applied that was not stated"))


def slopes(heads: int) -> np.ndarray:
    """ALiBi's, for a power of two of heads."""
    return 2.0 ** (-8 / heads * np.arange(1, heads + 1))


def _slopes_of(problem: Problem) -> np.ndarray:
    return np.broadcast_to(
        slopes(problem.query.shape[2]).astype(np.float32), (len(problem.query), problem.query.shape[2])
    )


def alibi_applied(case: Case) -> Made:
    """ALiBi that nobody stated."""
    return Made(case.with_(alibi=_slopes_of(case.problem)), _name("ALiBi was applied, with the slopes of the paper"))


def without(case: Case, term: str, words: str) -> Made:
    """A stated term of the logits is left away."""
    return Made(case.with_(**{term: None}), _name(words))


def alibi_negated(case: Case) -> Made:
    """Far keys are preferred."""
    assert case.work.alibi is not None
    return Made(case.with_(alibi=-case.work.alibi), _name("the ALiBi slopes were applied with the other sign"))


def overflow(case: Case) -> Made | None:
    """q·k in FP16: rows in which it exceeds 65,504 are NaN."""
    if case.setting.profile != "flash_fp16":
        return None
    raw = np.einsum("btnh,bsnh->btns", case.work.query, case.work.key)
    over = (np.where(case.work.seen[:, :, None], np.abs(raw), 0) > 65504).any(axis=-1)
    out = case.right.out.copy()
    out[over] = np.nan
    lse = case.right.lse.copy()
    lse[over] = np.nan
    return Made(Result(out, lse), _name("q·k, before it is scaled, exceeds 65,504"))


# Arithmetic


def rounded_to(case: Case, step: str, words: str, fmt: str) -> Made | None:
    """A step is rounded to another format."""
    changes = {step: fmt, "block": fmt} if step == "carry" else {step: fmt}
    arithmetic = replace(case.work.arithmetic, **changes)
    return Made(case.with_(arithmetic=arithmetic), _name(words))


def fp16_accumulator(case: Case) -> Made:
    """The sum of e^… v is kept in FP16; what is told is the size of errors, or what rounds as much."""
    return Made(case.with_(accumulator="float16"), _name("consistent with"))


def _named_scales() -> Iterator[tuple[str, float, str]]:
    scale = DIM**-0.5
    yield "inverted", scale**-2, "the scale is the inverse of the stated one"
    yield "not applied", 1 / scale, "the scale was not applied"
    yield "squared", scale, "the scale was applied twice"
    yield "negated", -1.0, "the scale has the other sign"
    yield "without mscale²", 1 / MSCALE_SQUARED, "the scale lacks YaRN's factor mscale²"
    yield "mscale² twice", MSCALE_SQUARED, "the scale has YaRN's factor mscale² twice"
    yield "× log2(e)", 1 / LN2, r"scale times log2\(e\)"
    yield "× ln 2", LN2, "scale times ln 2"
    yield "log2(e)", 1 / LN2 / scale, r"the scale is log2\(e\): only"
    yield "without its root", scale**-0.5, "the scale was applied by its root only"
    yield "mscale once", MSCALE_SQUARED**-0.5, "the scale lacks one of YaRN's two factors mscale"
    yield "mscale³", MSCALE_SQUARED**0.5, "the scale has YaRN's factor mscale once more"
    for dim in (DIM // 2, 2 * DIM, 192, 576):
        yield f"1/√{dim}", (DIM / dim) ** 0.5, f"the scale is 1/√{dim}, that of a head_dim of {dim}"


LSE_FORMS = {
    "log2": "lse is the logarithm to base two",
    "log10": "lse is the logarithm to base ten",
    "negated": "lse has the other sign",
    "maximum": "lse is the row maximum; the logarithm of the sum was not added",
    "sum": "lse is the sum itself",
    "log of the sum": "lse is the logarithm of the sum; the row maximum was not added",
    "maximum + log2": "lse is the row maximum plus log2 of the sum",
    "zero": "lse is zero: it was never written",
    "+ 0.25": r"lse is off by \+0.25",
}


def _softcap(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, softcap=5.0, scale=2 * problem.scale)


def _sink(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, sink=rng.uniform(0, 4, problem.query.shape[2]).astype(np.float32))


def _alibi(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, alibi=_slopes_of(problem))


def _bias(problem: Problem, rng: np.random.Generator) -> Problem:
    (batch, length, heads, _), keys = problem.query.shape, problem.key.shape[1]
    return replace(problem, bias=rng.standard_normal((batch, heads, length, keys)).astype(np.float32))


def _window(problem: Problem, rng: np.random.Generator) -> Problem:
    return replace(problem, window=int(rng.integers(8, 30)))


def _near_overflow(problem: Problem, rng: np.random.Generator) -> Problem:
    if problem.query.dtype != np.float16:
        return problem
    query, key = (rng.standard_normal(x.shape) + mean for x, mean in ((problem.query, 20), (problem.key, 102)))
    return replace(problem, query=query, key=key).cast("float16")


REPORTED: dict[str, Reported] = {
    "natural lse merged by exp2": Reported(partial(wrong_base, is_natural=True)),
    "lse in base two merged by exp": Reported(partial(wrong_base, is_natural=False)),
    "merges not rescaled": Reported(not_rescaled),
    **{f"lse: {form}": Reported(partial(lse_as, form=form, words=words)) for form, words in LSE_FORMS.items()},
    "lse of one row NaN": Reported(lse_nan),
    "sink added": Reported(sink_added),
    "page of zero keys": Reported(page_of_zeros),
    "sink dropped": Reported(partial(without, term="sink", words="the sink was not added to the sums"), _sink),
    "last rows zero": Reported(partial(unwritten, fill=0.0)),
    "last rows a pattern": Reported(partial(unwritten, fill=7.5)),
    "all zero": Reported(all_zero),
    "batch rows exchanged": Reported(batch_exchanged),
    "requests exchanged": Reported(requests_exchanged),
    "heads exchanged": Reported(heads_exchanged),
    "ranks exchanged": Reported(ranks_exchanged),
    "axes exchanged": Reported(axes_exchanged),
    "causal mask shifted": Reported(partial(shifted, most=6)),
    "one key too few every 8 queries": Reported(fewer_every),
    "drafts see alike": Reported(drafts_alike),
    "local lengths": Reported(local_lengths),
    "lengths off by one a request": Reported(off_by_request),
    "top-left for bottom-right": Reported(top_left),
    "causal mask absent": Reported(mask_absent),
    "causal mask applied": Reported(mask_applied),
    "causal mask in each block": Reported(mask_in_blocks),
    "window applied": Reported(window_applied),
    "window ignored": Reported(window_ignored, _window),
    "requests mixed": Reported(requests_mixed),
    "pads leaked": Reported(pads_leaked),
    "prefix dropped": Reported(prefix_dropped),
    "run of keys lost": Reported(partial(run_weighted, weight=0.0)),
    "run of keys doubled": Reported(partial(run_weighted, weight=2.0)),
    "run lost across a border": Reported(partial(run_across, weight=0.0)),
    "run doubled across a border": Reported(partial(run_across, weight=2.0)),
    "page lost of one batch row": Reported(page_of_one_row),
    "key lost": Reported(partial(key_weighted, weight=0.0)),
    "key doubled": Reported(partial(key_weighted, weight=2.0)),
    "stale block": Reported(stale_block),
    "keys of another head": Reported(keys_of_another),
    "values of another head": Reported(values_of_another),
    "head h mod K": Reported(head_mod),
    "values of the next token": Reported(partial(neighbours_value, shift=1)),
    "values of the token before": Reported(partial(neighbours_value, shift=-1)),
    **{f"scale {name}": Reported(partial(scaled, factor=x, words=words)) for name, x, words in _named_scales()},
    "scale off": Reported(scaled_by_any),
    "scale nearly × log2(e)": Reported(partial(scaled_near, factor=1 / LN2)),
    "scale nearly without mscale²": Reported(partial(scaled_near, factor=1 / MSCALE_SQUARED)),
    "queries and keys ignored": Reported(averaged),
    "softcap applied": Reported(softcap_applied),
    "softcap ignored": Reported(partial(without, term="softcap", words="the softcap was not applied"), _softcap),
    "ALiBi applied": Reported(alibi_applied),
    "ALiBi ignored": Reported(partial(without, term="alibi", words="the ALiBi slopes were not applied"), _alibi),
    "ALiBi negated": Reported(alibi_negated, _alibi),
    "bias ignored": Reported(partial(without, term="bias", words="the bias was not added"), _bias),
    "q·k beyond FP16": Reported(overflow, _near_overflow),
    "scores in FP16": Reported(partial(rounded_to, step="score", fmt="float16", words="scores rounded to FP16")),
    "probabilities in BF16": Reported(
        partial(rounded_to, step="probability", fmt="bfloat16", words="probabilities rounded to BF16")
    ),
    "chunk results in BF16": Reported(
        partial(rounded_to, step="carry", fmt="bfloat16", words="chunk results stored in BF16")
    ),
    "accumulator in FP16": Reported(fp16_accumulator),
}
"""By name. docs/diagnosis.md lists what is named."""
