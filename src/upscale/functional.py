"""Write a captured graph functionally: every in-place call becomes a call that returns the new value.

A write through a view is carried back to the tensor that owns the memory (``slice_scatter``, inverse permutes,
reshapes), and every other view of it is made anew when it is next read. Buffers are the model's state: writes to them
stay in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from upscale.aliases import Aliases, changes_view, targets_of, written_arguments
from upscale.constants import fold_constants
from upscale.errors import CaptureError
from upscale.importing import Imported
from upscale.program import where
from upscale.views import undo_item, undo_view

_aten = torch.ops.aten
_REFUSED = {"set_", "resize_", "resize_as_", "resize_as_sparse_"}


def functionalise(imported: Imported, names: tuple[str, ...]) -> list[str]:
    """Fold constants, make writes functional, remove what has no effect. Returns notes for the report.

    Raises CaptureError, naming the module and source line, for a write that cannot be expressed so.
    """
    graph = imported.graph
    aliases = Aliases(graph)
    if fold_constants(imported, aliases):
        aliases = Aliases(graph)
    notes: list[str] = []
    if any(targets_of(node) for node in graph.nodes):
        notes = _Functionaliser(imported, aliases).rewrite(names)
    _drop_aliases(graph)
    remove_dead(imported)
    return notes


class _Functionaliser:
    """Walks the graph in order and keeps, for each node, the node that now holds its value."""

    def __init__(self, imported: Imported, aliases: Aliases) -> None:
        self.imported, self.graph, self.aliases = imported, imported.graph, aliases
        self.parents = {node: aliases.parent(node) for node in self.graph.nodes}
        self.arguments = {node: node.args for node in self.graph.nodes}  # as captured
        self.value: dict[fx.Node, fx.Node] = {}
        self.stamp: dict[fx.Node, int] = {}  # version of the storage at which `value` holds
        self.version: dict[int, int] = {}
        self.kept: set[int] = set()
        self.notes: list[str] = []
        self.now: fx.Node = next(iter(self.graph.nodes))

    def rewrite(self, names: tuple[str, ...]) -> list[str]:
        """Edit the graph; returns notes."""
        self._classify(names)
        replaced = []
        for node in list(self.graph.nodes):
            self.now = node
            if self._rewrites(node):
                self._write(node)
                replaced.append(node)
                continue
            if changes_view(node.target):
                node.target = _functional_target(node)
            self._refresh_arguments(node)
        for node in reversed(replaced):
            self.graph.erase_node(node)
        return self.notes

    def _classify(self, names: tuple[str, ...]) -> None:
        """Which written storages stay in place (buffers), and which are the user's inputs."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        for storage, writers in self.aliases.written.items():
            base = self.aliases.base[storage]
            if all(changes_view(writer.target) for writer in writers):
                continue
            if base.op == "placeholder":
                name = names[inputs.index(base)]
                self.notes.append(
                    f"input {name!r} is written in place by the model; the exported model leaves it alone"
                )
            elif base.op == "get_attr":
                kind = self.imported.kinds[str(base.target)]
                if kind == "buffer":
                    self.kept.add(storage)
                elif str(base.target) not in self.imported.folded:
                    what = "parameter" if kind == "parameter" else "tensor attribute"
                    raise CaptureError(
                        f"{what} {base.target!r} is written in place at {where(writers[0])}: make it a buffer"
                    )

    def _tracked(self, node: fx.Node) -> bool:
        storage = self.aliases.of(node)
        return storage is not None and storage in self.aliases.written and storage not in self.kept

    def _rewrites(self, node: fx.Node) -> bool:
        """True for an in-place call on memory that is not a buffer's."""
        return bool(targets_of(node)) and not changes_view(node.target) and not self._on_buffers(node)

    def _on_buffers(self, node: fx.Node) -> bool:
        return all(self.aliases.of(target) in self.kept for target in targets_of(node))

    def _refresh_arguments(self, node: fx.Node) -> None:
        if any(self._tracked(used) for used in node.all_input_nodes):
            node.args = fx.node.map_arg(node.args, self._read)
            node.kwargs = fx.node.map_arg(node.kwargs, self._read)
        if self._tracked(node):
            self._hold(node, node)

    def _hold(self, node: fx.Node, value: fx.Node) -> None:
        storage = self.aliases.of(node)
        assert storage is not None
        self.value[node], self.stamp[node] = value, self.version.get(storage, 0)

    def _read(self, node: fx.Node) -> fx.Node:
        """The node that holds the value of ``node`` now; a view whose memory was written since is made anew."""
        if not self._tracked(node):
            return node
        storage = self.aliases.of(node)
        assert storage is not None
        current = self.stamp.get(node, 0) == self.version.get(storage, 0)
        if current or node is self.aliases.base[storage]:
            return self.value.get(node, node)
        parent = self._parent(node)
        source = self._read(parent)
        if self._rewrites(node):  # the result of a write is the tensor that was written
            self._hold(node, source)
        else:
            args = fx.node.map_arg(self.arguments[node], lambda used: source if used is parent else self._read(used))
            self._hold(node, self._insert(node.target, args, dict(node.kwargs), node))
        return self.value[node]

    def _parent(self, node: fx.Node) -> fx.Node:
        parent = self.parents.get(node)
        if parent is None:
            raise CaptureError(f"cannot tell which tensor {node.target} at {where(node)} is a view of")
        return parent

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: fx.Node) -> fx.Node:
        """A new call before the current node, with the shape of ``like`` and the origin of the current node."""
        with self.graph.inserting_before(self.now):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = {**self.now.meta, "val": like.meta["val"]}
        return made

    def _write(self, node: fx.Node) -> None:
        """Replace an in-place call by its functional form and carry the new value back to the owner of the memory."""
        targets = targets_of(node)
        if len(targets) != 1:
            raise CaptureError(f"{node.target} writes to several tensors at {where(node)}")
        (child,) = targets
        storage = self.aliases.of(child)
        if storage is None:
            raise CaptureError(f"cannot tell what {node.target} at {where(node)} writes to")
        new = self._functional(node, child)
        path = [(child, new)]
        while child is not self.aliases.base[storage]:
            parent = self._parent(child)
            if not self._rewrites(child):
                child, parent, new = self._undo(child, parent, new)
            path.append((parent, new))
            child = parent
        self.version[storage] = self.version.get(storage, 0) + 1
        for changed, value in path:
            self._hold(changed, value)
        self._hold(node, path[0][1])

    def _undo(self, view: fx.Node, parent: fx.Node, new: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        """New value of the tensor that ``view`` looks at; the results of a split count as views of what was split."""
        if isinstance(parent.meta.get("val"), (list, tuple)):
            source = self._parent(parent)
            return view, source, undo_item(view, parent, source, self._read(source), new, self._insert)
        return view, parent, undo_view(view, parent, self._read(parent), new, self._insert)

    def _functional(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """The new value of ``target`` after the in-place call ``node``."""
        value: torch.Tensor = target.meta["val"]
        name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
        if name == "copy_":
            return self._copied(node, target)
        if name == "zero_":
            return self._insert(_aten.zeros_like.default, (self._read(target),), {}, target)
        functional = _functional_target(node)
        args = fx.node.map_arg(node.args, self._read)
        new = self._insert(functional, args, fx.node.map_arg(node.kwargs, self._read), target)
        others = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        promoted = any(torch.promote_types(value.dtype, other.dtype) != value.dtype for other in others)
        if promoted or (name in _BOOLEAN and value.dtype != torch.bool):  # writing in place keeps the type
            new = self._insert(_aten.to.dtype, (new, value.dtype), {}, target)
        return new

    def _copied(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """``target.copy_(source)``: the source, converted and broadcast where needed."""
        source = self._read(node.args[1])  # type: ignore[arg-type]
        old, new = target.meta["val"], source.meta["val"]
        if new.device != old.device:
            source = self._insert(_aten.to.device, (source, old.device, old.dtype), {}, source)
        elif new.dtype != old.dtype:
            source = self._insert(_aten.to.dtype, (source, old.dtype), {}, source)
        if str(tuple(new.shape)) != str(tuple(old.shape)):
            source = self._insert(_aten.expand_as.default, (source, self._read(target)), {}, target)
        return source


# In place these keep the type of the tensor; otherwise they return booleans.
_BOOLEAN = {f"{name}_" for name in ("eq", "ne", "lt", "le", "gt", "ge", "less", "greater", "not_equal", "less_equal")}
_BOOLEAN |= {f"{name}_" for name in ("greater_equal", "logical_and", "logical_or", "logical_xor", "logical_not")}


def _functional_target(node: fx.Node) -> Any:
    """The operator that returns what ``node``'s operator writes."""
    target: Any = node.target
    schema = target._schema
    name = schema.name.removeprefix("aten::")
    found = None
    if name.endswith("_") and not name.endswith("__") and name not in _REFUSED and schema.name.startswith("aten::"):
        packet = getattr(_aten, name[:-1], None)
        overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
        signature = _types(target)
        matching = [o for o in overloads if _types(o) == signature and not written_arguments(o)]
        found = next((o for o in matching if o._overloadname == target._overloadname), None)
        found = found or next(iter(matching), None)
    if found is None:
        raise CaptureError(f"{target} at {where(node)} writes in place and has no form that does not")
    return found


def _types(target: Any) -> list[tuple[str, str]]:
    """Names and types of an operator's arguments; the first is not always called the same."""
    arguments = target._schema.arguments
    return [("", str(arguments[0].type)), *((a.name, str(a.type)) for a in arguments[1:])]


def _drop_aliases(graph: fx.Graph) -> None:
    """Remove calls that only rename a tensor."""
    for node in graph.nodes:
        if node.target in (_aten.alias.default, _aten.lift_fresh.default, _aten.lift_fresh_copy.default):
            node.replace_all_uses_with(node.args[0])


def remove_dead(imported: Imported) -> None:
    """Erase calls whose result nobody reads, but for writes to buffers, and forget tensors no longer read."""
    for node in reversed(list(imported.graph.nodes)):
        if node.users or node.op in ("placeholder", "output") or targets_of(node):
            continue
        imported.graph.erase_node(node)
        if node.op == "get_attr":
            del imported.tensors[str(node.target)], imported.kinds[str(node.target)]
