"""Error curves: what a layer's mask costs, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["along", "increments"]

_TIE = 1e-9  # by how much equal increments differ, so that their order is that of the removals


def along(costs: np.ndarray, counts: Sequence[int], errors: Sequence[float]) -> np.ndarray:
    """The error after each removal, float64 (channels,).

    It was measured as ``errors`` after ``counts`` removals, the last one after all; in between it grows as ``costs``,
    what each removal added where the weights were fitted.
    """
    summed = np.concatenate([[0.0], np.cumsum(costs)])
    known = np.maximum.accumulate([0.0, *errors])
    places = np.array([0, *counts])
    found = np.empty(len(costs))
    for a, b, low, high in zip(places[:-1], places[1:], known[:-1], known[1:], strict=True):
        grown = summed[a + 1 : b + 1] - summed[a]
        share = grown / grown[-1] if grown[-1] > 0 else np.linspace(0, 1, b - a + 1)[1:]
        found[a:b] = low + (high - low) * share
    return found


def increments(curve: np.ndarray) -> np.ndarray:
    """What each removal adds, along the greatest convex curve below ``curve``, which starts from 0: never less than
    the one before. Only the corners of it are worth stopping at, whatever the price of a channel."""
    points = [(0, 0.0)]
    for place, value in enumerate(curve.tolist(), start=1):
        while len(points) > 1 and _is_above(points[-2], points[-1], (place, value)):
            points.pop()
        points.append((place, value))
    places, values = np.array([p for p, _ in points]), np.array([v for _, v in points])
    slopes = np.repeat(np.diff(values) / np.diff(places), np.diff(places))
    rank = np.arange(len(slopes))
    return slopes * (1 + _TIE * rank) + np.finfo(np.float64).tiny * rank


def _is_above(first: tuple[int, float], middle: tuple[int, float], last: tuple[int, float]) -> bool:
    """Whether ``middle`` is on or above the line from ``first`` to ``last``."""
    (x0, y0), (x1, y1), (x2, y2) = first, middle, last
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)
