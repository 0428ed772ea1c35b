"""Batch norms with running statistics, as a factor and a constant for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..aliases import argument

__all__ = ["Affine", "affine_of"]


@dataclass(frozen=True, eq=False)
class Affine:
    """``y -> y * scale + offset``, float64 (channels,)."""

    scale: Tensor
    offset: Tensor

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
