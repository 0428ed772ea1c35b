"""What readers must pay where runs can be had for less than a gather: a lower bound by counting columns.

Let K be the readers that do not gather, and M the number of different columns among their rows, that of no reader
counted in. An order steps from column to column, from nothing and back to nothing, and each step begins or ends a run
of somebody, so K's readers have M / 2 runs at least: M / 2 - |K| beyond the first ones. As M may be as great as 2^|K|,
few readers can do without a gather. In a group of readers every choice of K is tried; what different groups must pay
adds up. For the choices that decide, steps count with their weights: half of the way from each column to its two
nearest ones is the least that any tour must go.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .budget import Budget

GROUP = 10  # readers of which every choice is tried
LARGEST = 12  # if there are no more
ROUNDS = 30  # of tolls
CELLS = 6_000_000  # of distance tables, for all groups
MOST_COLUMNS = 512  # of a choice looked at closely
CALLS = 20_000  # cells that take as long as the calls of one round


def counting_bound(
    wanted: np.ndarray,
    present: np.ndarray,
    gather: np.ndarray,
    piece: np.ndarray,
    forced: np.ndarray,
    clash: Callable[[int, int, int], bool],
) -> float:
    """A cost that no order undercuts.

    wanted, present: bool, readers x elements. gather, piece: per reader, as in a wish. forced: runs beyond the first
    that each reader has in any order. clash: whether three readers cannot all have one run.
    """
    ranked = np.lexsort((np.arange(len(gather)), -gather))
    total = 0.0
    size = GROUP if len(ranked) > LARGEST else LARGEST
    groups = [ranked[begin : begin + size] for begin in range(0, len(ranked), size)]
    for mine in groups:
        budget = Budget(CELLS // len(groups))
        common = present[mine].all(0)
        least = np.minimum(gather, piece)[mine]
        further = _further_runs(wanted[mine][:, common])
        must = np.maximum(further, 0) * _subset_min(least)
        must = np.maximum(must, _paid_by_others(least * forced[mine])[::-1])
        _raise_triples(must, mine, least, clash)
        total += _refined(_superset_max(must), _paid_by_others(gather[mine]), wanted[mine][:, common], least, budget)
    return total


def _refined(must: np.ndarray, gathered: np.ndarray, wanted: np.ndarray, least: np.ndarray, budget: Budget) -> float:
    """The cheapest choice, where the cheapest so far is looked at closely until it has been."""
    rows = 1 << np.arange(len(wanted))
    codes = np.append(0, np.unique(rows @ wanted))
    sets = np.arange(len(must))
    done: set[int] = set()
    paid = must + gathered
    while True:
        choice = int(paid.argmin())
        columns = np.unique(codes & choice)
        work = len(must) + ROUNDS * (len(columns) ** 2 + CALLS)
        if choice in done or not 2 < len(columns) <= MOST_COLUMNS or not budget.spend(work):
            break
        done.add(choice)
        above = sets & choice == choice
        inside = np.flatnonzero(rows & choice)
        value = _tour(columns[:, None] >> inside & 1, least[inside])
        paid[above] = np.maximum(paid[above], value + gathered[above])
    return float(paid.min())


def _tour(columns: np.ndarray, least: np.ndarray) -> float:
    """What readers must pay beyond one run each. columns: 0 or 1, different columns x readers; one of them all 0.

    Tolls on passing a column, which sum to nothing, leave the length of any tour as it is, and so does the bound hold
    with them; they rise where too many columns have their nearest one (Held and Karp 1971, without the tree).
    """
    apart = (columns * least) @ (1 - columns).T / 2
    apart = apart + apart.T
    np.fill_diagonal(apart, np.inf)
    toll = np.zeros(len(columns))
    longest, step = 0.0, float(least.min()) / 2
    for _ in range(ROUNDS):
        tolled = apart + toll[:, None] + toll[None, :]
        two = np.argpartition(tolled, 1, axis=1)[:, :2]
        longest = max(longest, float(np.take_along_axis(tolled, two, axis=1).sum()) / 2)
        toll += step * (np.bincount(two.reshape(-1), minlength=len(toll)) / 2 - 1)
        step *= 0.9
    value = max(longest - float(least.sum()), 0.0)
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


def _paid_by_others(prices: np.ndarray) -> np.ndarray:
    """For every set, the sum of the prices of all who are not in it."""
    total = np.array([0.0])
    for value in prices.tolist():
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
