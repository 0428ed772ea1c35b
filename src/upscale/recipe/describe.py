"""A graph and a module tree in words that do not depend on the process, the device or the values of weights.

Two captures of one architecture read alike, however torch named their nodes, and whether the weights of one of them
were computed (pruning masks, parametrisations) or not.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from upscale.program import Program, module_path

__all__ = [
    "ADJUSTABLE",
    "ModuleFact",
    "TensorFact",
    "canonical_names",
    "difference",
    "digest_of",
    "graph_lines",
    "module_facts",
    "tensor_facts",
]

#: Settings of layers that people change while they train, and what values they take.
ADJUSTABLE: dict[str, tuple[type, ...]] = {"p": (float, int), "momentum": (float, type(None)), "inplace": (bool,)}


@dataclass(frozen=True)
class TensorFact:
    """A tensor that a captured graph reads. ``kind``: "parameter", "buffer" or "constant"."""

    name: str
    kind: str
    dtype: str  # "float32"
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModuleFact:
    """One module of an emitted model: class and settings, as they print."""

    path: str
    kind: str
    settings: dict[str, str]


def canonical_names(graph: fx.Graph) -> dict[str, str]:
    """A name for every node that depends on the computation alone: inputs and calls by number, tensors by name."""
    names: dict[str, str] = {}
    counts = {"placeholder": 0, "call": 0}
    for node in graph.nodes:
        if node.op == "get_attr":
            names[node.name] = f"={node.target}"
        elif node.op == "output":
            names[node.name] = "output"
        else:
            kind, mark = ("placeholder", "in") if node.op == "placeholder" else ("call", "%")
            names[node.name] = f"{mark}{counts[kind]}"
            counts[kind] += 1
    return names


def graph_lines(graph: fx.Graph, paths: bool = True) -> tuple[str, ...]:
    """One line a node, but for nodes that only fetch a tensor: what is called, on what, and in which module (which an
    emitted graph says only after it was traced again, so ``paths`` may be left out)."""
    names = canonical_names(graph)
    lines = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        target = "" if node.op in ("placeholder", "output") else _target(node)
        args, kwargs = _arguments(node)
        arguments = [_text(item, names) for item in args]
        arguments += [f"{key}={_text(item, names)}" for key, item in sorted(kwargs.items())]
        path = module_path(node) if paths else ""
        lines.append(f"{names[node.name]} {target}({', '.join(arguments)})" + (f" in {path}" if path else ""))
    return tuple(lines)


_aten = torch.ops.aten
#: Arguments without a part in eval mode. A network is the same with another dropout rate or momentum.
_FOR_TRAINING: dict[Any, tuple[int, int]] = {
    **dict.fromkeys((_aten.dropout.default, _aten.feature_dropout.default), (1, 2)),
    **dict.fromkeys((_aten.alpha_dropout.default, _aten.feature_alpha_dropout.default), (1, 2)),
    _aten.batch_norm.default: (6, 5),  # momentum, where training is off
}


def _arguments(node: fx.Node) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments as a call spells them after it was traced again, without those that only matter in training."""
    place, switch = _FOR_TRAINING.get(node.target, (-1, -1))
    if place >= 0 and len(node.args) > switch and node.args[switch] is False:
        return [item for index, item in enumerate(node.args) if index != place], node.kwargs
    if isinstance(node.target, types.FunctionType):
        with contextlib.suppress(TypeError, ValueError):  # the signature of a wrapper need not be that of the function
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
            bound.apply_defaults()
            return (), bound.arguments
    return node.args, node.kwargs


#: Operators of Python by the names of the methods that stand for them after they were traced again.
_METHODS = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return f"module {target}" if node.op == "call_module" else target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name: str = getattr(target, "__name__", "function")
    return _METHODS.get(name, name)


def _text(value: Any, names: Mapping[str, str]) -> str:
    """An argument in words; a device is just that, since a model may be loaded on another."""
    if isinstance(value, fx.Node):
        return names[value.name]
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, slice):
        return ":".join(_text(part, names) for part in (value.start, value.stop, value.step))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_text(item, names)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_text(item, names) for item in value) + "]"
    return value.__name__ if isinstance(value, type) else repr(value)


def digest_of(graph: fx.Graph) -> str:
    """SHA-256 of an emitted graph's lines, in hexadecimal."""
    return hashlib.sha256("\n".join(graph_lines(graph, paths=False)).encode()).hexdigest()


def tensor_facts(program: Program) -> tuple[TensorFact, ...]:
    """The tensors that a program's graph reads, in the order in which it first computes with them."""
    used = (n for node in program.graph.nodes if node.op != "get_attr" for n in node.all_input_nodes)
    names = dict.fromkeys(str(node.target) for node in used if node.op == "get_attr")
    return tuple(
        TensorFact(name, program.kinds[name], str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in ((name, program.tensors[name]) for name in names)
    )


def module_facts(model: nn.Module) -> tuple[ModuleFact, ...]:
    """Classes and settings of all modules below ``model``. One whose weight is computed counts as what it was before
    that."""
    facts = []
    for path, module in model.named_modules(remove_duplicate=False):
        if path and "parametrizations" not in path.split("."):
            kind = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
            name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("torch.nn.modules.")
            facts.append(ModuleFact(path, name, _settings(module)))
    return tuple(facts)


def difference(before: Sequence[ModuleFact], after: Sequence[ModuleFact]) -> str | None:
    """The first module in which two trees differ, in words; None where they agree.

    Settings that may change at any time (:data:`ADJUSTABLE`) do not count, nor those that only one side knows: a later
    version of torch may have given a layer one more.
    """
    known = {fact.path: fact for fact in after}
    for old in before:
        new = known.pop(old.path, None)
        if new is None:
            return f"{old.path} ({old.kind}) is missing"
        if new.kind != old.kind:
            return f"{old.path} is now a {new.kind}, not a {old.kind}"
        for name in sorted(set(old.settings) & set(new.settings) - set(ADJUSTABLE)):
            if old.settings[name] != new.settings[name]:
                return f"{name} of {old.path} is now {new.settings[name]}, not {old.settings[name]}"
    return f"{next(iter(known))} is new" if known else None


_PLAIN = (type(None), bool, int, float, str, torch.dtype)


def _settings(module: nn.Module) -> dict[str, str]:
    return {
        name: repr(value)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)
