"""Sums from which a regression is solved: they take the same memory however many rows have gone into them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Moments", "Regression"]


@dataclass(eq=False)
class Moments:
    """Sums over rows ``x`` (groups, K) with targets ``y`` (groups, M), in float64.

    ``xx``: (groups, K, K), the Gram matrix; ``xy``: (groups, K, M); ``yy``, ``y``: (groups, M); ``x``: (groups, K).
    """

    count: int = 0
    x: Tensor = field(default_factory=lambda: torch.zeros(()))
    y: Tensor = field(default_factory=lambda: torch.zeros(()))
    xx: Tensor = field(default_factory=lambda: torch.zeros(()))
    xy: Tensor = field(default_factory=lambda: torch.zeros(()))
    yy: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor, y: Tensor) -> None:
        """More rows: ``x`` (groups, rows, K), ``y`` (groups, rows, M)."""
        x = x.double()
        self.count += x.shape[1]
        self.x, self.xx = self.x + x.sum(1), self.xx + x.mT @ x
        self.add_targets(x, y)

    def add_targets(self, x: Tensor, y: Tensor) -> None:
        """Targets of rows whose own sums are there already; float64."""
        y = y.double()
        self.y, self.yy = self.y + y.sum(1), self.yy + y.square().sum(1)
        self.xy = self.xy + x.mT @ y

    def without_targets(self) -> Moments:
        """The sums of the same rows, to which other targets can be added."""
        return Moments(self.count, x=self.x, xx=self.xx)

    def error(self, weight: Tensor, shift: Tensor) -> Tensor:
        """Mean square of ``y - (weight x + shift)`` of each output, (groups, M); ``weight``: (groups, M, K)."""
        crossed = (weight.mT * self.xy).sum(1)
        squared = ((weight @ self.xx) * weight).sum(2)
        constant = shift * (shift * self.count - 2 * (self.y - (weight @ self.x.unsqueeze(2)).squeeze(2)))
        return ((self.yy - 2 * crossed + squared + constant) / self.count).clamp_min(0)

    def regression(self, weight: Tensor, has_shift: bool) -> Regression:
        """The least squares problem for a change of ``weight`` (groups, M, K), per row."""
        gram, crossed = self.xx, self.xy
        if has_shift:
            mean = self.x / self.count
            gram = gram - self.x.unsqueeze(2) * mean.unsqueeze(1)
            crossed = crossed - mean.unsqueeze(2) * self.y.unsqueeze(1)
        return Regression(gram / self.count, (crossed - gram @ weight.mT) / self.count)

    def shift(self, weight: Tensor) -> Tensor:
        """The constants that suit ``weight`` best: (groups, M)."""
        return (self.y - (weight @ self.x.unsqueeze(2)).squeeze(2)) / self.count


@dataclass(frozen=True, eq=False)
class Regression:
    """Minimise ``d gram d' - 2 d right`` over changes ``d``. ``gram``: (groups, K, K); ``right``: (groups, K, M)."""

    gram: Tensor
    right: Tensor
