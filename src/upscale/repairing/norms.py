"""Batch norms with running statistics, as a factor and a constant for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..aliases import argument

__all__ = ["Affine", "affine_of"]

_LEAST_SCALE = 1e-6  # of the largest


@dataclass(frozen=True, eq=False)
class Affine:
    """``y -> y * scale + offset``, float64 (channels,)."""

    scale: Tensor
    offset: Tensor

    @property
    def usable(self) -> Tensor:
        """Which channels can be divided by their scale: one that is all but removed tells nothing about its input."""
        return self.scale.abs() > _LEAST_SCALE * self.scale.abs().max()

    @property
    def divisor(self) -> Tensor:
        """``scale``, with ones where it is not usable."""
        return torch.where(self.usable, self.scale, 1.0)

    def same_as(self, other: Affine) -> bool:
        return torch.equal(self.scale, other.scale) and torch.equal(self.offset, other.offset)


def affine_of(norm: fx.Node, tensors: Mapping[str, Tensor]) -> Affine:
    """What a call of batch norm in eval mode does."""

    def value(name: str) -> Tensor | None:
        node = argument(norm, name)
        return None if node is None else tensors[str(node.target)].detach().double()

    mean, variance = value("running_mean"), value("running_var")
    assert mean is not None and variance is not None
    scale = (variance + argument(norm, "eps")).rsqrt()
    weight, bias = value("weight"), value("bias")
    if weight is not None:
        scale = scale * weight
    offset = -mean * scale
    return Affine(scale, offset if bias is None else offset + bias)
