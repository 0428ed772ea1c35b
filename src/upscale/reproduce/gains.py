"""How much accuracy one way to mask gains over another: at equal amount, at equal FLOPs, at equal latency."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .rows import DENSE, Row, described

__all__ = ["AXES", "Curve", "Gain", "curves", "gain", "gains", "mean_gain"]

#: What two masks may have in common when they are compared, by the field of a row; and what 0 % masked has.
AXES = {"amount": 0.0, "flops_left": 1.0, "latency_left": 1.0}


@dataclass(frozen=True)
class Curve:
    """Accuracy of one network masked in one way, by amount. ``points``: rows with an accuracy, the dense one first.
    ``repair``: what was done after masking, see :attr:`Row.repair`. ``ranking``: see :class:`Combination`."""

    model: str
    importance: str
    side: str
    method: str
    repair: str
    ranking: str
    points: tuple[Row, ...]

    @property
    def way(self) -> str:
        """The method, with the ranking if it was another than usual, and the repair if there was one."""
        return described(self.method, self.ranking, repair=self.repair)

    @property
    def dense(self) -> float:
        return float(self.points[0].top1 or 0)

    def along(self, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """Places on an axis in ascending order, and the top-1 there; of points at one place, their mean."""
        places = np.array([_place(row, axis) for row in self.points])
        top1 = np.array([row.top1 for row in self.points], dtype=float)
        unique, index = np.unique(places, return_inverse=True)
        return unique, np.bincount(index, top1) / np.bincount(index)


def _place(row: Row, axis: str) -> float:
    if row.method == DENSE:
        return AXES[axis]
    value = getattr(row, axis)
    return float("nan") if value is None else float(value)


def curves(rows: Sequence[Row]) -> list[Curve]:
    """The curves of networks whose dense accuracy is known, in order of appearance."""
    dense = {row.group: row for row in rows if row.method == DENSE and row.top1 is not None}
    found: dict[tuple[tuple[Any, ...], str, str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.method != DENSE and row.top1 is not None and row.group in dense:
            how = (row.group, row.importance, row.side, row.method, row.repair, row.ranking)
            found.setdefault(how, []).append(row)
    return [
        Curve(points[0].model, *how[1:], (dense[how[0]], *sorted(points, key=lambda row: row.amount)))
        for how, points in found.items()
    ]


@dataclass(frozen=True)
class Gain:
    """Points of top-1 that ``better`` has over ``other``, in the mean along each axis. ``alive``: the same over the
    part of the axis on which one of the two still has half of the dense accuracy (NaN: there is none). ``worst``: the
    least difference at one amount, and that amount."""

    better: Curve
    other: Curve
    everywhere: dict[str, float]
    alive: dict[str, float]
    worst: tuple[float, float]


def gains(found: Sequence[Curve], better: str, other: str = "constrained") -> list[Gain]:
    """The gain of one method over another, both ranked and repaired alike, for each network, importance and side that
    has both."""
    by = {(c.points[0].group, c.importance, c.side, c.ranking, c.repair, c.method): c for c in found}
    pairs = (((*key[:-1], other), curve) for key, curve in by.items() if key[-1] == better)
    return [gain(curve, by[key]) for key, curve in pairs if key in by]


def gain(better: Curve, other: Curve) -> Gain:
    """Compare two curves of one network."""
    at = {row.amount: float(row.top1 or 0) for row in other.points[1:]}
    pairs = [(row.amount, float(row.top1 or 0), at[row.amount]) for row in better.points[1:] if row.amount in at]
    living = [pair for pair in pairs if max(pair[1:]) >= better.dense / 2]
    everywhere, alive = {"amount": _mean(pairs)}, {"amount": _mean(living)}
    for axis in list(AXES)[1:]:
        everywhere[axis] = _between(better, other, axis, 0.0)
        alive[axis] = _between(better, other, axis, better.dense / 2)
    worst = min(((one - two, amount) for amount, one, two in pairs), default=(float("nan"), float("nan")))
    return Gain(better, other, everywhere, alive, worst)


def _mean(pairs: Sequence[tuple[float, float, float]]) -> float:
    return float(np.mean([one - two for _, one, two in pairs])) if pairs else float("nan")


def _between(better: Curve, other: Curve, axis: str, least: float) -> float:
    """Mean difference of two curves, linear between their points, where both have points around and one is above
    ``least``."""
    (x1, y1), (x2, y2) = better.along(axis), other.along(axis)
    low, high = max(x1[0], x2[0]), min(x1[-1], x2[-1])
    places = np.unique(np.concatenate([x1, x2, [low, high]]))
    places = places[(places >= low) & (places <= high)]
    one, two = np.interp(places, x1, y1), np.interp(places, x2, y2)
    lived = places[np.maximum(one, two) >= least]
    if not len(lived):
        return float("nan")
    inside = places >= lived[0]
    places, differences = places[inside], (one - two)[inside]
    if len(places) < 2:
        return float(differences[0])
    steps = np.diff(places)
    return float((steps * (differences[1:] + differences[:-1]) / 2).sum() / steps.sum())


def mean_gain(found: Iterable[Gain], axis: str, alive: bool) -> float:
    """The mean over networks and importances; those of which nothing can be said are left out."""
    values = [(one.alive if alive else one.everywhere)[axis] for one in found]
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
