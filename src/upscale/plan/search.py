"""Fewer runs where not every reader can have one: local search over the order of groups of like elements.

With the cost of a further run per reader as weights, the cost of an order is the length of a path through the groups'
columns in the weighted Hamming metric (consecutive block minimisation as a travelling salesman's path; Haddadi and
Layouni, "Consecutive block minimization is 1.5-approximable", 2008). A reader is cheap only as long as it has few
runs; from some number on it gathers and stops to matter. So readers are let in one by one, and stay where that pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .budget import Budget
from .columns import Columns

MOST_GROUPS = 256  # that moves are tried on: a move looks at every pair of groups
GROUP_CELLS = 400  # dividing one group takes about as long as looking at so many cells
LENGTHS = (1, 2, 3)  # of the segments of groups that or-opt moves


@dataclass(frozen=True)
class Prices:
    """What readers pay. Several wishes may be one reader (a row of the columns): ``reader[w]`` is that of wish w."""

    reader: np.ndarray
    gather: np.ndarray
    piece: np.ndarray

    def pay(self, runs: np.ndarray) -> np.ndarray:
        """Cost per wish; ``runs`` per reader."""
        further = runs[self.reader] - 1
        return np.where(further > 0, np.minimum(self.gather, self.piece * np.maximum(further, 1)), 0.0)

    def per_reader(self, amounts: np.ndarray) -> np.ndarray:
        """Amounts per wish, summed per reader."""
        return np.bincount(self.reader, weights=amounts, minlength=int(self.reader.max()) + 1)


def runs(flags: np.ndarray) -> np.ndarray:
    """Number of runs of True along the last dimension."""
    starts = flags[..., 1:] & ~flags[..., :-1]
    count: np.ndarray = flags[..., 0].astype(int) + starts.sum(-1)
    return count


def runs_among(wanted: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Number of runs per row of ``wanted`` with all columns left out where ``present`` is false."""
    count = runs(wanted)
    for row in np.flatnonzero(~present.all(1)):
        held = wanted[row, present[row]]
        count[row] = runs(held) if len(held) else 0
    return count


def improve(columns: Columns, prices: Prices, order: np.ndarray, served: Sequence[int], budget: Budget) -> np.ndarray:
    """An order of the elements that costs no more than ``order``. ``served``: readers to keep at one run if it pays."""
    return _Search(columns, prices, budget).run(order, list(served))


