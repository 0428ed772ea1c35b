"""PQ-trees: all orders of a set of elements in which each of several subsets is one run (consecutive-ones property).

After Booth and Lueker, "Testing for the consecutive ones property, interval graphs, and graph planarity using PQ-tree
algorithms" (1976). Two things are different. Trees are immutable, so that a search can try a subset, keep the tree it
had, and share all that did not change; and elements that no subset has told apart yet are one bit set inside their P
node, so that a tree has no more nodes than the subsets demand, whatever the number of elements. Sets of elements are
Python integers, bit ``i`` for element ``i``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

FEW = 16  # elements are taken out one by one, more of them by way of numpy


@dataclass(frozen=True, slots=True)
class Tree:
    """A node and all below it.

    ``linear=False`` is a P node: its loose elements and its children stand in any order. ``linear=True`` is a Q node:
    its children stand in the given order or its reverse; ``sign`` +1 allows only the given order, -1 only the
    reverse, 0 both.
    """

    mask: int  # all elements below
    loose: int  # elements that are children of a P node themselves
    children: tuple[Tree, ...]
    linear: bool = False
    sign: int = 0


class Label(Enum):
    """What a node holds of the subset in hand."""

    EMPTY = 0  # an element that must stay out, none that must be in
    WILD = 1  # only elements that may be in or out
    FULL = 2  # an element that must be in, none that must stay out
    PARTIAL = 3  # both


def free(elements: int, children: Sequence[Tree] = ()) -> Tree:
    """A P node; a single child stands for itself."""
    if not elements and len(children) == 1:
        return children[0]
    mask = elements
    for child in children:
        mask |= child.mask
    return Tree(mask, elements, tuple(children))


def chain(children: Sequence[Tree], sign: int = 0) -> Tree:
    """A Q node; a single child stands for itself."""
    if len(children) == 1:
        return children[0]
    mask = 0
    for child in children:
        mask |= child.mask
    return Tree(mask, 0, tuple(children), True, sign)


def bits(elements: Iterable[int] | np.ndarray) -> int:
    """The set of these elements as an integer."""
    found = 0
    for e in elements:
        found |= 1 << int(e)
    return found


def pack(flags: np.ndarray) -> int:
    """The set of the places where ``flags`` (bool, one dimension) is true."""
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")


def members(elements: int) -> list[int]:
    """The elements of a set, in increasing order."""
    if elements.bit_count() < FEW:
        found = []
        while elements:
            low = elements & -elements
            found.append(low.bit_length() - 1)
            elements ^= low
        return found
    raw = np.frombuffer(elements.to_bytes((elements.bit_length() + 7) // 8, "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(raw, bitorder="little")).tolist()


def reduce(tree: Tree, inside: int, wild: int = 0) -> Tree | None:
    """The tree of those orders in which ``inside`` is one run too; None if there are none.

    ``wild``: elements that may stand inside that run or not (disjoint from ``inside``). Without them the answer is
    exact. With them the tree holds some of the orders only - deciding whether there is one is NP-complete - and None
    means no more than that this method found none.
    """
    if not inside:
        return tree
    outside = tree.mask & ~(inside | wild)
    path: list[tuple[Tree, int]] = []
    node = tree
    while True:  # down to the deepest node that holds all of the subset
        holding = [i for i, child in enumerate(node.children) if child.mask & inside]
        if node.loose & inside or len(holding) != 1:
            break
        path.append((node, holding[0]))
        node = node.children[holding[0]]
    new = (_reduce_linear if node.linear else _reduce_free)(node, inside, outside)
    if new is None or new is node:
        return None if new is None else tree
    for parent, place in reversed(path):
        children = (*parent.children[:place], new, *parent.children[place + 1 :])
        new = Tree(parent.mask, parent.loose, children, parent.linear, parent.sign)
    return new


def restrict(tree: Tree, kept: int) -> Tree | None:
    """The orders that are left when all elements but ``kept`` are taken out; None if none is left.

    Recursion goes as deep as the tree: blocks and their channels, before subsets have made it deeper.
    """
    if not tree.mask & ~kept:
        return tree
    children = [child for c in tree.children if c.mask & kept and (child := restrict(c, kept)) is not None]
    if tree.linear:
        return chain(children, tree.sign) if children else None
    return free(tree.loose & kept, children) if tree.mask & kept else None


def frontier(tree: Tree) -> list[int]:
    """One of the orders that the tree stands for: small elements early, as far as it lets them."""
    order: list[int] = []
    stack: list[Tree | int] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, int):
            order.append(node)
        elif node.linear:
            forward = node.sign > 0 or (node.sign == 0 and _lowest(node.children[0]) < _lowest(node.children[-1]))
            stack.extend(reversed(node.children) if forward else node.children)
        else:
            keyed: list[tuple[int, Tree | int]] = [(e, e) for e in members(node.loose)]
            keyed.extend((_lowest(child), child) for child in node.children)
            stack.extend(item for _, item in sorted(keyed, key=lambda pair: -pair[0]))
    return order


def _lowest(node: Tree) -> int:
    return (node.mask & -node.mask).bit_length() - 1


def _label(node: Tree, inside: int, outside: int) -> Label:
    if node.mask & inside:
        return Label.PARTIAL if node.mask & outside else Label.FULL
    return Label.EMPTY if node.mask & outside else Label.WILD


def _split(node: Tree, inside: int, outside: int) -> tuple[list[Tree], list[Tree], list[Tree]]:
    """Children of a P node that are out (or wild), in, and both."""
    out: list[Tree] = []
    full: list[Tree] = []
    partial: list[Tree] = []
    for child in node.children:
        label = _label(child, inside, outside)
        (full if label is Label.FULL else partial if label is Label.PARTIAL else out).append(child)
    return out, full, partial


def _reduce_free(node: Tree, inside: int, outside: int) -> Tree | None:
    """The subset's root is a P node: what is full becomes one child, with a partial child on either side."""
    out, full, partial = _split(node, inside, outside)
    loose_in, loose_out = node.loose & inside, node.loose & ~inside
    if len(partial) > 2:
        return None
    if not partial and (not (out or loose_out) or (not full and loose_in.bit_count() == 1)):
        return node
    middle = [free(loose_in, full)] if loose_in or full else []
    if not partial:
        return free(loose_out, [*out, *middle])
    left = _flatten(partial[0], inside, outside)
    right = _flatten(partial[1], inside, outside) if len(partial) == 2 else ([], 0)
    if left is None or right is None or (sign := _agree(left[1], -right[1])) is None:
        return None
    return free(loose_out, [*out, chain([*left[0], *middle, *reversed(right[0])], sign)])


