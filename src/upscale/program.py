"""The one intermediate form of the whole compiler: a functional ATen graph and the tensors it names.

``capture`` makes a :class:`Program` of a module, ``lower`` makes a smaller one of it, ``raising`` turns either into an
ordinary ``torch.fx.GraphModule``. A lowered program has exactly the format of a captured one.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from upscale.signature import Signature

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)')
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep
#: Folders whose frames say nothing to the user; the adaptor around the captured model is one of ours.
_INTERNAL = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, __file__))


@dataclass(frozen=True)
class Program:
    """A model as data.

    ``graph`` holds functional ATen calls only: ``placeholder`` (one per tensor input, in call order), ``get_attr`` (one
    per tensor used; the target is its name in ``tensors``), ``call_function``, and an ``output`` whose argument is the
    flat tuple of the model's output leaves. No call writes to its arguments, but for writes to a buffer, which are
    kept in place. ``tensors`` of a captured program share the user's storage and must never be written to.
    """

    graph: fx.Graph
    tensors: Mapping[str, torch.Tensor]
    kinds: Mapping[str, str]  # "parameter", "buffer" or "constant" (not in the state dict)
    signature: Signature
    modules: Mapping[str, torch.nn.Module]  # the user's modules by path, "" is the root: read only
    inputs: tuple[torch.Tensor, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0  # spent in torch.export itself
    batch: int | None = None  # of the user's example; ``inputs`` may hold it twice
    free: Any = None  # the sizes that capture was asked to leave free: None (batch), "spatial", or FlatShapes
    # Tensors of executed modules that the graph does not read (``num_batches_tracked``): they stay in the state dict.
    spare: Mapping[str, torch.Tensor] = field(default_factory=dict)


def run(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Compute the flat outputs of ``program``; a value is freed after its last use. Gradients are not recorded."""
    with torch.no_grad():
        return interpret(program.graph, program.tensors, inputs)


def interpret(
    graph: fx.Graph,
    tensors: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Run ``graph`` node by node and return its flat outputs; see :func:`steps`."""
    result: Any = None
    for _, value in steps(graph, tensors, inputs, dtype):
        result = value
    return tuple(result)


def steps(
    graph: fx.Graph,
    tensors: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Every node with its value, the output last; a value is freed after its last use.

    ``inputs`` are the graph's placeholders in order. ``dtype`` takes the place of every floating type that the graph
    itself converts to.
    """

    def converted(value: Any) -> Any:
        return dtype if dtype and isinstance(value, torch.dtype) and value.is_floating_point else value

    dying = last_uses(graph)
    values: dict[fx.Node, Any] = {}
    feed = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(feed)
        elif node.op == "get_attr":
            values[node] = tensors[node.target]
        elif node.op == "call_function":
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            if dtype is not None:
                args, kwargs = fx.node.map_aggregate(args, converted), fx.node.map_aggregate(kwargs, converted)
            values[node] = node.target(*args, **kwargs)
        elif node.op == "output":
            values[node] = fx.node.map_arg(node.args[0], values.__getitem__)
        yield node, values[node]
        for used in dying.get(node, ()):
            del values[used]
        if not node.users:
            values.pop(node, None)


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node the values that nobody needs after it."""
    last_use: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last_use[used] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for used, node in last_use.items():
        dying.setdefault(node, []).append(used)
    return dying


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose ``forward`` made ``node`` ("" is the root)."""
    for entry in reversed((node.meta.get("nn_module_stack") or {}).values()):
        if isinstance(entry, tuple) and isinstance(entry[0], str):
            return entry[0]
    return ""


def is_users_file(filename: str) -> bool:
    """Whether a source file is the user's (or a library's), not torch's, Python's, this package's or generated code."""
    standard = filename.startswith(_STANDARD) and "-packages" not in filename
    return not standard and not filename.startswith((*_INTERNAL, "<"))


def where(node: fx.Node) -> str:
    """Where in the user's model ``node`` comes from, for messages: module path, class, and the user's source line."""
    stack = [e for e in (node.meta.get("nn_module_stack") or {}).values() if isinstance(e, tuple)]
    path, kind = (stack[-1][0] or "model", stack[-1][1]) if stack else ("model", "")
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    details = [kind.rsplit(".", 1)[-1]] if kind else []
    own = [frame for frame in _FRAME.findall(node.meta.get("stack_trace") or "") if is_users_file(frame[0])]
    if own:
        file, line, code = own[-1]
        details.append(f"{file}:{line}: {code.strip()}")
    return f"{path} ({', '.join(details)})" if details else path
