"""How far the network's outputs are from the original's, on held-out examples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..program import run
from .examples import has_fixed_batch
from .pair import Inputs, Pair
from .samples import is_held_out

__all__ = ["Outputs"]


class Outputs:
    """The original's outputs on held-out examples, computed once.

    Where capture fixed the batch size, whole batches are run, and what has one entry an example is cut afterwards.
    """

    def __init__(self, pair: Pair, inputs: Inputs) -> None:
        self._pair, self._batches = pair, list(_held_out(inputs, has_fixed_batch(pair.masked)))
        self._wanted = [_leaves(run(pair.original, leaves), chosen) for leaves, chosen in self._batches]
        everything = torch.cat(
            [leaf.flatten().double() for batch in self._wanted for leaf in batch] or [torch.zeros(1)]
        )
        self._scale = float((everything - everything.mean()).square().sum())

    def error(self) -> float:
        """Mean square of the difference, divided by the original's mean square about its mean."""
        wrong = 0.0
        for (leaves, chosen), wanted in zip(self._batches, self._wanted, strict=True):
            for got, target in zip(_leaves(run(self._pair.masked, leaves), chosen), wanted, strict=True):
                wrong += float((got.double() - target.double()).square().sum())
        return wrong / self._scale if self._scale > 0 else wrong


def _leaves(outputs: tuple[object, ...], chosen: Tensor | None) -> list[Tensor]:
    found = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return found if chosen is None else [_of(leaf, chosen) for leaf in found]


def _of(leaf: Tensor, chosen: Tensor) -> Tensor:
    """The chosen examples of what has one entry an example."""
    has_batch = leaf.dim() > 0 and leaf.shape[0] == len(chosen)
    return leaf[chosen.to(leaf.device)] if has_batch else leaf


def _held_out(inputs: Inputs, fixed: bool) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """The held-out examples of each batch; if its size is ``fixed``, the whole batch and which of it those are."""
    start = 0
    for leaves, size in zip(inputs.leaves, inputs.sizes, strict=True):
        chosen = is_held_out(torch.arange(start, start + size))
        start += size
        if bool(chosen.any()):
            used = leaves if fixed else [_of(leaf, chosen) for leaf in leaves]
            yield [leaf.to(inputs.device) for leaf in used], chosen if fixed else None