def _reduce_linear(node: Tree, inside: int, outside: int) -> Tree | None:
    """The subset's root is a Q node: the children it touches are neighbours, partial ones at the ends only."""
    labels = [_label(child, inside, outside) for child in node.children]
    touched = [i for i, label in enumerate(labels) if label in (Label.FULL, Label.PARTIAL)]
    first, last = touched[0], touched[-1]
    if any(label in (Label.EMPTY, Label.PARTIAL) for label in labels[first + 1 : last]):
        return None
    if labels[first] is Label.FULL and labels[last] is Label.FULL:
        return node
    left = _flatten(node.children[first], inside, outside)
    right = _flatten(node.children[last], inside, outside)
    if left is None or right is None:
        return None
    sign = _agree(node.sign, left[1])
    sign = None if sign is None else _agree(sign, -right[1])
    if sign is None:
        return None
    middle = [*left[0], *node.children[first + 1 : last], *reversed(right[0])]
    return chain([*node.children[:first], *middle, *node.children[last + 1 :]], sign)


def _flatten(node: Tree, inside: int, outside: int) -> tuple[list[Tree], int] | None:
    """A node as a list that has what is out on its left and what is in on its right, and the list's sign."""
    left: list[Tree] = []
    right: list[Tree] = []  # from right to left
    sign = 0
    while (label := _label(node, inside, outside)) is Label.PARTIAL:
        if node.linear:
            turned = _turned(node, inside, outside)
            both = None if turned is None else _agree(sign, turned[2])
            if turned is None or both is None:
                return None
            children, place, _ = turned
            sign = both
            left.extend(children[:place])
            right.extend(reversed(children[place + 1 :]))
            node = children[place]
            continue
        out, full, partial = _split(node, inside, outside)
        if len(partial) > 1:
            return None
        if out or node.loose & ~inside:
            left.append(free(node.loose & ~inside, out))
        if full or node.loose & inside:
            right.append(free(node.loose & inside, full))
        if not partial:
            return [*left, *reversed(right)], sign
        node = partial[0]
    (right if label is Label.FULL else left).append(node)
    return [*left, *reversed(right)], sign


def _turned(node: Tree, inside: int, outside: int) -> tuple[tuple[Tree, ...], int, int] | None:
    """A Q node's children so that the subset is at their right end, where it begins, and the sign of that list."""
    for children, sign in ((node.children, node.sign), (node.children[::-1], -node.sign)):
        labels = [_label(child, inside, outside) for child in children]
        place = next(i for i, label in enumerate(labels) if label in (Label.FULL, Label.PARTIAL))
        if all(label in (Label.FULL, Label.WILD) for label in labels[place + 1 :]):
            return children, place, sign
    return None


def _agree(first: int, second: int) -> int | None:
    """The sign that two demands leave, None where they contradict."""
    if first and second and first != second:
        return None
    return first or second
