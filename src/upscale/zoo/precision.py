"""Does a float64 model compute in less than float64 somewhere? Then equality is a matter of that rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .subject import Subject

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.narrow:
            tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.narrow = any(tensor.dtype in _NARROW and tensor.numel() > 1 for tensor in tensors)
        return result


def computes_in_less(subject: Subject) -> bool:
    """Whether any operator of the model gives a tensor of less than float64 (norms and softmax of many language
    models do, whatever the dtype of their weights)."""
    with _Watch() as watch:
        subject.call(subject.model)
    return watch.narrow
