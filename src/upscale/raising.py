"""Back end: turn a program into an ordinary ``torch.fx.GraphModule`` of ordinary ``torch.nn`` layers.

Layers come back under their original names from the calls they made; containers, buffers, the call signature and the
nesting of outputs are those of the captured model. The result needs nothing of this library to run, copy or pickle.
"""

from __future__ import annotations

import typing
from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn

from upscale.aliases import argument, is_idle_dropout, targets_of
from upscale.calls import emit_call
from upscale.face import emit_inputs, emit_output
from upscale.idle import switch_notes
from upscale.layers import (
    PLAIN_LAYERS,
    LayerCall,
    build_layer,
    clone_plain,
    is_plain,
    layer_call,
    may_be_layer,
    slot_nodes,
)
from upscale.pointwise import Product, emit_product
from upscale.program import Program, module_path
from upscale.tree import Names, Tensors, Tree

_aten = torch.ops.aten


def raise_program(program: Program, *, class_name: str | None = None) -> fx.GraphModule:
    """Emit ``program`` as a GraphModule in eval mode; ``class_name`` names its class (default: the original's).

    The module owns its tensors: nothing of the user's model is shared.
    """
    names = Names(program.modules)
    tensors = Tensors(program)
    calls, owners = _choose_layers(program, names)
    plain_calls, plain = _choose_plain(program, names)
    layers = {}
    for path, call in owners.items():
        layers[path] = build_layer(call, {slot: tensors.get(name) for slot, name in call.slots})
    tree = Tree(program, names, tensors, layers, plain)
    tree.build()
    graph = _Emitter(program, tree, calls, plain_calls).emit()
    root = program.modules.get("")
    name = class_name or (type(root).__name__ if root is not None else "GraphModule")
    return _assemble(tree.root, graph, name)


def training_notes(program: Program) -> list[str]:
    """What of the module that :func:`raise_program` makes may answer ``train()`` otherwise than the original."""
    names = Names(program.modules)
    layers, _ = _choose_layers(program, names)
    plain, _ = _choose_plain(program, names)
    calls = [n for n in program.graph.nodes if n.op == "call_function" and n not in layers and n not in plain]
    return switch_notes(layers, calls, program.modules)


def _assemble(root: nn.Module, graph: fx.Graph, class_name: str) -> fx.GraphModule:
    """A GraphModule around the children of ``root``: built empty, since its constructor flattens containers."""
    empty = fx.Graph()
    empty.output(None)
    module = fx.GraphModule(nn.Module(), empty, class_name)
    for name, child in root._modules.items():
        module.add_module(name, child)
    for name, parameter in root._parameters.items():
        module.register_parameter(name, parameter)
    for name, buffer in root._buffers.items():
        module.register_buffer(name, buffer)
    module.graph = graph
    return module.eval()


def _choose_layers(program: Program, names: Names) -> tuple[dict[fx.Node, str], dict[str, LayerCall]]:
    """Which calls a layer makes (node -> path), and the layer at each path."""
    candidates: dict[str, dict[tuple[Any, ...], list[tuple[fx.Node, LayerCall]]]] = defaultdict(dict)
    for node in program.graph.nodes:
        if node.op != "call_function" or not may_be_layer(node):
            continue
        path = _owner(node, names)
        if not path:
            continue
        call = layer_call(node, program.tensors, program.modules.get(path))
        if call is not None:
            candidates[path].setdefault(call.key, []).append((node, call))
    below: dict[str, set[str]] = defaultdict(set)
    for name in program.tensors:
        if program.kinds[name] != "constant":
            for alias in names.of(name):
                parts = alias.split(".")
                for end in range(1, len(parts)):
                    below[".".join(parts[:end])].add(name)
    calls: dict[fx.Node, str] = {}
    owners: dict[str, LayerCall] = {}
    for path, groups in candidates.items():
        at_home = [g for g in groups.values() if any(names.path.get(module_path(n)) == path for n, _ in g)]
        chosen = at_home if at_home else list(groups.values())
        if len(chosen) != 1:
            continue  # one module, several configurations: plain calls with the parameters at their names
        call = chosen[0][0][1]
        if below[path] - {name for _, name in call.slots}:
            continue  # the module owns more than such a layer would
        owners[path] = call
        calls.update({node: path for node, _ in chosen[0]})
    return calls, owners


def _owner(node: fx.Node, names: Names) -> str:
    """Path of the module that owns all tensors of a layer call under the layer's attribute names; "" for none."""
    paths: set[str] | None = None
    first = ""
    for slot, value in slot_nodes(node).items():
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return ""
        found = [alias.rpartition(".")[0] for alias in names.of(str(value.target)) if alias.rpartition(".")[2] == slot]
        found = [names.path.get(path, path) for path in found]
        if paths is None:
            paths, first = set(found), found[0] if found else ""
        else:
            paths &= set(found)
    if not paths:
        return ""
    here = names.path.get(module_path(node), "")
    if here in paths:
        return here
    return first if first in paths else sorted(paths)[0]


