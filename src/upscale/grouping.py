"""Groups of channels for constrained masks: what the graph ties together, and what shared weights tie."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from .ranking import Group

__all__ = ["Segments", "tied_groups"]

# Per group of channels that go together: (layer, side, index of each of the group's channels in that layer).
# An index tensor is int64 of shape (channels,), or (channels, k) where a channel fills up to k places; -1 is
# "not there".
Segments = list[list[tuple[str, str, Tensor]]]


class _Sets:
    """Disjoint sets of 0, 1, ..., n - 1; the smallest member stands for its set."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low


def tied_groups(segments: Segments, side: str, layers: Container[str]) -> list[Group]:
    """The groups of one side's channels, restricted to ``layers``.

    A layer that is called twice, on different tensors, is in two segments. It has one weight for both, so
    the channels that meet in one place of it are made one channel, and their segments one group.
    """
    starts = [0]
    for segment in segments:
        starts.append(starts[-1] + (len(segment[0][2]) if segment else 0))
    channels, groups = _Sets(starts[-1]), _Sets(len(segments))
    first: dict[tuple[str, int], tuple[int, int]] = {}  # a place of a layer -> the segment and channel found first
    for s, segment in enumerate(segments):
        for layer, member_side, index in segment:
            if member_side == side and layer in layers:
                for k, places in enumerate(index.reshape(len(index), -1).tolist()):
                    for place in places:
                        if place >= 0:
                            group, channel = first.setdefault((layer, place), (s, starts[s] + k))
                            channels.join(channel, starts[s] + k)
                            groups.join(group, s)
    return _gathered(first, channels, groups)


def _gathered(first: dict[tuple[str, int], tuple[int, int]], channels: _Sets, groups: _Sets) -> list[Group]:
    """Collect the places of every layer by group and channel."""
    found: dict[int, dict[str, dict[int, list[int]]]] = {}
    for (layer, place), (segment, channel) in first.items():
        by_layer = found.setdefault(groups.root(segment), {})
        by_layer.setdefault(layer, {}).setdefault(channels.root(channel), []).append(place)
    result = []
    for _, by_layer in sorted(found.items()):
        everyone = sorted({channel for rows in by_layer.values() for channel in rows})
        members = {layer: _index([rows.get(c, []) for c in everyone]) for layer, rows in by_layer.items()}
        result.append(Group(members, len(everyone)))
    return result


def _index(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64)
