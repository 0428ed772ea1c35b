"""How fast is a pruned model? Variants of one masked model, timed side by side in a process of their own."""

from .rows import Row, Setting

__all__ = ["Row", "Setting"]
