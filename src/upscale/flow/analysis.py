"""The forward pass: which channel stands at each index of each tensor."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import replace
from itertools import islice, product

import numpy as np
import torch
from torch.fx import Node

from ..program import Program
from .effects import (
    Aligned,
    Barrier,
    Channels,
    Concat,
    Contract,
    Effect,
    Folded,
    Mixing,
    Movement,
    Op,
    Opaque,
    Pad,
    PerChannel,
    Pointwise,
    is_tensor,
    size_of,
)
from .model import FlowNode, Link, Split
from .registry import find
from .rules_movement import getitem
from .tracking import Tracker
from .units import refine

MOST_CHOICES = 16  # ways to see the operands of one operator as blocks of channels, tried in turn


def analyse(program: Program) -> dict[Node, FlowNode]:
    """Flow of every node of a captured program, in graph order."""
    return _Analysis(program).run()


class _Analysis:
    """State of one forward pass: the flow found so far."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.flow: dict[Node, FlowNode] = {}
        self.shapes: dict[Node, tuple[int, ...]] = {}
        self.weight_uses: Counter[str] = Counter()
        self.tracker = Tracker(self.shape, self.channels)

    def run(self) -> dict[Node, FlowNode]:
        self._count_weight_uses()
        for node in self.program.graph.nodes:
            self.flow[node] = self._visit(node)
        return self.flow

    # -- facts rules ask for ------------------------------------------------------------------------------------

    def shape(self, node: Node) -> tuple[int, ...]:
        if node not in self.shapes:
            val = node.meta["val"]
            self.shapes[node] = tuple(size_of(s) for s in val.shape)
        return self.shapes[node]

    def channels(self, node: Node) -> Channels | None:
        found = self.flow.get(node)
        return found.channels if found is not None and found.kind != "list" else None

    def value(self, node: Node) -> torch.Tensor | None:
        return self.program.tensors[str(node.target)] if node.op == "get_attr" else None

    def _op(self, node: Node) -> Op:
        schema = getattr(node.target, "_schema", None)
        args: dict[str, object] = {}
        if schema is not None:
            for i, a in enumerate(schema.arguments):
                if i < len(node.args):
                    args[a.name] = node.args[i]
                else:
                    args[a.name] = node.kwargs.get(a.name, a.default_value if a.has_default_value() else None)
        return Op(node, args, self.shape, self.channels, self.value)

    def _count_weight_uses(self) -> None:
        """A weight used by two calls ties them in ways one pass cannot see: such layers are pinned."""
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                self.weight_uses[str(node.target)] += len(node.users)

    def _shared(self, *weights: Node | None) -> bool:
        return any(w is not None and self.weight_uses[str(w.target)] > 1 for w in weights)

    # -- one node -----------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> FlowNode:
        if node.op == "placeholder":
            return FlowNode(node, "opaque", Opaque())
        if node.op == "get_attr":
            return self._parameter(node)
        if node.op == "output":
            self._settle(node)
            return self._barrier(node, Barrier("model output", self._inputs(node), silent=True))
        if not is_tensor(node):
            return self._not_a_tensor(node)
        if node.target is operator.getitem:
            return self._pick(node)
        effect = find(self._op(node))
        if isinstance(effect, Movement):
            return self._flow_of(node, effect)
        self._part(node)
        self._settle(node)
        return self._flow_of(node, find(self._op(node)))

    def _flow_of(self, node: Node, effect: Effect) -> FlowNode:
        if any(self.channels(n) or self.tracker.is_scrambled(n) for n in self._inputs(node)):
            return self._dispatch(node, effect)
        return self._contract(node, effect) if isinstance(effect, Contract) else FlowNode(node, "opaque", effect)

    def _dispatch(self, node: Node, effect: Effect) -> FlowNode:
        handlers = {
            Contract: self._contract,
            Pointwise: self._pointwise,
            Aligned: self._aligned,
            Folded: self._folded,
            PerChannel: self._per_channel,
            Mixing: self._mixing,
            Movement: self._movement,
            Concat: self._concat,
            Pad: self._pad,
            Barrier: self._barrier,
        }
        handler = handlers.get(type(effect))
        return FlowNode(node, "opaque", effect) if handler is None else handler(node, effect)  # type: ignore[operator]

    def _inputs(self, node: Node) -> tuple[Node, ...]:
        return tuple(n for n in node.all_input_nodes if n in self.flow)

    def _parameter(self, node: Node) -> FlowNode:
        """A vector parameter is labelled along its only long dimension: its channels are those it meets."""
        shape = self.shape(node)
        long = [d for d, s in enumerate(shape) if s > 1]
        if len(long) != 1 or not self.program.tensors[str(node.target)].is_floating_point():
            return FlowNode(node, "opaque", Opaque())
        return FlowNode(node, "param", Opaque(), Channels(long[0], np.arange(shape[long[0]]), weak=True))

    def _not_a_tensor(self, node: Node) -> FlowNode:
        """Sizes and flags read no channel; an operator with several results is resolved where one is picked."""
        inputs = [n for n in self._inputs(node) if self.channels(n) is not None or self.tracker.is_scrambled(n)]
        val = node.meta.get("val")
        if not inputs or not isinstance(val, (list, tuple)):
            return FlowNode(node, "opaque", Opaque())  # a size: whatever the channels' order, it is the same
        effect = find(self._op(node))
        if isinstance(effect, Movement) and (channels := self.channels(effect.operand)) is not None:
            link = Link(effect.operand, channels.dim, np.arange(channels.size))
            picks = [user for user in node.users if user.target is operator.getitem]
            if all(self.tracker.moved(user, getitem(user), node) is not None for user in picks):
                return FlowNode(node, "list", effect, channels, (link,))
        if isinstance(effect, Movement):
            return FlowNode(node, "opaque", effect)  # each result is scrambled: see _pick
        self._settle(node)
        return self._barrier(node, Barrier("several results at once", self._inputs(node)))

    # -- effects ------------------------------------------------------------------------------------------------

    def _barrier(self, node: Node, effect: Barrier) -> FlowNode:
        whole = tuple((n, effect.ordered) for n in effect.operands if self.channels(n) is not None)
        return FlowNode(node, "barrier" if whole else "opaque", effect, whole=whole)

    def _refuse(self, node: Node, reason: str, silent: bool = False) -> FlowNode:
        return self._barrier(node, Barrier(reason, self._inputs(node), silent=silent))

    def _contract(self, node: Node, effect: Contract) -> FlowNode:
        if effect.weight.op != "get_attr" or (effect.bias is not None and effect.bias.op != "get_attr"):
            return self._refuse(node, "the weight is computed from the input")
        fresh = Channels(effect.out_dim, np.arange(self.shape(node)[effect.out_dim]))
        pinned = self._shared(effect.weight, effect.bias)
        if effect.operand is None:
            return FlowNode(node, "fresh", effect, fresh, pinned=pinned)
        assert effect.in_dim is not None
        channels = self.channels(effect.operand)
        if channels is not None and channels.dim == effect.in_dim:
            link = Link(effect.operand, effect.in_dim, np.arange(channels.size))
            return FlowNode(node, "fresh", effect, fresh, (link,), pinned=pinned)
        whole = () if channels is None else ((effect.operand, True),)
        size = self.shape(effect.weight)[effect.weight_in or 0] * (effect.groups if effect.weight_in == 1 else 1)
        link = Link(effect.operand, effect.in_dim, np.arange(size), anchored=True)
        return FlowNode(node, "fresh", effect, fresh, (link,), whole, pinned=pinned)

    def _pointwise(self, node: Node, effect: Pointwise) -> FlowNode:
        rank = len(self.shape(node))
        strong = [(n, c) for n in effect.operands if (c := self.channels(n)) is not None and not c.weak]
        carriers = [(n, c) for n, c in strong if c.size > 1 or self.shape(node)[c.dim + rank - len(self.shape(n))] == 1]
        if not carriers:
            return (
                self._weak_pointwise(node, effect)
                if not strong
                else self._refuse(node, "broadcasts one channel", silent=True)
            )
        dims = {c.dim + rank - len(self.shape(n)) for n, c in carriers}
        if len(dims) > 1:
            return self._refuse(node, "operands carry channels on different dimensions")
        dim = dims.pop()
        size = self.shape(node)[dim]
        links, whole = self._pair(effect.operands, rank, dim, size)
        units = refine([c.units for _, c in carriers])
        return FlowNode(node, "transit", effect, Channels(dim, units), links, whole)

    def _pair(
        self, operands: tuple[Node, ...], rank: int, dim: int, size: int
    ) -> tuple[tuple[Link, ...], tuple[tuple[Node, bool], ...]]:
        """How each operand of a broadcasting operator meets channels along ``dim`` of the result."""
        links, whole = [], []
        for n in operands:
            shape, channels = self.shape(n), self.channels(n)
            own = dim - (rank - len(shape))
            if own < 0 or (shape[own] == 1 and size > 1):  # the same value for every channel
                if channels is not None and not channels.weak:
                    whole.append((n, True))
            elif channels is not None and channels.dim == own:
                links.append(Link(n, own, np.arange(size)))
            elif size > 1 or channels is None:
                links.append(Link(n, own, np.arange(size), anchored=True))
                if channels is not None and not channels.weak:
                    whole.append((n, True))
        return tuple(links), tuple(whole)

    def _weak_pointwise(self, node: Node, effect: Pointwise) -> FlowNode:
        """Only parameters carry channels here: they stay together while they agree, else they are plain numbers."""
        rank = len(self.shape(node))
        weak = [(n, c) for n in effect.operands if (c := self.channels(n)) is not None]
        dims = {(c.dim + rank - len(self.shape(n)), c.size) for n, c in weak}
        others = [n for n in effect.operands if self.channels(n) is None and int(np.prod(self.shape(n))) > 1]
        if len(dims) != 1 or others:
            return FlowNode(node, "opaque", effect, whole=tuple((n, True) for n, _ in weak))
        dim, size = dims.pop()
        links, whole = self._pair(effect.operands, rank, dim, size)
        return FlowNode(node, "transit", effect, Channels(dim, np.arange(size), weak=True), links, whole)

    def _aligned(self, node: Node, effect: Aligned) -> FlowNode:
        size = self.shape(node)[effect.out_dim]
        links, whole, units, named = [], [], [], set()
        for n, dim in effect.operands:
            channels, own = self.channels(n), self.shape(n)[dim]
            named.add(n)
            carries = channels is not None and channels.dim == dim
            if own == 0 or size % own or (own == 1 and size > 1):
                whole += [(n, True)] if channels is not None else []
                continue
            positions = np.arange(size) // (size // own)
            links.append(Link(n, dim, positions, anchored=not carries))
            if channels is not None and not carries:
                whole.append((n, True))
            units.append(channels.units[positions] if carries and channels is not None else positions)
        if not any(not link.anchored for link in links) or len({link.operand for link in links}) != len(links):
            return self._refuse(node, "mixes channels")
        whole += self._stray(node, *named)
        out = Channels(effect.out_dim, refine(units))
        return FlowNode(node, "transit", effect, out, tuple(links), tuple(whole))

    def _folded(self, node: Node, effect: Folded) -> FlowNode:
        channels = self.channels(effect.operand)
        if channels is None or channels.dim != effect.dim or channels.unit_count != channels.size:
            return self._refuse(node, "folds another dimension than the channels'")
        link = Link(effect.operand, effect.dim, effect.positions)
        out = Channels(effect.out_dim, np.arange(len(effect.positions)))
        return FlowNode(node, "split", effect, out, (link,), split=Split(None, by_column=True))

    def _per_channel(self, node: Node, effect: PerChannel) -> FlowNode:
        channels = self.channels(effect.operand)
        if channels is None:
            return FlowNode(node, "opaque", effect, whole=self._stray(node))
        if channels.dim != effect.dim or self.shape(node)[effect.out_dim] != channels.size:
            return self._refuse(node, "works along another dimension than the channels'")
        pinned = self._shared(*(p for p, _ in effect.slices))
        if any(p.op != "get_attr" for p, _ in effect.slices):
            return self._refuse(node, "a weight is computed from the input")
        link = Link(effect.operand, effect.dim, np.arange(channels.size))
        units = channels.units
        out = Channels(effect.out_dim, units, channels.weak)
        return FlowNode(node, "transit", effect, out, (link,), self._stray(node, effect.operand), pinned=pinned)

    def _stray(self, node: Node, *known: Node) -> tuple[tuple[Node, bool], ...]:
        """Operands that carry channels but are not the one the effect speaks of: needed whole."""
        return tuple(
            (n, True)
            for n in self._inputs(node)
            if n not in known and n.op != "get_attr" and self.channels(n) is not None
        )

    def _mixing(self, node: Node, effect: Mixing) -> FlowNode:
        channels = self.channels(effect.operand)
        if channels is None:
            return FlowNode(node, "opaque", effect, whole=self._stray(node))
        if channels.dim != effect.dim or any(p.op != "get_attr" for p, _ in effect.slices):
            return self._refuse(node, "normalises along another dimension than the channels'")
        link = Link(effect.operand, effect.dim, np.arange(channels.size))
        pinned = effect.ordered or self._shared(*(p for p, _ in effect.slices))
        whole = ((effect.operand, pinned), *self._stray(node, effect.operand))
        return FlowNode(node, "transit", effect, Channels(effect.dim, channels.units), (link,), whole, pinned=pinned)

    def _pad(self, node: Node, effect: Pad) -> FlowNode:
        channels = self.channels(effect.operand)
        if channels is None:
            return FlowNode(node, "opaque", effect)
        d = channels.dim
        low, high = effect.before[d], effect.after[d]
        if not low and not high:
            link = Link(effect.operand, d, np.arange(channels.size))
            return FlowNode(node, "transit", effect, channels, (link,))
        spatial = any(effect.before[i] or effect.after[i] for i in range(len(effect.before)) if i != d)
        if spatial or low < 0 or high < 0:
            return self._refuse(node, "pads channels and space at once")
        positions = np.concatenate([np.full(low, -1), np.arange(channels.size), np.full(high, -1)])
        units = np.arange(len(positions)) if channels.unit_count == channels.size else None
        if units is None:
            return self._refuse(node, "pads channels that were merged with space")
        link = Link(effect.operand, d, positions)
        return FlowNode(node, "concat", effect, Channels(d, units), (link,), fill=effect.value)

    def _concat(self, node: Node, effect: Concat) -> FlowNode:
        known = [(n, c) for n in effect.operands if (c := self.channels(n)) is not None and not c.weak]
        known = known or [(n, c) for n in effect.operands if (c := self.channels(n)) is not None]
        dims = {c.dim for _, c in known}
        if len(dims) != 1:
            return self._refuse(node, "operands carry channels on different dimensions")
        dim = dims.pop()
        if effect.new_dim or dim != effect.dim:
            return self._side_by_side(node, effect, dim, known)
        links, units, offset, unit = [], [], 0, 0
        total = self.shape(node)[dim]
        for n in effect.operands:
            channels, size = self.channels(n), self.shape(n)[dim]
            positions = np.full(total, -1)
            positions[offset : offset + size] = np.arange(size)
            own = channels is not None and channels.dim == dim
            links.append(Link(n, dim, positions, anchored=not own))
            part = channels.units if own and channels is not None else np.arange(size)
            units.append(part + unit)
            unit += int(part.max()) + 1 if len(part) else 0
            offset += size
        return FlowNode(
            node, "concat", effect, Channels(dim, np.concatenate(units)), tuple(links), self._crossed(effect, dim)
        )

    def _crossed(self, effect: Concat, dim: int) -> tuple[tuple[Node, bool], ...]:
        return tuple((n, True) for n in effect.operands if (c := self.channels(n)) is not None and c.dim != dim)

    def _side_by_side(self, node: Node, effect: Concat, dim: int, known: list[tuple[Node, Channels]]) -> FlowNode:
        """Concatenation along tokens, space or batch: the operands' channels pair up."""
        size = known[0][1].size
        if any(self.shape(n)[dim] != size for n in effect.operands):
            return self._refuse(node, "operands have different numbers of channels")
        links = []
        for n in effect.operands:
            channels = self.channels(n)
            own = channels is not None and channels.dim == dim
            links.append(Link(n, dim, np.arange(size), anchored=not own))
        out = dim + 1 if effect.new_dim and effect.dim <= dim else dim
        units = refine([c.units for _, c in known])
        return FlowNode(node, "transit", effect, Channels(out, units), tuple(links), self._crossed(effect, dim))

    # -- movement -----------------------------------------------------------------------------------------------

    def _pick(self, node: Node) -> FlowNode:
        """One result of an operator that returns several; the operator is a barrier unless all can be named."""
        parent = node.args[0]
        assert isinstance(parent, Node)
        listed = self.flow[parent]
        if listed.kind == "list":
            found = self.tracker.moved(node, getitem(node), parent)
            assert found is not None  # checked when the list was visited
            return found
        if listed.kind == "opaque" and isinstance(listed.effect, Movement):
            return self._movement(node, getitem(node), parent)
        return FlowNode(node, "opaque", Opaque())

    def _movement(self, node: Node, effect: Movement, through: Node | None = None) -> FlowNode:
        channels = self.channels(self.tracker.ancestor(effect.operand))
        if channels is None:
            return FlowNode(node, "opaque", effect)
        if channels.size == 1:
            return self._refuse(node, "moves a single channel", silent=True)
        found = self.tracker.moved(node, effect)
        if found is None or (through is not None and found.kind != "select"):
            self.tracker.scramble(node, effect, through)
            return FlowNode(node, "opaque", effect)
        return replace(found, whole=self._stray(node, found.links[0].operand))

    def _part(self, node: Node) -> None:
        """``node`` computes with tensors whose channels lie over several dimensions. Where one of these holds blocks of
        channels (attention heads) that ``node`` can work with, the blocks are the channels from here on."""
        scrambled = [n for n in self._inputs(node) if self.tracker.is_scrambled(n)]
        if not scrambled:
            return
        before = {n: self.flow[n] for n in scrambled}
        options = [[replace(s, effect=before[n].effect) for s in self.tracker.splits(n)] for n in scrambled]
        for choice in islice(product(*options), MOST_CHOICES):
            self.flow.update(zip(scrambled, choice, strict=True))
            effect = find(self._op(node))
            found = self._flow_of(node, effect) if not isinstance(effect, Barrier) else None
            if found is not None and found.kind not in ("barrier", "opaque") and not found.whole:
                for n in scrambled:
                    self.tracker.unscramble(n)
                return
        self.flow.update(before)

    def _settle(self, node: Node) -> None:
        """``node`` computes with a tensor whose channels lie over several dimensions: the movement that spread them
        then reads all of them, in order."""
        for head in self.tracker.heads_behind(self._inputs(node)):
            effect = self.flow[head].effect
            if isinstance(effect, Movement):
                reason = "its channels lie over several dimensions where they are used"
                self.flow[head] = self._barrier(head, Barrier(reason, (effect.operand,)))
