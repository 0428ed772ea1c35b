"""Emit the call signature of the original model: arguments, unpacking, checks, and outputs rebuilt in the graph.

All of it is plain graph code, so that it survives pickling, copying and another export. Nothing here may need this
library when the emitted model runs.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx

from upscale.guards import Size
from upscale.signature import Branch, Const, Leaf, Signature, Tree, access

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
_PLAIN = (type(None), bool, int, float, str)


def emit_inputs(graph: fx.Graph, signature: Signature, ranks: list[int]) -> list[fx.Node]:
    """Placeholders with the original names and defaults, and the checks; returns the node of each flat tensor."""
    nodes: dict[str, fx.Node] = {}
    defaulted = False
    for argument in signature.arguments:
        prefix = _STARS.get(argument.kind, "")
        default: tuple[Any, ...] = ()
        if not prefix:
            if argument.default is not inspect.Parameter.empty:
                default = (argument.default if isinstance(argument.default, _PLAIN) else None,)
            elif defaulted:  # keyword-only without default behind one with: it must be given, which is checked
                default = (None,)
            defaulted = defaulted or bool(default)
        node = graph.placeholder(
            prefix + argument.name, default_value=default[0] if default else inspect.Parameter.empty
        )
        nodes[argument.name] = node
    leaves: dict[int, fx.Node] = {}
    for argument in signature.arguments:
        node = nodes[argument.name]
        if argument.tree is None:
            _check_not_given(graph, node, argument.name, argument.kind, argument.default)
            continue
        optional = argument.default is not inspect.Parameter.empty
        _unpack(graph, argument.tree, node, argument.name, leaves, optional)
    found = [leaves[index] for index in range(len(leaves))]
    _check_sizes(graph, signature, found, ranks)
    return found


def _require(graph: fx.Graph, condition: Any, message: str) -> None:
    graph.call_function(torch._assert, (condition, message))


def _check_not_given(graph: fx.Graph, node: fx.Node, name: str, kind: Any, default: Any) -> None:
    expected: Any = default if isinstance(default, _PLAIN) else None
    if kind is inspect.Parameter.VAR_POSITIONAL:
        expected = ()
    elif kind is inspect.Parameter.VAR_KEYWORD:
        expected = {}
    message = f"upscale: argument {name!r} was not given at export and takes no other value than {expected!r}"
    _require(graph, graph.call_function(operator.eq, (node, expected)), message)


def _unpack(
    graph: fx.Graph, tree: Tree, node: fx.Node, name: str, leaves: dict[int, fx.Node], optional: bool = False
) -> None:
    """Take the tensors out of ``node`` and check everything else in it."""
    if isinstance(tree, Leaf):
        if optional:
            present = graph.call_function(operator.ne, (node, None))
            _require(graph, present, f"upscale: argument {name!r} was a tensor at export and must be given")
        leaves[tree.index] = node
        return
    if isinstance(tree, Const):
        value = tree.value
        message = f"upscale: input {name!r} was {value!r} at export and takes no other value"
        _require(graph, graph.call_function(operator.eq, (node, value)), message)
        return
    _check_length(graph, tree, node, name)
    for key, child, child_name in access(tree, name):
        if tree.kind in ("object", "namedtuple"):
            item = graph.call_function(getattr, (node, key))
        else:
            item = graph.call_function(operator.getitem, (node, key))
        _unpack(graph, child, item, child_name, leaves)


def _check_length(graph: fx.Graph, tree: Branch, node: fx.Node, name: str) -> None:
    """No item may be passed that the graph would ignore."""
    if tree.kind not in ("tuple", "list", "dict", "ordered"):
        return
    length = graph.call_function(len, (node,))
    length.meta["is_wrapped"] = True  # keeps the call as a call when a pickled copy is traced again
    message = f"upscale: input {name!r} had {len(tree.keys)} entries at export and takes no other number"
    _require(graph, graph.call_function(operator.eq, (length, len(tree.keys))), message)


def _check_sizes(graph: fx.Graph, signature: Signature, leaves: list[fx.Node], ranks: list[int]) -> None:
    for leaf, node in enumerate(leaves):
        rank = graph.call_function(getattr, (node, "ndim"))
        message = f"upscale: input {signature.names[leaf]!r} must have {ranks[leaf]} dimensions"
        _require(graph, graph.call_function(operator.eq, (rank, ranks[leaf])), message)
    sizes: dict[tuple[int, int], fx.Node] = {}
    for guard in signature.guards:
        _require(graph, _emit_size(graph, guard.condition, leaves, sizes), guard.message)


def _emit_size(graph: fx.Graph, size: Any, leaves: list[fx.Node], sizes: dict[tuple[int, int], fx.Node]) -> Any:
    if not isinstance(size, Size):
        return size
    if size.op is not None:
        return graph.call_function(size.op, tuple(_emit_size(graph, a, leaves, sizes) for a in size.args))
    key = (size.leaf, size.dim)
    if key not in sizes:
        sizes[key] = graph.call_method("size", (leaves[size.leaf], size.dim))
    return sizes[key]


def emit_output(graph: fx.Graph, tree: Tree, flat: list[Any]) -> None:
    """The output node: the original structure around the flat results."""
    graph.output(_rebuild(graph, tree, flat))


def _rebuild(graph: fx.Graph, tree: Tree, flat: list[Any]) -> Any:
    if isinstance(tree, Leaf):
        return flat[tree.index]
    if isinstance(tree, Const):
        return tree.value
    children = [_rebuild(graph, child, flat) for child in tree.children]
    if tree.kind == "tuple":
        return tuple(children)
    if tree.kind == "list":
        return children
    if tree.kind == "dict" and all(isinstance(key, str) for key in tree.keys):
        return dict(zip(tree.keys, children, strict=True))
    if tree.kind == "namedtuple":
        return tree.type(*children)
    if tree.kind == "object":
        made = graph.call_function(tree.type, (), dict(zip(tree.keys, children, strict=True)))
    else:
        made = graph.call_function(tree.type, ([(k, c) for k, c in zip(tree.keys, children, strict=True)],))
    made.meta["is_wrapped"] = True  # keeps the call as a call when a pickled copy is traced again
    return made
