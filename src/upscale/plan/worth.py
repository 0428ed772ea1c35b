"""Layers that are better left as they were: where every way of picking their channels costs more than it saves.

A layer that reads one stored tensor decides by itself (:func:`~upscale.plan.reads.widest_worth`). Here are those that
read through a chain of unary operators, or a concatenation that exists on paper only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from ..flow import Flow
from ..flow.effects import Contract
from .cost import ReadCost, Setting, memory_of
from .keep import Kept
from .reads import is_worth


@dataclass(frozen=True)
class Copied:
    """A read that copies: what it costs, by which rates, how many channels its sources hold, and how many it takes."""

    price: float
    cost: ReadCost
    sizes: tuple[int, ...]
    taken: int


def dearer_than_whole(flow: Flow, kept: Kept, copied: Mapping[Node, Copied], setting: Setting) -> frozenset[Node]:
    """The layers that would rather read all channels that their sources hold, with zero weights."""
    found: set[Node] = set()
    for node, read in copied.items():
        layers = _layers_behind(flow, kept, node)
        if layers is None:
            continue
        joined = read.cost.join(len(read.sizes), sum(read.sizes)) if len(read.sizes) > 1 else 0.0
        spent = (sum(read.sizes) - read.taken) * sum(_price(flow, kept, n, setting) for n in _behind(kept, node))
        if is_worth(read.price - joined, spent):
            found |= layers
    return frozenset(found)


def _behind(kept: Kept, node: Node) -> list[Node]:
    """``node`` and what follows it, up to and with the first operators that are no hoisted chain."""
    nodes = [node]
    for n in nodes:
        if n in kept.hoisted:
            nodes += [user for user in n.users if user not in nodes]
    return nodes


def _layers_behind(flow: Flow, kept: Kept, node: Node) -> set[Node] | None:
    """The layers that read ``node``, through hoisted operators only; None where somebody else does too."""
    layers = set()
    for n in _behind(kept, node):
        f = flow.nodes[n]
        plain = isinstance(f.effect, Contract) and f.kind == "fresh" and f.groups == 1
        if plain and not f.pinned and f.twins is None and n in flow.used:
            layers.add(n)
        elif n not in kept.hoisted:
            return None
    return layers


def _price(flow: Flow, kept: Kept, node: Node, setting: Setting) -> float:
    """Nanoseconds of one more channel."""
    f = flow.nodes[node]
    if isinstance(f.effect, Contract):
        units = kept.kept[node].sum() if node in kept.kept else len(flow.live[node])
        return setting.computing(node, f.effect, int(units))
    assert f.channels is not None
    return memory_of(node, f.channels.dim, setting.examples).channel * setting.rates.copy
