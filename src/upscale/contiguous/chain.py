"""One chain of channels and readers that keep a fixed number each: an order, and an interval of it for every reader.

Local search by alternation. Given the order, the best interval of a reader is the best window of its size (prefix
sums). Given the intervals, the best order is a transportation problem: a channel is worth, at a place, the scores of
the readers whose intervals cover that place, and places between two ends of intervals are alike. Both steps are exact,
so the sum never falls; it is the starts that matter, and moving one reader's interval at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from .model import Chain
from .transport import assign

__all__ = ["ChainProblem", "ChainState", "covered", "search", "settled", "stacked", "valued", "window_sums"]

_TOLERANCE = 1e-12  # of the value: a smaller gain is rounding
_MOST_EXACT = 256  # combinations of intervals that are all tried
_MOST_PAIRS = 15  # pairs of readers that are served first, each in a start of its own
_MOST_CLIMBS = 150  # of one search


@dataclass(frozen=True, eq=False)
class ChainProblem:
    """``scores``: float64 (readers, channels), 0 where not seen; ``sees``: bool, alike; ``keep``: int64 (readers,).

    ``elastic``: an interval may be of any size, none included; scores then say what a channel is worth above a price.
    """

    chain: Chain
    scores: np.ndarray
    sees: np.ndarray
    keep: np.ndarray
    elastic: bool = False

    @property
    def bound(self) -> float:
        """What the readers retain if each chooses freely: no arrangement retains more."""
        if self.elastic:
            return float(np.maximum(self.scores, 0).sum())
        return sum(float(np.sort(s[v])[len(s[v]) - k :].sum()) for s, v, k in self._rows())

    def favourites(self, reader: int) -> np.ndarray:
        """The channels that a reader would keep if it chose freely (bool)."""
        scores = np.where(self.sees[reader], self.scores[reader], -np.inf)
        chosen = np.zeros(len(scores), dtype=bool)
        chosen[np.argsort(-scores, kind="stable")[: self.keep[reader]]] = True
        return chosen

    def _rows(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        return zip(self.scores, self.sees, self.keep.tolist(), strict=True)


@dataclass(frozen=True, eq=False)
class ChainState:
    """``order``: the stored channels; ``dead``: for each block those that are not; ``starts`` and ``sizes``: of every
    interval."""

    order: np.ndarray
    dead: tuple[np.ndarray, ...]
    starts: np.ndarray
    sizes: np.ndarray
    value: float


def settled(problem: ChainProblem, order: np.ndarray, dead: tuple[np.ndarray, ...]) -> ChainState:
    """The state with the best intervals of an order."""
    starts, sizes, value = _best_windows(problem, order)
    return ChainState(order, dead, starts, sizes, value)


def valued(problem: ChainProblem, order: np.ndarray, dead: tuple[np.ndarray, ...], starts: np.ndarray) -> ChainState:
    """The state with given intervals."""
    state = ChainState(order, dead, starts, problem.keep, 0.0)
    return replace(state, value=float(problem.scores[:, order][covered(problem, state)].sum()))


def _best_windows(problem: ChainProblem, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Start and size of each reader's best interval of the order, and what they all retain."""
    starts, sizes, value = np.zeros(len(problem.keep), dtype=np.int64), problem.keep.copy(), 0.0
    for reader, keep in enumerate(problem.keep.tolist()):
        scores = problem.scores[reader, order[problem.sees[reader, order]]]
        if problem.elastic:
            sums = np.concatenate([[0.0], np.cumsum(scores)])
            lowest = np.minimum.accumulate(sums)
            stop = int(np.argmax(sums - lowest))
            starts[reader] = np.argmin(sums[: stop + 1])
            sizes[reader] = stop - starts[reader]
            value += float(sums[stop] - lowest[stop])
        else:
            totals = window_sums(scores, keep)
            starts[reader] = np.argmax(totals)
            value += float(totals[starts[reader]])
    return starts, sizes, value


def window_sums(scores: np.ndarray, size: int) -> np.ndarray:
    """The sum of every window of ``size`` neighbours."""
    sums = np.concatenate([[0.0], np.cumsum(scores)])
    return sums[size:] - sums[: len(sums) - size]


def search(problem: ChainProblem, start: ChainState, work: int) -> ChainState:
    """The best arrangement found; never worse than ``start``. Deterministic.

    ``work``: channels times readers times climbs that the search may spend, but for eight climbs that it always may.
    """
    search = _Search(problem, start, work)
    search.run()
    return search.best


