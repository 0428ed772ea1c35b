"""What makes a timing doubtful: a machine that is busy with something else, and numbers too small for the processor.

A denormal number (closer to zero than a type's smallest normal one) costs some processors a hundred times as much as
any other: a model full of them is slow for a reason of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: Interquartile range over median above which a timing is called noisy.
NOISY = 0.10
#: How far the unpruned model's second name may be from its first.
CONTROL = 0.03
#: Share of denormal activations that is told: at a hundred times the cost of others they add a tenth of a percent.
FEW = 1e-5


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; of a single value, that value."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def paired_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over rounds of time / reference time: a machine that is slow for a while slows both."""
    return statistics.median(time / other for time, other in zip(times, reference, strict=True))


def denormals(tensor: Tensor) -> int:
    """How many values are denormal: not zero, and smaller than the type's smallest normal number."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    size = tensor.detach().abs()
    return int(((size > 0) & (size < torch.finfo(tensor.dtype).tiny)).sum())


def denormal_weights(model: nn.Module) -> int:
    """Denormal values in parameters and buffers."""
    return sum(denormals(tensor) for tensor in (*model.parameters(), *model.buffers()))


def denormal_activations(call: Callable[[], Any]) -> float:
    """Share of the floating-point values written by all operators of a call that are denormal."""
    with torch.no_grad(), _Watch() as watch:
        call()
    return watch.found / watch.total if watch.total else 0.0


class _Watch(TorchDispatchMode):
    """Counts values that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.found = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.found += denormals(leaf)
                self.total += leaf.numel()
        return result


def warnings_of(
    median: float, iqr: float, control: float | None, weights: int | None, activations: float | None
) -> list[str]:
    """What a reader of the row must know, in words.

    ``median``, ``iqr``: of the row's times, in one unit. ``control``: the unpruned model's ratio to itself.
    ``weights``: denormal ones; ``activations``: share of denormal ones.
    """
    told = []
    if iqr > NOISY * median:
        told.append(f"noisy: the interquartile range is more than {100 * NOISY:g} % of the median")
    if control is not None and abs(control - 1) > CONTROL:
        told.append(f"noisy: the unpruned model against itself is {control:.2f}")
    if weights:
        told.append(f"{weights} weights are denormal")
    if activations is not None and activations > FEW:
        told.append(f"{100 * activations:.2g} % of the activations are denormal")
    return told


def joined(told: Iterable[str]) -> str:
    """Warnings as one cell."""
    return "; ".join(told)
