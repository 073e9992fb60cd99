"""In which order the partial results of chunks are merged at each rank, for out and for lse: as trees.

Out, after FPRev (`tree`): chunk i has the value M, chunk j has −M, both with the score 0; all others have a value and a
score so low that M swallows what they add. M and −M weigh the same, so that they cancel to 0 in every formula; what
is merged before the two meet is lost, and the number that survives is that of the chunks outside their node.

Lse cannot cancel. Chunk k has a high score, i and j low ones: what each adds is 0.3 of lse's spacing, both together
0.6. So they are seen if and only if they are merged with each other before either meets k. What swallows them is the
spacing of lse at 16, if lse is what is carried, in one of three formats; or that of a sum near 1, if the sum is.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint.order import pairs
from cpjax.fingerprint.probe import UNTOLD, Answer, Line, Probe, missing, untold
from cpjax.fingerprint.ranks import chunks, held, lse_of, out_of, over_ranks, rank_of
from cpjax.fingerprint.tree import Tree, sequential, sizes_of, tree_of

OUT, LSE = "order over ranks, out", "order over ranks, lse"

LARGE, VALUE, SCORE = 49152.0, 40960.0, -19.5
"""M; value and score of the others. 6 · exp(−19.5) · (49,152 + 40,960) is less than half of float32's spacing at M, and
exp(−19.5) · 40,960 / 2 is a normal number of FP16."""
SIZES = 1.0, 1 / 8
"""What M and the values are multiplied with: sums that nobody divides overflow in FP16 with the first one."""


class Level(NamedTuple):
    """Where two small weights are lost one by one, and are not together."""

    what: str
    code: str
    top: float
    low: float
    step: float
    """The least that is seen in lse."""


LEVELS = (
    Level("lse, in float32", "float32", 16.0, 1.6260, 2.0**-19),
    Level("lse, in FP16", "float16", 16.0, 10.6406, 2.0**-6),
    Level("lse, in BF16", "bfloat16", 16.0, 12.75, 2.0**-3),
    Level("the sum of exp(lse − m), in float32", "sum", 0.0, -17.1463, 2.0**-23),
)
"""exp(low − top) is 0.3 steps; at the last one, 0.3 of a step of 1 + x."""


def probes(cp: int) -> dict[str, Probe]:
    """One of out, one of lse."""
    return {"merge-order": _of_out(cp), "merge-order-lse": _of_lse(cp)}


def _of_out(cp: int) -> Probe:
    pair = pairs(chunks(cp))
    row = np.arange(len(pair))
    scores, values = np.full((len(pair), chunks(cp)), SCORE), np.full((len(pair), chunks(cp)), VALUE)
    for place, value in ((pair[:, 0], LARGE), (pair[:, 1], -LARGE)):
        scores[row, place], values[row, place] = 0, value
    sizes = np.concatenate([values * size for size in SIZES])
    return over_ranks(np.tile(scores, (len(SIZES), 1)), sizes[..., None, None])


def triples(count: int) -> Int[np.ndarray, "n 3"]:
    """i, j, k: the pairs i < j with each other chunk k; then k alone, written as (k, k, k)."""
    found = [(i, j, k) for i, j in pairs(count).tolist() for k in range(count) if k not in (i, j)]
    return np.array(found + [(k, k, k) for k in range(count)])


def _of_lse(cp: int) -> Probe:
    asked = triples(chunks(cp))
    row = np.arange(len(asked))
    scores = np.full((len(LEVELS), len(asked), chunks(cp)), -np.inf)
    for level, some in zip(LEVELS, scores, strict=True):
        low = FORMATS["float16"].round(np.array([level.low]))[0]
        for column, score in ((0, low), (1, low), (2, level.top)):
            some[row, asked[:, column]] = score
    scores = scores.reshape(-1, chunks(cp))
    return over_ranks(scores, np.zeros((*scores.shape, 1, 1)))


NO_NUMBERS = "the kernel gave no numbers for this probe"


class Orders(NamedTuple):
    """What was found: a tree for the queries of each chunk, or why there is none."""

    trees: tuple[Tree, ...] | None
    why: str
    level: str = ""
    """Of lse: the code of the level that swallows."""


def out_orders(cp: int, answer: Answer | None) -> Orders:
    """The trees of out."""
    count, pair = chunks(cp), pairs(chunks(cp))
    if answer is None:
        return Orders(None, NO_NUMBERS)
    sizes = out_of(answer, len(SIZES) * len(pair))[..., 0].reshape(len(SIZES), len(pair), count, -1)
    finite = [out / size for out, size in zip(sizes, SIZES, strict=True) if np.isfinite(out).all()]
    if not finite:
        return Orders(None, NO_NUMBERS)
    out = finite[0]  # [pairs, C, rows]
    if (out != out[..., :1]).any():
        return Orders(None, "rows of one chunk give different numbers")
    weight = np.exp(SCORE)
    survived = out[..., 0] * (2 + (count - 2) * weight) / (weight * VALUE)
    lost = count - survived
    if (np.abs(lost - np.round(lost)) > 0.4).any():  # lse in BF16 is off by up to 6 %
        return Orders(None, "what survives beside a large value and its negative is no number of chunks")
    return _orders(np.round(lost.T).astype(int), pair, count, "what survives fits no tree")


def lse_orders(cp: int, answer: Answer | None) -> Orders:
    """The trees of lse, from the level at which small weights are swallowed."""
    if answer is None:
        return Orders(None, NO_NUMBERS)
    asked = triples(chunks(cp))
    lse = lse_of(answer, len(LEVELS) * len(asked))
    if lse is None:
        return Orders(None, "there is no lse, or not all of it are numbers")
    found, is_all_seen = Orders(None, "no small weight is swallowed at any size of lse, or all are"), True
    for level, of_level in zip(LEVELS, lse[..., 0].reshape(len(LEVELS), len(asked), -1), strict=True):
        seen = _seen(cp, level, of_level)
        if seen.any() and not seen.all():
            found = _of_all(cp, seen)
            found = found if found.trees is not None else _of_ranks(cp, seen, found)
            # Where lse is carried, a sum near 1 swallows, too; only where no lse swallows it is not carried.
            if found.trees is not None:
                return found._replace(level=level.code if level.code != "sum" or is_all_seen else "")
        is_all_seen &= bool(seen[_early(cp)].all())
    return found


def _of_all(cp: int, seen: np.ndarray) -> Orders:
    together = 2 + (~seen).sum(axis=2)
    return _orders(together, pairs(chunks(cp)), chunks(cp), "which weights are swallowed fits no tree")


def _early(cp: int) -> tuple[slice, np.ndarray, slice]:
    """The pairs of early chunks; of the others each."""
    return slice(None), np.all(pairs(chunks(cp)) < cp, axis=1), slice(cp - 2)


def _of_ranks(cp: int, seen: np.ndarray, found: Orders) -> Orders:
    """The trees of the ranks alone, read off their early chunks: a block of two may swallow in a way of its own."""
    if cp < 3:
        return found
    together = 2 + (~seen[_early(cp)]).sum(axis=2)
    of_ranks = _orders(together, pairs(cp), cp, found.why)
    if of_ranks.trees is None:
        return found
    return of_ranks._replace(trees=tuple(_with_pairs(tree, cp) for tree in of_ranks.trees))


def _with_pairs(tree: Tree, cp: int) -> Tree:
    """Both chunks of a rank in the place of the rank."""
    if tree.leaf >= 0:
        return _pair(tree.leaf, cp)
    return Tree(children=tuple(_with_pairs(child, cp) for child in tree.children))


def _seen(cp: int, level: Level, lse: Float[np.ndarray, "triples C"]) -> np.ndarray:
    """Whether chunks i and j are seen beside k, `[C of the query, pairs, others]`."""
    count, asked = chunks(cp), triples(chunks(cp))
    alone = lse[-count:][asked[:-count, 2]]
    seen = lse[:-count] - alone >= level.step / 2
    return seen.T.reshape(count, len(pairs(count)), count - 2)


def _orders(size_of_pairs: Int[np.ndarray, "C pairs"], pair: np.ndarray, count: int, why: str) -> Orders:
    trees = []
    for sizes in size_of_pairs:
        size = np.ones((count, count), int)
        size[pair[:, 0], pair[:, 1]] = size[pair[:, 1], pair[:, 0]] = sizes
        tree = tree_of(size)
        if tree is None:
            return Orders(None, why)
        trees.append(tree)
    return Orders(tuple(trees), "")


RANKS: dict[str, tuple[str, Callable[[int, int], list[int]]]] = {
    "ring": (
        "a ring: its own rank first, then the one before it, and so on",
        lambda rank, cp: [(rank - step) % cp for step in range(cp)],
    ),
    "ring upward": (
        "a ring upward: its own rank first, then the one behind it, and so on",
        lambda rank, cp: [(rank + step) % cp for step in range(cp)],
    ),
    "ring both ways": (
        "a ring both ways: its own rank first, then the ones before and behind it, and so on",
        lambda rank, cp: [(rank + step) % cp for step in (0, -1, 1, -2, 2)[:cp]],
    ),
    "gather": ("from rank 0 up, on every rank", lambda rank, cp: list(range(cp))),
    "gather downward": ("from the last rank down, on every rank", lambda rank, cp: list(range(cp))[::-1]),
    "own first": (
        "its own rank first, then the others from rank 0 up",
        lambda rank, cp: [rank, *(other for other in range(cp) if other != rank)],
    ),
}
"""Code → words, and the ranks in the order in which the queries of a rank meet their keys."""


def candidates(cp: int) -> dict[tuple[str, str], list[Tree]]:
    """(code, words) → the tree of the queries of each chunk."""
    found: dict[tuple[str, str], list[Tree]] = {}

    def add(code: str, words: str, tree: Callable[[int], Tree]) -> None:
        found[code, words] = [tree(rank_of(chunk, cp)) for chunk in range(chunks(cp))]

    whole = list(range(chunks(cp)))
    for code, (said, ranks) in RANKS.items():
        inner = {
            "": lambda rank, r=ranks: chain([Tree(c) for one in r(rank, cp) for c in held(one, cp)]),
            ", of each the late chunk first": lambda rank, r=ranks: chain(
                [Tree(c) for one in r(rank, cp) for c in held(one, cp)[::-1]]
            ),
            TOGETHER: lambda rank, r=ranks: chain([_pair(one, cp) for one in r(rank, cp)]),
        }
        for more, tree in inner.items():
            add(code, said + more, tree)
        add(code, said + SWALLOWED, lambda rank, r=ranks: _absorbing([held(one, cp) for one in r(rank, cp)]))
    add("tree", "a tree over ranks, halves added to halves", lambda _: halves([_pair(one, cp) for one in range(cp)]))
    add("ascending", "chunk after chunk of the text, on every rank", lambda _: sequential(chunks(cp)))
    add("descending", "chunk after chunk from the last one, on every rank", lambda _: chain([*map(Tree, whole[::-1])]))
    return found


TOGETHER = ", of each both chunks together"
SWALLOWED = f"{TOGETHER} (all that is small before them is lost beside them)"


def _absorbing(parts: list[tuple[int, int]]) -> Tree:
    """Part after part, where M and −M in one part lose all before it: a sigmoid near 1 is 1, and 1 − 1 is 0."""
    tree = Tree(children=tuple(map(Tree, parts[0])))
    for part in parts[1:]:
        tree = Tree(children=(tree, *map(Tree, part)))
    return tree


def _pair(rank: int, cp: int) -> Tree:
    return Tree(children=tuple(Tree(c) for c in held(rank, cp)))


def chain(parts: list[Tree]) -> Tree:
    """Part after part added to one result."""
    tree = parts[0]
    for part in parts[1:]:
        tree = Tree(children=(tree, part))
    return tree


def halves(parts: list[Tree]) -> Tree:
    """Half of the parts, and the other half, each alike."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return Tree(children=(halves(parts[:middle]), halves(parts[middle:])))


