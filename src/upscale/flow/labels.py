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
    varying = _varying(labels)
    if len(varying) != 1:
        return None
    line = labels.movedim(varying[0], 0).flatten(1)[:, 0] if labels.ndim > 1 else labels
    return Moved(varying[0], line.numpy().astype(np.int64))


def _varying(labels: torch.Tensor) -> list[int]:
    """Dimensions along which labels change."""
    # What has stride 0 is the same all along: looking at its first index will do.
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return [d for d in range(labels.ndim) if labels.shape[d] > 1 and _varies(labels, d)]


def _varies(labels: torch.Tensor, dim: int) -> bool:
    return not bool((labels == labels.narrow(dim, 0, 1)).all())


@dataclass(frozen=True)
class Blocks:
    """One way to see channels that lie over several dimensions as blocks: ``positions[j]`` are the operand's channels
    at index ``j`` of ``dim``; ``flatten`` and ``permute`` as in :class:`upscale.flow.model.Split`."""

    dim: int
    positions: np.ndarray
    flatten: tuple[int, int] | None
    permute: tuple[int, ...] | None


def find_blocks(run: Run, shape: tuple[int, ...], dim: int, replay: Run | None) -> list[Blocks]:
    """All ways to see the moved channels as blocks that can be rebuilt when some blocks are gone.

    ``run``: the movement. ``replay``: the operator, if the movement is just that one. Blocks that lie together in the
    operand come first.
    """
    labels = run(channel_labels(shape, dim))
    varying = _varying(labels)
    if len(varying) < 2:
        return []
    elements = torch.arange(int(np.prod(shape)), dtype=torch.int32).view(shape)
    moved = run(elements)
    found = []
    for d in varying:
        positions = _rows(labels, d, varying)
        if positions is None:
            continue
        rebuilt = _rebuilt(elements, moved, dim, d, varying, positions)
        if rebuilt is not None:
            found.append(Blocks(d, positions, *rebuilt))
        elif replay is not None and _repeats(replay, elements, moved, dim, d, positions):
            found.append(Blocks(d, positions, None, None))
    return sorted(found, key=lambda b: int((np.diff(b.positions, axis=1) != 1).sum()))


def _rows(labels: torch.Tensor, dim: int, varying: list[int]) -> np.ndarray | None:
    """The channels at every index of ``dim``, each once; None where indices share channels."""
    for d in range(labels.ndim):
        if d not in varying:
            labels = labels.narrow(d, 0, 1)
    table = labels.movedim(dim, 0).flatten(1).numpy()
    rows = [np.unique(row) for row in table]
    if len({len(row) for row in rows}) != 1:
        return None
    positions = np.stack(rows).astype(np.int64)
    return positions if len(np.unique(positions)) == positions.size else None


def _rebuilt(
    elements: torch.Tensor, moved: torch.Tensor, dim: int, out: int, varying: list[int], positions: np.ndarray
) -> tuple[tuple[int, int] | None, tuple[int, ...]] | None:
    """How ``moved`` is made of the channels read: dimensions to flatten first, and the permutation after parting."""
    ways: list[tuple[tuple[int, int] | None, torch.Tensor, int]] = [(None, elements, dim)]
    if dim == 1 and elements.ndim > 3:  # (batch, channels, height, width)
        ways.append(((2, elements.ndim - 1), elements.flatten(2), 1))
    if dim == elements.ndim - 1 and elements.ndim > 3:  # (batch, height, width, channels)
        ways.append(((1, dim - 1), elements.flatten(1, dim - 1), 2))
    for flatten, flat, place in ways:
        permute = _permutation(flat, moved, place, out, varying, positions)
        if permute is not None:
            return flatten, permute
    return None


def _permutation(
    elements: torch.Tensor, moved: torch.Tensor, dim: int, out: int, varying: list[int], positions: np.ndarray
) -> tuple[int, ...] | None:
    """The permutation that makes ``moved`` of the channels read block by block and parted in two dimensions."""
    if moved.ndim != elements.ndim + 1 or len(varying) != 2:
        return None
    inner = varying[0] if varying[1] == out else varying[1]
    picked = elements.index_select(dim, torch.from_numpy(positions.reshape(-1))).unflatten(dim, positions.shape)
    places: dict[int, int] = {out: dim, inner: dim + 1}
    free = [d for d in range(picked.ndim) if d not in (dim, dim + 1)]
    for d in range(moved.ndim):
        if d in places or moved.shape[d] == 1:
            continue
        step = int(moved.select(d, 1).flatten()[0] - moved.flatten()[0])
        match = [f for f in free if picked.shape[f] > 1 and _step(picked, f) == step]
        if not match:
            return None
        places[d] = match[0]
        free.remove(match[0])
    for d in range(moved.ndim):
        if d not in places:
            places[d] = free.pop(0)
    permute = tuple(places[d] for d in range(moved.ndim))
    return permute if torch.equal(picked.permute(permute), moved) else None


def _step(elements: torch.Tensor, dim: int) -> int:
    return int(elements.select(dim, 1).flatten()[0] - elements.flatten()[0])


def _repeats(
    replay: Run, elements: torch.Tensor, moved: torch.Tensor, dim: int, out: int, positions: np.ndarray
) -> bool:
    """Whether the operator does the same to fewer blocks in another order."""
    fewer = positions[:0:-1]
    try:
        again = replay(elements.index_select(dim, torch.from_numpy(fewer.reshape(-1).copy())))
    except (RuntimeError, ValueError):
        return False
    return torch.equal(again, moved.flip(out).narrow(out, 0, len(fewer)))


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
