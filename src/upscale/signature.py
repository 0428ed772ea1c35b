"""The two faces of a captured model: how its arguments nest, how its outputs nest, and which sizes it insists on.

A structure (:data:`Tree`) says how a nested Python value is built from a flat list of leaves. Arguments become a
tree whose leaves are the tensors; every other value in it is a constant that was baked into the graph and that the
exported model therefore checks.
"""

from __future__ import annotations

import collections
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upscale.errors import InputError
from upscale.guards import Guard

_LITERALS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)


@dataclass(frozen=True)
class Leaf:
    """The ``index``-th flat value."""

    index: int


@dataclass(frozen=True)
class Const:
    """A value that is no tensor: fixed at capture."""

    value: Any


@dataclass(frozen=True)
class Branch:
    """A container: ``kind`` is tuple, list, dict, ordered, namedtuple or object (built by keyword)."""

    kind: str
    type: type
    keys: tuple[Any, ...]
    children: tuple[Tree, ...]


Tree = Leaf | Const | Branch


@dataclass(frozen=True)
class Argument:
    """One parameter of the model's ``forward``; ``tree`` is None where the capture did not pass it."""

    name: str
    kind: inspect._ParameterKind
    default: Any
    tree: Tree | None


@dataclass(frozen=True)
class Signature:
    """What capture knows about calling the model: arguments, names of the tensor inputs, outputs, conditions."""

    arguments: tuple[Argument, ...]
    names: tuple[str, ...]  # of each tensor input, as a user writes it: "x", "batch['mask']"
    outputs: Tree
    guards: tuple[Guard, ...]


def _parts(value: Any) -> tuple[str, type, tuple[Any, ...], Sequence[Any]] | None:
    """Kind, type, keys and children of a container; None for anything else."""
    kind = type(value)
    if dataclasses.is_dataclass(value):
        if isinstance(value, Mapping):  # transformers' ModelOutput: only the entries that are set
            return "object", kind, tuple(value.keys()), list(value.values())
        names = tuple(f.name for f in dataclasses.fields(value) if f.init)
        return "object", kind, names, [getattr(value, name) for name in names]
    if isinstance(value, collections.OrderedDict):
        return "ordered", collections.OrderedDict, tuple(value), list(value.values())
    if isinstance(value, dict):
        return "dict", dict, tuple(value), list(value.values())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "namedtuple", kind, tuple(value._fields), list(value)
    if isinstance(value, tuple):
        return "tuple", tuple, tuple(range(len(value))), list(value)
    if isinstance(value, list):
        return "list", list, tuple(range(len(value))), value
    return None


def flatten(value: Any, leaves: list[Any], is_leaf: Callable[[Any], bool]) -> Tree:
    """Structure of ``value``; what ``is_leaf`` accepts is appended to ``leaves``."""
    if is_leaf(value):
        leaves.append(value)
        return Leaf(len(leaves) - 1)
    parts = _parts(value)
    if parts is None:
        return Const(value)
    kind, made, keys, children = parts
    return Branch(kind, made, keys, tuple(flatten(child, leaves, is_leaf) for child in children))


def leaves_at(tree: Tree, value: Any) -> list[Any]:
    """What lies in ``value`` where ``tree`` has leaves: tensors, and sizes that are computed."""
    if isinstance(tree, Leaf):
        return [value]
    if isinstance(tree, Const):
        return []
    parts = _parts(value)
    found = {} if parts is None else dict(zip(parts[2], parts[3], strict=True))
    pairs = zip(tree.keys, tree.children, strict=True)
    return [leaf for key, child in pairs for leaf in leaves_at(child, found.get(key))]


def rebuild(tree: Tree, leaves: Sequence[Any]) -> Any:
    """Inverse of :func:`flatten`."""
    if isinstance(tree, Leaf):
        return leaves[tree.index]
    if isinstance(tree, Const):
        return tree.value
    children = [rebuild(child, leaves) for child in tree.children]
    return assemble(tree, children)


def assemble(tree: Branch, children: Sequence[Any]) -> Any:
    """The container of ``tree`` around ``children``."""
    if tree.kind == "tuple":
        return tuple(children)
    if tree.kind == "list":
        return list(children)
    if tree.kind == "namedtuple":
        return tree.type(*children)
    if tree.kind == "object":
        return tree.type(**dict(zip(tree.keys, children, strict=True)))
    return tree.type(zip(tree.keys, children, strict=True))


def access(tree: Branch, name: str) -> Iterator[tuple[Any, Tree, str]]:
    """Key, subtree and printable name of each child of the container called ``name``."""
    for key, child in zip(tree.keys, tree.children, strict=True):
        attribute = tree.kind in ("object", "namedtuple")
        yield key, child, f"{name}.{key}" if attribute else f"{name}[{key!r}]"


