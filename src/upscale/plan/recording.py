"""Spaces as plain data: from the planner's order classes to channels, producers and readers by name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
from torch.fx import Node

from ..flow import Flow, FlowNode, Link
from ..flow.effects import Contract, reads_values
from ..program import module_path
from .keep import Kept, pairs_of
from .shared import Port, Space, SpaceReader
from .sources import locate
from .union import DisjointSets

#: Kinds of nodes whose channels begin elsewhere.
_PASSING = ("transit", "select", "split", "concat", "list")


def record_spaces(flow: Flow, kept: Kept, spaces: tuple[np.ndarray, ...]) -> tuple[Space, ...]:
    """``spaces``: the order classes that stay, space by space, each in its chosen order. Those without a producer and
    those without a reader are left out."""
    return _Recorder(flow, kept, spaces).run()


class _Recorder:
    def __init__(self, flow: Flow, kept: Kept, spaces: tuple[np.ndarray, ...]) -> None:
        self.flow, self.kept, self.spaces = flow, kept, spaces
        self.steps = {node: step for step, node in enumerate(flow.nodes)}
        self.home, self.number = _numbered(flow, kept, spaces)
        self.sizes = np.bincount(self.home[self.number >= 0], minlength=len(spaces))
        self.producers: dict[int, list[Port]] = defaultdict(list)
        self.readers: dict[int, list[SpaceReader]] = defaultdict(list)
        self.behind: set[Node] = set()  # hoisted chains that are shown as the read of the layer after them

    def run(self) -> tuple[Space, ...]:
        self._find_producers()
        for node, f in self.flow.nodes.items():
            if node in self.flow.used and node not in self.kept.virtual:
                for link, positions in self._reads_of(node, f):
                    self._record(f, f, link, positions)
        for node in self.kept.hoisted - self.behind:
            f = self.flow.nodes[node]
            self._record(f, f, f.links[0], f.links[0].positions[self._kept_positions(node)])
        shared = sorted(
            (number for number in self.producers if self.readers[number]),
            key=lambda number: (self.producers[number][0].step, number),
        )
        names = self._names(shared)
        return tuple(self._space(number, names[number]) for number in shared)

    def _space(self, number: int, name: str) -> Space:
        readers = sorted(self.readers[number], key=lambda r: (r.step, r.tensor))
        return Space(
            name,
            int(self.sizes[number]),
            tuple(self.number[self.spaces[number]].tolist()),
            tuple(self.producers[number]),
            tuple(readers),
        )

    def _names(self, shared: list[int]) -> dict[int, str]:
        """The first producer's layer, with a number where several spaces begin in it."""
        first = {number: self.producers[number][0].layer for number in shared}
        many, seen = Counter(first.values()), Counter[str]()
        names = {}
        for number, layer in first.items():
            seen[layer] += 1
            names[number] = f"{layer} #{seen[layer]}" if many[layer] > 1 else layer
        return names

    # -- producers ----------------------------------------------------------------------------------------------

    def _find_producers(self) -> None:
        for node in self.kept.stored:
            f = self.flow.nodes[node]
            if f.kind in _PASSING:
                continue
            homes = np.unique(self.home[self.kept.order[node][self.kept.kept[node]]])
            for number in homes[homes >= 0].tolist():
                self.producers[number].append(Port(node.name, _layer(f), self.steps[node]))

    # -- readers ------------------------------------------------------------------------------------------------

    def _reads_of(self, node: Node, f: FlowNode) -> Iterator[tuple[Link, np.ndarray]]:
        """Links that ``node`` reads channels through, with the operand's positions it needs."""
        if isinstance(f.effect, Contract) and f.kind == "fresh" and f.links:
            wanted = self.kept.grouped.get(node, self.flow.demands[node].inputs)
            for link in f.links[:1]:
                if (node, link.operand) not in self.flow.replaced and not link.anchored:
                    yield link, link.positions[wanted | f.pinned]
        elif node in self.kept.shrinking:
            for link in f.links:
                if not link.anchored and (node, link.operand) not in self.flow.replaced:
                    yield link, self._shrunk(node, link)
        for operand in self._whole(f):
            channels = self.flow.nodes[operand].channels
            if channels is not None:
                yield Link(operand, channels.dim, np.arange(channels.size)), np.arange(channels.size)

    def _shrunk(self, node: Node, link: Link) -> np.ndarray:
        mine = self._kept_positions(node)
        part = self.flow.partial.get((node, link.operand))
        return link.positions[mine if part is None else mine[part[mine]]]

    def _whole(self, f: FlowNode) -> list[Node]:
        """Operands that are read whole and through no link."""
        found = [operand for operand, _ in f.whole]
        if f.kind in ("opaque", "barrier") and reads_values(f.node):
            found += [n for n in f.node.all_input_nodes if n in self.flow.nodes]
        linked = {link.operand for link in f.links} if isinstance(f.effect, Contract) else set()
        return [n for n in dict.fromkeys(found) if n not in linked]

    def _kept_positions(self, node: Node) -> np.ndarray:
        return np.flatnonzero(self.kept.kept[node][self._units(node)])

    def _record(self, reader: FlowNode, via: FlowNode, link: Link, positions: np.ndarray) -> None:
        """File what ``reader`` takes of every tensor behind a link of ``via``: itself, or a hoisted chain before it."""
        place = locate(self.flow, self.kept.virtual, link, positions[positions >= 0].reshape(-1))
        for i, source in enumerate(place.tensors):
            here = place.position[place.which == i]
            if source in self.kept.hoisted:
                behind = self.flow.nodes[source]
                self.behind.add(source)
                self._record(reader, behind, behind.links[0], behind.links[0].positions[here])
            elif source in self.kept.order:
                self._file(reader, (via.node.name, link.operand.name), source, here)

    def _file(self, reader: FlowNode, key: tuple[str, str], source: Node, positions: np.ndarray) -> None:
        held = np.unique(self.kept.order[source][self.kept.kept[source]])
        mine = np.intersect1d(_classes(self.flow, self.kept, source, positions), held)
        if reader.node in self.kept.shrinking | self.kept.hoisted and len(mine) == len(held):
            return  # what only passes all of its operand on picks nothing
        for number in np.unique(self.home[mine]).tolist():
            wanted, present = self._numbers(mine, number), self._numbers(held, number)
            self.readers[number].append(
                SpaceReader(
                    reader.node.name,
                    _layer(reader),
                    self.steps[reader.node],
                    source.name,
                    key,
                    wanted,
                    None if len(present) == len(self.spaces[number]) else present,
                )
            )

    def _numbers(self, classes: np.ndarray, space: int) -> tuple[int, ...]:
        return tuple(np.sort(self.number[classes[self.home[classes] == space]]).tolist())

    def _units(self, node: Node) -> np.ndarray:
        channels = self.flow.nodes[node].channels
        assert channels is not None
        return channels.units


