"""Which pairs and triples of readers no order can serve together, found for all of them at once.

Three subsets divide the elements into eight regions. Whether some order makes all three one run depends only on
which regions have an element, so a table over the seven inner regions decides every triple.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

from .consecutive import Tree, free, pack, reduce, restrict

REGIONS = 7  # of three subsets, but for the elements that none of them wants


@dataclass(frozen=True)
class Clashes:
    """Bit ``l`` of ``pairs[i]``: readers i and l cannot both be served; of ``triples[i][j]``: nor i, j and l.

    ``alone``: readers that cannot be served at all, as a set of bits. Everything stated is certain: where a reader's
    tensor lacks some elements, only elements that all readers in question have were looked at.
    """

    alone: int
    pairs: tuple[int, ...]
    triples: tuple[tuple[int, ...], ...]


def find_clashes(tree: Tree, wanted: np.ndarray, present: np.ndarray) -> Clashes:
    """Clashes of readers among the orders that ``tree`` allows.

    wanted, present: bool, readers x elements; ``wanted`` within ``present``.
    """
    alone, pairs = _by_tree(tree, [pack(w) for w in wanted], [pack(p) for p in present])
    return Clashes(alone, pairs, _triples(wanted, present))


def _by_tree(tree: Tree, wanted: Sequence[int], present: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Single readers and pairs that contradict the tree itself; a tree of loose elements contradicts none."""
    pairs = [0] * len(wanted)
    if not tree.children:
        return 0, tuple(pairs)
    trees: dict[tuple[int, int], Tree | None] = {}

    def serving(held: int, i: int) -> Tree | None:
        """The orders of the elements ``held`` that serve reader i."""
        if (held, i) not in trees:
            base = restrict(tree, held)
            trees[held, i] = None if base is None else reduce(base, wanted[i] & held)
        return trees[held, i]

    alone = sum(1 << i for i, held in enumerate(present) if wanted[i] and serving(held, i) is None)
    for i, j in combinations([i for i in range(len(wanted)) if not alone >> i & 1], 2):
        held = present[i] & present[j]
        base = serving(held, i)
        if held and (base is None or reduce(base, wanted[j] & held) is None):
            pairs[i] |= 1 << j
            pairs[j] |= 1 << i
    return alone, tuple(pairs)


def _triples(wanted: np.ndarray, present: np.ndarray) -> tuple[tuple[int, ...], ...]:
    count = len(wanted)
    inside, outside = _words(wanted), _words(present & ~wanted)
    found = [[0] * count for _ in range(count)]
    table = _infeasible()
    for i, j in combinations(range(count - 1), 2):
        parts = np.stack(
            [outside[i] & outside[j], inside[i] & outside[j], outside[i] & inside[j], inside[i] & inside[j]]
        )
        later = np.stack([outside[j + 1 :], inside[j + 1 :]])
        occupied = (parts[None, :, None] & later[:, None]).any(-1)  # reader l, readers i and j, which l
        code = occupied.reshape(8, -1)[1:].T @ (1 << np.arange(REGIONS))
        for offset in np.flatnonzero(table[code]).tolist():
            k = j + 1 + offset
            for a, b, c in ((i, j, k), (i, k, j), (j, k, i)):
                found[a][b] |= 1 << c
                found[b][a] |= 1 << c
    return tuple(tuple(row) for row in found)


def _words(flags: np.ndarray) -> np.ndarray:
    """Rows of bools as rows of 64-bit words."""
    packed = np.packbits(np.pad(flags, ((0, 0), (0, -flags.shape[1] % 64))), axis=1)
    return packed.view(np.uint64)


@cache
def _infeasible() -> np.ndarray:
    """Whether no order serves three subsets, per set of occupied regions (bit ``r - 1``; bits of r: who wants it)."""
    table = np.zeros(1 << REGIONS, dtype=bool)
    for code in range(1 << REGIONS):
        regions = [r for r in range(1, REGIONS + 1) if code >> (r - 1) & 1]
        tree: Tree | None = free((1 << len(regions)) - 1)
        for reader in range(3):
            if tree is not None:
                tree = reduce(tree, sum(1 << i for i, r in enumerate(regions) if r >> reader & 1))
        table[code] = tree is None
    return table
