"""Looking through tensors that exist on paper only: which stored tensor holds a given channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from ..flow import Flow, Link


@dataclass(frozen=True)
class Located:
    """For each wanted channel the index of its tensor in ``tensors`` (-1: a constant) and its position there."""

    tensors: tuple[Node, ...]
    which: np.ndarray
    position: np.ndarray
    fill: np.ndarray


def choose_virtual(flow: Flow, fuse: bool) -> frozenset[Node]:
    """Selections are read through, but by readers along another dimension. A concatenation is fused into its reader
    where it has just one."""
    virtual = set()
    across = {k.operand for n, f in flow.nodes.items() if n in flow.used for k in f.links if k.anchored}
    for node, f in flow.nodes.items():
        if f.kind == "select" and node not in across:
            virtual.add(node)
        elif f.kind == "concat" and fuse and len(node.users) == 1 and node in flow.used:
            user = flow.nodes[next(iter(node.users))]
            if user.kind in ("fresh", "transit") and any(k.operand is node and not k.anchored for k in user.links):
                virtual.add(node)
    return frozenset(virtual)


def locate(flow: Flow, virtual: frozenset[Node], link: Link, positions: np.ndarray) -> Located:
    """Find the stored tensors behind ``positions`` of a link's operand."""
    tensors: list[Node] = []
    which = np.full(len(positions), -1)
    position = np.zeros(len(positions), dtype=np.int64)
    fill = np.zeros(len(positions))
    stop = virtual if not link.anchored else frozenset()
    _descend(flow, stop, link.operand, positions, np.arange(len(positions)), tensors, which, position, fill)
    return Located(tuple(tensors), which, position, fill)


def _descend(
    flow: Flow,
    virtual: frozenset[Node],
    node: Node,
    positions: np.ndarray,
    slots: np.ndarray,
    tensors: list[Node],
    which: np.ndarray,
    position: np.ndarray,
    fill: np.ndarray,
) -> None:
    if node not in virtual:
        if node.op == "call_function" and node not in flow.used:
            return  # dead, and kept by a tie alone: nobody looks at the value, so a constant will do
        if node not in tensors:
            tensors.append(node)
        which[slots] = tensors.index(node)
        position[slots] = positions
        return
    f = flow.nodes[node]
    fill[slots] = f.fill
    for link in f.links:
        here = link.positions[positions]
        mine = here >= 0
        if mine.any():
            stop = virtual if not link.anchored else frozenset()
            _descend(flow, stop, link.operand, here[mine], slots[mine], tensors, which, position, fill)
