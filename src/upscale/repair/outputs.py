"""How far the network's outputs are from the original's, on held-out examples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..program import run
from .pair import Inputs, Pair
from .samples import is_held_out

__all__ = ["Outputs"]


class Outputs:
    """The original's outputs on held-out examples, computed once."""

    def __init__(self, pair: Pair, inputs: Inputs) -> None:
        self._pair, self._batches = pair, list(_held_out(inputs))
        self._wanted = [_leaves(run(pair.original, leaves)) for leaves in self._batches]

    def error(self) -> float:
        """Mean square of the difference, divided by the original's mean square about its mean."""
        wrong = total = 0.0
        mean = [sum(parts) / len(parts) for parts in zip(*([w.double().mean() for w in b] for b in self._wanted))]
        for leaves, wanted in zip(self._batches, self._wanted, strict=True):
            for got, target, middle in zip(_leaves(run(self._pair.masked, leaves)), wanted, mean, strict=True):
                wrong += float((got.double() - target.double()).square().sum())
                total += float((target.double() - middle).square().sum())
        return wrong / total if total > 0 else wrong


def _leaves(outputs: tuple[object, ...]) -> list[Tensor]:
    return [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _held_out(inputs: Inputs) -> Iterator[list[Tensor]]:
    """The held-out examples of each batch, at the device; whole batches where an input has no batch dimension."""
    start = 0
    for leaves, size in zip(inputs.leaves, inputs.sizes, strict=True):
        chosen = is_held_out(torch.arange(start, start + size))
        start += size
        if not bool(chosen.any()):
            continue
        yield [
            (leaf[chosen.to(leaf.device)] if leaf.dim() and leaf.shape[0] == size else leaf).to(inputs.device)
            for leaf in leaves
        ]
