"""Labels: an integer per element saying which channel stands there. Moving labels tells where channels go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Moved:
    """Where a movement put the channels: ``positions[j]`` is the operand's channel at index ``j`` of ``dim``."""

    dim: int
    positions: np.ndarray


def channel_labels(shape: tuple[int, ...], dim: int) -> torch.Tensor:
    """Labels 0..C-1 along ``dim``, the same everywhere else, at no memory: the other dimensions have stride 0."""
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return torch.arange(shape[dim], dtype=torch.int32).view(view).expand(shape)


def summarise(labels: torch.Tensor) -> Moved | None:
    """The one dimension along which labels change, or None where there are several or none."""
    varying = [d for d in range(labels.ndim) if labels.shape[d] > 1 and labels.stride(d) != 0 and _varies(labels, d)]
    if len(varying) != 1:
        return None
    line = labels.movedim(varying[0], 0).flatten(1)[:, 0] if labels.ndim > 1 else labels
    return Moved(varying[0], line.numpy().astype(np.int64))


def _varies(labels: torch.Tensor, dim: int) -> bool:
    return not bool((labels == labels.narrow(dim, 0, 1)).all())


def is_selection(run: Run, shape: tuple[int, ...], dim: int, moved: Moved) -> bool:
    """Whether the movement does nothing but pick (and reorder) channels: checked element by element."""
    expected = list(shape)
    expected[dim] = len(moved.positions)
    if moved.dim != dim:
        return False
    count = int(np.prod(shape))
    elements = torch.arange(count, dtype=torch.int32).view(shape)
    out = run(elements)
    if list(out.shape) != expected:
        return False
    return torch.equal(out, elements.index_select(dim, torch.from_numpy(moved.positions)))


def merge_pattern(positions: np.ndarray, channels: int) -> tuple[int, int] | None:
    """(outer, inner) if positions are each channel ``inner`` times in a row, the whole ``outer`` times over.

    That is what merging the channel dimension with its neighbours gives: ``(outer, C, inner)`` flattened.
    """
    if channels == 0 or len(positions) % channels:
        return None
    changes = np.flatnonzero(np.diff(positions))
    inner = int(changes[0]) + 1 if len(changes) else len(positions)
    if len(positions) % (channels * inner):
        return None
    outer = len(positions) // (channels * inner)
    pattern = np.tile(np.repeat(np.arange(channels), inner), outer)
    return (outer, inner) if np.array_equal(pattern, positions) else None
