"""Are two models the same, and how much of what was masked is gone? Independent of the library's own verification."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import Side, channel_count, channel_dim, is_layer

Masked = Mapping[Side, Mapping[str, Tensor]]  # per side and layer, the masked channels


def leaves(value: Any, path: str = "output") -> Iterator[tuple[str, Any]]:
    """``(path, leaf)`` of a nested result: tuples, lists, mappings, dataclasses (``transformers``' outputs too)."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


class DifferentError(Exception):
    """Two results that cannot be the same: another structure, shape, dtype, or non-finite entries elsewhere."""


def relative_error(expected: Any, actual: Any) -> float:
    """Largest ``max|a - b| / max|a|`` over the tensors of two nested results. Raises ``DifferentError``."""
    left, right = list(leaves(expected)), list(leaves(actual))
    if [path for path, _ in left] != [path for path, _ in right]:
        raise DifferentError(f"the structure of the output differs: {_paths(left)} became {_paths(right)}")
    worst = 0.0
    for (path, a), (_, b) in zip(left, right, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            worst = max(worst, _tensor_error(path, a.detach(), b.detach()))
        elif type(a) is not type(b) or (isinstance(a, (bool, int, float, str)) and a != b):
            raise DifferentError(f"{path}: {type(a).__name__} {str(a)[:40]} became {type(b).__name__} {str(b)[:40]}")
    return worst


def _paths(found: list[tuple[str, Any]]) -> str:
    return ", ".join(path for path, _ in found[:4]) + (", ..." if len(found) > 4 else "")


def _tensor_error(path: str, a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise DifferentError(f"{path}: {a.dtype} {tuple(a.shape)} became {b.dtype} {tuple(b.shape)}")
    if not (a.is_floating_point() or a.is_complex()):
        if not torch.equal(a, b):
            raise DifferentError(f"{path}: the values of a tensor of {a.dtype} differ")
        return 0.0
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        raise DifferentError(f"{path}: NaN or infinite values are in other places")
    if not bool(finite.any()):
        return 0.0
    difference, scale = float((a[finite] - b[finite]).abs().max()), float(a[finite].abs().max())
    return difference / scale if scale else (float("inf") if difference else 0.0)


def tells(expected: Any) -> bool:
    """Whether any float output is finite somewhere and not zero everywhere: otherwise equality says nothing."""
    floats = [leaf for _, leaf in leaves(expected) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(bool((torch.isfinite(leaf) & (leaf != 0)).any()) for leaf in floats)


def masked_count(masked: Masked) -> int:
    """Masked (weight, channel) pairs."""
    return sum(len(channels) for layers in masked.values() for channels in layers.values())


def removed_share(before: nn.Module, after: nn.Module, masked: Masked) -> float | None:
    """Of the masked channels, how many the exported layers lack: at most all of them, layer by layer."""
    total = masked_count(masked)
    if not total:
        return None
    layers_before = dict(before.named_modules(remove_duplicate=False))
    layers_after = dict(after.named_modules(remove_duplicate=False))
    removed = 0
    for side, layers in masked.items():
        for name, channels in layers.items():
            layer = layers_before[name]
            gone = channel_count(layer, side) - _channels_left(layer, layers_after.get(name), side)
            removed += max(0, min(gone, len(channels)))
    return removed / total


def _channels_left(before: nn.Module, after: nn.Module | None, side: Side) -> int:
    """Channels of the exported layer; one that is gone has none, one emitted as a bare weight is read off its shape."""
    if after is not None and is_layer(after):
        return channel_count(after, side)
    weight, old = getattr(after, "weight", None), before.weight
    if not isinstance(weight, Tensor):
        return 0
    assert isinstance(old, Tensor)
    if weight.ndim != old.ndim:
        return channel_count(before, side)
    dim, _ = channel_dim(before, side)
    return channel_count(before, side) * weight.shape[dim] // old.shape[dim]
