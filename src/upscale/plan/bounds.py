"""What readers must pay where runs can be had for less than a gather: a lower bound by counting columns.

Let K be the readers that do not gather, and M the number of different columns among their rows, that of no reader
counted in. An order steps from column to column, from nothing and back to nothing, and each step begins or ends a run
of somebody, so K's readers have M / 2 runs at least: M / 2 - |K| beyond the first ones. As M may be as great as 2^|K|,
few readers can do without a gather. In a group of readers every choice of K is tried; what different groups must pay
adds up. For the choices that decide, the tour's two steps at each column are counted with their weights, from its two
nearest columns: half the sum of these is a bound of any tour.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

GROUP = 14  # readers of which every choice is tried
REFINED = 300  # choices per group that are looked at closely
MOST_COLUMNS = 512  # of a choice that is


def counting_bound(
    wanted: np.ndarray,
    present: np.ndarray,
    gather: np.ndarray,
    piece: np.ndarray,
    clash: Callable[[int, int, int], bool],
) -> float:
    """A cost that no order undercuts.

    wanted, present: bool, readers x elements. gather, piece: per reader, as in a wish. clash: whether
    three readers cannot all have one run.
    """
    ranked = np.lexsort((np.arange(len(gather)), -gather))
    total = 0.0
    for begin in range(0, len(ranked), GROUP):
        mine = ranked[begin : begin + GROUP]
        common = present[mine].all(0)
        least = np.minimum(gather, piece)[mine]
        further = _further_runs(wanted[mine][:, common])
        must = np.maximum(further, 0) * _subset_min(least)
        _raise_triples(must, mine, least, clash)
        total += _refined(_superset_max(must), _gathered(gather[mine]), wanted[mine][:, common], least)
    return total


def _refined(must: np.ndarray, gathered: np.ndarray, wanted: np.ndarray, least: np.ndarray) -> float:
    """The cheapest choice, where the cheapest so far is looked at closely until it has been."""
    rows = 1 << np.arange(len(wanted))
    codes = np.append(0, np.unique(rows @ wanted))
    sets = np.arange(len(must))
    done: set[int] = set()
    paid = must + gathered
    for _ in range(REFINED):
        choice = int(paid.argmin())
        columns = np.unique(codes & choice)
        if choice in done or not 2 < len(columns) <= MOST_COLUMNS:
            break
        done.add(choice)
        above = sets & choice == choice
        inside = np.flatnonzero(rows & choice)
        value = _tour(columns[:, None] >> inside & 1, least[inside])
        paid[above] = np.maximum(paid[above], value + gathered[above])
    return float(paid.min())


def _tour(columns: np.ndarray, least: np.ndarray) -> float:
    """What readers must pay beyond one run each. columns: 0 or 1, different columns x readers; one of them all 0."""
    apart = (columns * least) @ (1 - columns).T / 2
    apart = apart + apart.T
    np.fill_diagonal(apart, np.inf)
    nearest = np.partition(apart, 1, axis=1)[:, :2]
    value = max(float(nearest.sum()) / 2 - float(least.sum()), 0.0)
    if least.min() == least.max():  # runs are whole
        value = float(np.ceil(value / least[0] - 1e-9) * least[0])
    return value


def _further_runs(wanted: np.ndarray) -> np.ndarray:
    """For every set of rows (bit r: row r) how many runs they have at least beyond one each; negative: no statement."""
    rows = len(wanted)
    columns = np.unique((1 << np.arange(rows)) @ wanted)
    seen = 1
    for column in columns.tolist():
        seen |= 1 << column
    counts = np.zeros(1 << rows, dtype=np.int64)
    kept = [_without(bit, rows) for bit in range(rows)]

    def fill(columns: int, bit: int, chosen: int) -> None:
        if bit == rows:
            counts[chosen] = columns.bit_count()
            return
        fill(columns, bit + 1, chosen | 1 << bit)
        fill((columns | columns >> (1 << bit)) & kept[bit], bit + 1, chosen)

    fill(seen, 0, 0)
    size = np.array([int(k).bit_count() for k in range(1 << rows)])
    return (counts + 1) // 2 - size


def _without(bit: int, rows: int) -> int:
    """The set of all numbers below ``2 ** rows`` that lack this bit."""
    block = (1 << (1 << bit)) - 1
    found = 0
    for start in range(0, 1 << rows, 2 << bit):
        found |= block << start
    return found


def _subset_min(values: np.ndarray) -> np.ndarray:
    """The least value of every set; 0 for the empty one."""
    least = np.array([np.inf])
    for value in values.tolist():
        least = np.concatenate([least, np.minimum(least, value)])
    least[0] = 0.0
    return least


def _gathered(gather: np.ndarray) -> np.ndarray:
    """What all others pay for gathers, for every set that does not."""
    total = np.array([0.0])
    for value in gather.tolist():
        total = np.concatenate([total + value, total])
    return total


def _raise_triples(
    must: np.ndarray, readers: np.ndarray, least: np.ndarray, clash: Callable[[int, int, int], bool]
) -> None:
    """One of three readers that clash has a second run."""
    for a, i in enumerate(readers.tolist()):
        for b, j in enumerate(readers[:a].tolist()):
            for c, k in enumerate(readers[:b].tolist()):
                if clash(i, j, k):
                    place = 1 << a | 1 << b | 1 << c
                    must[place] = max(must[place], min(least[a], least[b], least[c]))


def _superset_max(values: np.ndarray) -> np.ndarray:
    """For every set the greatest value of its subsets: whoever is in a set pays what the subset must."""
    values = values.copy()
    bit = 1
    while bit < len(values):
        pairs = values.reshape(-1, 2, bit)
        np.maximum(pairs[:, 1], pairs[:, 0], out=pairs[:, 1])
        bit *= 2
    return values
