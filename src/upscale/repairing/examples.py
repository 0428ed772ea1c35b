"""Examples drawn from the batches one by one, where they can be taken apart."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..program import Program
from .pair import Inputs
from .samples import is_held_out

__all__ = ["Examples", "has_fixed_batch"]

Drawn = tuple[list[Tensor], Tensor | None]


def has_fixed_batch(program: Program) -> bool:
    """Whether capture fixed the batch size, so that only whole batches can be run."""
    from torch.fx.experimental.symbolic_shapes import has_free_symbols  # imports sympy

    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    return not any(has_free_symbols(size) for node in placeholders for size in node.meta["val"].shape[:1])


class Examples:
    """The batches' examples. What is drawn is inputs of the model, and which of their examples count (None: all)."""

    def __init__(self, program: Program, inputs: Inputs) -> None:
        self._inputs = inputs
        sizes = zip(inputs.leaves, inputs.sizes, strict=True)
        self._is_whole = has_fixed_batch(program) or any(
            not leaf.dim() or len(leaf) != size for leaves, size in sizes for leaf in leaves
        )
        owners = [(b, row) for b, size in enumerate(inputs.sizes) for row in range(size)]
        held = is_held_out(torch.arange(len(owners)))
        self._owners, self._held = torch.tensor(owners), held

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """``count`` examples that are not held out, perhaps some twice; or a batch, where it cannot be taken apart."""
        free = torch.nonzero(~self._held).flatten()
        if self._is_whole:
            return self._batch(int(self._owners[free[torch.randint(len(free), (), generator=generator)], 0]), False)
        return self._taken(free[torch.randint(len(free), (count,), generator=generator)]), None

    def held(self, count: int) -> Iterator[Drawn]:
        """All held-out examples, ``count`` at a time, or batch by batch."""
        numbers = torch.nonzero(self._held).flatten()
        if self._is_whole:
            yield from (self._batch(number, True) for number in self._owners[numbers, 0].unique().tolist())
        else:
            yield from ((self._taken(part), None) for part in numbers.split(count))

    def _taken(self, numbers: Tensor) -> list[Tensor]:
        batches, rows = self._owners[numbers].unbind(1)
        back = batches.argsort(stable=True).argsort()  # examples of a batch are taken together, and put back in order
        found = []
        for leaf in range(len(self._inputs.leaves[0])):
            parts = []
            for batch in batches.unique().tolist():
                held = self._inputs.leaves[batch][leaf]
                parts.append(held[rows[batches == batch].to(held.device)])
            together = torch.cat(parts)
            found.append(together[back.to(together.device)])
        return found

    def _batch(self, number: int, held: bool) -> Drawn:
        chosen = self._held[self._owners[:, 0] == number] == held
        return [leaf.clone() for leaf in self._inputs.leaves[number]], chosen
