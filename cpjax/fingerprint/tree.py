"""The order of a sum as a tree, from how many terms two others swallow (FPRev, arXiv 2411.00442).

Term i is M, term j is −M, the others are units so small that M + unit = M. Units that are added to M or −M before the
two meet are lost; the others survive. So the number of lost terms, i and j included, is the number of leaves under the
node where i and j meet. All these numbers together are the tree. A node may have many children: terms that are added
all at once, with one common exponent, as matrix units do.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Tree:
    """A leaf has its number and no children."""

    leaf: int = -1
    children: tuple["Tree", ...] = ()

    def leaves(self) -> Iterator[int]:
        """Numbers of the terms, from left to right."""
        if self.leaf >= 0:
            yield self.leaf
        for child in self.children:
            yield from child.leaves()

    def __str__(self) -> str:
        """Terms in parentheses: ((0 1) 2)."""
        return str(self.leaf) if self.leaf >= 0 else f"({' '.join(map(str, self.children))})"


def tree_of(size: Int[np.ndarray, "n n"]) -> Tree | None:
    """The tree in which terms i and j meet at a node with `size[i, j]` leaves; None if no tree has these numbers."""
    tree = _subtree(np.arange(len(size)), size)
    return tree if tree is not None and (sizes_of(tree, len(size)) == size).all() else None


def _subtree(terms: np.ndarray, size: np.ndarray) -> Tree | None:
    if len(terms) == 1:
        return Tree(int(terms[0]))
    children, left = [], terms
    while len(left):
        apart = size[left[0], left] >= len(terms)
        apart[0] = False  # itself
        together = left[~apart]
        if len(together) == len(terms):
            return None
        child = _subtree(together, size)
        if child is None:
            return None
        children.append(child)
        left = left[apart]
    return Tree(children=tuple(children))


def sizes_of(tree: Tree, count: int) -> Int[np.ndarray, "n n"]:
    """For each two of `count` terms the number of leaves under the node where they meet; 1 for a term and itself."""
    size = np.ones((count, count), int)
    _fill(tree, size)
    return size


def _fill(tree: Tree, size: np.ndarray) -> list[int]:
    parts = [_fill(child, size) for child in tree.children]
    if not parts:
        return [tree.leaf]
    whole = [leaf for part in parts for leaf in part]
    for place, part in enumerate(parts):
        others = [leaf for other in parts[:place] + parts[place + 1 :] for leaf in other]
        size[np.ix_(part, others)] = len(whole)
    return whole


def words(tree: Tree) -> str:
    """What kind of tree it is, in words.

    >>> words(sequential(4)), words(Tree(children=tuple(Tree(i) for i in range(8))))
    ('one after the other', 'all 8 at once')
    """
    count = len(list(tree.leaves()))
    if all(child.leaf >= 0 for child in tree.children):
        return f"all {count} at once" if count > 2 else "one addition"
    chain = _chain(tree)
    if chain is not None:
        in_order = [leaf for group in chain for leaf in group] == sorted(tree.leaves())
        most = max(map(len, chain))
        said = "one after the other" if most == 1 else f"blocks of {most}, each added at once to the sum so far"
        return said if in_order else f"{said}, but not from the first to the last"
    if _is_balanced(tree):
        apart = "" if list(tree.leaves()) == sorted(tree.leaves()) else ", but not of neighbours"
        return f"in pairs, halves added to halves{apart}"
    said = _of_parts(tree, list(_parts(tree)), count) or _of_neighbours(tree, count) or _of_runs(tree)
    return said or f"a tree of depth {_depth(tree)}"


def _of_neighbours(tree: Tree, count: int) -> str:
    """Sums of equally many neighbours, of any kind, that are added to one running sum; "" if it is another tree."""
    if len(tree.children) != 2:
        return ""
    size = len(list(tree.children[1].leaves()))
    parts, left = [], tree
    while len(left.children) == 2 and len(list(left.leaves())) > size:
        left, part = left.children
        parts.append(part)
    parts = [left, *reversed(parts)]
    runs = [list(part.leaves()) for part in parts]
    if size < 2 or any(run != list(range(i * size, (i + 1) * size)) for i, run in enumerate(runs)):
        return ""
    each = {words(_numbered(part, {leaf: leaf % size for leaf in part.leaves()})) for part in parts}
    if len(each) != 1 or next(iter(each)).startswith("sums of"):
        return ""
    return f"{count // size} sums of {size} terms (neighbours), each {each.pop()}; then these: one after the other"


def _of_parts(tree: Tree, parts: list[Tree], count: int) -> str:
    """Sums side by side that are added together in the end; "" if they are not of equal size."""
    sets = [sorted(part.leaves()) for part in parts]
    size = len(sets[0])
    if len(sets) == count or any(len(one) != size for one in sets):
        return ""
    strides = {tuple(np.diff(one)) for one in sets}
    steps = {int(step) for stride in strides for step in stride}
    each = {words(_numbered(part, {leaf: place for place, leaf in enumerate(sorted(part.leaves()))})) for part in parts}
    if len(steps) != 1 or len(each) != 1:
        return ""
    step = steps.pop()
    where = "neighbours" if step == 1 else f"{step} apart"
    number = {id(part): place for place, part in enumerate(parts)}
    joined = words(_quotient(tree, number)) if len(parts) > 2 else "one addition"
    return f"{len(parts)} sums of {size} terms ({where}), each {each.pop()}; then these: {joined}"


def _of_runs(tree: Tree) -> str:
    """Sums of neighbours that are added to one running sum; "" if it is another tree."""
    runs, left = [], tree
    while left.children and _chain(left) is None:
        if len(left.children) != 2 or min(left.children[0].leaves()) > min(left.children[1].leaves()):
            return ""
        left, run = left.children
        runs.append(run)
    runs.append(left)
    each = [list(run.leaves()) for run in reversed(runs)]
    in_order = [leaf for leaves in each for leaf in leaves] == sorted(tree.leaves())
    if not in_order or any(run.children and _chain(run) is None for run in runs):
        return ""
    return f"sums of {min(map(len, each))} to {max(map(len, each))} neighbours, added one after the other to one sum"


def _numbered(tree: Tree, number: dict[int, int]) -> Tree:
    if tree.leaf >= 0:
        return Tree(number[tree.leaf])
    return Tree(children=tuple(_numbered(child, number) for child in tree.children))


def _quotient(tree: Tree, number: dict[int, int]) -> Tree:
    """The tree with each part as a leaf."""
    if id(tree) in number:
        return Tree(number[id(tree)])
    return Tree(children=tuple(_quotient(child, number) for child in tree.children))


def sequential(count: int) -> Tree:
    """Term after term."""
    tree = Tree(0)
    for leaf in range(1, count):
        tree = Tree(children=(tree, Tree(leaf)))
    return tree


def _chain(tree: Tree) -> list[list[int]] | None:
    """The groups of terms that are added to one running sum, first to last; None if there is more than one sum."""
    groups = []
    while tree.children:
        inner = [child for child in tree.children if child.children]
        if len(inner) > 1:
            return None
        groups.append([child.leaf for child in tree.children if child.leaf >= 0])
        if not inner:
            first = groups.pop()
            # A running sum that starts at 0: the first group is as large as the others, or two single terms.
            groups += [first] if all(len(group) > 1 for group in groups) else [first[1:], first[:1]]
            return [group for group in reversed(groups) if group]
        tree = inner[0]
    return None


def _is_balanced(tree: Tree) -> bool:
    sizes = [len(list(child.leaves())) for child in tree.children]
    return not tree.children or (len(set(sizes)) == 1 and all(_is_balanced(child) for child in tree.children))


def _depth(tree: Tree) -> int:
    return 1 + max(map(_depth, tree.children)) if tree.children else 0


def _parts(tree: Tree) -> Iterator[Tree]:
    """The largest subtrees that are chains."""
    if _chain(tree) is not None or tree.leaf >= 0:
        yield tree
    else:
        for child in tree.children:
            yield from _parts(child)
