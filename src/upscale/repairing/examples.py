"""Examples drawn from the batches one by one, where they can be taken apart."""

from __future__ import annotations

from ..program import Program

__all__ = ["has_fixed_batch"]


def has_fixed_batch(program: Program) -> bool:
    """Whether capture fixed the batch size, so that only whole batches can be run."""
    from torch.fx.experimental.symbolic_shapes import has_free_symbols  # imports sympy

    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    return not any(has_free_symbols(size) for node in placeholders for size in node.meta["val"].shape[:1])