def bind(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Argument, ...], list[torch.Tensor], tuple[str, ...]]:
    """Match the example to the parameters of ``forward``.

    Returns the arguments in the order of the signature, the flat example tensors, and a printable name for each.
    Raises InputError where the example does not fit the signature, holds no tensor, or holds a value that could
    neither be a graph input nor be checked later.
    """
    signature = inspect.signature(forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"the example input does not fit forward{signature}: {error}") from error
    leaves: list[Any] = []
    arguments = []
    for name, parameter in signature.parameters.items():
        tree = None
        if name in bound.arguments:
            tree = flatten(bound.arguments[name], leaves, lambda value: isinstance(value, torch.Tensor))
            _check_constants(tree, name)
        arguments.append(Argument(name, parameter.kind, parameter.default, tree))
    if not leaves:
        raise InputError(
            "the example input holds no tensor: pass the model's example arguments, for instance "
            "(torch.randn(1, 3, 224, 224),)"
        )
    names: dict[int, str] = {}
    for argument in arguments:
        if argument.tree is not None:
            _name_leaves(argument.tree, argument.name, names)
    return tuple(arguments), leaves, tuple(names[index] for index in range(len(leaves)))


def _name_leaves(tree: Tree, name: str, names: dict[int, str]) -> None:
    if isinstance(tree, Leaf):
        names[tree.index] = name
    elif isinstance(tree, Branch):
        for _, child, child_name in access(tree, name):
            _name_leaves(child, child_name, names)


def _check_constants(tree: Tree, name: str) -> None:
    """Refuse a baked-in value that the exported model could not compare with what it is given."""
    if isinstance(tree, Const) and not isinstance(tree.value, _LITERALS):
        raise InputError(
            f"example input {name!r} is a {type(tree.value).__name__}: only tensors, numbers, strings, None and "
            "tuples, lists, dicts and dataclasses of these can be inputs of an exported model"
        )
    if isinstance(tree, Branch):
        for _, child, child_name in access(tree, name):
            _check_constants(child, child_name)


def call_with(arguments: Sequence[Argument], leaves: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of a call that passes ``leaves`` at their places."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    by_keyword = False
    for argument in arguments:
        if argument.tree is None:
            by_keyword = by_keyword or argument.kind is not inspect.Parameter.POSITIONAL_ONLY
            continue
        value = rebuild(argument.tree, leaves)
        if argument.kind is inspect.Parameter.VAR_POSITIONAL:
            args.extend(value)
        elif argument.kind is inspect.Parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif argument.kind is inspect.Parameter.KEYWORD_ONLY or by_keyword:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def flat_shapes(arguments: Sequence[Argument], spec: Any, count: int) -> list[Any]:
    """The user's ``dynamic_shapes`` (by name or by position, nested like the inputs) as one entry per tensor."""
    if isinstance(spec, FlatShapes):
        return list(spec.entries)
    given = [argument for argument in arguments if argument.tree is not None]
    flat: list[Any] = [None] * count
    if isinstance(spec, Mapping):
        unknown = set(spec) - {argument.name for argument in arguments}
        if unknown:
            raise InputError(f"dynamic_shapes names {sorted(unknown)}, which are no arguments of the model")
        pairs = [(argument, spec.get(argument.name)) for argument in given]
    elif isinstance(spec, (tuple, list)):
        if len(spec) != len(given):
            raise InputError(f"dynamic_shapes has {len(spec)} entries for {len(given)} arguments")
        pairs = list(zip(given, spec, strict=True))
    else:
        raise InputError(f'dynamic_shapes must be None, "spatial", a dict or a tuple, not {spec!r}')
    for argument, entry in pairs:
        assert argument.tree is not None
        _spread(argument.tree, entry, argument.name, flat)
    return flat


@dataclass(frozen=True)
class FlatShapes:
    """``dynamic_shapes`` with one entry for each tensor input, in order."""

    entries: tuple[Any, ...]


def _spread(tree: Tree, spec: Any, name: str, flat: list[Any]) -> None:
    if spec is None:
        return
    if isinstance(tree, Leaf):
        flat[tree.index] = spec
    elif isinstance(tree, Branch):
        for position, (key, child, child_name) in enumerate(access(tree, name)):
            try:
                entry = spec.get(key) if isinstance(spec, Mapping) else spec[position]
            except (AttributeError, IndexError, TypeError, KeyError) as error:
                raise InputError(f"dynamic_shapes does not fit input {child_name!r}") from error
            _spread(child, entry, child_name, flat)
