"""What a :class:`MaskingManager` is given: checked, or guessed where nothing is given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .channels import channel_count
from .errors import InputError, UnsupportedModelError

__all__ = [
    "IMAGE_SIZES",
    "Call",
    "as_call",
    "checked_amount",
    "checked_model",
    "guessed_inputs",
    "one_of",
    "penalty",
    "whole",
]

IMAGE_SIZES = (224, 64, 32)


def checked_model(model: nn.Module) -> nn.Module:
    """The module whose layers are masked: wrappers of compilation and data parallelism are looked through."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("a ScriptModule cannot be masked: give the Python model it was made from")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return checked_model(model.module)
    original = getattr(model, "_orig_mod", None)  # torch.compile's wrapper
    return checked_model(original) if isinstance(original, nn.Module) else model


def one_of(what: str, value: Any, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise InputError(f"{what} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    return value


def whole(what: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{what} must be a whole number of at least {least}, not {value!r}")
    return value


def penalty(what: str, value: Any, or_else: str = "") -> float:
    """A number that is finite and not negative. ``or_else``: what else ``what`` may be, for the message."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        raise InputError(f"{what} must be {or_else}a number, zero or more, not {value!r}")
    return float(value)


def checked_amount(amount: Any) -> float:
    if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise InputError(f"amount must be a number with 0 <= amount < 1, not {amount!r}")
    share = float(amount)
    if not 0 <= share < 1:  # NaN fails this too
        raise InputError(f"amount must be at least 0 and less than 1, not {amount!r}")
    return share


@dataclass(frozen=True, eq=False)
class Call:
    """An example call with positional and keyword arguments both."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Call):
        return example_inputs.args, example_inputs.kwargs
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def guessed_inputs(layers: Mapping[str, nn.Module]) -> Iterable[tuple[Tensor]]:
    """Images (volumes, sequences, vectors) with as many channels as the first layer reads, two to a batch."""
    first = next(iter(layers.values()), None)
    if first is None:
        return
    channels = channel_count(first, "input")
    spatial = len(getattr(first, "kernel_size", ()))
    weight = next(first.parameters())
    sizes: Iterable[tuple[int, ...]] = [()] if spatial == 0 else [(size,) * spatial for size in IMAGE_SIZES]
    if spatial == 3:
        sizes = [(8, 64, 64), (16, 112, 112), (32, 32, 32)]
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        example = torch.randn(2, channels, *size, generator=generator)
        yield (example.to(weight.device, weight.dtype),)
