"""Parts of a network between two joins, each of which reads one tensor and writes one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..program import Program, last_uses
from .geometry import is_contraction

__all__ = ["Segment", "find_segments"]

_aten = torch.ops.aten
_JOINS = (_aten.add.Tensor, _aten.cat.default, _aten.mul.Tensor)
_MOST = 4  # contractions in a row without a join


@dataclass(frozen=True, eq=False)
class Segment:
    """``nodes`` are the calls from the one after ``start`` to ``end``, in order; ``start`` is all they read."""

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]


def find_segments(program: Program) -> list[Segment]:
    """The segments of ``program`` in order, none where its values never pass through one tensor.

    A segment ends where one tensor is all that is alive, after a join or after several contractions, and after the
    activation that follows; the last one at the model's output. What reads anything else from outside is left out.
    """
    found: list[Segment] = []
    nodes: list[fx.Node] = []
    start: fx.Node | None = None
    for node, alive in _alive(program):
        if node.op == "placeholder":
            start = node if start is None else start
        if node.op != "call_function":
            continue
        nodes.append(node)
        layers = sum(map(is_contraction, nodes))
        joined = layers >= _MOST or any(n.target in _JOINS for n in nodes)
        if alive == {node} and (_is_last(node) or (layers and joined and _branches(node))):
            segment = None if start is None or not layers else Segment(start, node, tuple(nodes))
            if segment is not None and _is_closed(segment):
                found.append(segment)
            start, nodes = node, []
    return found


def _alive(program: Program) -> list[tuple[fx.Node, set[fx.Node]]]:
    """Each node with the values that are still needed when it is done."""
    dying = last_uses(program.graph)
    alive: set[fx.Node] = set()
    found = []
    for node in program.graph.nodes:
        if node.op in ("placeholder", "call_function") and isinstance(node.meta.get("val"), Tensor) and node.users:
            alive = alive | {node}
        alive = alive - set(dying.get(node, ()))
        found.append((node, alive))
    return found


def _branches(node: fx.Node) -> bool:
    """Whether ``node`` is the last of a chain: what reads it is no activation."""
    return len(node.users) > 1 or not any(_is_pointwise(user) for user in node.users)


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and len(node.all_input_nodes) == 1


def _is_last(node: fx.Node) -> bool:
    return all(user.op == "output" for user in node.users)


def _is_closed(segment: Segment) -> bool:
    inside = {segment.start, *segment.nodes}
    return all(used.op == "get_attr" or used in inside for node in segment.nodes for used in node.all_input_nodes)
