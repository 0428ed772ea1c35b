"""Units: positions of a channel dimension that cannot be parted."""

from __future__ import annotations

import numpy as np


def renumber(units: np.ndarray) -> np.ndarray:
    """The same grouping with groups numbered in order of their first position."""
    _, first, inverse = np.unique(units, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def refine(groupings: list[np.ndarray]) -> np.ndarray:
    """Positions that any of the groupings keeps together."""
    first = groupings[0]
    if all(np.array_equal(first, g) for g in groupings[1:]):
        return first
    parent = np.arange(len(first))
    for grouping in groupings:
        lowest = np.full(int(grouping.max()) + 1, len(first))
        np.minimum.at(lowest, grouping, parent)
        parent = lowest[grouping]
    while True:  # to a fixed point: two groupings may chain
        before = parent
        for grouping in groupings:
            lowest = np.full(int(grouping.max()) + 1, len(first))
            np.minimum.at(lowest, grouping, parent)
            parent = lowest[grouping]
        if np.array_equal(before, parent):
            return renumber(parent)
