"""From what the user says about a target and what the example shows of it to the setting that a plan is made for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import InputError
from .plan import Setting, Target, rates_for
from .program import Program

__all__ = ["checked_target", "in_format", "setting_for"]


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
    """Rates of the target's device and backend, and how many examples are planned for to each one captured."""
    captured = next((t.shape[0] for t in program.inputs if t.dim() > 0), 1)
    planned = target.batch or program.batch or captured
    if target.device is None:
        device = next((t.device.type for t in program.tensors.values()), "cpu")
        target = replace(target, device="cuda" if device == "cuda" else "cpu")
    return Setting(rates_for(target), planned / captured, target.round_to)
