"""Which models can be pruned? Every model of a suite in a process of its own: mask, export, compare, one row each."""

from .rows import Row, Settings
from .subject import Subject

__all__ = ["Row", "Settings", "Subject"]
