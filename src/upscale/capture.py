"""Front end: turn any ``nn.Module`` and an example call into one functional :class:`~upscale.program.Program`.

The model is captured by ``torch.export`` in eval mode, through an adaptor that takes and returns flat tensors, so that
any nesting of arguments and results works alike. Whatever the capture changes in the model is put back.
"""

from __future__ import annotations

import contextlib
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from upscale.accept import check_names, unwrap
from upscale.errors import CaptureError, InputError
from upscale.functional import functionalise
from upscale.guards import Guard, accepted, size_guards, text_guards
from upscale.idle import dropped_notes
from upscale.importing import import_graph
from upscale.program import Program, is_users_file, module_path
from upscale.signature import Argument, FlatShapes, Signature, Tree, bind, call_with, flat_shapes, flatten
from upscale.spelling import normalise_spelling
from upscale.weights import fold_weight_slots

_MOST_NOTES = 5  # of one kind


class _Adaptor(nn.Module):
    """Calls the model with its arguments rebuilt from flat tensors; remembers how the result nests."""

    def __init__(self, model: nn.Module, arguments: Sequence[Argument], found: Callable[[Tree], None]) -> None:
        super().__init__()
        self.model = model
        self.arguments = arguments
        self.found = found  # called with the structure of the result: export undoes changes to attributes

    def forward(self, *leaves: torch.Tensor) -> tuple[Any, ...]:
        args, kwargs = call_with(self.arguments, leaves)
        flat: list[Any] = []
        symbolic = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
        result = self.model(*args, **kwargs)
        self.found(flatten(result, flat, lambda value: isinstance(value, symbolic)))
        return tuple(flat)


def capture(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Program:
    """Capture ``model`` as it computes in eval mode on the example ``args`` and ``kwargs``.

    ``dynamic_shapes=None`` leaves dimension 0 free of every tensor input that shares the batch size (an example of
    batch 1 is repeated, since torch would fix a size of one); ``"spatial"`` leaves height, width and depth of 4D and
    5D inputs free as well; anything else is handed to ``torch.export``. What torch fixes all the same becomes a guard.

    The model is left as it was, training flags included. Raises InputError (the example does not fit the model),
    UnsupportedModelError, CaptureError (the graph cannot be captured or written functionally).
    """
    model = unwrap(model)
    check_names(model)
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)):
        hint = "; keyword inputs go into kwargs" if isinstance(args, Mapping) else ""
        raise InputError(f"args must be a tuple of example inputs, not {type(args).__name__}{hint}")
    arguments, leaves, names = bind(model.forward, args, kwargs or {})
    leaves = [leaf.detach() for leaf in leaves]
    _check_example(leaves, names)
    with borrowed(model):
        export = _export(model, arguments, leaves, dynamic_shapes)
        return _program(model, arguments, names, export)


