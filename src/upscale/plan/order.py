"""One order of channels per space, so that as many readers as possible read one contiguous slice.

Minimising the number of runs over all readers is NP-complete (consecutive block minimisation), but two readers can
always be served: [only A][A and B][only B][the rest]. Each block of channels is ordered so for the best pair, then
the four parts in turn for the remaining readers; the original order is kept where it is no worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class Wish:
    """A reader's wish: the channels it wants side by side (bool per channel) and what it costs not to get it."""

    wanted: np.ndarray
    cost: float


MAX_FIRST = 8  # readers, dearest first, of which every pair is tried


def order_block(count: int, wishes: Sequence[Wish]) -> np.ndarray:
    """A permutation of ``count`` channels that lowers the cost of wishes not contiguous. Deterministic."""
    wishes = _distinct([w for w in wishes if 0 < int(w.wanted.sum()) < count])
    identity = np.arange(count)
    if not wishes:
        return identity
    ranked = sorted(range(len(wishes)), key=lambda i: (-wishes[i].cost, i))
    wishes = [wishes[i] for i in ranked]
    table = np.stack([w.wanted for w in wishes])
    costs = np.array([w.cost for w in wishes])
    best, best_cost = identity, cost_of(identity, table, costs)
    top = range(min(len(wishes), MAX_FIRST))
    starts: list[tuple[int, ...]] = [*((i,) for i in top), *combinations(top, 2)]
    for start in starts:
        if best_cost == 0:
            break
        rest = [i for i in range(len(wishes)) if i not in start]
        candidate = _arrange(identity, [wishes[i] for i in start], [wishes[i] for i in rest[:MAX_FIRST]])
        cost = cost_of(candidate, table, costs)
        if cost < best_cost:
            best, best_cost = candidate, cost
    return best


def cost_of(order: np.ndarray, table: np.ndarray, costs: np.ndarray) -> float:
    """Total cost of the readers (rows of ``table``: bool per channel) whose channels are not one run of ``order``."""
    return float(costs[runs(table[:, order]) > 1].sum())


def runs(flags: np.ndarray) -> np.ndarray:
    """Number of runs of True along the last dimension."""
    starts = flags[..., 1:] & ~flags[..., :-1]
    count: np.ndarray = flags[..., 0].astype(int) + starts.sum(-1)
    return count


def _distinct(wishes: list[Wish]) -> list[Wish]:
    merged: dict[bytes, Wish] = {}
    for w in wishes:
        key = w.wanted.tobytes()
        merged[key] = Wish(w.wanted, w.cost + (merged[key].cost if key in merged else 0.0))
    return list(merged.values())


def _arrange(channels: np.ndarray, first: list[Wish], rest: list[Wish]) -> np.ndarray:
    """Serve the readers of ``first`` (at most two), then, inside each part, as many of ``rest`` as fit.

    Within a part a later reader is pushed towards the neighbour it also has members in, so that its run goes on
    across the border.
    """
    if len(channels) <= 1 or not first:
        return channels
    if len(first) == 1:
        inside = first[0].wanted[channels]
        parts = [channels[~inside], channels[inside]]
    else:
        a, b = first[0].wanted[channels], first[1].wanted[channels]
        parts = [channels[~a & ~b], channels[a & ~b], channels[a & b], channels[~a & b]]
    parts = [p for p in parts if len(p)]
    if not rest:
        return np.concatenate(parts)
    return np.concatenate([_lean(p, i, parts, rest) for i, p in enumerate(parts)])


def _lean(part: np.ndarray, index: int, parts: list[np.ndarray], rest: list[Wish]) -> np.ndarray:
    """Order one part: members of each remaining reader towards the side where the reader has more neighbours."""
    keys = []
    for w in rest:
        inside = w.wanted[part]
        if inside.all() or not inside.any():
            continue
        left = w.wanted[parts[index - 1]].mean() if index else 0.0
        right = w.wanted[parts[index + 1]].mean() if index + 1 < len(parts) else 0.0
        keys.append(inside if right >= left else ~inside)
    if not keys:
        return part
    order = np.lexsort(tuple(reversed(keys)))  # the dearest reader decides first
    return part[order]
