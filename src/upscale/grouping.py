"""Groups of channels for constrained masks: what the graph ties together, and what shared weights tie."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from .plan.union import DisjointSets
from .ranking import Group

__all__ = ["Segments", "places_by_row", "tied_groups"]

# Per group of channels that go together: (layer, side, index of each of the group's channels in that layer).
# An index tensor is int64 of shape (channels,), or (channels, k) where a channel fills up to k places; -1 is
# "not there".
Segments = list[list[tuple[str, str, Tensor]]]


def tied_groups(segments: Segments, side: str, layers: Collection[str]) -> list[Group]:
    """The groups of one side's channels, restricted to ``layers``.

    A layer that is called twice, on different tensors, is in two segments. It has one weight for both, so
    the channels that meet in one place of it are made one channel, and their segments one group.
    """
    names, layer, place, channel, segment = _entries(segments, side, layers)
    if not len(layer):
        return []
    _, first, met = np.unique(layer * (1 + place.max()) + place, return_index=True, return_inverse=True)
    channels, groups = DisjointSets(1 + int(channel.max())), DisjointSets(len(segments))
    channels.join(channel, channel[first][met])
    groups.join(segment, segment[first][met])
    first = np.sort(first)  # every place of a layer once, where it was found first
    layer, place = layer[first], place[first]
    channel, group = channels.find(channel[first]), groups.find(segment[first])
    result = []
    for root in np.unique(group):
        mine = np.flatnonzero(group == root)
        everyone = np.unique(channel[mine])
        members = {}
        for number in dict.fromkeys(layer[mine].tolist()):
            its = mine[layer[mine] == number]
            rows = np.searchsorted(everyone, channel[its])
            members[names[number]] = torch.from_numpy(places_by_row(rows, place[its], len(everyone)))
        result.append(Group(members, len(everyone)))
    return result


def _entries(
    segments: Segments, side: str, layers: Collection[str]
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The layers' names, and for each place of each of them: layer, place, channel, segment, all as numbers."""
    names: dict[str, int] = {}
    parts: list[list[np.ndarray]] = [[], [], [], []]
    start = 0
    for number, members in enumerate(segments):
        for name, member_side, index in members:
            if member_side == side and name in layers:
                table = index.reshape(len(index), -1).numpy()
                row, column = np.nonzero(table >= 0)
                here = np.full(len(row), names.setdefault(name, len(names)))
                for part, values in zip(
                    parts, (here, table[row, column], start + row, np.full(len(row), number)), strict=True
                ):
                    part.append(values)
        start += len(members[0][2]) if members else 0
    layer, place, channel, segment = (np.concatenate(part or [np.empty(0, int)]) for part in parts)
    return list(names), layer, place, channel, segment


def places_by_row(rows: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """A table of ``count`` rows with the places of each (int64), in the order given; -1 where a row has fewer."""
    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], places[order]
    column = np.arange(len(rows)) - np.searchsorted(rows, rows)
    table = np.full((count, 1 + int(column.max(initial=0))), -1, dtype=np.int64)
    table[rows, column] = places
    return table
