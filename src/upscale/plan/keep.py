"""Which channels every stored tensor keeps, and which tensors must agree about it.

Two relations tie channels of different tensors: *order* (they pair somewhere, so they stand in the same order
everywhere) and *keep* (they pair in an operator that cannot read a subset cheaply, so they stay or go together).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch.fx import Node

from ..flow import Flow, FlowNode, Link
from ..flow.effects import Contract, Mixing, reads_values
from ..flow.groups import grouped_inputs, grouped_rows
from .cost import memory_of
from .rounding import Rounding
from .sources import choose_virtual, locate
from .union import DisjointSets

# An operator that leaves so many times less of a channel is read from behind it: there a gather costs next to nothing,
# while in front of it it costs as much as the operator itself.
_SMALLER = 16


@dataclass(frozen=True)
class Kept:
    """``order[n]``/``units[n]``: the order class and the kept flag of every unit of stored tensor ``n``."""

    virtual: frozenset[Node]
    stored: tuple[Node, ...]
    order: dict[Node, np.ndarray]
    kept: dict[Node, np.ndarray]
    forced: frozenset[Node]  # all channels, in the original order
    hoisted: frozenset[Node]  # unary transits that read a subset of their operand
    shrinking: frozenset[Node]  # transits of several operands that may
    ordered: frozenset[Node]  # what is kept stands in the original order
    grouped: dict[Node, np.ndarray]  # grouped convolutions: the inputs they read (bool)
    whole: frozenset[Node]  # layers that read all that is there
    rounded: dict[Node, np.ndarray]  # units that are kept for the sake of a round number only


def decide_kept(
    flow: Flow,
    fuse: bool,
    hoist: bool,
    joins_whole: bool = False,
    whole: frozenset[Node] = frozenset(),
    rounding: Rounding | None = None,
    shrinking: frozenset[Node] = frozenset(),
) -> Kept:
    """Close liveness under everything that ties tensors together.

    ``fuse``: a concatenation with one reader exists on paper only. ``hoist``: a unary chain reads what its readers
    want. ``joins_whole``: a concatenation takes all that its operands hold. ``whole``: layers that read all that is
    there, whatever they need of it. ``rounding``: how many channels layers make, and chains read, who need fewer.
    ``shrinking``: elementwise operators that keep their live channels only, whatever their operands hold.
    """
    return _Decision(flow, fuse, hoist, joins_whole, whole, rounding, shrinking).run()


class _Decision:
    def __init__(
        self,
        flow: Flow,
        fuse: bool,
        hoist: bool,
        joins_whole: bool,
        whole: frozenset[Node],
        rounding: Rounding | None,
        shrinking: frozenset[Node],
    ) -> None:
        self.flow, self.shrinking = flow, shrinking
        self.hoist, self.joins_whole, self.whole, self.rounding = hoist, joins_whole, whole, rounding
        self.virtual = choose_virtual(flow, fuse)
        self.stored = [
            n for n, f in flow.nodes.items() if f.channels is not None and n in flow.used and n not in self.virtual
        ]
        self.base: dict[Node, int] = {}
        total = 0
        for n in self.stored:
            self.base[n] = total
            total += self._channels(n).unit_count
        self.order, self.ties = DisjointSets(total), DisjointSets(total)
        self.forced: set[Node] = set()
        self.hoisted: set[Node] = set()
        self.ordered: set[Node] = set()
        self.grouped: dict[Node, np.ndarray] = {}
        self.twins: dict[str, Node] = {}
        self.wants: dict[Node, list[np.ndarray | None]] = {n: [] for n in self.stored}  # None: whatever it keeps

    def _channels(self, node: Node):  # type: ignore[no-untyped-def]
        return self.flow.nodes[node].channels

    def run(self) -> Kept:
        for node, f in reversed(self.flow.nodes.items()):
            if node not in self.flow.used:
                continue
            if node in self.virtual:
                continue
            self._whole(f)
            if f.twins is not None:
                self._join_twins(f)
            if f.kind == "fresh":
                self._contract(f)
            elif f.kind in ("transit", "list"):
                self._transit(f)
            elif f.kind == "split":
                self._want(f.links[0], np.ones(len(self.flow.live[node]), dtype=bool), tie=True, reader=f)
            elif f.kind in ("concat", "select"):
                for link in f.links:
                    whole = self.joins_whole and f.kind == "concat"
                    self._want(link, np.ones_like(self.flow.live[node]) if whole else self.flow.live[node], whole, f)
        return self._result()

    def _join_twins(self, f: FlowNode) -> None:
        """Calls that share a weight keep the same channels in the same order."""
        assert f.twins is not None
        first = self.twins.setdefault(f.twins, f.node)
        every = np.arange(self._channels(f.node).size)
        for joined in (self.order, self.ties):
            joined.join(self._slots(first, every), self._slots(f.node, every))
        self.ordered.add(f.node)

    # -- readers ------------------------------------------------------------------------------------------------

    def _whole(self, f: FlowNode) -> None:
        """Operands needed whole, in order, keep everything where it is (and what a selection of them stands for)."""
        if f.pinned and f.node in self.base:
            self.forced.add(f.node)
        for operand, ordered in f.whole:
            if operand in self.base:
                self.wants[operand].append(None)
                if ordered:
                    self.forced.add(operand)
            elif operand in self.virtual and (channels := self._channels(operand)) is not None:
                link = Link(operand, channels.dim, np.arange(channels.size))
                self._want(link, np.ones(channels.size, dtype=bool), tie=False, reader=None)
        if f.kind in ("opaque", "barrier") and reads_values(f.node):
            for n in set(f.node.all_input_nodes) - {operand for operand, _ in f.whole}:
                if n in self.base:
                    self.wants[n].append(None)
                    self.forced.add(n)

    def _contract(self, f: FlowNode) -> None:
        assert isinstance(f.effect, Contract)
        for link in f.links:
            self._want(link, self.flow.demands[f.node].inputs, tie=f.node in self.whole, reader=None)
            if f.pinned and not link.anchored and link.operand in self.base:
                self.forced.add(link.operand)  # it reads everything, in order
            if f.groups > 1:
                self.ordered.update(n for n in (f.node, link.operand) if n in self.base)

    def _transit(self, f: FlowNode) -> None:
        node, live = f.node, self.flow.live[f.node]
        links = [k for k in f.links if (node, k.operand) not in self.flow.replaced]
        if self._can_hoist(f, links):
            self.hoisted.add(node)
            self._want(links[0], live, tie=False, reader=f)
            return
        for link in links:
            wanted = self.flow.partial.get((node, link.operand), np.ones(len(live), dtype=bool))
            if node in self.shrinking:
                self._want(link, wanted & live, tie=False, reader=f)
            else:
                self._want(link, wanted, tie=True, reader=f)

    def _can_hoist(self, f: FlowNode, links: list[Link]) -> bool:
        """A transit reads just what its readers read, where they all read the same: their reads become whole."""
        if (
            not self.hoist
            or f.pinned
            or f.twins is not None
            or len(links) != 1
            or links[0].anchored
            or f.merge != (1, 1)
        ):
            return False
        if isinstance(f.effect, Mixing) or f.whole or f.kind == "list" or f.node in self.forced:
            return False
        if self.flow.nodes[links[0].operand].kind == "list":
            return False
        if self._channels(f.node).unit_count != len(self.flow.live[f.node]) or self._reduces(f, links[0].operand):
            return False
        live, wants = self.flow.live[f.node], self.wants[f.node]
        return bool(wants) and all(w is not None and np.array_equal(w, live) for w in wants)

    def _reduces(self, f: FlowNode, operand: Node) -> bool:
        before, after = self._channels(operand), self._channels(f.node)
        return _SMALLER * memory_of(f.node, after.dim, 1).channel <= memory_of(operand, before.dim, 1).channel

    def _want(self, link: Link, wanted: np.ndarray, tie: bool, reader: FlowNode | None) -> None:
        """Record that positions ``wanted`` (of the reader's side) of a link are read; ``tie``: all that is kept."""
        mine, theirs = pairs_of(link, wanted)
        found = locate(self.flow, self.virtual, link, theirs)
        for i, source in enumerate(found.tensors):
            if source not in self.base or (link.anchored and source is link.operand):
                continue
            here = found.which == i
            if tie:
                self.wants[source].append(None)
            else:
                want = np.zeros(self._channels(source).size, dtype=bool)
                want[found.position[here]] = True
                self.wants[source].append(want)
            if reader is None or reader.node not in self.base:
                continue
            one, other = self._slots(reader.node, mine[here]), self._slots(source, found.position[here])
            self.order.join(one, other)
            if tie:
                self.ties.join(one, other)

    def _slots(self, node: Node, positions: np.ndarray) -> np.ndarray:
        slots: np.ndarray = self.base[node] + self._channels(node).units[positions]
        return slots

    # -- result -------------------------------------------------------------------------------------------------

    def _settle_lists(self) -> None:
        """A list of tensors and what is picked from it stand in one order: no read parts them."""
        for node, f in self.flow.nodes.items():
            if f.kind != "list":
                continue
            together = {n for n in (node, *node.users) if n in self.base}
            for members in (self.forced, self.ordered):
                if together & members:
                    members |= together

    def _result(self) -> Kept:
        self._settle_lists()
        flags = np.zeros(len(self.ties.parent), dtype=bool)
        for n in self.stored:
            flags[self._slots(n, np.flatnonzero(self.flow.live[n]))] = True
            if n in self.forced:
                flags[self._slots(n, np.arange(self._channels(n).size))] = True
        self._spread(flags)
        needed = flags.copy()
        while self._round_up(flags):
            self._spread(flags)
        roots, order = self.ties.roots(), self.order.roots()
        count = {n: self._channels(n).unit_count for n in self.stored}
        return Kept(
            self.virtual,
            tuple(self.stored),
            {n: order[self.base[n] : self.base[n] + count[n]] for n in self.stored},
            {n: flags[roots[self.base[n] : self.base[n] + count[n]]] for n in self.stored},
            frozenset(self.forced),
            frozenset(self.hoisted),
            self.shrinking,
            frozenset(self.ordered),
            self.grouped,
            self.whole,
            {n: (flags & ~needed)[self.base[n] : self.base[n] + count[n]] for n in self.stored},
        )

    def _round_up(self, flags: np.ndarray) -> bool:
        """Keep the first channels that could go, where a layer or a hoisted chain has an odd number left."""
        changed = False
        for node in self.stored if self.rounding is not None else ():
            f = self.flow.nodes[node]
            if node in self.hoisted or (f.kind == "fresh" and f.groups == 1):
                assert self.rounding is not None
                mine = flags[self.base[node] : self.base[node] + self._channels(node).unit_count]
                needed = int(mine.sum())
                spare = np.flatnonzero(~mine)[: self.rounding.outputs(node, needed, len(mine)) - needed]
                mine[spare] = True
                changed |= bool(len(spare))
        return changed

    def _spread(self, flags: np.ndarray) -> None:
        """Kept by one of a tied set: kept by all; and what a hoisted read or a concatenation takes must be there."""
        roots = self.ties.roots()
        while True:
            before = int(flags.sum())
            np.maximum.at(flags, roots, flags)
            flags |= flags[roots]
            for node in self.stored:
                f = self.flow.nodes[node]
                if node in self.hoisted or node in self.shrinking or f.kind in ("concat", "select"):
                    units = np.flatnonzero(flags[self.base[node] : self.base[node] + self._channels(node).unit_count])
                    mine = np.isin(self._channels(node).units, units)
                    for link in f.links:
                        self._need(link, mine & self.flow.partial.get((node, link.operand), mine), flags)
                if f.kind == "fresh" and f.groups > 1 and not f.pinned:
                    self._fill_groups(f, flags)
            if int(flags.sum()) == before:
                return

    def _fill_groups(self, f: FlowNode, flags: np.ndarray) -> None:
        """A grouped convolution keeps equally many channels of every group, on both sides."""
        slots = self._slots(f.node, np.arange(self._channels(f.node).size))
        rows = grouped_rows(flags[slots], f.groups)
        flags[slots] |= rows
        self.grouped[f.node] = grouped_inputs(self.flow.demands[f.node].inputs, rows, f.groups)
        self._need(f.links[0], self.grouped[f.node], flags)

    def _need(self, link: Link, wanted: np.ndarray, flags: np.ndarray) -> None:
        found = locate(self.flow, self.virtual, link, pairs_of(link, wanted)[1])
        for i, source in enumerate(found.tensors):
            if source in self.base and not link.anchored:
                flags[self._slots(source, found.position[found.which == i])] = True


def pairs_of(link: Link, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the reader and of the operand that meet in a link, where the reader's are ``wanted``."""
    table = link.positions.reshape(len(link.positions), -1)
    mine = np.repeat(np.arange(len(table)), table.shape[1])
    theirs = table.reshape(-1)
    meet = (theirs >= 0) & wanted[mine]
    return mine[meet], theirs[meet]
