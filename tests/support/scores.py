"""Scores by definition, for layers of every kind, and a small network with data to score it on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.subjects import Block, dense, image
from upscale.importance import (
    Subject,
    channel_scores,
)

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: nn.Conv1d(6, 4, 3),
    "conv2d": lambda: nn.Conv2d(6, 4, (3, 2)),
    "conv3d": lambda: nn.Conv3d(6, 4, 2),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "transposed1d": lambda: nn.ConvTranspose1d(6, 4, 3),
    "transposed3d": lambda: nn.ConvTranspose3d(6, 4, 2),
    "grouped transposed": lambda: nn.ConvTranspose2d(6, 4, 3, groups=2),
}
SIZES = {"linear": (), "conv1d": (7,), "conv3d": (3, 4, 5), "transposed1d": (7,), "transposed3d": (3, 4, 5)}


def slices(layer: nn.Module, side: str) -> list[np.ndarray]:
    """Each channel's weights, by the definition of the layer: which entries multiply, or make, the channel."""
    weight, groups = layer.weight.detach().numpy(), getattr(layer, "groups", 1)
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    first, second = weight.shape[0] // groups, weight.shape[1]  # of one group
    by_first = [weight[c] for c in range(weight.shape[0])]
    by_second = [weight[g * first : (g + 1) * first, c] for g in range(groups) for c in range(second)]
    return by_first if transposed == (side == "input") else by_second


def scored(heuristic: Any, model: nn.Module, side: str = "output", norms: Any = None, **layers: nn.Module) -> Any:
    """Checked scores of these layers (the model itself if there are none)."""
    return channel_scores(heuristic, Subject(model, side, layers or {"layer": model}, norms or {}))


def loops(name: str, filters: list[np.ndarray]) -> list[float]:
    """The scores, term by term."""
    energy = [math.fsum(float(w) ** 2 for w in f.flat) for f in filters]
    if name == "l1":
        return [math.fsum(abs(float(w)) for w in f.flat) for f in filters]
    if name == "l2":
        return [math.sqrt(e) for e in energy]
    if name == "lamp":
        return [e / math.fsum(other for other in energy if other >= e) for e in energy]
    return [math.fsum(math.dist(f.flat, other.flat) for other in filters) for f in filters]


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def residual() -> nn.Module:
    """A stem, one block with a strided shortcut and a classifier."""
    layers = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 12, 2)
    return dense(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)))


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(image(4, seed=seed), torch.arange(4)) for seed in (5, 6)]
