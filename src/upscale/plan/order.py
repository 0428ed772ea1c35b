"""One order of channels per space, so that the readers of its tensors pay as little as possible.

Whether all readers can read one slice each is the consecutive-ones property, which a PQ-tree decides. Otherwise the
dearest readers that can be served together are found by branch and bound, the others get as few runs as local search
finds (minimising them is NP-complete), and what any order must cost is reported with the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from ..errors import InputError
from .bounds import counting_bound
from .budget import Budget
from .clashes import Clashes, find_clashes
from .columns import Columns, further_runs, group_columns
from .consecutive import Tree, frontier, pack, reduce
from .search import Prices, improve, runs, runs_among
from .subfamily import Demand, best_family

__all__ = ["Ordering", "Wish", "cost_of", "order_space", "runs"]

MOST_READERS = 96  # the dearest, among which branch and bound chooses; the rest join where they fit
TRIES = 12_000  # families and subsets tried in branch and bound
CELLS = 30_000_000  # of tables that local search looks at
ROUNDING = 1e-9  # of sums of costs, relative
FEW = 6  # elements: all their orders are looked at


@dataclass(frozen=True)
class Wish:
    """One reader of one tensor. It pays nothing for one run of channels, else ``min(gather, piece * (runs - 1))``.

    wanted: bool per channel of the space. gather: cost of one gather, the most the read ever costs more than one
    slice. piece: cost of each run beyond the first, read as slices joined. present: bool per channel, those that the
    tensor holds at all (None: every one); runs are counted in the order of these alone.
    """

    wanted: np.ndarray
    gather: float
    piece: float = float("inf")
    present: np.ndarray | None = None


@dataclass(frozen=True)
class Ordering:
    """A permutation of the channels, its cost, what no order can be cheaper than, and whether the two meet.

    ``bound`` is about orders that the blocks allow. ``proven``: no order is cheaper than this one.
    """

    order: np.ndarray
    cost: float
    bound: float
    proven: bool


def order_space(
    blocks: Sequence[np.ndarray],
    wishes: Sequence[Wish],
    *,
    frozen: Sequence[bool] = (),
    block_order_free: bool = True,
) -> Ordering:
    """The cheapest order found of the channels of ``blocks``, for all wishes together. Deterministic.

    blocks: disjoint arrays of channel indices that cover ``range(n)``. A block's channels stay together, in any
    order, or in the given one if it is ``frozen`` (one flag per block; none given: no block is). Blocks stand in any
    order if ``block_order_free``, else in the given one. An order that is no cheaper than the blocks as given is not
    used.

    If an order exists in which every wish is one run, it is found, provided that every wish is for a tensor that
    holds all channels. With ``present`` that question is NP-complete, and only some of the orders are looked at; the
    bound holds all the same. The cost of readers that can gather only (``piece`` infinite or no less than ``gather``)
    is minimal where branch and bound finishes. Where slices are joined the bound counts one ``piece`` for every
    reader that must have a second run, which may be far below the cost.

    Method: consecutive ones, Booth and Lueker 1976; readers beyond them, as consecutive block minimisation (Kou 1977).

    Raises:
        InputError: blocks that overlap or leave a gap; flags of another length; wanted channels that the tensor does
            not hold; a cost that is negative or not a number, or a gather's that is infinite.
    """
    original = np.concatenate([np.asarray(b, dtype=np.int64) for b in blocks]) if len(blocks) else np.arange(0)
    _check(original, len(blocks), wishes, frozen)
    problem = _Problem(original, blocks, wishes, tuple(frozen) or (False,) * len(blocks), block_order_free)
    return problem.solve()


def cost_of(order: np.ndarray, wishes: Sequence[Wish]) -> float:
    """What all readers pay together for the channels in this order."""
    if not len(wishes) or not len(order):
        return 0.0
    wanted, present = _tables(wishes, len(order))
    return float(_prices(np.arange(len(wishes)), wishes).pay(runs_among(wanted[:, order], present[:, order])).sum())


def _check(original: np.ndarray, blocks: int, wishes: Sequence[Wish], frozen: Sequence[bool]) -> None:
    count = len(original)
    if not np.array_equal(np.sort(original), np.arange(count)):
        raise InputError(f"the blocks must hold each of the {count} channels exactly once")
    if len(frozen) not in (0, blocks):
        raise InputError(f"frozen has {len(frozen)} flags for {blocks} blocks: give one for each, or none")
    for number, wish in enumerate(wishes):
        for flags in (wish.wanted, wish.present):
            if flags is not None and (flags.shape != (count,) or flags.dtype != bool):
                raise InputError(f"wish {number}: give one bool per channel ({count}), not {flags.dtype}{flags.shape}")
        if wish.present is not None and (wish.wanted & ~wish.present).any():
            raise InputError(f"wish {number} wants channels that its tensor does not hold")
        if not (0 <= wish.gather < float("inf") and wish.piece >= 0):
            raise InputError(f"wish {number}: costs {wish.gather} and {wish.piece} must be >= 0, the first finite")


def _tables(wishes: Sequence[Wish], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Wanted and present, bool, wishes x channels."""
    everything = np.ones(count, dtype=bool)
    wanted = np.stack([w.wanted for w in wishes])
    return wanted, np.stack([everything if w.present is None else w.present for w in wishes])


def _prices(reader: np.ndarray, wishes: Sequence[Wish]) -> Prices:
    return Prices(reader, np.array([w.gather for w in wishes]), np.array([w.piece for w in wishes]))


def _matter(wish: Wish) -> bool:
    """Whether an order can make this reader pay at all."""
    held = len(wish.wanted) if wish.present is None else int(wish.present.sum())
    return min(wish.gather, wish.piece) > 0 and 1 < int(wish.wanted.sum()) < held


