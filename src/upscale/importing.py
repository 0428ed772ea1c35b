"""From an exported program to a bare graph whose parameters and buffers are named tensors.

Names and module paths lose the adaptor's prefix, tied tensors get one name, integers that export fixed become
literals, checks that the guards repeat are dropped, and nested ``no_grad`` graphs are inlined.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from upscale.errors import CaptureError
from upscale.guards import fixed_size
from upscale.program import where

_aten = torch.ops.aten

_CHECKS = {
    _aten._assert_tensor_metadata.default,
    _aten._assert_scalar.default,
    _aten.sym_constrain_range.default,
    _aten.sym_constrain_range_for_size.default,
    torch._check,
}


@dataclass
class Imported:
    """A graph under construction; ``canonical`` maps each name of a tied tensor to the one used here."""

    graph: fx.Graph
    tensors: dict[str, torch.Tensor]
    kinds: dict[str, str]
    canonical: dict[str, str]
    consumed: set[str] = field(default_factory=set)  # names folded into other tensors
    folded: set[str] = field(default_factory=set)  # constants made here
    notes: list[str] = field(default_factory=list)


def import_graph(exported: ExportedProgram, model: nn.Module, prefix: str) -> Imported:
    """Copy ``exported``'s graph; the captured ``model`` is its child ``prefix``."""
    named, canonical = _tensor_names(model)
    result = Imported(fx.Graph(), {}, {}, canonical)
    values: dict[fx.Node, Any] = {}
    lifted: dict[str, tuple[str, torch.Tensor, str]] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise CaptureError(f"the model holds {spec.target!r}, which is no tensor ({spec.kind.name.lower()})")
        target = (spec.target or "").removeprefix(f"{prefix}.")
        if spec.kind is InputKind.CONSTANT_TENSOR:
            lifted[spec.arg.name] = (target, exported.constants[spec.target or ""], "constant")
        else:
            name = canonical[target]
            lifted[spec.arg.name] = (name, named[name], spec.kind.name.lower())
    copier = _Copier(result, values, lifted, exported.graph_module, prefix)
    for node in exported.graph.nodes:
        copier.copy(node)
    return result


def _tensor_names(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each distinct parameter and buffer under its first name, and every name's canonical one."""
    first: dict[int, str] = {}
    named: dict[str, torch.Tensor] = {}
    canonical: dict[str, str] = {}
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in pairs:
        chosen = first.setdefault(id(tensor), name)
        canonical[name] = chosen
        named[chosen] = tensor
    return named, canonical


class _Copier:
    """Copies nodes of an exported graph, its nested graphs included, into a new one."""

    def __init__(
        self,
        result: Imported,
        values: dict[fx.Node, Any],
        lifted: dict[str, tuple[str, torch.Tensor, str]],
        owner: nn.Module,
        prefix: str,
    ) -> None:
        self.result, self.values, self.lifted, self.owner, self.prefix = result, values, lifted, owner, prefix
        self.attributes: dict[str, fx.Node] = {}
        self.inputs_end: fx.Node | None = None

    def copy(self, node: fx.Node) -> None:
        """Copy one node and remember what stands for it."""
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "get_attr":
            self.values[node] = getattr(self.owner, str(node.target))  # a nested graph
        elif node.op == "output":
            self.result.graph.output(tuple(self._map(node.args[0])))
        elif node.target in _CHECKS:
            self._check_is_static(node)
        elif _fixed(node.meta.get("val")) is not None:
            self.values[node] = _fixed(node.meta["val"])  # a size that export fixed: guarded at the input
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            self._inline(node)
        else:
            self._call(node)

    def _placeholder(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.name in self.lifted:
            self.values[node] = node  # made at first use
        elif isinstance(value, torch.Tensor):
            made = self.result.graph.placeholder(node.name)
            made.meta = dict(node.meta)
            self.values[node] = made
        else:
            self.values[node] = value

    def _attribute(self, node: fx.Node) -> fx.Node:
        """The ``get_attr`` of a lifted tensor; one node per distinct tensor."""
        name, tensor, kind = self.lifted[node.name]
        if name not in self.attributes:
            made = self.result.graph.get_attr(name)
            made.meta = {"val": node.meta["val"]}
            self.attributes[name] = made
            self.result.tensors[name] = tensor
            self.result.kinds[name] = kind
        return self.attributes[name]

    def _map(self, arguments: Any) -> Any:
        def value_of(used: fx.Node) -> Any:
            value = self.values[used]
            return self._attribute(used) if value is used else value

        return fx.node.map_arg(arguments, value_of)

    def _call(self, node: fx.Node) -> None:
        if node.args and isinstance(node.args[0], fx.Node) and isinstance(self.values[node.args[0]], _Results):
            self.values[node] = self.values[node.args[0]][node.args[1]]
            return
        args, kwargs = self._map(node.args), self._map(node.kwargs)
        made = self.result.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        made.meta = dict(node.meta)
        if "nn_module_stack" in made.meta:
            made.meta["nn_module_stack"] = self._strip(made.meta["nn_module_stack"])
        self.values[node] = made

    def _strip(self, stack: dict[str, Any]) -> dict[str, Any]:
        """The module stack without the adaptor."""
        kept = {}
        for key, entry in stack.items():
            if not isinstance(entry, tuple) or not isinstance(entry[0], str) or entry[0] == "":
                continue
            path = entry[0]
            if path == self.prefix or path.startswith(f"{self.prefix}."):
                kept[key] = (path[len(self.prefix) + 1 :], entry[1])
        return kept

    def _check_is_static(self, node: fx.Node) -> None:
        """A dropped check must be on input sizes alone: those are guarded. One on data cannot be kept."""
        condition = node.args[0] if node.args else None
        value = condition.meta.get("val") if isinstance(condition, fx.Node) else None
        if isinstance(value, (torch.SymBool, torch.SymInt)) and _is_unbacked(value):
            raise CaptureError(f"the computation depends on values, not only on shapes, at {where(node)}")

    def _inline(self, node: fx.Node) -> None:
        """Inline ``with torch.no_grad()`` blocks and regions without autocast; other higher-order operators are control
        flow."""
        name, leading = node.target.__name__, 1  # type: ignore[union-attr]
        if name == "wrap_with_autocast":
            leading = 4  # device, dtype, enabled, cache
            if node.args[2]:
                raise CaptureError(
                    f"autocast is switched on inside the model, at {where(node)}: it cannot be exported; "
                    "call the model under autocast instead, or convert the layers there"
                )
            self.result.notes.append(f"the region without autocast at {where(node)} is part of the whole now")
        elif name != "wrap_with_set_grad_enabled":
            raise CaptureError(f"{node.target} at {where(node)} is control flow: it cannot be exported")
        nested, *arguments = [self._map(argument) for argument in node.args[leading:]]
        inner = _Copier(self.result, {}, {}, nested, self.prefix)
        feed = iter(arguments)
        for child in nested.graph.nodes:
            if child.op == "placeholder":
                inner.values[child] = next(feed)
            elif child.op == "output":
                self.values[node] = _Results(inner._map(child.args[0]))
            else:
                inner.copy(child)


class _Results(tuple):
    """The outputs of an inlined graph: ``getitem`` on them is resolved at once."""


def _fixed(value: Any) -> Any:
    """The number that a value of the capture is, or None."""
    if isinstance(value, (int, float)):
        return value
    return fixed_size(value) if isinstance(value, torch.SymInt) else None


def _is_unbacked(value: Any) -> bool:
    try:
        from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

        return bool(free_unbacked_symbols(value))
    except Exception:
        return False
