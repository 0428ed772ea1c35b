"""Disjoint sets over integers, joined many at a time."""

from __future__ import annotations

import numpy as np


class DisjointSets:
    """Union-find with whole arrays as operands; the representative of a set is its smallest member."""

    def __init__(self, size: int) -> None:
        self.parent = np.arange(size)

    def find(self, items: np.ndarray) -> np.ndarray:
        roots = self.parent[items]
        while True:
            above = self.parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self.parent[items] = roots
        return roots

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        while True:
            a, b = self.find(left), self.find(right)
            low, high = np.minimum(a, b), np.maximum(a, b)
            apart = low != high
            if not apart.any():
                return
            np.minimum.at(self.parent, high[apart], low[apart])

    def roots(self) -> np.ndarray:
        return self.find(np.arange(len(self.parent)))
