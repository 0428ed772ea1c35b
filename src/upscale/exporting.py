"""The main job: a masked model in, a smaller model that computes the same out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .accept import unwrap
from .capture import capture
from .errors import ConstantOutputError, InputError, NonFiniteError, NothingToPruneError, UnsupportedModelError
from .flow import Flow, analyse_flow
from .flow.effects import Contract, PerChannel
from .large import all_finite
from .lowering import lower
from .plan import MODES, Mode, Plan, Target, make_plan
from .pointwise import product_notes
from .program import Program
from .raising import raise_program, training_notes
from .recipe import attach_recipe, make_recipe
from .report import Report, count_parameters, kept_by_choice, layer_rows
from .setting import checked_target, in_format, setting_for
from .signature import call_with, leaves_at
from .verification import Verification, verify


@dataclass(frozen=True)
class Compiled:
    """A masked program and the smaller one made of it."""

    program: Program
    flow: Flow
    plan: Plan
    lowered: Program
    seconds: dict[str, float]


def export(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    reads: Mode = "auto",
    target: Target | None = None,
    inplace: bool = False,
    verify: bool = True,
) -> torch.fx.GraphModule:
    """Remove every channel that zeros in the weights have made useless, and return the smaller model.

    Args:
        model: any module with zeroed channels, whatever put the zeros there. Captured in eval mode.
        args, kwargs: an example call, as ``torch.export`` takes it: tensors of shape (batch, ...), or nested
            containers of them. The batch size stays free, also where the example has batch 1.
        dynamic_shapes: None (free batch), ``"spatial"`` (free height, width and depth too; capture is slower), or
            what ``torch.export`` takes.
        reads: ``"auto"`` (the planner reorders channels and chooses), ``"gather"`` (original order, one
            ``index_select`` per read of a proper subset), ``"baseline"`` (channel by channel: the baseline of
            Wan et al. 2023, arXiv 2307.08771). All compute the same.
        target: what the model will run on, where that is not what the example says: see :class:`upscale.Target`. Only
            ``"auto"`` plans with it.
        inplace: turn ``model`` itself into the pruned model (after verification) and return it: the same object, but
            no longer an instance of its class. Works on a submodule of a larger model too.
        verify: compare the result with ``model`` on the example, on perturbed examples and at other batch sizes.

    Returns:
        A ``torch.fx.GraphModule`` of ordinary layers under the original names, with a ``report``.

    Raises:
        NothingToPruneError: no channel is zero. ConstantOutputError: nothing of the input reaches the output.
        InputError, CaptureError, UnsupportedModelError, NonFiniteError, VerificationError: see each. The model is
        untouched in every case.
    """
    if reads not in MODES:
        raise InputError(f"reads={reads!r}: choose one of {', '.join(map(repr, MODES))}")
    original = unwrap(model)
    if inplace:
        check_replaceable(original)
    target = checked_target(target)
    program = capture(original, in_format(args, target), in_format(kwargs, target), dynamic_shapes=dynamic_shapes)
    compiled = compile_program(program, reads, target=target)
    pruned = finish(compiled, type(original).__name__, verify)
    take_training_flags(original, pruned)
    return become(original, pruned) if inplace else pruned


def compile_program(
    program: Program,
    reads: Mode = "auto",
    *,
    only: Mapping[str, torch.Tensor] | None = None,
    reorder: bool = True,
    target: Target | None = None,
) -> Compiled:
    """Flow, plan and lowering of a masked program. ``only``: see :func:`upscale.flow.analyse_flow`.

    Raises:
        NonFiniteError, NothingToPruneError, ConstantOutputError: the program cannot be pruned.
    """
    check_finite(program)
    started = time.perf_counter()
    flow = analyse_flow(program, only)
    if not flow.depends:
        raise ConstantOutputError(
            "so much is masked that the model's output is the same for every input; mask less "
            f"({_emptiest(program, flow)})"
        )
    analysed = time.perf_counter()
    plan = make_plan(flow, reads, reorder, setting_for(program, target or Target()))
    planned = time.perf_counter()
    lowered = lower(program, flow.nodes, plan)
    seconds = {"flow": analysed - started, "plan": planned - analysed, "lower": time.perf_counter() - planned}
    _check_something_pruned(program, flow, lowered)
    return Compiled(program, flow, plan, lowered, {"capture": program.seconds, **seconds})


def finish(compiled: Compiled, class_name: str, check: bool = True) -> torch.fx.GraphModule:
    """Raise the lowered program to an ordinary module, verify it and attach the report."""
    started = time.perf_counter()
    pruned = raise_program(compiled.lowered, class_name=class_name)
    seconds = {**compiled.seconds, "emit": time.perf_counter() - started}
    verification: Verification | None = None
    if check:
        verification = verify(compiled.program, compiled.lowered, compiled.plan, flat_call(compiled.program, pruned))
        seconds["verify"] = verification.seconds
    report = make_report(compiled, pruned, verification, seconds)
    attach_report(pruned, report)
    attach_recipe(pruned, make_recipe(compiled.program, compiled.plan, pruned, report))
    return pruned


def flat_call(program: Program, model: nn.Module) -> Callable[[Sequence[torch.Tensor]], list[Any]]:
    """``model`` as a function from flat input tensors to the flat outputs of ``program``."""

    def call(inputs: Sequence[torch.Tensor]) -> list[Any]:
        args, kwargs = call_with(program.signature.arguments, inputs)
        return leaves_at(program.signature.outputs, model(*args, **kwargs))

    return call


# -- checks -----------------------------------------------------------------------------------------------------------


def check_finite(program: Program) -> None:
    """NaN or infinite parameters make zeros and equality meaningless."""
    for name, tensor in program.tensors.items():
        statistics = name.endswith(("running_mean", "running_var"))
        if (program.kinds[name] == "parameter" or statistics) and not all_finite(tensor):
            raise NonFiniteError(f"{name} holds NaN or infinite values; the model cannot be pruned or verified")


def _check_something_pruned(program: Program, flow: Flow, lowered: Program) -> None:
    if count_parameters(lowered.tensors) < count_parameters(program.tensors) or _zero_channels(program, flow):
        return
    layers = [
        str(f.effect.weight.target) for f in flow.nodes.values() if isinstance(f.effect, Contract) and f.kind == "fresh"
    ]
    raise NothingToPruneError(
        f"nothing to prune: none of the {len(layers)} layers with channels ({', '.join(layers[:3])}, ...) has a zero "
        "input or output channel. Mask first, for example with upscale.MaskingManager(model).importance().mask(0.25)"
    )


def _zero_channels(program: Program, flow: Flow) -> bool:
    """Whether any layer has a zero row or column, though a barrier may have kept it."""
    for node, demand in flow.demands.items():
        effect = flow.nodes[node].effect
        if isinstance(effect, Contract) and (not demand.inputs.all() or demand.constant.any() or flow.masked[node]):
            return True
    for f in flow.nodes.values():
        if isinstance(f.effect, PerChannel) and f.effect.groups_arg == "groups":  # a filter per channel
            filters = program.tensors[str(f.effect.slices[0][0].target)].detach().flatten(1)
            if bool((filters == 0).all(1).any()):
                return True
    return False


def _emptiest(program: Program, flow: Flow) -> str:
    """The first layer in which nothing is left, for the message."""
    for f in flow.nodes.values():
        if isinstance(f.effect, Contract) and f.effect.weight.op == "get_attr":
            name = str(f.effect.weight.target)
            if not bool(program.tensors[name].any()):
                return f"{name} is zero everywhere"
    return "together the masks of several layers leave no path"


# -- training flags ---------------------------------------------------------------------------------------------------


def take_training_flags(original: nn.Module, pruned: nn.Module) -> None:
    """Training or eval mode as in ``original``, module by module: a frozen part stays frozen until ``train()``."""
    pruned.train(original.training)
    flags = {path: module.training for path, module in original.named_modules(remove_duplicate=False)}
    for path, module in pruned.named_modules(remove_duplicate=False):
        module.training = _nearest(flags, path)


def _nearest(flags: Mapping[str, bool], path: str) -> bool:
    """The flag of the innermost original module around ``path``."""
    while path and path not in flags:
        path = path.rpartition(".")[0]
    return flags[path]


# -- in place ---------------------------------------------------------------------------------------------------------


def check_replaceable(model: nn.Module) -> None:
    """Refuse what cannot change its class: the in-place form gives the object another ``__class__``."""
    if any("__slots__" in vars(c) for c in type(model).__mro__ if c not in (object,) and issubclass(c, nn.Module)):
        raise UnsupportedModelError(
            f"{type(model).__name__} uses __slots__, so it cannot become the pruned model in place; "
            "use pruned = upscale.export(model, args)"
        )


def become(model: nn.Module, pruned: torch.fx.GraphModule) -> Any:
    """Make ``model`` the pruned model: the same object, another class and content."""
    object.__setattr__(model, "__class__", pruned.__class__)
    object.__setattr__(model, "__dict__", pruned.__dict__)
    model.graph.owning_module = model  # type: ignore[union-attr]
    return model


# -- report -----------------------------------------------------------------------------------------------------------


def make_report(
    compiled: Compiled, pruned: nn.Module, verification: Verification | None, seconds: dict[str, float]
) -> Report:
    program, lowered = compiled.program, compiled.lowered
    rows = layer_rows(program, lowered, compiled.flow, compiled.plan)
    before = set(program.modules[""].state_dict()) if "" in program.modules else set(program.tensors)
    return Report(
        parameters=(count_parameters(program.tensors), count_parameters(lowered.tensors)),
        flops=(sum(r.flops[0] for r in rows), sum(r.flops[1] for r in rows)),
        layers=rows,
        reads=dict(compiled.plan.read_counts()),
        barriers=compiled.plan.barriers,
        notes=(*program.notes, *training_notes(lowered), *product_notes(lowered.graph)),
        kept=kept_by_choice(program, compiled.plan),
        removed=tuple(sorted(before - set(pruned.state_dict()))),
        seconds=seconds,
        error=None if verification is None else verification.error,
        batches=() if verification is None else verification.batches,
        plan=compiled.plan,
    )


def attach_report(pruned: torch.fx.GraphModule, report: Any, name: str = "report") -> None:
    """Give the module a report so that it survives ``copy.deepcopy`` and, as text, ``pickle``."""
    setattr(pruned, name, report)
    kept = pruned.meta.setdefault("_user_preserved_attributes", {})
    kept[name] = report


__all__ = ["Compiled", "become", "compile_program", "export", "finish", "flat_call"]