def _choose_plain(program: Program, names: Names) -> tuple[dict[fx.Node, str], dict[str, nn.Module]]:
    """Calls made by parameterless layers of torch's own, and copies of these layers by path."""
    together: dict[str, list[fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "call_function" and node.meta.get("nn_module_stack"):
            together[list(node.meta["nn_module_stack"])[-1]].append(node)
    calls: dict[fx.Node, str] = {}
    safe: dict[str, bool] = {}
    for nodes in together.values():
        (node, *others) = nodes
        path = names.path.get(module_path(node), "")
        module = program.modules.get(path)
        if others or not path or module is None or not is_plain(module) or node.meta.get("rewritten"):
            continue
        operators = PLAIN_LAYERS.get(type(module), set())
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.name.removeprefix("aten::") not in operators or len(node.all_input_nodes) != 1:
            continue
        if node.args[0] is not node.all_input_nodes[0]:
            continue
        calls[node] = path
        safe[path] = safe.get(path, True) and _may_write(node.args[0])
    clones = {path: clone_plain(program.modules[path]) for path in safe}
    for path, clone in clones.items():
        if getattr(clone, "inplace", False) and not safe[path]:
            clone.inplace = False  # type: ignore[assignment]
    return calls, clones


_MAY_RETURN_ARGUMENT = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "pad"}


def _may_write(source: Any) -> bool:
    """True where a layer may overwrite its input: a fresh tensor that nothing else reads, or a view of only that."""
    while isinstance(source, fx.Node) and source.op == "call_function" and len(source.users) == 1:
        if targets_of(source) or not isinstance(source.target, torch._ops.OpOverload):
            return source.target in (torch.add, torch.cat, torch.index_add, torch.index_select)
        schema = source.target._schema
        view = any(result.alias_info is not None for result in schema.returns)
        if not view and schema.name.removeprefix("aten::") not in _MAY_RETURN_ARGUMENT:
            return True
        source = source.args[0]
    return False


class _Emitter:
    """Writes the graph of the emitted module node by node."""

    def __init__(
        self, program: Program, tree: Tree, calls: dict[fx.Node, str], plain_calls: dict[fx.Node, str]
    ) -> None:
        self.program, self.tree, self.calls, self.plain_calls = program, tree, calls, plain_calls
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.anchor: fx.Node | None = None
        self.frozen = _buffer_only_reads(program)

    def emit(self) -> fx.Graph:
        """The whole graph."""
        ranks = [tensor.dim() for tensor in self.program.inputs]
        leaves = iter(emit_inputs(self.graph, self.program.signature, ranks))
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(leaves)
                self.anchor = self.anchor or self.values[node]
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                flat = [self._value(item) if isinstance(item, fx.Node) else item for item in node.args[0]]
                emit_output(self.graph, self.program.signature.outputs, flat)
        return self.graph

    def _value(self, node: fx.Node) -> Any:
        """What stands for a node; tensors of the model are fetched when first needed."""
        if node not in self.values:
            value = self.graph.get_attr(self.tree.emitted[str(node.target)])
            if node in self.frozen and self.anchor is not None:
                # Tracing a pickled copy again would run a call on buffers alone and keep its result. Passing the
                # buffer through a function that also sees an input keeps such calls in the graph.
                value = self.graph.call_function(typing.cast, (self.anchor, value))
                value.meta["is_wrapped"] = True
            self.values[node] = value
        return self.values[node]

    def _call(self, node: fx.Node) -> Any:
        product = Product.of(node)
        if product is not None:
            return emit_product(self.graph, node, product, self._value)
        if node in self.calls:
            call = layer_call(node, self.program.tensors, self.program.modules.get(self.calls[node]))
            assert call is not None
            return self.graph.call_module(self.calls[node], (self._value(call.source),))
        if node in self.plain_calls:
            return self.graph.call_module(self.plain_calls[node], (self._value(node.all_input_nodes[0]),))
        if is_idle_dropout(node):
            return self._dropout(node)
        device = self.program.inputs[0].device if self.program.inputs else None
        return emit_call(self.graph, node, self._value, self.anchor, device)

    def _dropout(self, node: fx.Node) -> Any:
        """Functional dropout, idle in eval mode, as a layer that works again after ``train()``."""
        source = self._value(node.args[0])  # type: ignore[arg-type]
        rate = argument(node, "p")
        if rate == 0:
            return source
        kinds: dict[Any, type[nn.Module]] = {
            _aten.dropout.default: nn.Dropout,
            _aten.feature_dropout.default: nn.Dropout2d,
            _aten.alpha_dropout.default: nn.AlphaDropout,
            _aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
        }
        path = self.tree.names.path.get(module_path(node), "")
        owner = self.tree.at(path)
        while owner is None or path in self.tree.layers:
            path = path.rpartition(".")[0]
            owner = self.tree.at(path)
        name, number = "dropout", 1
        while hasattr(owner, name) or (not path and hasattr(fx.GraphModule, name)):
            name, number = f"dropout_{number}", number + 1
        owner.add_module(name, kinds[node.target](rate).eval())
        return self.graph.call_module(f"{path}.{name}" if path else name, (source,))


def _buffer_only_reads(program: Program) -> set[fx.Node]:
    """Reads of buffers and constants by calls that see neither an input nor a parameter."""
    varying: set[fx.Node] = set()
    frozen: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or (node.op == "get_attr" and program.kinds[str(node.target)] == "parameter"):
            varying.add(node)
        elif node.op == "call_function":
            if any(used in varying for used in node.all_input_nodes):
                varying.add(node)
            else:
                reads = {used for used in node.all_input_nodes if used.op == "get_attr"}
                frozen |= reads
                varying.add(node)  # once its reads are passed through, so is everything behind
    return frozen
