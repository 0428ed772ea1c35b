"""Masks and scores of other libraries. The libraries themselves are extras, imported where an object of theirs is."""

from __future__ import annotations

from . import torch_pruning

__all__ = ["torch_pruning"]
