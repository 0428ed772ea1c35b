"""The transportation problem: items to places of a few kinds, so many of each, at the highest total value.

Solved exactly by cancelling cycles (Klein 1967, "A primal method for minimal cost flows"): an assignment is best if
and only if no cycle of moves between kinds of place raises its value. Two-cycles come first, and all the profitable
swaps between two kinds at once; longer cycles are found by Bellman and Ford's method.
"""

from __future__ import annotations

import numpy as np

__all__ = ["assign"]

_TOLERANCE = 1e-12  # of the largest value: smaller gains are rounding


def assign(values: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """The best assignment with as many items of each kind as ``kinds`` has.

    ``values``: float64 (items, kinds), what an item is worth at each kind of place. ``kinds``: int64 (items,), an
    assignment to start from, in which every kind occurs. Returns int64 (items,); deterministic.
    """
    kinds = kinds.copy()
    if values.shape[1] < 2:
        return kinds
    tolerance = _TOLERANCE * max(float(np.abs(values).max()), 1e-300)
    moves = _Moves(values, kinds)
    while True:
        _swap_pairs(moves, tolerance)
        cycle = _positive_cycle(moves.best, tolerance)
        if not cycle or moves.gain(cycle) <= tolerance:
            return kinds
        moves.rotate(cycle)


class _Moves:
    """``best[q, p]``: the most that moving one item of kind ``q`` to kind ``p`` can add."""

    def __init__(self, values: np.ndarray, kinds: np.ndarray) -> None:
        self.values, self.kinds = values, kinds
        self.best = np.empty((values.shape[1],) * 2)
        for kind in range(values.shape[1]):
            self._refresh(kind)

    def _refresh(self, kind: int) -> None:
        mine = self.values[self.kinds == kind]
        self.best[kind] = (mine - mine[:, kind, None]).max(0)

    def split(self, one: int, other: int) -> None:
        """Share out the items of two kinds anew, best for both together."""
        items = np.flatnonzero((self.kinds == one) | (self.kinds == other))
        count = int((self.kinds[items] == one).sum())
        preference = self.values[items, other] - self.values[items, one]
        self.kinds[items] = other
        self.kinds[items[np.argsort(preference, kind="stable")[:count]]] = one
        self._refresh(one)
        self._refresh(other)

    def gain(self, cycle: list[int]) -> float:
        """What :meth:`rotate` adds."""
        return float(self.best[cycle, cycle[1:] + cycle[:1]].sum())

    def rotate(self, cycle: list[int]) -> None:
        """Move one item of each kind of the cycle to the next kind."""
        movers = []
        for kind, following in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            items = np.flatnonzero(self.kinds == kind)
            movers.append((items[np.argmax(self.values[items, following] - self.values[items, kind])], following))
        for item, kind in movers:
            self.kinds[item] = kind
        for kind in cycle:
            self._refresh(kind)


def _swap_pairs(moves: _Moves, tolerance: float) -> None:
    """Until no two items of different kinds want to change places."""
    while True:
        gain = moves.best + moves.best.T
        one, other = divmod(int(np.argmax(gain)), len(gain))
        if gain[one, other] <= tolerance:
            return
        moves.split(one, other)


def _positive_cycle(best: np.ndarray, tolerance: float) -> list[int]:
    """Kinds in a cycle of moves of positive total gain; empty where there is none."""
    count = len(best)
    reach = np.zeros(count)
    before = np.full(count, -1)
    for _ in range(count):
        through = reach[:, None] + best
        source = np.argmax(through, axis=0)
        better = through[source, np.arange(count)]
        improved = better > reach + tolerance
        if not improved.any():
            return []
        reach = np.where(improved, better, reach)
        before[improved] = source[improved]
    kind = int(np.flatnonzero(improved)[0])
    for _ in range(count):
        kind = int(before[kind])
    cycle = [kind]
    while int(before[cycle[-1]]) != kind:
        cycle.append(int(before[cycle[-1]]))
    return cycle[::-1]