def _numbered(flow: Flow, kept: Kept, spaces: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Each order class's space (-1: none) and its number there, counted in original order (-1: it has no number).

    A channel that goes is counted once, whatever tensors held it, in the space of the channel that stays before it in
    its producer's tensor.
    """
    total = 1 + max((int(o.max()) for o in kept.order.values() if len(o)), default=0)
    home, number = np.full(total, -1), np.full(total, -1)
    for i, classes in enumerate(spaces):
        home[classes] = i
    stays = home >= 0
    originals = _originals(flow, kept, total)
    stands = np.zeros(total, dtype=bool)
    stands[originals[stays]] = True
    counted = stays | (~stands[originals] & (originals == np.arange(total)))
    nodes = sorted(kept.stored, key=lambda n: flow.nodes[n].kind in _PASSING)
    for node in nodes:
        _bring_home(home, kept.order[node])
    members = np.flatnonzero(counted & (home >= 0))
    members = members[np.lexsort((_first_met(nodes, kept, originals)[members], home[members]))]
    number[members] = np.arange(len(members)) - np.searchsorted(home[members], home[members])
    return home, number


def _originals(flow: Flow, kept: Kept, total: int) -> np.ndarray:
    """One class for all classes that are the same channel in the original network: one that goes does not pair."""
    same = DisjointSets(total)
    for node in kept.stored:
        f = flow.nodes[node]
        for link in f.links if f.kind in _PASSING else ():
            mine, theirs = pairs_of(link, np.ones(len(link.positions), dtype=bool))
            place = locate(flow, kept.virtual, link, theirs)
            for i, source in enumerate(place.tensors):
                if source in kept.order and not (link.anchored and source is link.operand):
                    here = place.which == i
                    theirs_here = _classes(flow, kept, source, place.position[here])
                    same.join(_classes(flow, kept, node, mine[here]), theirs_here)
    return same.roots()


def _bring_home(home: np.ndarray, classes: np.ndarray) -> None:
    """Put the classes of one tensor that have no space where the nearest before them, or the first, has its own."""
    known = np.flatnonzero(home[classes] >= 0)
    if len(known):
        nearest = known[np.maximum(np.searchsorted(known, np.arange(len(classes)), side="right") - 1, 0)]
        gone = home[classes] < 0
        home[classes[gone]] = home[classes[nearest[gone]]]


def _first_met(nodes: list[Node], kept: Kept, originals: np.ndarray) -> np.ndarray:
    """A number per class by which classes sort as they stand in the original, producers one after the other."""
    first, met = np.full(len(originals), np.iinfo(np.int64).max), 0
    for node in nodes:
        same = originals[kept.order[node]]
        np.minimum.at(first, same, met + np.arange(len(same)))
        met += len(same)
    return first[originals]


def _classes(flow: Flow, kept: Kept, node: Node, positions: np.ndarray) -> np.ndarray:
    channels = flow.nodes[node].channels
    assert channels is not None
    return kept.order[node][channels.units[positions]]


def _layer(f: FlowNode) -> str:
    """What a user calls a node: the layer's path, the parameter's, or the module that made it."""
    node = f.node
    if isinstance(f.effect, Contract) and f.effect.weight.op == "get_attr":
        return _owner(str(f.effect.weight.target)) or module_path(node) or str(f.effect.weight.target)
    if node.op == "get_attr":
        return str(node.target)
    if node.op in ("placeholder", "output"):
        return "model output" if node.op == "output" else f"input {node.name}"
    operator = str(node.target).removeprefix("aten.").split(".")[0]
    return f"{path} ({operator})" if (path := module_path(node)) else operator


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]