def _check_example(leaves: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """An empty or NaN example proves nothing about the model."""
    for leaf, name in zip(leaves, names, strict=True):
        if not leaf.numel():
            raise InputError(f"example input {name!r} is empty: its shape is {tuple(leaf.shape)}")
        if leaf.is_floating_point() and bool(leaf.isnan().any()):
            raise InputError(f"example input {name!r} holds NaN")


@dataclass
class _Export:
    """What ``torch.export`` made, of which example, and the notes so far."""

    exported: ExportedProgram
    outputs: Tree
    leaves: list[torch.Tensor]
    notes: list[str]
    seconds: float
    batch: int | None
    free: Any  # as in Program


def _export(
    model: nn.Module, arguments: tuple[Argument, ...], leaves: list[torch.Tensor], dynamic_shapes: Any
) -> _Export:
    """Export with the sizes that were asked for; fall back to the example's own sizes where torch refuses them."""
    started = time.perf_counter()
    notes: list[str] = []
    automatic = dynamic_shapes is None or dynamic_shapes == "spatial"
    if automatic:
        example, shapes = free_batch(leaves, spatial=dynamic_shapes == "spatial")
    else:
        if hasattr(dynamic_shapes, "dynamic_shapes"):  # torch.export.ShapesCollection
            args, kwargs = call_with(arguments, leaves)
            dynamic_shapes = dynamic_shapes.dynamic_shapes(model, tuple(args), kwargs)
        example, shapes = leaves, flat_shapes(arguments, dynamic_shapes, len(leaves))
    try:
        exported, outputs = _export_once(model, arguments, example, shapes)
        if automatic and _batch_is_fixed(exported, shapes):
            notes.append("batch size specialised: the model computes with it, so the export takes this batch only")
            if example is not leaves:
                example = leaves
                exported, outputs = _export_once(model, arguments, leaves, [None] * len(leaves))
    except Exception as error:
        _blame_example(model, arguments, leaves)
        if not automatic:
            raise _capture_error(model, error) from error
        try:
            exported, outputs = _export_once(model, arguments, leaves, [None] * len(leaves))
        except Exception:
            raise _capture_error(model, error) from error
        example = leaves
        notes.append(f"batch size specialised: torch could not leave it free ({_brief(error, 160)})")
    free = dynamic_shapes if automatic else FlatShapes(tuple(shapes))
    return _Export(exported, outputs, example, notes, time.perf_counter() - started, _batch_of(leaves), free)


def _batch_of(leaves: Sequence[torch.Tensor]) -> int | None:
    return next((leaf.shape[0] for leaf in leaves if leaf.dim() > 0), None)


def free_batch(leaves: list[torch.Tensor], spatial: bool) -> tuple[list[torch.Tensor], list[Any]]:
    """The example with a batch of at least two, and per tensor which dimensions are left to torch to free."""
    batch = _batch_of(leaves)
    example, shapes = list(leaves), []
    for index, leaf in enumerate(leaves):
        spec = {}
        if batch and leaf.dim() > 0 and leaf.shape[0] == batch:
            spec[0] = Dim.AUTO
            if batch == 1:
                example[index] = torch.cat([leaf, leaf])  # unlike repeat, in the leaf's memory format
        if spatial and leaf.dim() in (4, 5):
            spec.update({dim: Dim.AUTO for dim in range(2, leaf.dim()) if leaf.shape[dim] > 1})
        shapes.append(spec or None)
    return (example if batch == 1 else leaves), shapes


def _export_once(
    model: nn.Module, arguments: tuple[Argument, ...], leaves: list[torch.Tensor], shapes: list[Any]
) -> tuple[ExportedProgram, Tree]:
    outputs: list[Tree] = []
    adaptor = _Adaptor(model, arguments, outputs.append)
    adaptor.training = False
    with warnings.catch_warnings(), torch.no_grad():
        # Without gradients ``with torch.no_grad()`` in the model leaves no nested graph, and writes through the
        # results of chunk and split are legal; the nodes are the same otherwise.
        warnings.simplefilter("ignore")
        exported = torch.export.export(adaptor, tuple(leaves), dynamic_shapes=(tuple(shapes),), strict=False)
    return exported, outputs[-1]


def _inputs_of(exported: ExportedProgram) -> list[torch.Tensor]:
    """The fake tensors of the user's inputs, in order."""
    users = set(exported.graph_signature.user_inputs)
    return [n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder" and n.name in users]


def _batch_is_fixed(exported: ExportedProgram, shapes: Sequence[Any]) -> bool:
    """Whether torch fixed the batch size: in the shapes themselves, or by a condition that no other batch meets."""
    if not any(spec and 0 in spec for spec in shapes):
        return False
    fakes = _inputs_of(exported)
    guards, _ = _guards(exported, fakes, [str(leaf) for leaf in range(len(fakes))])

    def at_batch(batch: int) -> list[list[int]]:
        sizes = [[_size_of(s) for s in value.shape] for value in fakes]
        return [[batch, *size[1:]] if spec and 0 in spec else size for size, spec in zip(sizes, shapes, strict=True)]

    example = next(_size_of(f.shape[0]) for f, spec in zip(fakes, shapes, strict=True) if spec and 0 in spec)
    return not any(accepted(guards, at_batch(example + more)) for more in (1, 2, 5))


def _guards(
    exported: ExportedProgram, fakes: Sequence[torch.Tensor], names: Sequence[str]
) -> tuple[list[Guard], list[str]]:
    """All that the sizes of the inputs must meet, and what of it could not be written down."""
    guards, missing = size_guards(fakes, names, exported.range_constraints)
    more, unread = text_guards(getattr(exported, "_guards_code", None) or (), fakes, names, "leaves")
    return [*guards, *more], [*missing, *unread]


def _size_of(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _program(model: nn.Module, arguments: tuple[Argument, ...], names: tuple[str, ...], export: _Export) -> Program:
    """Everything after ``torch.export``: one functional graph, folded constants and weights, guards."""
    fakes = _inputs_of(export.exported)
    guards, unwritten = _guards(export.exported, fakes, names)
    notes = list(export.notes)
    notes += [f"a relation between input sizes is not checked: {text}" for text in unwritten]
    imported = import_graph(export.exported, model, "model")
    notes += list(dict.fromkeys(imported.notes))[:_MOST_NOTES]
    notes += functionalise(imported, names)
    normalise_spelling(imported)
    notes += fold_weight_slots(imported)
    executed = _executed(imported.graph)
    spare = _spare(model, imported.tensors, imported.consumed, executed, imported.canonical)
    signature = Signature(arguments, names, export.outputs, tuple(guards))
    notes += dropped_notes(model, imported.tensors, imported.graph, executed)
    return Program(
        graph=imported.graph,
        tensors=imported.tensors,
        kinds=imported.kinds,
        signature=signature,
        modules=dict(model.named_modules(remove_duplicate=False)),
        inputs=tuple(export.leaves),
        notes=tuple(notes),
        seconds=export.seconds,
        batch=export.batch,
        free=export.free,
        spare=spare,
    )


def _executed(graph: torch.fx.Graph) -> set[str]:
    """Paths of the modules that made a node of the graph, and of the modules around them."""
    paths = {""}
    for path in {module_path(node) for node in graph.nodes}:
        parts = path.split(".") if path else []
        paths.update(".".join(parts[: end + 1]) for end in range(len(parts)))
    return paths


def _spare(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    consumed: set[str],
    executed: set[str],
    canonical: Mapping[str, str],
) -> dict[str, torch.Tensor]:
    """Parameters and buffers of used modules that the graph itself does not read."""
    owners = executed | {name.rpartition(".")[0] for name in tensors}
    spare = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        name = canonical.get(name, name)
        if name.rpartition(".")[0] in owners and name not in tensors and name not in consumed:
            spare[name] = tensor
    return spare


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and guarantee that it is afterwards exactly as it was.

    Only flags are set, module by module: ``eval()`` may be overridden. Forward hooks such as pruning's store tensors
    as plain attributes, which tracing would leave behind as fakes; so all attributes are recorded and put back.
    """
    saved = [(module, _attributes(module)) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, _ in saved:
            module.__dict__["training"] = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, attributes in saved:
            _restore(module, attributes)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every attribute of a module, with a copy of the contents where it is a plain list, dict or tensor."""

    def contents(value: Any) -> Any:
        if type(value) in (list, dict):
            return value.copy()
        # Export runs writes to plain tensor attributes for real. Results of a computation are made anew anyway.
        return value.clone() if isinstance(value, torch.Tensor) and value.is_leaf else None

    return {name: (value, contents(value)) for name, value in module.__dict__.items()}


@torch.no_grad()
def _restore(module: nn.Module, attributes: Mapping[str, tuple[Any, Any]]) -> None:
    for name in [name for name in module.__dict__ if name not in attributes]:
        del module.__dict__[name]
    for name, (value, contents) in attributes.items():
        module.__dict__[name] = value
        if isinstance(contents, list):
            value[:] = contents
        elif isinstance(contents, torch.Tensor):
            if not torch.equal(value, contents):
                value.copy_(contents)
        elif contents is not None and (
            len(value) != len(contents) or any(value.get(k) is not v for k, v in contents.items())
        ):
            value.clear()
            value.update(contents)


def _blame_example(model: nn.Module, arguments: tuple[Argument, ...], leaves: Sequence[torch.Tensor]) -> None:
    """Raise InputError if the model itself cannot run on the example; buffers it writes to are put back."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    args, kwargs = call_with(arguments, [leaf.clone() for leaf in leaves])
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(*args, **kwargs)
    except Exception as error:
        raise InputError(
            f"the model itself fails on the example input ({', '.join(str(tuple(x.shape)) for x in leaves)}): "
            f"{type(error).__name__}: {_brief(error)}{_source_line(error)}"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _capture_error(model: nn.Module, error: BaseException) -> CaptureError:
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    child = children[0] if children else "backbone"
    return CaptureError(
        f"torch.export cannot capture {type(model).__name__}: {_brief(error)}{_source_line(error)}. "
        f"If only a part of the model is in the way, export the rest of it as a submodule, in place: "
        f"upscale.export(model.{child}, (x,), inplace=True)"
    )


def _brief(error: BaseException, limit: int = 500) -> str:
    """The first lines of an error message, without torch's advice on its own debugging tools."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = " ".join(lines[:3]) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _source_line(error: BaseException) -> str:
    """The innermost line of the user's own code that the error passed through, as " (at file:line: code)"."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users_file(frame.filename)]
    if not frames:
        return ""
    last = frames[-1]
    return f" (at {last.filename}:{last.lineno}: {last.line})"
