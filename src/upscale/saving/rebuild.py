"""A pruned model made again: the original architecture is captured anew, and the stored plan carried out on it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from upscale.accept import unwrap
from upscale.capture import capture
from upscale.errors import FileError, InputError, MismatchError, UpscaleError
from upscale.flow import FlowNode, analyse
from upscale.lowering import lower
from upscale.plan import Plan
from upscale.program import Program
from upscale.raising import raise_program
from upscale.recipe import Recipe, Step
from upscale.recipe.describe import TensorFact, canonical_names, difference, digest_of, module_facts, tensor_facts
from upscale.recipe.example import dtype_of, make_call, make_inputs, make_sizes
from upscale.recipe.model import captured_lines, renamed
from upscale.saving.state import named_tensors

__all__ = ["rebuild"]

Example = tuple[Any, Mapping[str, Any] | None]


def rebuild(recipe: Recipe, model: nn.Module, example: Example | None) -> tuple[fx.GraphModule, Plan]:
    """The module that ``recipe`` describes, with meaningless weights, and the plan of its last export.

    ``model``: the original architecture; it is left as it was. ``example``: a call to capture it with, where the one
    of the recipe is not to be used.

    Raises:
        MismatchError: ``model`` is another architecture. FileError: the recipe does not hang together.
    """
    current: nn.Module = unwrap(model)
    if any(tensor.is_meta for _, tensor in named_tensors(current)):
        raise InputError("the model has no weights (device 'meta'): build it on a device, any values will do")
    plan: Plan | None = None
    for number, step in enumerate(recipe.steps):
        place = f" (export {number + 1} of {len(recipe.steps)})" if len(recipe.steps) > 1 else ""
        current, plan = _repeat(step, current, example, recipe.name, place)
    assert isinstance(current, fx.GraphModule) and plan is not None
    if found := difference(recipe.modules, module_facts(current)):
        raise MismatchError(f"the model does not give the saved one: {found}")
    return current, plan


def _repeat(
    step: Step, model: nn.Module, example: Example | None, name: str, place: str
) -> tuple[fx.GraphModule, Plan]:
    """One export again."""
    missing = _check_shapes(step.tensors, model)
    with _in_dtypes(model, step.tensors):
        device = next((tensor.device for _, tensor in named_tensors(model)), torch.device("cpu"))
        args, kwargs = example if example is not None else make_call(step.call, make_inputs(step.call, device))
        try:
            free = make_sizes(step.sizes, len(step.call.inputs))
            program = capture(model, args, kwargs, dynamic_shapes=free)
        except FileError:
            raise
        except UpscaleError as error:
            hint = f"; the saved one has {missing}, this one has no such tensor" if missing else ""
            raise MismatchError(f"the model cannot be captured as the saved one was{place}{hint}: {error}") from error
        _check_same(step, program, place)
        return _carried_out(step, program, name, place)


def _carried_out(step: Step, program: Program, name: str, place: str) -> tuple[fx.GraphModule, Plan]:
    nodes = analyse(program)
    back = {canonical: node for node, canonical in canonical_names(program.graph).items()}
    plan = renamed(step.plan, back)
    _check_layouts(plan, nodes)
    try:
        pruned = raise_program(lower(program, nodes, plan), class_name=name)
    except (AssertionError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise FileError(f"its plan cannot be carried out{place}: {type(error).__name__}: {error}") from error
    if digest_of(pruned.graph) != step.emitted:
        raise MismatchError(
            f"the stored plan gives another graph here than where it was saved{place}: it was saved with another "
            "version of upscale or torch"
        )
    return pruned, plan


# -- is it the same architecture? -------------------------------------------------------------------------------------


def _check_shapes(stored: tuple[TensorFact, ...], model: nn.Module) -> str | None:
    """Refuse a tensor of another shape; returns the first that the model lacks. Weights that were computed when they
    were captured (pruning masks, parametrisations) may have other names here."""
    here = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    for fact in stored:
        if here.get(fact.name, fact.shape) != fact.shape:
            raise MismatchError(
                f"this is not the model that was saved: {fact.name} has shape {fact.shape} there and "
                f"{here[fact.name]} here"
            )
    absent = [fact for fact in stored if fact.kind != "constant" and fact.name not in here]
    return f"{absent[0].name} of shape {absent[0].shape}" if absent else None


def _check_same(step: Step, program: Program, place: str) -> None:
    """The captured graph must be the stored one, tensor by tensor and call by call."""
    here = {fact.name: fact for fact in tensor_facts(program)}
    problem = next((p for fact in step.tensors if (p := _tensor_problem(fact, here.get(fact.name)))), None)
    if problem is None:
        known = {fact.name for fact in step.tensors}
        extra = next((fact for name, fact in here.items() if name not in known), None)
        problem = f"it has {extra.name} of shape {extra.shape}, which the saved one lacks" if extra else None
    problem = problem or _line_problem(step.lines, captured_lines(program))
    if problem is not None:
        raise MismatchError(f"this is not the model that was saved{place}: {problem}")


def _tensor_problem(stored: TensorFact, here: TensorFact | None) -> str | None:
    if here is None:
        return f"it has no {stored.name} of shape {stored.shape}"
    if here.shape != stored.shape:
        return f"{stored.name} has shape {stored.shape} there and {here.shape} here"
    if (here.dtype, here.kind) != (stored.dtype, stored.kind):
        return f"{stored.name} is a {stored.dtype} {stored.kind} there and a {here.dtype} {here.kind} here"
    return None


def _line_problem(stored: tuple[str, ...], here: tuple[str, ...]) -> str | None:
    for there, line in zip(stored, here, strict=False):
        if there != line:
            return f"it computes `{line}` where the saved one computes `{there[:300]}`"
    if len(stored) != len(here):
        return f"it has {len(here)} steps and the saved one {len(stored)}"
    return None


def _check_layouts(plan: Plan, nodes: Mapping[fx.Node, FlowNode]) -> None:
    """Sizes in a plan must be those of the graph, before anything is made of these sizes."""
    sizes = {node.name: f.channels.size for node, f in nodes.items() if f.channels is not None}
    for name, layout in plan.layouts.items():
        if sizes.get(name) != layout.size or len(layout.positions) > layout.size:
            raise FileError(f"its plan gives {name} {layout.size} channels; there are {sizes.get(name)}")


# -- as it was when it was captured -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _in_dtypes(model: nn.Module, stored: tuple[TensorFact, ...]) -> Iterator[None]:
    """Put copies of the stored types in the place of floating-point tensors of another type, for a while.

    What the graph does can depend on the types; a freshly built model mostly has those of its constructor. A tensor
    that is not in the list (it was computed with) takes the type that most of the list have.
    """
    dtypes = {fact.name: dtype_of(fact.dtype) for fact in stored}
    floating = Counter(dtype for dtype in dtypes.values() if dtype.is_floating_point)
    usual = floating.most_common(1)[0][0] if floating else None
    copies: dict[int, torch.Tensor] = {}
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules(remove_duplicate=False):
            for registry in (module._parameters, module._buffers):
                for name, tensor in registry.items():
                    wanted = dtypes.get(f"{path}.{name}" if path else name, usual)
                    if tensor is None or not tensor.is_floating_point() or wanted in (None, tensor.dtype):
                        continue
                    swapped.append((registry, name, tensor))
                    registry[name] = copies.setdefault(id(tensor), _converted(tensor, wanted))
        yield
    finally:
        for registry, name, tensor in reversed(swapped):
            registry[name] = tensor


def _converted(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    new = tensor.detach().to(dtype)
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
