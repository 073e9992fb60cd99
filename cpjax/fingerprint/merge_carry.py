"""What is rounded where partial results are handed on: a chunk's out and lse, and the merged ones.

Each chunk has four keys of one score with values of many sizes, so that neither its mean nor its lse is a number of a
half format, and the scores differ. Every way of rounding is computed in float64 along the trees that were read
(`merge_order`), with the divisions that are possible (`merge_division`); the answer is the way that explains the
kernel's numbers. Errors of exp are far below a half format's.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint.merge_division import Division
from cpjax.fingerprint.merge_order import Orders
from cpjax.fingerprint.probe import HEAD_DIM, UNTOLD, Answer, Line, Probe, missing, untold
from cpjax.fingerprint.ranks import chunks, held, lse_of, of_chunks, out_of, over_ranks, rank_of
from cpjax.fingerprint.tree import Tree

DIVISION = "division over ranks"
NAMES = "partial out over ranks", "carried out", "partial lse over ranks", "carried lse"
QUESTIONS, LIVE = 24, 4
WIDE, HALVES = "float32", ("float16", "bfloat16")
FORMATS_OF = (WIDE, *HALVES)
ENOUGH, CLEAR, SAME = 0.95, 0.02, 0.002
"""The share of the numbers that a way explains; ways that explain so much less than the best one are not meant; and
what is no difference."""
SPACING = 2.0**-19
"""To what an lse must agree, where it is at most 8: an exponential may be off by some spacings of float32."""

FORMS = {
    "each": ("each", "at each merge: what is carried is a mean"),
    "each by lse": ("each", "at each merge, by weights that take the rounded lse: what is carried is a mean"),
    "once": ("once", "once, in the end, behind a running maximum"),
    "at once": ("at once", "once: weights are taken from the lses of all, and then all results are summed"),
    "at once by lse": ("at once", "once: weights exp(lse − lse of all) are taken, and then all results are summed"),
}
"""Form → its kind in `merge_division`, and words."""


class Way(NamedTuple):
    """One way of rounding."""

    block: str
    carry: str
    block_lse: str
    carry_lse: str
    per_rank: bool
    """Both chunks of a rank are one block."""
    form: str
    """A name of `FORMS`."""

    @property
    def kind(self) -> str:
        """Of its form."""
        return FORMS[self.form][0]


def probes(cp: int) -> dict[str, Probe]:
    """One probe."""
    rng = np.random.default_rng(12)
    rank = np.array([rank_of(chunk, cp) for chunk in range(chunks(cp))])
    # Both chunks of a rank have one score: where they are one block, no probability is rounded.
    scores = FORMATS["bfloat16"].round(rng.uniform(-1.5, 1.5, (QUESTIONS, cp)))[:, rank]
    # All above 0: where terms cancel, the last bits of an exponential would move what is rounded.
    values = 64 * np.exp(rng.standard_normal((QUESTIONS, chunks(cp), LIVE, HEAD_DIM)))
    return {"merge-carry": over_ranks(scores, FORMATS["float16"].round(values))}


class Asked(NamedTuple):
    """The partials of the chunks: `[C, n, V]` and `[C, n]`."""

    out: Float[np.ndarray, "C n V"]
    lse: Float[np.ndarray, "C n"]


def partials(asked: Probe) -> Asked:
    """What each chunk alone gives."""
    value, key = (of_chunks(x, QUESTIONS).astype(np.float64) for x in (asked.value, asked.key))
    return Asked(value[:, :, :LIVE].mean(axis=2).swapaxes(0, 1), key[:, :, 0, 0].T + np.log(LIVE))


class State(NamedTuple):
    """`out` `[n, V]`, `lse` `[n]`, and where nothing is divided before the end the sum of the weights, else 1."""

    out: np.ndarray
    lse: np.ndarray
    total: np.ndarray


def computed(cp: int, trees: tuple[Tree, ...], asked: Asked, way: Way) -> tuple[np.ndarray, np.ndarray]:
    """`out` `[n, C, V]`, rounded to FP16, and `lse` `[n, C]` of one way, in float64."""
    of_tree = {tree: _of_one(cp, tree, asked, way) for tree in set(trees)}  # chunks of one rank have one order
    outs, lses = zip(*(of_tree[tree] for tree in trees), strict=True)
    return FORMATS["float16"].round(np.stack(outs, axis=1)), np.stack(lses, axis=1)


def _of_one(cp: int, tree: Tree, asked: Asked, way: Way) -> tuple[np.ndarray, np.ndarray]:
    def leaf(which: tuple[int, ...]) -> State:
        # The chunks of a block have one score, so that their mean is that of all keys.
        out = rounded(np.mean([asked.out[chunk] for chunk in which], axis=0), way.block)
        lse = rounded(asked.lse[which[0]] + np.log(len(which)), way.block_lse)
        return State(out, lse, np.ones_like(lse))

    if way.kind == "at once":
        return _at_once([leaf(which) for which in _leaves(cp, tree, way.per_rank)], way)
    result = _folded(cp, tree, leaf, way)
    return result.out / result.total[:, None], result.lse + np.log(result.total)


def _folded(cp: int, tree: Tree, leaf: Callable[[tuple[int, ...]], State], way: Way) -> State:
    whole = tuple(sorted(tree.leaves()))
    if tree.leaf >= 0 or (way.per_rank and whole in _held_chunks(cp)):
        return leaf(whole)
    states = [_folded(cp, child, leaf, way) for child in tree.children]
    result = states[0]
    for state in states[1:]:
        result = _merged(result, state, way)
    return result


def _merged(a: State, b: State, way: Way) -> State:
    top = np.maximum(a.lse, b.lse)
    total = np.exp(a.lse - top) * a.total + np.exp(b.lse - top) * b.total
    if way.kind == "once":
        base, lse, kept = top, top, total
    else:
        base, lse, kept = top, rounded(top + np.log(total), way.carry_lse), a.total
    # Two of equal weight are divided by 2 exactly, so that what is half way between two numbers stays there.
    by = np.exp(lse - top) if way.form == "each by lse" else total if way.kind == "each" else np.ones_like(total)
    out = (np.exp(a.lse - base)[:, None] * a.out + np.exp(b.lse - base)[:, None] * b.out) / by[:, None]
    return State(rounded(out, way.carry), lse, kept)


def _at_once(states: list[State], way: Way) -> tuple[np.ndarray, np.ndarray]:
    lses = [state.lse for state in states]
    lse = np.logaddexp.reduce(lses, axis=0)
    base = lse if way.form == "at once by lse" else np.max(lses, axis=0)
    out = np.zeros_like(states[0].out)
    for state in states:
        out = rounded(out + np.exp(state.lse - base)[:, None] * state.out, way.carry)
    return out * np.exp(base - lse)[:, None], lse


def _leaves(cp: int, tree: Tree, per_rank: bool) -> list[tuple[int, ...]]:
    """The blocks of a sum, in order."""
    if not per_rank:
        return [(chunk,) for chunk in tree.leaves()]
    return list(dict.fromkeys(held(rank_of(chunk, cp), cp) for chunk in tree.leaves()))


def _held_chunks(cp: int) -> set[tuple[int, ...]]:
    return {held(rank, cp) for rank in range(cp)}


def has_pairs(cp: int, trees: tuple[Tree, ...]) -> bool:
    """Whether the two chunks of each rank meet each other first, as they do where they are one block."""
    return all(_held_chunks(cp) <= set(_nodes(tree)) for tree in trees)


def _nodes(tree: Tree) -> list[tuple[int, ...]]:
    return [tuple(sorted(tree.leaves())), *(node for child in tree.children for node in _nodes(child))]


def rounded(x: np.ndarray, fmt: str) -> np.ndarray:
    """Rounded to a half format; float32 is as good as not rounded."""
    return x if fmt == WIDE else FORMATS[fmt].round(x)


def ways(may_be: frozenset[str], lse_is_carried: bool, per_rank: bool) -> list[Way]:
    """All that are tried."""
    found = []
    for form, (kind, _) in FORMS.items():
        if kind not in may_be:
            continue
        for block, carry, block_lse, carry_lse in product(*[FORMATS_OF] * 4):
            if carry_lse != WIDE and not (kind == "each" and lse_is_carried):
                continue
            # Where nothing is rounded to a half format, two forms are one.
            if (form == "each by lse" and carry_lse == WIDE) or (form == "at once by lse" and carry == WIDE):
                continue
            found.append(Way(block, carry, block_lse, carry_lse, per_rank, form))
    return found


def read(
    cp: int, found: Division | None, orders: Orders, of_lse: Orders, asked: Probe, answer: Answer | None
) -> list[Line]:
    """The line of the division, and four whose codes are formats."""
    names = DIVISION, *NAMES
    if answer is None or not np.isfinite(answer.out).all():
        return [missing(name) for name in names]
    if orders.trees is None:
        return [untold(name, "the order of merging is not told") for name in names]
    if found is None:
        return [missing(name) for name in names]
    lse = lse_of(answer, QUESTIONS)
    out = out_of(answer, QUESTIONS)[..., 0, :]
    shares: dict[Way, float] = {}
    is_lse_explained = False
    # A pair that meets first is taken for one block, if two that are merged do not explain more.
    for per_rank in (True, False) if has_pairs(cp, orders.trees) else (False,):
        candidates = ways(found.may_be, of_lse.level != "sum", per_rank)
        if lse is not None:
            kept = _explaining_lse(cp, of_lse.trees or orders.trees, partials(asked), candidates, lse[..., 0])
            is_lse_explained |= bool(kept)
            candidates = kept or candidates
        for way in candidates:
            expected, _ = computed(cp, orders.trees, partials(asked), way)
            shares[way] = float((expected == out).mean())
    best = max(shares.values(), default=0)
    good = [way for way, share in shares.items() if share >= max(ENOUGH, best - CLEAR)]
    if any(way.per_rank for way in good if shares[way] >= best - SAME):
        good = [way for way in good if way.per_rank]
    ranked = sorted(shares.items(), key=lambda item: -item[1])[:2]
    told = "; ".join(f"{_said(way)}: {share:.1%}" for way, share in ranked)
    evidence = f"{out.size:,} numbers of out, and the share that a way of rounding explains: {told}"
    division = _division(found, {way.form for way in good})
    if not good:
        no = f"{UNTOLD}: no way of rounding that this probe knows explains it"
        return [division, *(Line(name, no, evidence) for name in NAMES)]
    lines = [_line(name, {str(way[place]) for way in good}, evidence) for place, name in enumerate(NAMES)]
    if good[0].per_rank:
        of_both = [x._replace(value=f"{x.value}, of both chunks of a rank together") if x.code else x for x in lines]
        lines = [of_both[0], lines[1], of_both[2], lines[3]]
    if lse is None or not is_lse_explained:
        why = "there is no lse" if lse is None else "no way of rounding that this probe knows explains lse"
        return [division, *lines[:2], *(untold(name, why) for name in NAMES[2:])]
    if division.code == "at once":
        lines[3] = Line(NAMES[3], "none is carried: those of all are there at once", division.evidence, "none")
    elif division.code == "once" and of_lse.level != "sum":
        lines[3] = untold(NAMES[3], "beside which number small weights are lost is not told")
    elif of_lse.level == "sum":
        said = "none is carried: the maximum and the sum are, in float32"
        why = "small weights are lost beside a sum near 1, and not beside an lse of 16"
        lines[3] = Line(NAMES[3], said, why, "none")
    return [division, *lines]


def _division(found: Division, forms: set[str]) -> Line:
    kinds = {FORMS[form][0] for form in forms} or found.may_be
    if len(kinds) == 1:
        kind = next(iter(kinds))
        said = FORMS[next(iter(forms))][1] if len(forms) == 1 else FORMS[kind][1]
        return Line(DIVISION, said, found.evidence, kind)
    why = " or ".join(sorted(kinds)) or "neither exact nor often inexact"
    return Line(DIVISION, f"{UNTOLD}: {why}", found.evidence)


def _explaining_lse(
    cp: int, trees: tuple[Tree, ...], parts: Asked, candidates: list[Way], lse: np.ndarray
) -> list[Way]:
    """Those that explain lse."""
    final = next((f for f in HALVES if (FORMATS[f].round(lse) == lse).all()), WIDE)
    good: dict[tuple[str, str, str], bool] = {}
    for way in candidates:
        what = way.block_lse, way.carry_lse, way.kind
        if what not in good:
            _, expected = computed(cp, trees, parts._replace(out=parts.out[..., :1]), way)
            near = np.abs(rounded(expected, final) - lse) <= (SPACING if final == WIDE else 0)
            good[what] = float(near.mean()) >= ENOUGH
    return [way for way in candidates if good[way.block_lse, way.carry_lse, way.kind]]


def _said(way: Way) -> str:
    blocks = "one block a rank, " if way.per_rank else ""
    return f"{blocks}{way.block}, carried {way.carry}, lse {way.block_lse}, carried {way.carry_lse}, {way.form}"


def _line(name: str, formats: set[str], evidence: str) -> Line:
    if len(formats) > 1:
        return Line(name, f"{UNTOLD}: {' or '.join(sorted(formats))}", evidence)
    code = formats.pop()
    return Line(name, code, evidence, code)
