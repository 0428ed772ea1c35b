"""Residual streams: a channel that nobody reads any more need not be carried on.

The sum of a stream and a branch has fewer live channels than the stream where some are read before it only. Either the
sum keeps them all the same, and the branch computes them for nothing, or it reads a part of the stream: a slice, where
the order allows it, else a copy.
"""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from ..flow import Flow, FlowNode, Link
from ..flow.effects import Contract, Pointwise
from .cost import Setting, memory_of
from .reads import is_worth


def shrinking_sums(flow: Flow, setting: Setting) -> frozenset[Node]:
    """The elementwise operators that keep their live channels only, since what they save is more than a gather."""
    return frozenset(node for node in flow.nodes if node in flow.used and _saves(flow, setting, node))


def _saves(flow: Flow, setting: Setting, node: Node) -> bool:
    f = flow.nodes[node]
    links = [k for k in f.links if (node, k.operand) not in flow.replaced]
    if not isinstance(f.effect, Pointwise) or f.pinned or f.twins is not None or f.merge != (1, 1) or len(links) < 2:
        return False
    if f.kind != "transit" or f.channels is None or any(not _is_plain(flow, k) for k in links):
        return False
    live = flow.live[node]
    held = [flow.live[k.operand][k.positions] for k in links]
    spare = np.stack(held).any(0) & ~live  # channels that the sum would keep for the stream's sake
    if not spare.any():
        return False
    saved, spent = (
        int(spare.sum()) * memory_of(node, f.channels.dim, setting.examples).channel * setting.rates.copy,
        0.0,
    )
    for link, mine in zip(links, held, strict=True):
        saved += int((spare & ~mine).sum()) * _price(flow, setting, link.operand)
        if bool((spare & mine).any()):
            spent += setting.reading(link.operand, link.dim, f).gather(int(live.sum()))
    return is_worth(saved, spent)


def _is_plain(flow: Flow, link: Link) -> bool:
    """Whether a link pairs every channel with one of the operand's."""
    operand = flow.nodes[link.operand]
    return (
        not link.anchored and link.positions.ndim == 1 and bool((link.positions >= 0).all()) and operand.kind != "param"
    )


def _price(flow: Flow, setting: Setting, node: Node) -> float:
    """Nanoseconds of computing one channel of a branch: its layer's row, and the unary operators behind it."""
    total = 0.0
    f = flow.nodes[node]
    while _is_unary(f) and len(node.users) == 1:
        assert f.channels is not None
        total += memory_of(node, f.channels.dim, setting.examples).channel * setting.rates.copy
        node = f.links[0].operand
        f = flow.nodes[node]
    if isinstance(f.effect, Contract) and f.kind == "fresh" and len(node.users) == 1 and f.effect.weight_in is not None:
        inputs = int(flow.demands[node].inputs.sum()) if node in flow.demands else 0
        total += setting.computing(node, f.effect, 1) * inputs / f.groups
    return total


def _is_unary(f: FlowNode) -> bool:
    return f.kind == "transit" and len(f.links) == 1 and not f.links[0].anchored and f.channels is not None