class _Problem:
    """One call: the wishes that matter, on elements instead of channels, and the ways to an order."""

    def __init__(
        self,
        original: np.ndarray,
        blocks: Sequence[np.ndarray],
        wishes: Sequence[Wish],
        frozen: tuple[bool, ...],
        block_order_free: bool,
    ) -> None:
        self.original = original
        self.wishes = [w for w in wishes if _matter(w)]
        self.now = cost_of(original, self.wishes)
        if self.now == 0:
            return
        wanted, present = _tables(self.wishes, len(original))
        both = np.concatenate([wanted, present], axis=1)
        _, first, reader = np.unique(both, axis=0, return_index=True, return_inverse=True)
        self.prices = _prices(reader.reshape(-1), self.wishes)
        self.columns = group_columns(blocks, frozen, block_order_free, wanted[first], present[first])
        weights = self.prices.per_reader(np.minimum(self.prices.gather, self.prices.piece))
        self.weights: list[float] = weights.tolist()
        self.ranked: list[int] = np.lexsort((first, -weights)).tolist()
        self.sets = [pack(w) for w in self.columns.wanted]
        self.wild = [pack(~p) for p in self.columns.present]

    def solve(self) -> Ordering:
        if self.now == 0:
            return Ordering(self.original, 0.0, 0.0, True)
        tree = self._join(self.columns.tree, sorted(self.ranked, key=lambda i: self.wild[i].bit_count()))
        if tree is not None:
            return Ordering(self.columns.expand(frontier(tree)), 0.0, 0.0, True)
        if len(self.columns.channels) <= FEW:
            order, cost = self._cheapest([*map(self.columns.expand, _every_order(self.columns))])
            return Ordering(order, cost, cost, True)
        return self._search()

    def _search(self) -> Ordering:
        dearest = self.ranked[:MOST_READERS]
        clashes = find_clashes(self.columns.tree, self.columns.wanted[dearest], self.columns.present[dearest])
        demands = [Demand(self.sets[i], self.wild[i], self.weights[i]) for i in dearest]
        family = best_family(self.columns.tree, demands, clashes, TRIES)
        total = sum(self.weights[i] for i in dearest)
        bound = total - family.upper if family.upper < total * (1 - ROUNDING) else 0.0
        start, served = self._extend(family.tree, [dearest[i] for i in family.chosen])
        order, cost = self._cheapest([self.columns.expand(start)])
        if not _meets(cost, bound) and self._improvable():
            budget = Budget(CELLS)
            found = [
                improve(self.columns, self.prices, *way, budget) for way in ((start, served), (np.sort(start), []))
            ]
            order, cost = self._cheapest([order, *map(self.columns.expand, found)])
            bound = max(bound, self._counted(dearest, clashes))
        bound = min(bound, cost)
        return Ordering(order, cost, bound, _meets(cost, bound))

    def _improvable(self) -> bool:
        """Whether what branch and bound cannot serve may be had for less than its gather, or served all the same."""
        return bool((self.prices.piece < self.prices.gather).any()) or any(self.wild)

    def _cheapest(self, orders: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
        """The first of the cheapest orders of the channels, the original one before all others."""
        orders = [self.original, *orders]
        costs = [self.now, *(cost_of(order, self.wishes) for order in orders[1:])]
        best = int(np.argmin(costs))
        return orders[best], costs[best]

    def _counted(self, readers: Sequence[int], clashes: Clashes) -> float:
        """The bound by counting columns, wish by wish; it has something to say where slices cost less than a gather."""
        gather, piece = self.prices.gather, self.prices.piece
        if not (piece < gather).any():
            return 0.0
        place = {reader: number for number, reader in enumerate(readers)}
        mine = [w for w, reader in enumerate(self.prices.reader.tolist()) if reader in place]
        mine = sorted(mine, key=lambda w: (-gather[w], w))[:MOST_READERS]
        rows = [int(self.prices.reader[w]) for w in mine]
        return counting_bound(
            self.columns.wanted[rows],
            self.columns.present[rows],
            gather[mine],
            piece[mine],
            further_runs(self.columns)[rows],
            lambda i, j, k: bool(clashes.triples[place[rows[i]]][place[rows[j]]] >> place[rows[k]] & 1),
        )

    def _join(self, tree: Tree | None, readers: Sequence[int]) -> Tree | None:
        """The tree of the orders that serve all these readers."""
        for i in readers:
            tree = None if tree is None else reduce(tree, self.sets[i], self.wild[i])
        return tree

    def _extend(self, tree: Tree, served: list[int]) -> tuple[np.ndarray, list[int]]:
        """An order of the elements that serves these readers and whoever else fits, and who that is."""
        for i in self.ranked:
            more = None if i in served else self._join(tree, [i])
            if more is not None:
                tree, served = more, [*served, i]
        return np.array(frontier(tree)), served


def _meets(cost: float, bound: float) -> bool:
    return cost <= bound * (1 + ROUNDING)


def _every_order(columns: Columns) -> list[tuple[int, ...]]:
    """All orders of the elements that the blocks allow."""
    return [order for order in permutations(range(len(columns.channels))) if _allowed(columns, order)]


def _allowed(columns: Columns, order: tuple[int, ...]) -> bool:
    block = columns.block[list(order)]
    seen = block[np.append(True, block[1:] != block[:-1])].tolist()
    if len(set(seen)) < len(seen) or (not columns.block_order_free and seen != sorted(seen)):
        return False
    steps = zip(order[:-1], order[1:], block[:-1].tolist(), block[1:].tolist(), strict=True)
    return all(a < b or x != y or not columns.frozen[x] for a, b, x, y in steps)
