"""Segments: the channels that layers share, and which layers write and read them.

All layers on one segment must agree for the segment to shrink without any copy: that is what constrained pruning
asks for (Wan et al. 2023, section 3).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node

from .capture import capture
from .flow import Flow, Link, analyse_flow
from .flow.effects import Contract
from .grouping import places_by_row
from .plan.keep import Kept, decide_kept
from .plan.sources import locate
from .plan.union import DisjointSets


@dataclass(frozen=True)
class Port:
    """One side of one layer on a segment: ``classes[c]`` is the shared channel that the layer's channel ``c`` is."""

    node: Node
    layer: str
    side: str  # "input" or "output"
    classes: np.ndarray


@dataclass(frozen=True)
class Sharing:
    """All ports of a model and, per shared channel, its segment and whether somebody reads it whatever is masked."""

    ports: tuple[Port, ...]
    segment: np.ndarray
    pinned: np.ndarray


def sharing(flow: Flow) -> Sharing:
    """Who shares which channels with whom, when nothing may be copied."""
    kept = decide_kept(flow, fuse=False, hoist=False)
    total = 1 + max((int(o.max()) for o in kept.order.values() if len(o)), default=0)
    joined = DisjointSets(total)
    for classes in kept.order.values():
        if len(classes):
            joined.join(classes, np.full(len(classes), classes[0]))
    ports = tuple(
        port for node, f in flow.nodes.items() if isinstance(f.effect, Contract) for port in _ports(flow, kept, node)
    )
    return Sharing(ports, joined.roots(), pinned_classes(flow, kept, total))


def _ports(flow: Flow, kept: Kept, node: Node) -> list[Port]:
    f = flow.nodes[node]
    if f.kind != "fresh" or node not in kept.order or f.pinned or f.groups > 1 or f.twins is not None:
        return []
    assert isinstance(f.effect, Contract)
    name = str(f.effect.weight.target).removesuffix(".weight")
    found = [Port(node, name, "output", kept.order[node])]
    for link in f.links:
        if not link.anchored:
            found.append(Port(node, name, "input", classes_behind(flow, kept, link)))
    return found


def classes_behind(flow: Flow, kept: Kept, link: Link) -> np.ndarray:
    """The order class behind each position of a link; -1 where there is none."""
    place = locate(flow, kept.virtual, link, link.positions)
    classes = np.full(len(link.positions), -1)
    for i, source in enumerate(place.tensors):
        channels = flow.nodes[source].channels
        if source in kept.order and channels is not None:
            here = place.which == i
            classes[here] = kept.order[source][channels.units[place.position[here]]]
    return classes


def pinned_classes(flow: Flow, kept: Kept, total: int) -> np.ndarray:
    """Channels read by something that reads all of them: they cannot go, whatever is masked."""
    pinned = np.zeros(total, dtype=bool)
    for node, f in flow.nodes.items():
        if node in kept.forced and node in kept.order:
            pinned[kept.order[node]] = True
        # One group's channels could not go without the other groups', nor one call's without its twins'.
        tied = [link.operand for link in f.links if not link.anchored] if f.groups > 1 or f.twins else []
        if tied and node in kept.order:
            pinned[kept.order[node]] = True
        for operand in (*(n for n, _ in f.whole), *tied):
            channels = flow.nodes[operand].channels
            if channels is not None and node in flow.used:
                classes = classes_behind(flow, kept, Link(operand, channels.dim, np.arange(channels.size)))
                pinned[classes[classes >= 0]] = True
    return pinned


def segments(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> list[list[tuple[str, str, Tensor]]]:
    """The groups of channels that constrained masks must choose together.

    Each group is a list of (layer, "input" or "output", index): ``index[k]`` holds the layer's channels that are the
    group's ``k``-th channel (int64, one column per repetition, -1 for none). Channels that a barrier, a model output
    or a normalisation over channels reads are in no group.
    """
    return groups_of(analyse_flow(capture(model, args, kwargs), partial=False))


def groups_of(flow: Flow) -> list[list[tuple[str, str, Tensor]]]:
    """The same of an analysed graph."""
    shared = sharing(flow)
    members: dict[int, list[Port]] = defaultdict(list)
    for port in shared.ports:
        for root in np.unique(shared.segment[port.classes[port.classes >= 0]]).tolist():
            members[root].append(port)
    result = []
    for root, ports in members.items():
        channels = np.flatnonzero((shared.segment == root) & ~shared.pinned)
        channels = np.intersect1d(channels, np.concatenate([p.classes for p in ports]))
        if len(channels):
            result.append([(p.layer, p.side, _index(p.classes, channels)) for p in ports])
    return result


def _index(classes: np.ndarray, channels: np.ndarray) -> Tensor:
    """For every shared channel the positions of a layer that hold it."""
    positions = np.flatnonzero(np.isin(classes, channels))
    return torch.from_numpy(places_by_row(np.searchsorted(channels, classes[positions]), positions, len(channels)))
