"""Lowering: a captured program and a plan give a smaller program in the same format.

Works node by node in graph order; every read, weight cut and constant is taken from the plan, nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from . import large
from .cutting import cut_weight
from .flow import FlowNode
from .flow.effects import Contract, Mixing, Movement, PerChannel, Pointwise
from .plan import Plan
from .pointwise import Product
from .program import Program
from .reading import Reading, as_index


def lower(program: Program, nodes: dict[Node, FlowNode], plan: Plan) -> Program:
    """Carry out ``plan`` on ``program``. The result shares no tensor with it.

    ``nodes``: the flow of the program's nodes, for which argument plays which part.
    """
    return Lowering(program, nodes, plan).run()


class Lowering(Reading):
    """One lowering. How a read is carried out is :meth:`build_read`, for a subclass to replace."""

    def __init__(self, program: Program, nodes: dict[Node, FlowNode], plan: Plan) -> None:
        super().__init__(program, plan)
        self.nodes = nodes
        self.absorbed = {c.absorber: c.delta for c in plan.contractions.values() if c.absorber is not None}
        self.skipped = set(plan.virtual) | set(plan.dead)

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            if node.name in self.skipped or node.op == "get_attr":
                continue
            self._emit(node)
        self.graph.eliminate_dead_code()
        live = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        return replace(
            self.program,
            graph=self.graph,
            tensors={k: v for k, v in self.tensors.items() if k in live},
            kinds={k: v for k, v in self.kinds.items() if k in live},
        )

    def _emit(self, node: Node) -> None:
        if node.op == "placeholder":
            new = self.graph.node_copy(node)
        elif node.op == "output":
            new = self.graph.output(map_arg(node.args[0], lambda n: self._value(node, n)))
        else:
            handler = {
                "fresh": self._contraction,
                "transit": self._transit,
                "split": self._split,
                "concat": self._joined,
                "select": self._joined,
            }
            new = handler.get(self.nodes[node].kind, self._plain)(node)
        self.env[node.name] = new

    # -- kinds of nodes -----------------------------------------------------------------------------------------

    def _plain(self, node: Node) -> Node:
        return self._call(node, {})

    def _joined(self, node: Node) -> Node:
        reads = self.plan.reads[node.name]
        return self._realise(next(iter(reads.values())), like=node)

    def _contraction(self, node: Node) -> Node:
        effect = self.nodes[node].effect
        assert isinstance(effect, Contract)
        cut = self.plan.contractions[node.name]
        weight = self._tensor(effect.weight)
        new = cut_weight(weight, effect, cut)
        swap = {effect.weight: self._attribute(effect.weight, new)}
        if effect.bias is not None:
            swap[effect.bias] = self._bias(effect.bias, cut.rows, cut.delta)
        made = self._call(node, swap, {"groups": cut.groups} if cut.groups != effect.groups else None)
        if cut.product:
            Product.mark(made, cut.product, node.meta["val"].shape)
        return made

    def _split(self, node: Node) -> Node:
        """Blocks of channels: what is read, parted in two dimensions, or the operator again on what is left."""
        f = self.nodes[node]
        split, link = f.split, f.links[0]
        assert split is not None
        ancestor = self.plan.layouts.get(link.operand.name)
        whole = self.plan.layouts[node.name].is_whole and ancestor is not None and ancestor.is_whole
        read = self._realise(self.plan.reads[node.name][link.operand.name], like=node)
        if split.permute is None:
            operand = node.args[0]
            assert isinstance(operand, Node)
            return self._call(node, {operand: read})
        if whole:
            return self._as_written(node, {link.operand: self._stored(link.operand)})
        shape = (len(self.plan.layouts[node.name].positions), link.positions.shape[1])
        dim, flat = link.dim, read
        if split.flatten is not None:
            start, end = split.flatten
            flat = self.graph.call_function(torch.ops.aten.flatten.using_ints, (read, start, end))
            dim = dim if dim < start else dim - (end - start)
        parted = self.graph.call_function(torch.ops.aten.unflatten.int, (flat, dim, list(shape)))
        new = self.graph.call_function(torch.ops.aten.permute.default, (parted, list(split.permute)))
        for made in (parted, new) if flat is read else (flat, parted, new):
            made.meta = {k: v for k, v in node.meta.items() if k != "val"} | {"rewritten": True}
        new.meta["origin"] = node.name
        return new

    def _as_written(self, node: Node, start: dict[Node, Node]) -> Node:
        """A chain of movements from a tensor that is whole (``start``: as it is stored), link by link."""
        for operand in node.all_input_nodes:
            if operand.op != "get_attr" and operand.name not in self.env:
                self.env[operand.name] = self._as_written(operand, start)
        return self._call(node, start)

    def _bias(self, bias: Node, rows: Sequence[int], delta: Sequence[float]) -> Node:
        old = self._tensor(bias)
        new = large.cut(old, {0: rows})
        if delta:
            extra = torch.tensor(delta, dtype=torch.float64)[list(rows)]
            new = (new.double() + extra.to(new.device)).to(new.dtype)
        return self._attribute(bias, new)

    def _transit(self, node: Node) -> Node:
        f = self.nodes[node]
        if isinstance(f.effect, Pointwise) and (same := self._without_zeros(node, f)) is not None:
            return same
        if node.name in self.plan.partial:
            return self._added_in_part(node)
        swap: dict[Node, Node] = {}
        changes: dict[str, Any] = {}
        layout = self.plan.layouts[node.name]
        if isinstance(f.effect, (PerChannel, Mixing)):
            for parameter, dim in f.effect.slices:
                swap[parameter] = self._slice(node, parameter, dim)
        if isinstance(f.effect, PerChannel) and f.effect.groups_arg is not None:
            changes[f.effect.groups_arg] = len(layout.positions)
        if isinstance(f.effect, Movement) and f.effect.size_arg is not None and not layout.is_whole:
            changes[f.effect.size_arg] = self._sizes(node, f.effect.size_arg)
        return self._call(node, swap, changes)

    def _added_in_part(self, node: Node) -> Node:
        """``base + part`` where ``part`` has only some of the channels: a run of them, or listed ones."""
        ((name, places),) = self.plan.partial[node.name].items()
        layout = self.plan.layouts[node.name]
        base, part = (self._value(node, n) for n in sorted(node.all_input_nodes, key=lambda n: n.name == name))
        start, end, count = places[0], places[-1] + 1, len(layout.positions)
        if end - start == len(places) == count:
            new = self.insert(torch.add, (base, part))
        elif end - start == len(places):
            runs = [(0, start), (start, len(places)), (end, count - end)]
            cut = [self.insert(torch.narrow, (base, layout.dim, *run)) if run[1] else None for run in runs]
            middle = self.insert(torch.add, (cut[1], part))
            pieces = [piece for piece in (cut[0], middle, cut[2]) if piece is not None]
            new = self.insert(torch.cat, (pieces, layout.dim))
        else:
            index = self._register("index", torch.tensor(places, device=self._device()), "constant")
            if node.name in self.plan.tables:
                table, sizes = self._as_table(base, layout.dim, node.meta["val"].shape)
                rows, _ = self._as_table(part, layout.dim, node.meta["val"].shape)
                new = self._from_table(self.insert(torch.index_add, (table, 1, index, rows)), layout.dim, sizes)
            else:
                new = self.insert(torch.index_add, (base, layout.dim, index, part))
        new.meta = {k: v for k, v in node.meta.items() if k != "val"} | {"origin": node.name, "rewritten": True}
        return new

    def _slice(self, node: Node, parameter: Node, dim: int) -> Node:
        old = self._tensor(parameter)
        positions = self.plan.layouts[node.name].positions
        new = old.index_select(dim, as_index(positions, old))
        if node.name in self.absorbed and parameter is node.args[3]:  # batch_norm(x, weight, bias, running_mean, ...)
            delta = torch.tensor(self.absorbed[node.name], dtype=torch.float64)[list(positions)]
            new = (new.double() - delta.to(new.device)).to(new.dtype)
        return self._attribute(parameter, new)

    def _sizes(self, node: Node, name: str) -> list[Any]:
        """The explicit sizes of a reshaping call, with the new number of channels."""
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        sizes = list(node.args[names.index(name)])  # type: ignore[arg-type]
        layout = self.plan.layouts[node.name]
        at = layout.dim
        if "unflatten" in str(node.target):
            first = node.args[1]
            assert isinstance(first, int)
            at -= first % (len(node.meta["val"].shape) - len(sizes) + 1)
        if 0 <= at < len(sizes) and isinstance(sizes[at], int) and sizes[at] != -1:
            sizes[at] = len(layout.positions)
        return sizes

    def _without_zeros(self, node: Node, f: FlowNode) -> Node | None:
        """``x + 0`` is ``x``: a branch that became zero leaves no trace."""
        constants = self.plan.constants.get(node.name, {})
        if str(node.target) not in ("aten.add.Tensor", "aten.sub.Tensor") or len(constants) != 1:
            return None
        ((name, values),) = constants.items()
        rest = [n for n in node.all_input_nodes if n.name != name]
        if any(values) or len(rest) != 1 or (str(node.target) == "aten.sub.Tensor" and rest[0] is not node.args[0]):
            return None
        if rest[0].meta["val"].shape != node.meta["val"].shape or rest[0].meta["val"].dtype != node.meta["val"].dtype:
            return None
        return self._value(node, rest[0]) if node.kwargs.get("alpha", 1) == 1 or rest[0] is node.args[0] else None

    # -- building calls -----------------------------------------------------------------------------------------

    def _call(self, node: Node, swap: dict[Node, Node], changes: dict[str, Any] | None = None) -> Node:
        """The same call with new operands; ``changes`` replaces arguments by their schema names."""

        def fresh(n: Node) -> Node:
            return swap[n] if n in swap else self._value(node, n)

        args, kwargs = list(node.args), dict(node.kwargs)
        if changes:
            names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
            for name, value in changes.items():
                index = names.index(name)
                if index < len(args):
                    args[index] = value
                else:
                    kwargs[name] = value
        # a slice of channels is not contiguous: what could be viewed before may need a copy now
        target = torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target
        new = self.graph.call_function(target, map_arg(tuple(args), fresh), map_arg(kwargs, fresh))  # type: ignore[arg-type]
        new.meta = {k: v for k, v in node.meta.items() if k != "val"} | {"origin": node.name}
        if changes and any(name != "groups" for name in changes):
            new.meta["rewritten"] = True
        return new

    def _value(self, reader: Node, operand: Node) -> Node:
        """What ``reader`` gets for ``operand``: a planned read, a constant, or the tensor as it stands."""
        constant = self.plan.constants.get(reader.name, {}).get(operand.name)
        if constant is not None:
            return self._constant(reader, operand, constant)
        read = self.plan.reads.get(reader.name, {}).get(operand.name)
        if read is not None:
            return self._realise(read, like=reader)
        return self._stored(operand)

    def _constant(self, reader: Node, operand: Node, values: Sequence[float]) -> Node:
        val = operand.meta["val"]
        dim = next(k.dim for k in self.nodes[reader].links if k.operand is operand)
        shape = [1] * val.ndim
        shape[dim] = len(values)
        tensor = torch.tensor(values, dtype=torch.float64).view(shape).to(val.dtype).to(self._device())
        return self._register(f"constant_{operand.name}", tensor, "constant")
