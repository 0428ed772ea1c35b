"""Evaluate, once, what depends on no input and no parameter: attention masks, index tables, fixed scales.

Such a subgraph may write in place (Swin fills slices of its mask); it is run as it stands, on real tensors.
Parameters and buffers are never folded: they stay trainable and loadable.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from upscale.aliases import Aliases, first_tensor, is_random, targets_of
from upscale.guards import fixed_size
from upscale.importing import Imported
from upscale.program import module_path

_aten = torch.ops.aten
_LARGEST = 1 << 24  # elements; larger constants stay computed

# These take only shape, dtype and device from their first argument.
_NEW = {_aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default, _aten.new_empty.default}
_LIKE = {
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.full_like.default,
    _aten.empty_like.default,
}


def fold_constants(imported: Imported, aliases: Aliases) -> bool:
    """Replace constant subgraphs of ``imported`` by constant tensors; returns whether there were any."""
    constant = _constant_nodes(imported, aliases)
    if not any(node.op == "call_function" for node in constant):
        return False
    _Evaluator(imported, aliases, constant).evaluate()
    return True


def _constant_nodes(imported: Imported, aliases: Aliases) -> set[fx.Node]:
    """Nodes that compute the same on every call.

    Where anything that varies is written into a storage, only its creation counts as constant.
    """
    tainted: set[int] = set()
    while True:
        constant: set[fx.Node] = set()
        before = len(tainted)
        for node in imported.graph.nodes:
            if _is_constant(node, imported, constant):
                storage = aliases.of(node)
                if storage is None or storage not in tainted or aliases.base[storage] is node:
                    constant.add(node)
            for target in targets_of(node):
                storage = aliases.of(target)
                if storage is not None and node not in constant:
                    tainted.add(storage)
        if len(tainted) == before:
            return constant


def _is_constant(node: fx.Node, imported: Imported, constant: set[fx.Node]) -> bool:
    if node.op == "get_attr":
        return imported.kinds[str(node.target)] == "constant"
    if node.op != "call_function" or is_random(node.target):
        return False
    value = first_tensor(node.meta.get("val"))
    if value is None or any(fixed_size(size) is None for size in value.shape):
        return False
    if value.numel() > _LARGEST:
        return False
    inputs = node.all_input_nodes
    if node.target in _NEW or node.target in _LIKE:
        inputs = [n for n in inputs if n is not node.args[0]]
    if any(target.op == "get_attr" for target in targets_of(node)):
        return False  # state kept in a plain attribute, not a constant
    return all(n in constant for n in inputs)


class _Evaluator:
    """Runs the constant nodes in order; a reader that is not constant gets a snapshot of that moment."""

    def __init__(self, imported: Imported, aliases: Aliases, constant: set[fx.Node]) -> None:
        self.imported, self.aliases, self.constant = imported, aliases, constant
        self.values: dict[fx.Node, Any] = {}
        self.version: dict[int, int] = {}
        self.snapshots: dict[tuple[fx.Node, int], fx.Node] = {}

    def evaluate(self) -> None:
        """Run, replace reads, erase what was folded."""
        with torch.no_grad():
            for node in list(self.imported.graph.nodes):
                if node in self.constant:
                    self._run(node)
                elif any(used in self.constant for used in node.all_input_nodes):
                    read = functools.partial(self._read, reader=node)
                    node.args, node.kwargs = fx.node.map_arg(node.args, read), fx.node.map_arg(node.kwargs, read)
        for node in reversed(list(self.imported.graph.nodes)):
            if node in self.constant and not node.users:
                self.imported.graph.erase_node(node)
                if node.op == "get_attr":
                    del self.imported.tensors[str(node.target)], self.imported.kinds[str(node.target)]

    def _run(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.values[node] = self.imported.tensors[str(node.target)].detach()
            return
        for target in targets_of(node):
            storage = self.aliases.of(target)
            if storage is not None:
                self.version[storage] = self.version.get(storage, 0) + 1
        args = list(node.args)
        if node.target in _NEW:
            args[0] = _stand_in(args[0].meta["val"], shape=())  # type: ignore[union-attr]
        elif node.target in _LIKE:
            args[0] = _stand_in(args[0].meta["val"], shape=node.meta["val"].shape)  # type: ignore[union-attr]
        args = fx.node.map_arg(args, self.values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self.values.__getitem__)
        self.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]

    def _read(self, used: fx.Node, reader: fx.Node) -> fx.Node:
        """A ``get_attr`` of the value that ``used`` has when ``reader`` runs."""
        if used not in self.constant or used.op == "get_attr":
            return used
        value = self.values[used]
        if not isinstance(value, torch.Tensor):  # read item by item: getitem is constant too
            return used
        key = (used, self.version.get(self.aliases.of(used) or 0, 0))
        if key not in self.snapshots:
            name = self._name(used)
            with self.imported.graph.inserting_before(reader):
                made = self.imported.graph.get_attr(name)
            made.meta = dict(used.meta)
            self.imported.tensors[name] = value.detach().clone()
            self.imported.kinds[name] = "constant"
            self.imported.folded.add(name)
            self.snapshots[key] = made
        return self.snapshots[key]

    def _name(self, node: fx.Node) -> str:
        path = module_path(node)
        stem = f"{path}.constant" if path else "constant"
        taken, number = {*self.imported.tensors, *self.imported.canonical}, 0
        while f"{stem}{number}" in taken:
            number += 1
        return f"{stem}{number}"


def _stand_in(fake: torch.Tensor, shape: Any) -> torch.Tensor:
    """A real tensor with the dtype and device of a fake one."""
    return torch.empty(tuple(int(size) for size in shape), dtype=fake.dtype, device=fake.device)
