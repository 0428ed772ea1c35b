"""The backward pass of liveness: a channel is live if somebody's result depends on it.

With the forward pass of constants before it, one pass in reverse order reaches the fixed point: a zero weight frees
its input, which may free a whole producer, and so on up the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.fx import Node

from ..program import Program
from .analysis import analyse
from .constants import find_constants, support_of
from .effects import Constants, Contract, Folded, PerChannel, Pointwise, is_tensor, reads_values
from .groups import grouped_inputs, grouped_rows
from .model import Demand, Flow, FlowNode, Link, Support

# An operand joins an addition in part only where at least this share of its channels is zero: it costs a copy.
LEAST_ZERO = 1 / 16


def analyse_flow(program: Program, only: Mapping[str, torch.Tensor] | None = None, partial: bool = True) -> Flow:
    """Labels, constants and liveness of a captured program.

    ``only``: where given, a weight's zeros count only at these entries (weight name -> bool of its shape).
    ``partial``: an addition may take the channels of an operand that are not zero, and leave out the others.
    """
    nodes = analyse(program)
    supports = {
        n: support_of(program, f.effect, only)
        for n, f in nodes.items()
        if isinstance(f.effect, Contract) and f.kind == "fresh"
    }
    constants = find_constants(program, nodes, supports)
    return _Liveness(nodes, constants, supports, partial).run()


class _Liveness:
    def __init__(
        self,
        nodes: dict[Node, FlowNode],
        constants: dict[Node, Constants | None],
        supports: dict[Node, Support],
        allow_partial: bool,
    ) -> None:
        self.nodes, self.constants, self.supports, self.allow_partial = nodes, constants, supports, allow_partial
        self.live = {n: np.zeros(f.channels.size, dtype=bool) for n, f in nodes.items() if f.channels is not None}
        self.used: set[Node] = set()
        self.demands: dict[Node, Demand] = {}
        self.replaced: set[tuple[Node, Node]] = set()
        self.partial: dict[tuple[Node, Node], np.ndarray] = {}
        self.twins: dict[tuple[str, str], np.ndarray] = {}  # (name, side) -> channels that any of the twins needs

    def run(self) -> Flow:
        while True:  # what a twin needs further up is only known when that is reached; sets only grow
            before = {key: needed.copy() for key, needed in self.twins.items()}
            self._pass()
            if before.keys() == self.twins.keys() and all(np.array_equal(before[k], v) for k, v in self.twins.items()):
                break
        masked = {n: not (s.used.any(0).all() and s.used.any(1).all()) for n, s in self.supports.items()}
        used, replaced = frozenset(self.used), frozenset(self.replaced)
        depends = self._depends()
        return Flow(self.nodes, self.constants, self.live, used, self.demands, replaced, self.partial, masked, depends)

    def _pass(self) -> None:
        """Every node once, readers before what they read."""
        self.demands, self.replaced, self.partial = {}, set(), {}
        for node, flow in reversed(self.nodes.items()):
            if node.op in ("output", "placeholder") or _writes(node):
                self.used.add(node)
            if node in self.live and bool(self.live[node].any()):
                self.used.add(node)
            if node in self.used:
                self._visit(node, flow)

    def _with_twins(self, flow: FlowNode, side: str, needed: np.ndarray) -> np.ndarray:
        """``needed`` and what the other calls with the same weight need."""
        if flow.twins is None:
            return needed
        known = self.twins.get((flow.twins, side))
        self.twins[flow.twins, side] = needed.copy() if known is None else known | needed
        return self.twins[flow.twins, side].copy()

    def _visit(self, node: Node, flow: FlowNode) -> None:
        for operand, _ in flow.whole:
            self._need_all(operand)
        if isinstance(flow.effect, Contract) and flow.kind == "fresh":
            self._contract(node, flow, flow.effect)
        elif flow.kind in ("opaque", "barrier"):
            for n in node.all_input_nodes:
                # a size is read off whatever stands there: one channel is enough
                self._need_all(n) if reads_values(node) else self._need_one(n)
        elif flow.kind != "param":
            self._through(node, flow)
        if flow.kind in ("select", "split") and not isinstance(flow.effect, Folded):
            return  # read through its link: the movements in between are never executed
        for n in node.all_input_nodes:  # weights, sizes, masks without channels
            if n in self.nodes and self.nodes[n].channels is None:
                self._mark_plain(node, n)

    def _mark_plain(self, reader: Node, operand: Node) -> None:
        if (reader, operand) not in self.replaced:
            self.used.add(operand)

    def _need_all(self, node: Node) -> None:
        self.used.add(node)
        if node in self.live:
            self.live[node][:] = True

    def _need_one(self, node: Node) -> None:
        self.used.add(node)
        if node in self.live and not self.live[node].any():
            self.live[node][0] = True

    def _need(self, link: Link, wanted: np.ndarray) -> None:
        """``wanted``: positions of the reader's result."""
        positions = link.positions[wanted].reshape(-1)
        positions = positions[positions >= 0]
        if not len(positions):
            return
        self.used.add(link.operand)
        if not link.anchored and link.operand in self.live:
            self.live[link.operand][positions] = True

    # -- transits -----------------------------------------------------------------------------------------------

    def _through(self, node: Node, flow: FlowNode) -> None:
        live = np.ones_like(self.live[node]) if flow.pinned else self._with_twins(flow, "output", self.live[node])
        self.live[node] = live
        own = self.constants.get(node)
        if (
            flow.kind == "concat"
            and flow.links
            and bool(live[np.all([k.positions < 0 for k in flow.links], axis=0)].any())
        ):
            self._need_one(flow.links[0].operand)  # padding needs a tensor to pad
        for link in flow.links:
            if self._replaceable(node, flow, link, live):
                self.replaced.add((node, link.operand))
        in_part = self._joins_in_part(node, flow, live)
        for link in flow.links:
            if (node, link.operand) in self.replaced:
                continue
            needed = live & ~self._blocked(flow, own, link)
            if link is in_part:
                needed &= ~self._zeros(link)
            if not needed.any() and live.any():
                needed[np.flatnonzero(live)[0]] = True  # the values do not matter, but the call needs its operand
            if link is in_part:
                self.partial[node, link.operand] = needed
            self._need(link, needed)

    def _is_parameter(self, node: Node) -> bool:
        """A parameter, or computed from parameters alone: known, but to be trained further."""
        channels = self.nodes[node].channels
        return node.op == "get_attr" or (channels is not None and channels.weak)

    def _joins_in_part(self, node: Node, flow: FlowNode, live: np.ndarray) -> Link | None:
        """The operand of an addition with enough channels that are zero: only the others are added."""
        if not self.allow_partial or node.target is not torch.ops.aten.add.Tensor or node.kwargs or flow.pinned:
            return None
        links = [k for k in flow.links if not k.anchored and not self._is_parameter(k.operand)]
        shape = node.meta["val"].shape
        if len(links) != 2 or any(k.operand.meta["val"].shape != shape for k in links):
            return None
        if any((node, k.operand) in self.replaced for k in links):
            return None
        counts = [int((self._zeros(k) & live).sum()) for k in links]
        chosen = int(np.argmax(counts))
        return links[chosen] if counts[chosen] >= max(1.0, LEAST_ZERO * live.sum()) else None

    def _zeros(self, link: Link) -> np.ndarray:
        """Positions at which an operand is known to be zero."""
        operand = self.constants.get(link.operand)
        if operand is None:
            return np.zeros(len(link.positions), dtype=bool)
        zero: np.ndarray = (operand.value == 0).numpy()[np.maximum(link.positions, 0)]
        return zero & self._known(link)

    def _blocked(self, flow: FlowNode, own: Constants | None, link: Link) -> np.ndarray:
        """Positions whose value is known without knowing this operand: zero times anything, a zero scale."""
        size = len(link.positions)
        if own is None or flow.pinned or not isinstance(flow.effect, (PerChannel, Pointwise)):
            return np.zeros(size, dtype=bool)
        return own.known.numpy() & ~self._known(link)

    def _known(self, link: Link) -> np.ndarray:
        operand = None if link.anchored else self.constants.get(link.operand)
        if operand is None:
            return np.zeros(len(link.positions), dtype=bool)
        return operand.known.numpy()[np.maximum(link.positions, 0)] & (link.positions >= 0)

    def _replaceable(self, node: Node, flow: FlowNode, link: Link, live: np.ndarray) -> bool:
        """A computed operand that is constant in every live channel becomes numbers, if another operand still gives
        the result its shape."""
        if not isinstance(flow.effect, Pointwise) or link.anchored or flow.pinned or self._is_parameter(link.operand):
            return False
        if not bool(self._known(link)[live].all()):
            return False
        shape = node.meta["val"].shape
        others = [n for n in flow.effect.operands if n is not link.operand and (node, n) not in self.replaced]
        return any(n.op != "get_attr" and n.meta["val"].shape == shape for n in others)

    # -- contractions -------------------------------------------------------------------------------------------

    def _contract(self, node: Node, flow: FlowNode, effect: Contract) -> None:
        live, own = self._with_twins(flow, "output", self.live[node]), self.constants.get(node)
        if flow.pinned:
            live[:] = True
        self.live[node] = live
        support = self.supports[node]
        rows, absorber = len(live), self._absorber(node, effect)
        constant = np.zeros(rows, dtype=bool)
        delta = torch.zeros(rows, dtype=torch.float64)
        if not flow.links or flow.pinned:
            inputs = np.ones(len(flow.links[0].positions) if flow.links else 0, dtype=bool)
            if flow.links:
                self._need(flow.links[0], inputs)
            self.demands[node] = Demand(inputs, constant, delta, None)
            return
        if effect.groups > 1:
            self._grouped(node, flow, effect)
            return
        link = flow.links[0]
        can_fold = flow.twins is None and (effect.bias is not None or absorber is not None)
        if own is not None and flow.twins is None:
            constant = own.known.numpy() & ((own.value == 0).numpy() | can_fold)
        known, value = self._input_constants(link)
        free = known & ((value == 0) | (effect.exact & can_fold))
        active = live & ~constant
        inputs = (support.used if active.all() else support.used[active]).any(0) & ~free
        folded = torch.from_numpy(np.where(free & ~inputs, value, 0.0))
        delta = support.weighted(folded)
        if own is not None and flow.twins is None:
            bias = 0.0 if support.bias is None else support.bias.double()
            delta = torch.where(torch.from_numpy(constant), own.value.double() - bias, delta)
        starved = not inputs.any()
        if starved and live.any():
            inputs[self._any_position(link)] = True  # a layer cannot have no input; its weights for it are zero
        inputs = self._with_twins(flow, "input", inputs)
        self._need(link, inputs)
        self.demands[node] = Demand(inputs, constant, delta, absorber if bool(delta.any()) else None, starved)

    def _grouped(self, node: Node, flow: FlowNode, effect: Contract) -> None:
        """A grouped convolution: groups that nobody reads vanish, the others are filled up to one size."""
        link, own, groups = flow.links[0], self.constants.get(node), effect.groups
        asked, live = self.live[node], grouped_rows(self.live[node], groups)
        self.live[node] = live
        constant = np.zeros(len(live), dtype=bool)
        if own is not None:
            constant = own.known.numpy() & ((own.value == 0).numpy() | (effect.bias is not None))
        active = (live & ~constant)[:, None] & self.supports[node].used  # (rows, inputs of one group)
        needed = active.reshape(groups, -1, active.shape[1]).any(1).reshape(-1)
        known, value = self._input_constants(link)
        needed &= ~(known & (value == 0))
        there = None if link.anchored or link.operand not in self.live else self.live[link.operand][link.positions]
        inputs = grouped_inputs(needed, live, groups, there)
        self._need(link, inputs)
        delta = torch.zeros(len(live), dtype=torch.float64)
        self.demands[node] = Demand(inputs, constant, delta, None, not needed.any(), inputs & ~needed, live & ~asked)

    def _input_constants(self, link: Link) -> tuple[np.ndarray, np.ndarray]:
        operand = None if link.anchored else self.constants.get(link.operand)
        if operand is None:
            return np.zeros(len(link.positions), dtype=bool), np.zeros(len(link.positions))
        return self._known(link), operand.value.double().numpy()[np.maximum(link.positions, 0)]

    def _any_position(self, link: Link) -> np.ndarray:
        """The cheapest position to read when none is needed: one that is live anyway."""
        channels = None if link.anchored else self.nodes[link.operand].channels
        if channels is None:
            return np.array([0])
        live = np.flatnonzero(self.live[link.operand])
        return live[:1] if len(live) else np.array([0])

    def _absorber(self, node: Node, effect: Contract) -> Node | None:
        """The batch norm that follows alone, whose running mean can take up a constant."""
        if effect.bias is not None or len(node.users) != 1:
            return None
        user = next(iter(node.users))
        flow = self.nodes[user]
        if "batch_norm" not in str(user.target) or not isinstance(flow.effect, PerChannel) or flow.pinned:
            return None
        if flow.twins is not None:
            return None
        return user if flow.effect.constant is not None and flow.kind == "transit" else None

    # -- dependence ---------------------------------------------------------------------------------------------

    def _depends(self) -> bool:
        """Whether any output still depends on any input."""
        depends: dict[Node, bool] = {}
        for node, flow in self.nodes.items():
            if node.op == "placeholder":
                depends[node] = is_tensor(node)
                continue
            direct = () if flow.kind in ("select", "split") and flow.links else node.all_input_nodes
            sources = (*direct, *(link.operand for link in flow.links), *(n for n, _ in flow.whole))
            inputs = [n for n in sources if (node, n) not in self.replaced]
            answer = node in self.used and any(depends.get(n, False) for n in inputs)
            own = self.constants.get(node)
            if answer and own is not None and bool(own.known.all()):
                answer = False
            if answer and isinstance(flow.effect, Contract) and (demand := self.demands.get(node)) is not None:
                pinned = flow.pinned or flow.effect.operand is None
                answer = bool(self.supports[node].used.any()) if pinned else not demand.starved
            if not reads_values(node):
                answer = False
            depends[node] = answer
        return any(d for n, d in depends.items() if n.op == "output")


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
