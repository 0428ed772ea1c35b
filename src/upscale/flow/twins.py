"""Calls that share a weight: one layer called twice. They keep the same channels, so that one weight serves all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node

from .model import FlowNode


def is_shared(parameters: Sequence[Node | None]) -> bool:
    """Whether any of these tensors is used by more than one call."""
    return any(p is not None and len(p.users) > 1 for p in parameters)


def twin_key(node: Node, parameters: Sequence[Node | None]) -> str | None:
    """A name for all calls like ``node`` that use the same parameters for the same; None where one of the parameters
    is also used otherwise (a tied embedding)."""
    present = [p for p in parameters if p is not None]
    if not is_shared(present):
        return None
    alike = all(_alike(node, user) for p in present for user in p.users)
    return str(present[0].target) if alike else None


def _alike(node: Node, other: Node) -> bool:
    """Whether two calls are of one operator with the same tensors of the model in the same places."""
    if other.target is not node.target or len(other.args) != len(node.args):
        return False
    pairs = zip(node.args, other.args, strict=True)
    return all(a is b for a, b in pairs if _is_of_the_model(a) or _is_of_the_model(b))


def _is_of_the_model(argument: object) -> bool:
    return isinstance(argument, Node) and argument.op == "get_attr"


def settle_twins(flow: dict[Node, FlowNode]) -> None:
    """Twins of which one cannot follow (grouped, flattened, ordered, no layer here) keep all their channels, as do all
    the others."""
    groups: dict[str, list[FlowNode]] = {}
    for f in flow.values():
        if f.twins is not None:
            groups.setdefault(f.twins, []).append(f)
    for members in groups.values():
        shapes = {(f.kind, len(f.channels.units)) for f in members if f.channels is not None}
        alone = _callers(members) <= {f.node for f in members}
        if len(shapes) != 1 or not alone or not all(_follows(f) for f in members):
            for f in members:
                flow[f.node] = replace(f, twins=None, pinned=True)


def _callers(members: Sequence[FlowNode]) -> set[Node]:
    """All calls that use a tensor of the model that several calls use."""
    tensors = {n for f in members for n in f.node.all_input_nodes if _is_of_the_model(n)}
    return {user for n in tensors if len(n.users) > 1 for user in n.users}


def _follows(f: FlowNode) -> bool:
    channels = f.channels
    return (
        f.kind in ("fresh", "transit")
        and not f.pinned
        and f.groups == 1
        and channels is not None
        and channels.unit_count == channels.size
    )
