"""The dearest readers that one order can serve together: best-first branch and bound over feasible subfamilies.

Feasible families are hereditary (a subfamily of one is one), as cliques are, so the bound is the one known for
weighted cliques: given the readers chosen, others clash in pairs; of readers that all clash with each other at most
one can still be served.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from .clashes import Clashes
from .consecutive import Tree, reduce


@dataclass(frozen=True)
class Demand:
    """One reader: the elements it wants, those its tensor lacks, and what serving it saves."""

    inside: int
    wild: int
    weight: float


@dataclass(frozen=True)
class Family:
    """Readers served together, the orders that serve them, what that saves, and what no choice can exceed."""

    chosen: tuple[int, ...]
    tree: Tree
    weight: float
    upper: float


@dataclass(frozen=True)
class _Node:
    """A feasible family, who else may join, and who clashes with whom given the family."""

    tree: Tree
    chosen: int
    weight: float
    open: int
    conflicts: tuple[int, ...]


def best_family(tree: Tree, demands: Sequence[Demand], clashes: Clashes, limit: int) -> Family:
    """The feasible subfamily of greatest weight.

    limit: how many times a subset may be tried on a tree; past it the best found so far is returned, with an
    ``upper`` above its ``weight``.
    """
    return _Search(tree, demands, clashes, limit).run()


class _Search:
    def __init__(self, tree: Tree, demands: Sequence[Demand], clashes: Clashes, limit: int) -> None:
        self.demands, self.clashes, self.limit = demands, clashes, limit
        everyone = ((1 << len(demands)) - 1) & ~clashes.alone
        self.root = _Node(tree, 0, 0.0, everyone, clashes.pairs)
        self.ranked = sorted(range(len(demands)), key=lambda i: (-demands[i].weight, i))
        self.best = self.root
        self.tries = 0

    def run(self) -> Family:
        self._dive(self.root)
        for first in self.ranked:
            if self.root.open >> first & 1 and self.tries < self.limit // 3:
                node = self._join(self.root, first)
                if node is not None:
                    self._dive(node)
        upper = self._prove()
        best = self.best
        chosen = tuple(i for i in range(len(self.demands)) if best.chosen >> i & 1)
        return Family(chosen, best.tree, best.weight, upper)

    def _join(self, node: _Node, i: int) -> _Node | None:
        """The family with reader ``i`` in it, None where no order was found."""
        self.tries += 1
        demand = self.demands[i]
        tree = reduce(node.tree, demand.inside, demand.wild)
        if tree is None:
            return None
        conflicts = tuple(a | b for a, b in zip(node.conflicts, self.clashes.triples[i], strict=True))
        left = node.open & ~node.conflicts[i] & ~(1 << i)
        new = _Node(tree, node.chosen | 1 << i, node.weight + demand.weight, left, conflicts)
        if new.weight > self.best.weight:
            self.best = new
        return new

    def _dive(self, node: _Node) -> None:
        """Add whoever fits, dearest first."""
        for i in self.ranked:
            if node.open >> i & 1:
                node = self._join(node, i) or node

    def _prove(self) -> float:
        """Search on until nothing better can be left; returns what no feasible family exceeds."""
        missed = 0.0  # the most that a family could save which was dropped though not proven infeasible
        serial = 0
        heap = [(-bound, -i, self.root, i, left) for i, bound, left in self._children(self.root, float("inf"))]
        heapq.heapify(heap)
        while heap and -heap[0][0] > self._target() and self.tries < self.limit:
            bound, _, parent, i, left = heapq.heappop(heap)
            node = self._join(parent, i)
            if node is None:
                if self._uncertain(parent.chosen | 1 << i):
                    missed = max(missed, -bound)
                continue
            node = _Node(node.tree, node.chosen, node.weight, node.open & left, node.conflicts)
            for child, upper, rest in self._children(node, -bound):
                if upper > self._target():
                    serial += 1
                    heapq.heappush(heap, (-upper, -len(self.demands) - serial, node, child, rest))
        still = -heap[0][0] if heap else 0.0
        return max(self.best.weight, missed, still if still > self._target() else 0.0)

    def _target(self) -> float:
        """What a family must exceed to matter: sums of the same weights in another order differ by rounding."""
        return self.best.weight * (1 + 1e-12)

    def _uncertain(self, chosen: int) -> bool:
        return any(d.wild for i, d in enumerate(self.demands) if chosen >> i & 1)

    def _children(self, node: _Node, most: float) -> list[tuple[int, float, int]]:
        """Who joins next, the most that can come of it, and who may join after: each family is met once.

        Readers are put into classes of which all clash with each other; a class adds its dearest at most.
        """
        classes: list[tuple[int, list[int]]] = []
        for i in self.ranked:
            if not node.open >> i & 1:
                continue
            for place, (common, inside) in enumerate(classes):
                if common >> i & 1:
                    inside.append(i)
                    classes[place] = (common & node.conflicts[i], inside)
                    break
            else:
                classes.append((node.conflicts[i], [i]))
        found = []
        bound, before = node.weight, 0
        for _, inside in classes:
            below = bound
            bound += self.demands[inside[0]].weight
            for i in inside:  # of its own class none can follow
                found.append((i, min(most, below + self.demands[i].weight), before))
            for i in inside:
                before |= 1 << i
        return found
