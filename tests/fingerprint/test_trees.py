"""The order of a sum is read off as a tree: any tree, at any place of out, from a kernel that adds in that order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint import order
from cpjax.fingerprint.probe import Answer, Probe
from cpjax.fingerprint.tree import Tree, sequential, sizes_of, tree_of, words


def drawn_tree(rng: np.random.Generator, terms: list[int]) -> Tree:
    """Any tree over these terms: at each node two or more children."""
    if len(terms) == 1:
        return Tree(terms[0])
    count = int(rng.integers(2, min(len(terms), 5) + 1))
    cuts = np.sort(rng.choice(np.arange(1, len(terms)), count - 1, replace=False))
    shuffled = list(rng.permutation(terms))
    parts = [[int(x) for x in part] for part in np.split(np.array(shuffled), cuts)]
    return Tree(children=tuple(drawn_tree(rng, part) for part in parts))


def alike(one: Tree, other: Tree) -> bool:
    """The same tree, whatever the order of the children: addition commutes."""
    n = len(list(one.leaves()))
    return bool((sizes_of(one, n) == sizes_of(other, n)).all())


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_sizes_are_the_tree(count, seed):
    tree = drawn_tree(np.random.default_rng(seed), list(range(count)))
    found = tree_of(sizes_of(tree, count))
    assert found is not None
    assert alike(found, tree)


def test_numbers_that_are_no_tree_are_refused():
    size = sizes_of(sequential(5), 5)
    size[0, 4] = size[4, 0] = 3
    assert tree_of(size) is None


def added(terms: np.ndarray, tree: Tree) -> np.ndarray:
    """The sum of `terms` `[n, …]` in float32, in the order of the tree; many children are added at once, exactly, then
    cut off at the 24 digits of the largest."""
    if tree.leaf >= 0:
        return terms[tree.leaf]
    parts = np.stack([added(terms, child) for child in tree.children])
    if len(parts) == 2:
        return parts[0] + parts[1]
    largest = np.abs(parts).max(axis=0)
    unit = np.where(largest > 0, 2.0 ** (np.floor(np.log2(np.where(largest > 0, largest, 1.0))) - 23), 1.0)
    cut = np.trunc(parts.astype(np.float64) / unit) * unit
    return cut.sum(axis=0).astype(np.float32)


def kernel(tree: Tree, which: str):
    """Attention whose p·v or q·k is added in the order of the tree, all in float32."""

    def compute(asked: Probe) -> Answer:
        query, key, value = (x.astype(np.float32) for x in asked[:3])
        products = query[:, :1, :, None, :] * key.swapaxes(1, 2)[:, None]  # [B, 1, N, S, H]
        score = added(np.moveaxis(products, -1, 0), tree) if which == "q·k" else products.sum(axis=-1, dtype=np.float64)
        p = np.exp(score - score.max(axis=-1, keepdims=True)).astype(np.float32)
        terms = np.moveaxis(p[..., None] * value.swapaxes(1, 2)[:, None], -2, 0)  # [S, B, 1, N, V]
        total = added(terms, tree) if which == "p·v" else terms.sum(axis=0, dtype=np.float64)
        out = total / p.sum(axis=-1, dtype=np.float64)[..., None]
        return Answer(FORMATS["float16"].round(out), None)

    return compute


@pytest.mark.slow
@pytest.mark.parametrize("which", ["q·k", "p·v"])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_is_read_off(which, seed):
    fmt = FORMATS["float16"]
    tree = drawn_tree(np.random.default_rng(seed), list(range(order.TERMS)))
    name = {"q·k": "terms-of-qk", "p·v": "terms-of-pv"}[which]
    found = order.trees_of(fmt, name, kernel(tree, which)(order.probes(fmt)[name]))
    assert found is not None
    assert [one is not None and alike(one, tree) for one in found] == [True]


def blocks(count: int, size: int) -> Tree:
    """A running sum to which blocks are added at once."""
    tree = Tree(children=tuple(Tree(i) for i in range(size)))
    for start in range(size, count, size):
        tree = Tree(children=(tree, *(Tree(start + i) for i in range(size))))
    return tree


def halves(first: int, count: int) -> Tree:
    if count == 1:
        return Tree(first)
    return Tree(children=(halves(first, count // 2), halves(first + count // 2, count // 2)))


def strided(count: int, stride: int) -> Tree:
    """Sums of every stride-th term, then added one after the other."""
    sums = []
    for first in range(stride):
        one = Tree(first)
        for leaf in range(first + stride, count, stride):
            one = Tree(children=(one, Tree(leaf)))
        sums.append(one)
    tree = sums[0]
    for one in sums[1:]:
        tree = Tree(children=(tree, one))
    return tree


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (sequential(64), "one after the other"),
        (Tree(children=tuple(Tree(i) for i in range(64))), "all 64 at once"),
        (blocks(64, 16), "blocks of 16, each added at once to the sum so far"),
        (halves(0, 64), "in pairs, halves added to halves"),
        (strided(64, 8), "8 sums of 8 terms (8 apart), each one after the other; then these: one after the other"),
        (Tree(children=(strided(3, 1), Tree(3))), "one after the other"),
    ],
)
def test_words(tree, said):
    assert words(tree) == said
