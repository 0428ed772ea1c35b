"""The forward pass: which channel stands at each index of each tensor."""

from __future__ import annotations

import operator
from dataclasses import replace
from itertools import islice, product

import numpy as np
import torch
from torch.fx import Node
from torch.fx.node import map_arg

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
from .meeting import Meeting
from .model import FlowNode, Link
from .registry import find
from .rules_movement import getitem
from .tracking import Tracker
from .twins import is_shared, settle_twins, twin_key

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
        self.tracker = Tracker(self.shape, self.channels)
        self.meeting = Meeting(self.shape, self.channels, self._refuse)

    def run(self) -> dict[Node, FlowNode]:
        for node in self.program.graph.nodes:
            self.flow[node] = self._visit(node)
        settle_twins(self.flow)
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
        """The value of a parameter, a buffer, or what is computed from an index buffer alone."""
        if node.op == "get_attr":
            return self.program.tensors[str(node.target)]
        if node.op != "call_function" or not is_tensor(node) or node.meta["val"].is_floating_point():
            return None
        inputs = {n: self.value(n) for n in node.all_input_nodes}
        if not inputs or any(value is None for value in inputs.values()):
            return None
        args, kwargs = map_arg(node.args, inputs.__getitem__), map_arg(node.kwargs, inputs.__getitem__)
        result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return result

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
            Pointwise: self.meeting.pointwise,
            Aligned: self.meeting.aligned,
            Folded: self.meeting.folded,
            PerChannel: self._per_channel,
            Mixing: self._mixing,
            Movement: self._movement,
            Concat: self.meeting.concat,
            Pad: self.meeting.pad,
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
        weights = (effect.weight, effect.bias)
        twins = twin_key(node, weights)
        pinned = twins is None and is_shared(weights)
        if effect.operand is None:
            return FlowNode(node, "fresh", effect, fresh, pinned=pinned, twins=twins)
        assert effect.in_dim is not None
        channels = self.channels(effect.operand)
        if channels is not None and channels.dim == effect.in_dim:
            link = Link(effect.operand, effect.in_dim, np.arange(channels.size))
            return FlowNode(node, "fresh", effect, fresh, (link,), pinned=pinned, twins=twins)
        whole = () if channels is None else ((effect.operand, True),)
        size = self.shape(effect.weight)[effect.weight_in or 0] * (effect.groups if effect.weight_in == 1 else 1)
        link = Link(effect.operand, effect.in_dim, np.arange(size), anchored=True)
        return FlowNode(node, "fresh", effect, fresh, (link,), whole, pinned=pinned, twins=twins)

    def _per_channel(self, node: Node, effect: PerChannel) -> FlowNode:
        channels = self.channels(effect.operand)
        if channels is None:
            return FlowNode(node, "opaque", effect, whole=self.meeting.stray(node))
        if channels.dim != effect.dim or self.shape(node)[effect.out_dim] != channels.size:
            return self._refuse(node, "works along another dimension than the channels'")
        slices = [p for p, _ in effect.slices]
        twins = twin_key(node, slices)
        pinned = twins is None and is_shared(slices)
        if any(p.op != "get_attr" for p, _ in effect.slices):
            return self._refuse(node, "a weight is computed from the input")
        link = Link(effect.operand, effect.dim, np.arange(channels.size))
        units = channels.units
        out = Channels(effect.out_dim, units, channels.weak)
        whole = self.meeting.stray(node, effect.operand)
        return FlowNode(node, "transit", effect, out, (link,), whole, pinned=pinned, twins=twins)

    def _mixing(self, node: Node, effect: Mixing) -> FlowNode:
        channels = self.channels(effect.operand)
        if channels is None:
            return FlowNode(node, "opaque", effect, whole=self.meeting.stray(node))
        if channels.dim != effect.dim or any(p.op != "get_attr" for p, _ in effect.slices):
            return self._refuse(node, "normalises along another dimension than the channels'")
        link = Link(effect.operand, effect.dim, np.arange(channels.size))
        pinned = effect.ordered or is_shared([p for p, _ in effect.slices])
        whole = ((effect.operand, pinned), *self.meeting.stray(node, effect.operand))
        return FlowNode(node, "transit", effect, Channels(effect.dim, channels.units), (link,), whole, pinned=pinned)

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
        return replace(found, whole=self.meeting.stray(node, found.links[0].operand))

    def _part(self, node: Node) -> None:
        """``node`` computes with tensors whose channels lie over several dimensions. Where one of these holds blocks of
        channels (attention heads) that ``node`` can work with, the blocks are the channels from here on."""
        scrambled = [n for n in self._inputs(node) if self.tracker.is_scrambled(n)]
        if not scrambled:
            return
        for ways in islice(product(*map(self._ways, scrambled)), MOST_CHOICES):
            choice = {n: f for way in ways for n, f in way.items()}
            before = {n: self.flow[n] for n in choice}
            self.flow.update(choice)
            effect = find(self._op(node))
            found = self._flow_of(node, effect) if not isinstance(effect, Barrier) else None
            if found is not None and found.kind not in ("barrier", "opaque") and not self._needs_whole(found):
                for n in choice:
                    self.tracker.unscramble(n)
                return
            self.flow.update(before)

    def _ways(self, node: Node) -> list[dict[Node, FlowNode]]:
        """All ways to give a scrambled tensor channels: blocks of its own, or blocks further up, moved from there."""
        chain = [node]
        while isinstance(effect := self.flow[chain[0]].effect, Movement) and self.tracker.is_scrambled(effect.operand):
            chain.insert(0, effect.operand)
        ways = [{node: split} for split in self._splits(node)]
        for place, first in enumerate(chain[:-1] if not ways else []):
            found = (self._followed(first, split, chain[place + 1 :]) for split in self._splits(first))
            ways += [way for way in found if way is not None]
        return ways

    def _splits(self, node: Node) -> list[FlowNode]:
        return [replace(split, effect=self.flow[node].effect) for split in self.tracker.splits(node)]

    def _followed(self, first: Node, split: FlowNode, rest: list[Node]) -> dict[Node, FlowNode] | None:
        """What the movements after ``first`` do to its blocks; None where they lose track. Nothing is changed."""
        before = {n: self.flow[n] for n in (first, *rest)}
        scrambled, heads = dict(self.tracker.scrambled), dict(self.tracker.heads)
        way = {first: split}
        try:
            self.flow[first] = split
            for n in (first, *rest):
                self.tracker.unscramble(n)
            for n in rest:
                effect = before[n].effect
                if n.target is operator.getitem or not isinstance(effect, Movement):
                    return None
                way[n] = self.flow[n] = self._movement(n, effect)
            return way if self.channels(rest[-1]) is not None else None
        finally:
            self.flow.update(before)
            self.tracker.scrambled, self.tracker.heads = scrambled, heads

    def _needs_whole(self, flow: FlowNode) -> bool:
        """Whether the node needs all channels of an activation."""
        return any(c is not None and not c.weak for c in (self.channels(n) for n, _ in flow.whole))

    def _settle(self, node: Node) -> None:
        """``node`` computes with a tensor whose channels lie over several dimensions: the movement that spread them
        then reads all of them, in order."""
        for head in self.tracker.heads_behind(self._inputs(node)):
            effect = self.flow[head].effect
            if isinstance(effect, Movement):
                reason = "its channels lie over several dimensions where they are used"
                self.flow[head] = self._barrier(head, Barrier(reason, (effect.operand,)))
