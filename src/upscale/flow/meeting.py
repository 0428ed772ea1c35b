"""Where channels of several operands meet: elementwise operators, products, concatenations, padding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch.fx import Node

from .effects import Aligned, Channels, Concat, Folded, Pad, Pointwise
from .model import FlowNode, Link, Split
from .units import refine


class Meeting:
    """Handlers of effects that bring operands together. ``refuse(node, reason, silent=False)`` makes a barrier."""

    def __init__(
        self,
        shape: Callable[[Node], tuple[int, ...]],
        channels: Callable[[Node], Channels | None],
        refuse: Callable[..., FlowNode],
    ) -> None:
        self.shape, self.channels, self.refuse = shape, channels, refuse

    def pointwise(self, node: Node, effect: Pointwise) -> FlowNode:
        rank = len(self.shape(node))
        strong = [(n, c) for n in effect.operands if (c := self.channels(n)) is not None and not c.weak]
        carriers = [(n, c) for n, c in strong if c.size > 1 or self.shape(node)[c.dim + rank - len(self.shape(n))] == 1]
        if not carriers:
            return (
                self._weak_pointwise(node, effect)
                if not strong
                else self.refuse(node, "broadcasts one channel", silent=True)
            )
        dims = {c.dim + rank - len(self.shape(n)) for n, c in carriers}
        if len(dims) > 1:
            return self.refuse(node, "operands carry channels on different dimensions")
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
                if channels is not None:
                    whole.append((n, True))
            elif channels is not None and channels.dim == own:
                links.append(Link(n, own, np.arange(size)))
            elif size > 1 or channels is None:
                links.append(Link(n, own, np.arange(size), anchored=True))
                if channels is not None:
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

    def aligned(self, node: Node, effect: Aligned) -> FlowNode:
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
            return self.refuse(node, "mixes channels")
        whole += self.stray(node, *named)
        out = Channels(effect.out_dim, refine(units))
        return FlowNode(node, "transit", effect, out, tuple(links), tuple(whole))

    def folded(self, node: Node, effect: Folded) -> FlowNode:
        channels = self.channels(effect.operand)
        if channels is None or channels.dim != effect.dim or channels.unit_count != channels.size:
            return self.refuse(node, "folds another dimension than the channels'")
        link = Link(effect.operand, effect.dim, effect.positions)
        out = Channels(effect.out_dim, np.arange(len(effect.positions)))
        return FlowNode(node, "split", effect, out, (link,), split=Split(None, by_column=True))

    def stray(self, node: Node, *known: Node) -> tuple[tuple[Node, bool], ...]:
        """Operands that carry channels but are not the one the effect speaks of: needed whole."""
        return tuple(
            (n, True)
            for n in node.all_input_nodes
            if n not in known and n.op != "get_attr" and self.channels(n) is not None
        )

    def pad(self, node: Node, effect: Pad) -> FlowNode:
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
            return self.refuse(node, "pads channels and space at once")
        positions = np.concatenate([np.full(low, -1), np.arange(channels.size), np.full(high, -1)])
        units = np.arange(len(positions)) if channels.unit_count == channels.size else None
        if units is None:
            return self.refuse(node, "pads channels that were merged with space")
        link = Link(effect.operand, d, positions)
        return FlowNode(node, "concat", effect, Channels(d, units), (link,), fill=effect.value)

    def concat(self, node: Node, effect: Concat) -> FlowNode:
        known = [(n, c) for n in effect.operands if (c := self.channels(n)) is not None and not c.weak]
        known = known or [(n, c) for n in effect.operands if (c := self.channels(n)) is not None]
        dims = {c.dim for _, c in known}
        if len(dims) != 1:
            return self.refuse(node, "operands carry channels on different dimensions")
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
            return self.refuse(node, "operands have different numbers of channels")
        links = []
        for n in effect.operands:
            channels = self.channels(n)
            own = channels is not None and channels.dim == dim
            links.append(Link(n, dim, np.arange(size), anchored=not own))
        out = dim + 1 if effect.new_dim and effect.dim <= dim else dim
        units = refine([c.units for _, c in known])
        return FlowNode(node, "transit", effect, Channels(out, units), tuple(links), self._crossed(effect, dim))
