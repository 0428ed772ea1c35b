"""Who shares memory with whom in a captured graph, and which calls write.

Export's fake tensors share storages as the real ones would, so aliasing is read off them; what an operator writes is
in its schema.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten

# In eval mode these return their very argument, though their fake kernels make a new tensor.
_DROPOUTS = {
    _aten.dropout.default,
    _aten.feature_dropout.default,
    _aten.alpha_dropout.default,
    _aten.feature_alpha_dropout.default,
}


@functools.cache
def written_arguments(target: Any) -> tuple[str, ...]:
    """Names of the arguments that an operator writes to, by its schema."""
    if not isinstance(target, torch._ops.OpOverload):
        return ()
    arguments = target._schema.arguments
    return tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)


@functools.cache
def is_random(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


@functools.cache
def changes_view(target: Any) -> bool:
    """Calls like ``squeeze_``: they change how their argument looks at memory, not the memory."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.inplace_view in target.tags


def is_idle_dropout(node: fx.Node) -> bool:
    """A dropout captured in eval mode: its result is its argument."""
    return node.target in _DROPOUTS and len(node.args) > 2 and node.args[2] is False


def first_tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, (tuple, list)):
        return next((item for item in value if isinstance(item, torch.Tensor)), None)
    return None


def storage_id(tensor: torch.Tensor) -> int:
    """Equal for two tensors, both alive, that look at the same memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other storage-less tensors
        return id(tensor)


class Aliases:
    """Storage of each node's result (for results that are lists of views: the one they share)."""

    def __init__(self, graph: fx.Graph) -> None:
        self._storage: dict[fx.Node, int] = {}
        self._same: dict[int, int] = {}  # fake storage -> the one it really is
        self.base: dict[int, fx.Node] = {}
        self.written: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            storage = self._find(node)
            if storage is None:
                continue
            self._storage[node] = storage
            self.base.setdefault(storage, node)
        for node in graph.nodes:
            for written in targets_of(node):
                storage = self._storage.get(written)
                if storage is not None:
                    self.written.setdefault(storage, []).append(node)

    def _find(self, node: fx.Node) -> int | None:
        value = node.meta.get("val")
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        storage = self._raw(first_tensor(value))
        if storage is None:
            return None
        if is_idle_dropout(node) and source is not None:
            self._same[storage] = self._storage.get(source, storage)
        storage = self._same.get(storage, storage)
        if isinstance(value, (tuple, list)):
            # max(dim) and friends return fresh tensors: only views of one argument share its storage.
            return storage if source is not None and self._storage.get(source) == storage else None
        return storage

    @staticmethod
    def _raw(value: torch.Tensor | None) -> int | None:
        if value is None:
            return None
        try:
            return value.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse and other storage-less tensors
            return None

    def of(self, node: fx.Node) -> int | None:
        return self._storage.get(node)

    def parent(self, node: fx.Node) -> fx.Node | None:
        """The argument that ``node`` is a view of (or that it wrote to)."""
        storage = self._storage.get(node)
        return next((n for n in node.all_input_nodes if self._storage.get(n) == storage), None)


def targets_of(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that ``node`` writes to."""
    if node.op != "call_function":
        return []
    found = []
    for name in written_arguments(node.target):
        value = argument(node, name)
        if isinstance(value, fx.Node):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, fx.Node))
    return found


def argument(node: fx.Node, name: str) -> Any:
    """An argument of an operator call by its schema name."""
    if name in node.kwargs:
        return node.kwargs[name]
    for position, declared in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if declared.name == name:
            return node.args[position] if position < len(node.args) else declared.default_value
    return None
