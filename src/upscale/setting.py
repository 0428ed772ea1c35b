"""From what the user says about a target and what the example shows of it to the setting that a plan is made for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import InputError
from .plan import Setting, Target, guessed_rates, on_backend
from .program import Program

__all__ = ["checked_target", "device_of", "in_format", "setting_for"]


def checked_target(target: Target | None) -> Target:
    """Raises InputError for anything but a Target."""
    if target is None:
        return Target()
    if not isinstance(target, Target):
        raise InputError(f"target must be an upscale.Target, such as upscale.Target(batch=8), not {target!r}")
    return target


def in_format(example: Any, target: Target) -> Any:
    """The example in the target's memory format: its images, (batch, channels, height, width)."""
    if target.memory_format is None:
        return example
    memory_format = torch.channels_last if target.memory_format == "channels_last" else torch.contiguous_format

    def converted(value: Any) -> Any:
        is_image = isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()
        return value.contiguous(memory_format=memory_format) if is_image else value

    return pytree.tree_map(converted, example)


def setting_for(program: Program, target: Target) -> Setting:
    """Rates of the target's device and backend, and how many examples are planned for to each one captured.

    Layers become matrix products only for a target that names the batch or the memory format: who does not say how the
    model will run gets modules that are called as modules. And only for one that names the batch may calls take longer
    than the work: an example of one image is no promise that all calls are of one.
    """
    captured = next((t.shape[0] for t in program.inputs if t.dim() > 0), 1)
    planned = target.batch or program.batch or captured
    rates = target.rates or guessed_rates(target.device or device_of(program.tensors.values()))
    named = target.batch is not None or target.memory_format is not None
    rates = on_backend(rates, target.backend)
    if target.batch is None:
        rates = replace(rates, issue=0.0)
    return Setting(rates, planned / captured, target.round_to, named)


def device_of(tensors: Iterable[torch.Tensor]) -> str:
    """``"cuda"`` or ``"cpu"``, the kinds of devices that have rates."""
    return "cuda" if any(t.device.type == "cuda" for t in tensors) else "cpu"