class _Search:
    def __init__(self, problem: ChainProblem, start: ChainState, work: int) -> None:
        self.problem, self.best = problem, start
        self.bound = problem.bound
        self.tolerance = _TOLERANCE * max(float(np.abs(problem.scores).sum()), 1e-300)
        self.block_of = np.empty(problem.chain.size, dtype=np.int64)
        for number, block in enumerate(problem.chain.blocks):
            self.block_of[block] = number
        readers, channels = problem.scores.shape
        self.climbs = min(max(8, work // max(1, readers * channels)), _MOST_CLIMBS)

    def run(self) -> None:
        if self._is_optimal() or self._try_all():
            return
        for state in self._beginnings():
            self._consider(state)
            if self.climbs <= 0 or self._is_optimal():
                return
        while self._move_intervals() or self._exchange_intervals():
            pass
        self._shake()

    def _is_optimal(self) -> bool:
        return self.best.value >= self.bound - self.tolerance

    def _consider(self, state: ChainState) -> bool:
        """Climb from a state and keep the result if it is better."""
        self.climbs -= 1
        state = self._climbed(state)
        if state.value <= self.best.value + self.tolerance:
            return False
        self.best = state
        return True

    def _climbed(self, state: ChainState) -> ChainState:
        while True:
            better = settled(self.problem, *self._reordered(state))
            if better.value <= state.value + self.tolerance:
                return state
            state = better

    # -- the best order of given intervals ------------------------------------------------------------------------

    def _reordered(self, state: ChainState) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Order and dead channels, best for the state's intervals: one transportation problem for each block."""
        cover = covered(self.problem, state)
        order, dead = state.order.copy(), []
        for block, gone in enumerate(state.dead):
            places = np.flatnonzero(self.block_of[order] == block)
            items = np.concatenate([order[places], gone])
            columns = cover[:, places]
            kinds = np.concatenate([[0], np.cumsum((columns[:, 1:] != columns[:, :-1]).any(0))])[: len(places)]
            firsts = np.flatnonzero(np.diff(kinds, prepend=-1))
            worth = self.problem.scores[:, items].T @ columns[:, firsts].astype(np.float64)
            if len(gone):
                kinds = np.concatenate([kinds, np.full(len(gone), len(firsts))])
                buried = np.where(self.problem.chain.pinned[items], -(np.abs(worth).sum() + 1), 0.0)
                worth = np.concatenate([worth, buried[:, None]], axis=1)
            arranged = items[np.argsort(assign(worth, kinds), kind="stable")]
            order[places] = arranged[: len(places)]
            dead.append(arranged[len(places) :])
        return order, tuple(dead)

    # -- starts ---------------------------------------------------------------------------------------------------

    def _slack(self) -> np.ndarray:
        return self.problem.sees[:, self.best.order].sum(1) - self.best.sizes

    def _try_all(self) -> bool:
        """Every combination of intervals, where they are few: exact for a chain of one block."""
        choices = [range(int(s) + 1) for s in self._slack()]
        if (
            self.problem.elastic
            or len(self.problem.chain.blocks) > 1
            or np.prod([float(len(c)) for c in choices]) > _MOST_EXACT
        ):
            return False
        begin = self.best
        for starts in product(*choices):
            state = settled(self.problem, *self._reordered(replace(begin, starts=np.array(starts))))
            if state.value > self.best.value + self.tolerance:
                self.best = state
        return True

    def _beginnings(self) -> Iterator[ChainState]:
        """Orders by the readers' main disagreement, and orders that serve two readers, or two parties of them."""
        yield self.best
        everything = np.concatenate(self.problem.chain.blocks)
        loads, axis = self._principal()
        for dead in self._burials():
            live = everything[~np.isin(everything, np.concatenate(dead))]
            halves = [loads > np.median(loads), loads > 0]
            ranks = np.argsort(np.argsort(loads, kind="stable"), kind="stable") / max(1, len(loads) - 1)
            for share in (ranks, *(h.astype(np.float64) for h in halves)):
                yield self._with_intervals_at(live, dead, share)
            for key in (axis, *map(self._two_parties, halves), *map(self._two_parties, self._pairs())):
                yield settled(self.problem, self._sorted(live, key), dead)

    def _with_intervals_at(self, live: np.ndarray, dead: tuple[np.ndarray, ...], share: np.ndarray) -> ChainState:
        """Intervals first, at a share of the way from one end to the other, and the best order for them."""
        slack = self.problem.sees[:, live].sum(1) - self.problem.keep
        starts = np.rint(share * slack).astype(np.int64)
        return settled(self.problem, *self._reordered(ChainState(live, dead, starts, self.problem.keep, 0.0)))

    def _burials(self) -> list[tuple[np.ndarray, ...]]:
        """Which channels are not stored: those of the start, half of them, none."""
        start = self.best.dead
        if not any(map(len, start)):
            return [start]
        total = self.problem.scores.sum(0)
        lowest_first = [d[np.argsort(total[d], kind="stable")] for d in start]
        return [tuple(d[: round(share * len(d))] for d in lowest_first) for share in (1.0, 0.5, 0.0)]

    def _pairs(self) -> list[np.ndarray]:
        """Pairs of readers, those first that an order for others costs most."""
        readers = len(self.problem.keep)
        lost = [self._lost(r) for r in range(readers)]
        pairs = sorted(combinations(range(readers), 2), key=lambda p: (-lost[p[0]] - lost[p[1]], p))
        return [np.array(p) for p in pairs[:_MOST_PAIRS]]

    def _lost(self, reader: int) -> float:
        free = self.problem.scores[reader][self.problem.favourites(reader)].sum()
        return float(free - self.problem.scores[reader][self._kept(reader)].sum())

    def _kept(self, reader: int) -> np.ndarray:
        seen = self.best.order[self.problem.sees[reader, self.best.order]]
        start = int(self.best.starts[reader])
        return seen[start : start + int(self.best.sizes[reader])]

    def _principal(self) -> tuple[np.ndarray, np.ndarray]:
        """First principal direction of the scores: a load for every reader and a key for every channel."""
        centred = self.problem.scores - self.problem.scores.mean(1, keepdims=True)
        left, _, right = np.linalg.svd(centred, full_matrices=False)
        sign = 1.0 if right[0, np.argmax(np.abs(right[0]))] >= 0 else -1.0
        return sign * left[:, 0], sign * right[0]

    def _two_parties(self, choice: np.ndarray) -> np.ndarray:
        """A key that orders [only one party's][both parties'][only the other's][the rest].

        ``choice``: bool (readers,), one party and the other; or two readers, each a party, the others looking on.
        Within the first and the last two, what all readers together want least stands outside.
        """
        if choice.dtype == bool:
            one, other = self._party(np.flatnonzero(choice)), self._party(np.flatnonzero(~choice))
        else:
            one, other = self._party(choice[:1]), self._party(choice[1:])
        total = self.problem.scores.sum(0)
        within = total / (np.abs(total).max() + 1e-300) / 4  # less than the steps between the groups
        groups = [one & ~other, one & other, ~one & other]
        return np.select(groups, [within, np.ones(len(total)), 2 - within], 3 - within)

    def _party(self, readers: np.ndarray) -> np.ndarray:
        """The channels that readers would keep if they had to agree (bool), as many as they keep in the median."""
        chosen = np.zeros(self.problem.chain.size, dtype=bool)
        if len(readers):
            total = self.problem.scores[readers].sum(0)
            chosen[np.argsort(-total, kind="stable")[: int(np.median(self.problem.keep[readers]))]] = True
        return chosen

    def _sorted(self, live: np.ndarray, key: np.ndarray) -> np.ndarray:
        return live[np.lexsort((key[live], self.block_of[live]))]

    # -- moves ----------------------------------------------------------------------------------------------------

    def _move_intervals(self) -> bool:
        """Move one reader's interval at a time, and let the others and the order follow. Whether any move helped."""
        helped = False
        for reader in range(len(self.problem.keep)):
            slack = int(self._slack()[reader])
            for place in sorted({0, slack // 4, slack // 2, slack - slack // 4, slack}):
                if self.climbs <= 0 or self._is_optimal():
                    return False
                if place == self.best.starts[reader]:
                    continue
                starts = self.best.starts.copy()
                starts[reader] = place
                helped |= self._try_starts(starts)
        return helped

    def _exchange_intervals(self) -> bool:
        """Let two readers change places. Whether any exchange helped."""
        helped = False
        for one, other in combinations(range(len(self.problem.keep)), 2):
            if self.climbs <= 0 or self._is_optimal():
                return False
            starts, slack = self.best.starts.copy(), self._slack()
            starts[one], starts[other] = min(starts[other], slack[one]), min(starts[one], slack[other])
            if (starts != self.best.starts).any():
                helped |= self._try_starts(starts)
        return helped

    def _shake(self) -> None:
        """Spend what is left of the work on moving a few intervals at once, at random (of a fixed seed)."""
        random = np.random.default_rng(0)
        readers = len(self.problem.keep)
        while self.climbs > 0 and not self._is_optimal():
            starts, slack = self.best.starts.copy(), self._slack()
            for reader in random.choice(readers, size=min(readers, int(random.integers(2, 5))), replace=False):
                starts[reader] = random.integers(0, slack[reader] + 1)
            self._try_starts(starts)

    def _try_starts(self, starts: np.ndarray) -> bool:
        return self._consider(settled(self.problem, *self._reordered(replace(self.best, starts=starts))))


def covered(problem: ChainProblem, state: ChainState) -> np.ndarray:
    """Bool (readers, stored channels): whose interval covers which place of the order."""
    sees = problem.sees[:, state.order]
    rank = np.cumsum(sees, axis=1) - 1
    starts = state.starts[:, None]
    return sees & (rank >= starts) & (rank < starts + state.sizes[:, None])


def stacked(chain: Chain, pieces: Sequence[tuple[np.ndarray, np.ndarray]], keep: Sequence[int]) -> ChainProblem:
    """The problem of readers given as (scores, sees) with the numbers of channels that they keep."""
    seen = np.array([sees for _, sees in pieces], dtype=bool).reshape(-1, chain.size)
    scores = np.array([scores for scores, _ in pieces], dtype=np.float64).reshape(-1, chain.size)
    return ChainProblem(chain, np.where(seen, scores, 0.0), seen, np.asarray(keep, dtype=np.int64))
