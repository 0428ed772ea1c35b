"""A model under trial with an example call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Positional arguments as a tuple, or keyword arguments as a dict.
Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass
class Subject:
    """A model in eval mode and what it is called with; every input tensor has the batch first."""

    model: nn.Module
    inputs: Inputs

    @property
    def args(self) -> tuple[Any, ...]:
        return self.inputs if isinstance(self.inputs, tuple) else ()

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.inputs if isinstance(self.inputs, dict) else {}

    def to(self, dtype: torch.dtype) -> Subject:
        """Model and floating-point inputs in ``dtype``."""
        return Subject(self.model.to(dtype), cast(self.inputs, dtype))

    def call(self, model: nn.Module, inputs: Inputs | None = None) -> Any:
        """``model`` on ``inputs`` (the example, if not given), without gradients."""
        chosen = self.inputs if inputs is None else inputs
        with torch.no_grad():
            return model(**chosen) if isinstance(chosen, dict) else model(*chosen)


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested inputs with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: each_tensor(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(each_tensor(item, change) for item in value)
    return value


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Nested inputs with their floating-point tensors in ``dtype``."""
    return each_tensor(value, lambda t: t.to(dtype) if t.is_floating_point() else t)


def batch_of(value: Any) -> int:
    """The batch size of the first tensor of nested inputs; 0 where there is none."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.ndim:
            sizes.append(tensor.shape[0])
        return tensor

    each_tensor(value, note)
    return sizes[0] if sizes else 0


def rebatched(value: Any, batch: int, seed: int) -> Any:
    """Random inputs like ``value`` with ``batch`` examples; integers stay within the range that was seen."""
    generator = torch.Generator().manual_seed(seed)

    def one(tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor
        shape = (batch, *tensor.shape[1:])
        if tensor.is_floating_point():
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        low, high = int(tensor.min()), int(tensor.max())
        return torch.randint(low, high + 1, shape, generator=generator).to(tensor.dtype)

    return each_tensor(value, one)
