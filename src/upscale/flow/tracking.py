"""Following channels through pure data movement."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch.fx import Node

from . import labels as lab
from .effects import Channels, Movement
from .model import FlowNode, Link, Split
from .units import renumber


class Tracker:
    """Names what a movement did to channels, also across a chain that spreads them over several dimensions and
    gathers them again, as a channel shuffle does."""

    def __init__(self, shape: Callable[[Node], tuple[int, ...]], channels: Callable[[Node], Channels | None]) -> None:
        self.shape, self.channels = shape, channels
        self.scrambled: dict[Node, tuple[Node, lab.Run]] = {}  # node -> (ancestor with channels, movement since)
        self.heads: dict[Node, Node] = {}  # scrambled node -> first node of its chain

    def is_scrambled(self, node: Node) -> bool:
        return node in self.scrambled

    def ancestor(self, node: Node) -> Node:
        """The nearest tensor behind ``node`` whose channels lie along one dimension."""
        return self.scrambled[node][0] if node in self.scrambled else node

    def heads_behind(self, nodes: Iterable[Node]) -> list[Node]:
        return [self.heads[n] for n in nodes if n in self.scrambled]

    def scramble(self, node: Node, effect: Movement, through: Node | None = None) -> None:
        """Remember that the channels of ``node`` lie over several dimensions; ``through``: the list it is from."""
        self.scrambled[node] = (self.ancestor(effect.operand), self._since(effect))
        self.heads[node] = self.heads.get(effect.operand, node if through is None else through)

    def splits(self, node: Node) -> list[FlowNode]:
        """All ways to see the channels of a scrambled tensor as blocks along one dimension."""
        ancestor, run = self.scrambled[node]
        channels, shape = self.channels(ancestor), self.shape(ancestor)
        if channels is None or channels.unit_count != channels.size:
            return []
        alone = self.heads[node] is node and node.all_input_nodes[0] is ancestor
        found = []
        try:
            options = lab.find_blocks(run, shape, channels.dim, run if alone else None)
        except (RuntimeError, IndexError, ValueError):  # as in moved
            return []
        for blocks in options:
            out = Channels(blocks.dim, np.arange(len(blocks.positions)), channels.weak)
            link = Link(ancestor, channels.dim, blocks.positions)
            found.append(
                FlowNode(node, "split", None, out, (link,), split=Split(blocks.permute, flatten=blocks.flatten))
            )
        return found

    def unscramble(self, node: Node) -> None:
        """``node`` carries its channels along one dimension after all."""
        self.scrambled.pop(node, None)
        self.heads.pop(node, None)

    def moved(self, node: Node, effect: Movement, through: Node | None = None) -> FlowNode | None:
        """Run the movement on labels of the ancestor: the same channels came out (``transit``), some of them
        (``select``), or they lie over several dimensions (None). ``through``: the list that the result is picked from.
        """
        operand = effect.operand
        ancestor, run = self.ancestor(operand), self._since(effect)
        channels, shape = self.channels(ancestor), self.shape(ancestor)
        if channels is None or channels.size == 1:
            return None
        try:
            moved = lab.summarise(run(lab.channel_labels(shape, channels.dim)))
        except (RuntimeError, IndexError, ValueError):  # sizes that depend on values: where channels go is not known
            return None
        if moved is None:
            return None
        merge = lab.merge_pattern(moved.positions, channels.size) if operand is ancestor else None
        if not isinstance(node.meta["val"].shape[moved.dim], int):
            return None  # merged with a dimension whose size may change, or picked by values: positions mean nothing
        if merge is not None and not self._follows(effect, shape, channels.dim, moved):
            merge = None
        if merge is not None:
            link = Link(operand if through is None else through, channels.dim, moved.positions)
            out = Channels(moved.dim, channels.units[moved.positions], channels.weak)
            return FlowNode(node, "transit", effect, out, (link,), merge=merge)
        if lab.is_selection(run, shape, channels.dim, moved):
            link = Link(ancestor, channels.dim, moved.positions)
            units = renumber(channels.units[moved.positions])
            return FlowNode(node, "select", effect, Channels(channels.dim, units, channels.weak), (link,))
        return None

    def _follows(self, effect: Movement, shape: tuple[int, ...], dim: int, moved: lab.Moved) -> bool:
        """Whether the operator as it is does the same when a channel is gone.

        An index that lists all channels does not, nor does a diagonal, which pairs a channel with a place in space.
        """
        if effect.size_arg is not None or shape[dim] < 2:
            return True  # sizes are rewritten
        # The labels of all channels but the first, and, where elements are left out, the elements themselves.
        fewer = torch.arange(1, shape[dim])
        left = torch.from_numpy(np.flatnonzero(moved.positions != 0))
        labels = lab.channel_labels(shape, dim)
        try:
            whole = effect.run(labels)
            if whole.numel() != labels.numel():
                labels = torch.arange(labels.numel(), dtype=torch.int32).view(shape)
                whole = effect.run(labels)
                return torch.equal(effect.run(labels.index_select(dim, fewer)), whole.index_select(moved.dim, left))
            again = effect.run(labels.narrow(dim, 1, shape[dim] - 1))
        except (RuntimeError, IndexError, ValueError):
            return False
        line = lab.summarise(again)
        if line is None:
            return shape[dim] == 2
        return line.dim == moved.dim and np.array_equal(line.positions, moved.positions[left.numpy()])

    def _since(self, effect: Movement) -> lab.Run:
        """The movement from the ancestor on."""
        if effect.operand not in self.scrambled:
            return effect.run
        before, last = self.scrambled[effect.operand][1], effect.run
        return lambda labels: last(before(labels))
