"""Find how many of an ordered list of channels to mask so that what is left costs a given share of the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Found", "Search"]

_TRIES = 48  # single channels tried where the next one in order is too large a step


@dataclass(frozen=True)
class Found:
    """Which channels of the list are masked, what is left of the cost, and whether that is near enough."""

    chosen: tuple[int, ...]
    left: float
    met: bool


@dataclass
class Search:
    """One search. ``cost(chosen)``: what is left with these positions of the list masked; below 0 for "nothing works".

    ``tolerance``: relative to the target. The search stops at a quarter of it, to spend few evaluations, and takes
    what is within it at the end. ``most``: evaluations of whole prefixes.
    """

    cost: Callable[[Sequence[int]], float]
    target: float
    tolerance: float
    most: int = 40
    seen: dict[tuple[int, ...], float] = field(default_factory=dict)

    def run(self, first: int, size: int, single: bool = True) -> Found:
        """Search among prefixes of at least ``first`` and at most ``size`` channels; then, if ``single``, among those
        that leave out some of a prefix's last channels."""
        low, high = first, size
        at_low = self._prefix(low)
        if self._is_low_enough(at_low) or low == high:
            return self._best()
        at_high = self._prefix(high)
        if at_high > self.target:
            return self._best()
        halve = False
        while high - low > 1 and len(self.seen) < self.most:
            middle = self._between(low, at_low, high, at_high, halve)
            value = self._prefix(middle)
            if abs(value - self.target) <= self.tolerance / 4 * self.target:
                return self._best()
            width = high - low
            if value > self.target:
                low, at_low = middle, value
            else:
                high, at_high = middle, value
            halve = high - low > width / 2  # interpolation crawls along a bend: bisect next
        if single and not self._best().met:
            self._singly(low, size)
        return self._best()

    def _is_low_enough(self, value: float) -> bool:
        return value <= self.target * (1 + self.tolerance / 4)

    def _prefix(self, length: int) -> float:
        return self._at(tuple(range(length)))

    def _at(self, chosen: tuple[int, ...]) -> float:
        if chosen not in self.seen:
            self.seen[chosen] = self.cost(chosen)
        return self.seen[chosen]

    def _between(self, low: int, at_low: float, high: int, at_high: float, halve: bool) -> int:
        """Where a straight line crosses the target, or the middle."""
        middle = (low + high) // 2
        if not halve and 0 <= at_high < at_low:
            middle = low + round((high - low) * (at_low - self.target) / (at_low - at_high))
        return min(max(middle, low + 1), high - 1)

    def _singly(self, length: int, size: int) -> None:
        """From a prefix that is too dear on, add later channels one by one, and leave out those that cost too much."""
        chosen = tuple(range(length))
        for extra in range(length + 1, min(size, length + 1 + _TRIES)):
            value = self._at((*chosen, extra))
            if value > self.target * (1 - self.tolerance):
                chosen = (*chosen, extra)
            if abs(value - self.target) <= self.tolerance * self.target:
                return

    def _best(self) -> Found:
        """The evaluated choice nearest to the target; the smaller one of two."""
        working = {chosen: value for chosen, value in self.seen.items() if value >= 0}
        if not working:
            return Found((), -1.0, False)
        chosen = min(working, key=lambda c: (abs(working[c] - self.target), len(c)))
        left = working[chosen]
        return Found(chosen, left, abs(left - self.target) <= self.tolerance * self.target * (1 + 1e-9))