def is_star(trees: tuple[Tree, ...]) -> bool:
    """Whether nothing is merged: whatever is small is lost beside what is large, in whatever order."""
    return all(all(child.leaf >= 0 for child in tree.children) and len(tree.children) > 2 for tree in trees)


def same(one: Tree, other: Tree) -> bool:
    """Whether they are one order; which of two results is the first one of a merge is not asked."""
    count = len(list(one.leaves()))
    return bool((sizes_of(one, count) == sizes_of(other, count)).all())


def read(cp: int, found: Orders, name: str) -> Line:
    """The line of an order."""
    if found.trees is None:
        return missing(name) if found.why == NO_NUMBERS else untold(name, found.why)
    trees = found.trees
    evidence = "; ".join(f"the queries of rank {rank}: {described(trees[rank])}" for rank in range(cp))
    if is_star(trees):
        return Line(name, "all keys are in one sum; no merge is seen", evidence, "together")
    fits = [
        names for names, other in candidates(cp).items() if all(same(a, b) for a, b in zip(trees, other, strict=True))
    ]
    if fits:
        code, said = fits[0]
        others = ", ".join(dict.fromkeys(other for other, _ in fits[1:] if other != code))
        return Line(name, f"{said} (with {cp} ranks the same as {others})" if others else said, evidence, code)
    if not all(map(is_binary, trees)):
        return Line(name, f"{UNTOLD}: more is lost than where two are merged at a time", evidence)
    return Line(name, "another order, see the evidence", evidence, "other")


def is_binary(tree: Tree) -> bool:
    """Whether two meet at each node."""
    return tree.leaf >= 0 or (len(tree.children) == 2 and all(map(is_binary, tree.children)))


def described(tree: Tree) -> str:
    """The order in chunks: first two in parentheses, for their merge is the same either way."""
    parts, left = [], tree
    while len(left.children) == 2 and any(child.leaf >= 0 for child in left.children):
        one, other = left.children
        if one.leaf >= 0 and other.leaf >= 0:
            break
        left, part = (one, other) if other.leaf >= 0 else (other, one)
        parts.append(str(part.leaf))
    return ", ".join([str(left), *reversed(parts)])


def node_sizes(trees: tuple[Tree, ...]) -> Int[np.ndarray, "C n n"]:
    """For the queries of each chunk and each two chunks the number of chunks in the node where they meet."""
    count = len(trees)
    return np.stack([sizes_of(tree, count) for tree in trees])