class _Search:
    def __init__(self, columns: Columns, prices: Prices, budget: Budget) -> None:
        self.columns, self.prices, self.budget = columns, prices, budget
        self.weights = prices.per_reader(np.minimum(prices.gather, prices.piece))  # of a further run
        self.gather = prices.per_reader(prices.gather)
        self.fixed = np.array(columns.frozen)[columns.block]

    def cost(self, order: np.ndarray) -> float:
        c = self.columns
        return float(self.prices.pay(runs_among(c.wanted[:, order], c.present[:, order])).sum())

    def run(self, order: np.ndarray, inside: list[int]) -> np.ndarray:
        best = self.cost(order)
        waiting = sorted(set(range(len(self.gather))) - set(inside), key=lambda i: (-self.gather[i], i))
        if inside:
            order, best = self._better(order, best, self._polish(order, inside))
        for reader in waiting:
            if best == 0 or not self.budget.spend(self.columns.wanted.size):
                break
            trial = self._polish(self._let_in(order, inside, reader), [*inside, reader])
            cost = self.cost(trial)
            if cost < best:
                order, best = trial, cost
                inside = [*inside, reader]
        return order

    def _better(self, order: np.ndarray, cost: float, trial: np.ndarray) -> tuple[np.ndarray, float]:
        new = self.cost(trial)
        return (trial, new) if new < cost else (order, cost)

    def _groups(self, order: np.ndarray, inside: list[int]) -> list[np.ndarray]:
        """Neighbours of one block that the readers ``inside`` do not tell apart; each of a frozen block by itself."""
        c = self.columns
        block = c.block[order]
        new = (np.diff(block) != 0) | self.fixed[order][1:]
        for rows in (c.wanted, c.present):
            part = rows[inside][:, order]
            new |= (part[:, 1:] != part[:, :-1]).any(0)
        cuts = [0, *(np.flatnonzero(new) + 1).tolist(), len(order)]
        return [order[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]

    def _let_in(self, order: np.ndarray, inside: list[int], reader: int) -> np.ndarray:
        """Divide every group into what ``reader`` wants and the rest, so turned that runs go on over borders."""
        wanted = self.columns.wanted[reader]
        groups = self._groups(order, inside)
        self.budget.spend(GROUP_CELLS * len(groups))
        divided = [(g[wanted[g]], g[~wanted[g]]) for g in groups]
        # Fewest changes so far if the last element is not wanted (0), if it is (1); and how that came about.
        fewest, turns = (0, len(order)), []
        for yes, no in divided:
            mixed = len(yes) > 0 and len(no) > 0
            if mixed:  # a group ends with what it did not begin with
                begin_yes = min(fewest[0] + 1, fewest[1]) + 1
                begin_no = min(fewest[0], fewest[1] + 1) + 1
                turns.append((int(fewest[0] + 1 > fewest[1]), int(fewest[0] > fewest[1] + 1)))
                fewest = (begin_yes, begin_no)
            elif len(yes):
                turns.append((0, int(fewest[0] + 1 > fewest[1])))
                fewest = (10 * len(order), min(fewest[0] + 1, fewest[1]))
            else:
                turns.append((int(fewest[0] > fewest[1] + 1), 0))
                fewest = (min(fewest[0], fewest[1] + 1), 10 * len(order))
        state = int(fewest[0] > fewest[1] + 1)
        parts = []
        for (yes, no), turn in zip(reversed(divided), reversed(turns), strict=True):
            parts.append(np.concatenate([no, yes] if state else [yes, no]))
            state = turn[state]
        return np.concatenate(parts[::-1])

    def _polish(self, order: np.ndarray, inside: list[int]) -> np.ndarray:
        """2-opt and or-opt, best move first, on the groups that the readers ``inside`` tell apart."""
        groups = self._groups(order, inside)
        if not 2 < len(groups) <= MOST_GROUPS:
            return order
        first = np.array([g[0] for g in groups])
        distance = self._distances(first, inside)
        path = _shorten(distance, self.columns, first, self.budget)
        return np.concatenate([groups[i] for i in path])

    def _distances(self, elements: np.ndarray, inside: list[int]) -> np.ndarray:
        """Weighted Hamming distance of elements, over readers that hold both; one that nobody wants is put last."""
        yes = self.columns.wanted[inside][:, elements]
        no = self.columns.present[inside][:, elements] & ~yes
        yes = np.pad(yes, ((0, 0), (0, 1))).astype(float)
        no = np.pad(no, ((0, 0), (0, 1)), constant_values=True).astype(float)
        half = (yes * self.weights[inside, None]).T @ no
        return half + half.T


def _shorten(distance: np.ndarray, columns: Columns, elements: np.ndarray, budget: Budget) -> np.ndarray:
    """Places of a shorter path, from the path 0, 1, ...; it begins and ends at the last row of ``distance``."""
    count = len(elements)
    path = np.arange(count)
    block = columns.block[elements]
    frozen = np.array(columns.frozen)
    least = 1e-9 * float(distance.max())
    while budget.spend(4 * count * count):
        gain, new = min(
            (_best_reversal(distance, path, block, frozen, columns.block_order_free)),
            (_best_move(distance, path, block, frozen, columns.block_order_free)),
            key=lambda found: found[0],
        )
        if gain >= -least:
            break
        path = new
    return path


def _best_reversal(
    distance: np.ndarray, path: np.ndarray, block: np.ndarray, frozen: np.ndarray, free: bool
) -> tuple[float, np.ndarray]:
    """The change of length by the best 2-opt move, and the path after it."""
    whole = np.concatenate([[len(path)], path, [len(path)]])
    step = distance[whole[:-1], whole[1:]]
    table = distance[np.ix_(whole[:-2], path)] + distance[np.ix_(path, whole[2:])] - step[:-1, None] - step[None, 1:]
    mine = block[path]
    starts, ends = _borders(mine)
    one_block = mine[:, None] == mine[None, :]
    allowed = one_block & ~frozen[mine][:, None]
    if free:
        unfrozen = np.cumsum(frozen[mine])
        none_frozen = unfrozen[None, :] == (unfrozen - frozen[mine])[:, None]
        allowed = allowed | (starts[:, None] & ends[None, :] & none_frozen)
    table[~np.triu(allowed, 1)] = np.inf
    a, b = divmod(int(table.argmin()), len(path))
    return float(table[a, b]), np.concatenate([path[:a], path[a : b + 1][::-1], path[b + 1 :]])


def _best_move(
    distance: np.ndarray, path: np.ndarray, block: np.ndarray, frozen: np.ndarray, free: bool
) -> tuple[float, np.ndarray]:
    """The change of length by the best or-opt move (a segment put elsewhere, turned or not), and the path after it."""
    count = len(path)
    whole = np.concatenate([[count], path, [count]])
    mine = block[path]
    starts, ends = _borders(mine)
    begin, end = _segments(mine, frozen, starts, ends, free)
    if not len(begin):
        return np.inf, path
    step = distance[whole[:-1], whole[1:]]  # step[g]: over the gap before place g
    alone = distance[whole[begin], whole[end + 2]] - step[begin] - step[end + 1]
    head, tail = path[begin], path[end]
    forward = distance[np.ix_(head, whole[:-1])] + distance[np.ix_(tail, whole[1:])]
    turned = distance[np.ix_(tail, whole[:-1])] + distance[np.ix_(head, whole[1:])]
    turned[frozen[mine[begin]]] = np.inf
    table = alone[:, None] + np.minimum(forward, turned) - step[None, :]
    gaps = np.arange(count + 1)
    apart = (gaps[None, :] < begin[:, None]) | (gaps[None, :] > end[:, None] + 1)
    left, right = np.append(-1, mine), np.append(mine, -1)
    inside = (left[None, :] == mine[begin][:, None]) | (right[None, :] == mine[begin][:, None])
    complete = starts[begin] & ends[end]
    border = free & complete[:, None] & (left != right)[None, :]
    table[~(apart & ((inside & ~complete[:, None] & ~frozen[mine[begin]][:, None]) | border))] = np.inf
    s, gap = divmod(int(table.argmin()), count + 1)
    a, b = int(begin[s]), int(end[s]) + 1
    segment = path[a:b] if forward[s, gap] <= turned[s, gap] else path[a:b][::-1]
    if gap < a:
        moved = np.concatenate([path[:gap], segment, path[gap:a], path[b:]])
    else:
        moved = np.concatenate([path[:a], path[b:gap], segment, path[gap:]])
    return float(table[s, gap]), moved


def _borders(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a block begins and where one ends."""
    change = blocks[1:] != blocks[:-1]
    return np.append(True, change), np.append(change, True)


def _segments(
    blocks: np.ndarray, frozen: np.ndarray, starts: np.ndarray, ends: np.ndarray, free: bool
) -> tuple[np.ndarray, np.ndarray]:
    """First and last places of the segments that may move: short ones inside a block, and whole blocks."""
    count = len(blocks)
    begin, end = [], []
    for length in LENGTHS:
        a = np.arange(max(count - length + 1, 0))
        a = a[(blocks[a] == blocks[a + length - 1]) & ~frozen[blocks[a]]]
        begin.append(a)
        end.append(a + length - 1)
    if free:
        begin.append(np.flatnonzero(starts))
        end.append(np.flatnonzero(ends))
    return np.concatenate(begin), np.concatenate(end)
