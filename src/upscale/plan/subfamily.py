"""The dearest readers that one order can serve together: best-first branch and bound over feasible subfamilies.

Feasible families are hereditary (a subfamily of one is one), as cliques are, so the bound is the one known for
weighted cliques: given the readers chosen, others clash in pairs; of readers that all clash with each other at most
one can still be served. Whenever readers turn out not to be served together, a smallest such set among them is kept
(a nogood, as in constraint programming): it clashes wherever all but two of it are chosen.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from .clashes import Clashes
from .consecutive import Tree, members, reduce

MOST_NOGOODS = 600  # kept: all of them are looked at for every family
LATEST = 3  # members of a family up to which triples of others are looked at


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
        self.nogoods: list[int] = []
        self.exact = not any(d.wild for d in demands)

    def run(self) -> Family:
        self._dive(self.root)
        for first in self.ranked:
            if self.root.open >> first & 1 and self.tries < self.limit // 4:
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
        chosen = node.chosen | 1 << i
        if any(nogood & chosen == nogood for nogood in self.nogoods):
            return None
        tree = self._try(node.tree, i)
        if tree is None:
            if self.exact and len(self.nogoods) < MOST_NOGOODS:
                self.nogoods.append(self._explain(node.chosen, i))
            return None
        conflicts = tuple(a | b for a, b in zip(node.conflicts, self.clashes.triples[i], strict=True))
        left = node.open & ~node.conflicts[i] & ~(1 << i)
        new = _Node(tree, chosen, node.weight + self.demands[i].weight, left, conflicts)
        if new.weight > self.best.weight:
            self.best = new
        return new

    def _try(self, tree: Tree, i: int) -> Tree | None:
        self.tries += 1
        return reduce(tree, self.demands[i].inside, self.demands[i].wild)

    def _explain(self, chosen: int, last: int) -> int:
        """Of readers ``chosen``, who can be served, and ``last``, a smallest set that cannot (none can be left out)."""
        base = self._try(self.root.tree, last)
        found = 1 << last
        left = [i for i in range(len(self.demands)) if chosen >> i & 1]
        while base is not None:
            place = self._too_much(base, left)
            left, needed = left[:place], left[place]
            found |= 1 << needed
            base = self._try(base, needed)
        return found

    def _too_much(self, tree: Tree, readers: Sequence[int]) -> int:
        """The place of the first reader who, with all before, cannot be served; there is one."""
        for place, i in enumerate(readers):
            more = self._try(tree, i)
            if more is None:
                return place
            tree = more
        raise AssertionError("readers that clashed a moment ago do not")

    def _know(self, node: _Node) -> _Node:
        """The family with what the nogoods say about it."""
        conflicts, left = list(node.conflicts), node.open
        for nogood in self.nogoods:
            rest = nogood & ~node.chosen
            if rest & ~left:
                continue
            low = rest & -rest
            high = rest ^ low
            if not high:
                left &= ~rest
            elif not high & (high - 1):
                conflicts[low.bit_length() - 1] |= high
                conflicts[high.bit_length() - 1] |= low
        return _Node(node.tree, node.chosen, node.weight, left, tuple(conflicts))

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
            node = self._know(_Node(node.tree, node.chosen, node.weight, node.open & left, node.conflicts))
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
        lost = self._lost(node, [inside for _, inside in classes])
        found = []
        bound, before = node.weight, 0
        for (_, inside), loss in zip(classes, lost, strict=True):
            below = bound
            bound += self.demands[inside[0]].weight - loss
            for i in inside:  # of its own class none can follow
                found.append((i, min(most, below + self.demands[i].weight), before))
            for i in inside:
                before |= 1 << i
        return found

    def _lost(self, node: _Node, classes: list[list[int]]) -> list[float]:
        """What the classes up to each one cannot save beyond their dearest, because sets of three or more clash.

        Each set that clashes takes a share from all its members, and nobody gives more than it would save; a class
        has only the lead of its dearest reader over the next to give.
        """
        lead: dict[int, float] = {}
        rank: dict[int, int] = {}
        for place, inside in enumerate(classes):
            weights = [self.demands[i].weight for i in inside[:2]]
            lead[inside[0]] = weights[0] - (weights[1] if len(inside) > 1 else 0.0)
            rank[inside[0]] = place
        lost = [0.0] * len(classes)
        givers = sum(1 << i for i in lead if lead[i] > 0)
        for rest in self._clashing(node, givers):
            if rest & ~givers:
                continue
            who = members(rest)
            share = min([lead[i] for i in who])
            lost[max([rank[i] for i in who])] += share
            for i in who:
                lead[i] -= share
                if lead[i] <= 0:
                    givers ^= 1 << i
        return lost

    def _clashing(self, node: _Node, among: int) -> Iterator[int]:
        """Sets of readers of ``among`` that cannot all join the family."""
        if node.chosen.bit_count() < LATEST:
            for i, j in combinations([i for i in self.ranked if among >> i & 1], 2):
                third = self.clashes.triples[i][j] & among & -(1 << max(i, j))
                while third:
                    low = third & -third
                    third ^= low
                    yield 1 << i | 1 << j | low
        for nogood in self.nogoods:
            rest = nogood & ~node.chosen
            if not rest & ~among:
                yield rest
