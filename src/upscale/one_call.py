"""Masking, and masking with export, in one call that leaves the user's model alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from .amounts import HALF, Amount, Ignored, Schedule, checked_request, ignored_layers
from .channels import Side
from .errors import BudgetError, InputError, UnsupportedModelError
from .exporting import attach_report, export
from .importance import Heuristic
from .importance.batches import checked_batches
from .importance.torch_pruning import is_from_torch_pruning
from .mask_arguments import Call, checked_model, whole
from .mask_groups import find_layers
from .masking import MaskingManager, Method
from .plan import Mode, Target
from .repairing import OBS, repair, with_blocks
from .zeroing import refuse_computed

__all__ = ["mask", "prune"]


def mask(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    amount: Amount = HALF,
    flops: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    importance: Heuristic = "auto",
    calibration: Iterable[Any] | None = None,
    side: Side = "input",
    method: Method = "unconstrained",
    is_global: bool | None = None,
    ignore: Ignored = (),
    steps: int = 1,
    schedule: Schedule = "geometric",
    permanent: bool = True,
) -> Any:
    """A masked copy of ``model``: the same size, with zeros in its weights. ``model`` itself is not touched.

    Args:
        model: any module that ``copy.deepcopy`` can copy.
        args, kwargs: an example call: a tensor of shape (batch, ...) or a tuple of positional arguments.
        amount, flops, params, latency, steps, schedule, permanent: see :meth:`MaskingManager.mask`.
        importance: see :meth:`MaskingManager.importance`. ``"obs"``: :class:`upscale.OBS` of ``calibration``.
            ``"auto"``: that where there is calibration data and ``side`` is the input's, else ``"l2"``.
        calibration: batches of inputs without labels, for ``"obs"``: what the masks will cost is estimated on them.
        side, method, ignore: see :class:`MaskingManager`. A module given to ``ignore`` is one of ``model``.
        is_global: see :class:`MaskingManager`. None: False, but for a budget with ``"obs"``, which is then spent where
            the outputs' error is smallest once the remaining weights are fitted again (by :func:`repair`).

    Returns:
        A module of the class of ``model``.

    Raises:
        InputError: ``calibration`` with another importance. UnsupportedModelError: the model cannot be copied. Else
            what :class:`MaskingManager` and its ``mask`` raise.
    """
    original = checked_model(model)
    names = sorted(ignored_layers(ignore, original, find_layers(original)))
    importance = _with_data(importance, calibration, side)
    if is_global is None:
        is_global = isinstance(importance, OBS) and any(left is not None for left in (flops, params, latency))
    copied, heuristic = _copy(original, importance)
    example = Call(tuple(args) if isinstance(args, (tuple, list)) else (args,), dict(kwargs or {}))
    manager = MaskingManager(copied, side, method, is_global, example, names).importance(heuristic)
    manager.mask(
        amount, flops=flops, params=params, latency=latency, steps=steps, schedule=schedule, permanent=permanent
    )
    copied.zero_grad()
    return copied


def prune(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    reads: Mode = "auto",
    target: Target | None = None,
    verify: bool = True,
    verbose: bool = False,
    calibration: Iterable[Any] | None = None,
    ridge: float | Literal["auto"] = "auto",
    blocks: int = 0,
    **masking: Any,
) -> torch.fx.GraphModule:
    """Mask a copy of ``model``, repair it if there is data, and export it: a smaller model, with a ``report``.

    Args:
        model, args, kwargs: as for :func:`mask`.
        dynamic_shapes, reads, target, verify: as for :func:`export`. A budget is met for the defaults of ``reads`` and
            ``target``.
        verbose: print the reports.
        calibration: batches of inputs without labels. Masks are chosen by them (see :func:`mask`), if ``importance`` is
            not something else, and the remaining weights are then fitted to what ``model`` computes on them, by
            :func:`repair`, whose ``repair_report`` the smaller model gets too. None: no repair.
        ridge: see :func:`repair`.
        blocks: steps of the fit of blocks that follows the regressions (``repair(method="blockwise", steps=blocks)``),
            after the last of several turns. 0: none.
        masking: what :func:`mask` takes, for instance ``flops=0.5`` or ``amount=0.3, method="contiguous"``. With
            ``steps=`` and masks chosen by ``calibration``, the weights are repaired after each step, and
            ``repair_report`` is of the last.

    Raises:
        What :func:`mask`, :func:`repair` and :func:`export` raise. ``model`` is untouched in every case.
    """
    last = _last_repair(ridge, blocks, calibration)
    batches = None if calibration is None else list(checked_batches(calibration))  # gone over twice
    by_them = _is_named(masking.get("importance", "auto"), "auto", "obs")
    if batches is None:
        masked = mask(model, args, kwargs, **masking)
    elif by_them:
        masked = _in_turns(model, args, kwargs, batches, last, **masking)
    else:
        masked = repair(mask(model, args, kwargs, **masking), checked_model(model), batches, **last)
    report = None if batches is None else masked.repair_report
    example = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    pruned = export(masked, example, kwargs, dynamic_shapes=dynamic_shapes, reads=reads, target=target, verify=verify)
    if report is not None:
        attach_report(pruned, report, "repair_report")
    if verbose:
        print(pruned.report if report is None else f"{report}\n{pruned.report}")
    return pruned


def _last_repair(ridge: Any, blocks: Any, calibration: Any) -> dict[str, Any]:
    """How :func:`repair` is called after the last masks."""
    if whole("blocks", blocks, 0) and calibration is None:
        raise InputError(f"blocks={blocks} fits to what the model computes on calibration=, and there is none")
    return {"ridge": ridge, **with_blocks(blocks)}


def _in_turns(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    batches: list[Any],
    last: Mapping[str, Any],
    *,
    amount: Amount = HALF,
    flops: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    steps: int = 1,
    schedule: Schedule = "geometric",
    ignore: Ignored = (),
    **masking: Any,
) -> Any:
    """Masked by the batches and repaired, in ``steps`` turns: what is masked next is chosen once the rest makes up for
    what is masked so far. A channel that is masked costs nothing, so it goes first and stays masked. A turn is left
    out where single channels are too large a step for its part of a budget. ``last``: how the repair is called in the
    last turn; the others are by regression alone."""
    original, request = checked_model(model), checked_request(amount, flops, params, latency, steps, schedule)
    names, found = sorted(ignored_layers(ignore, original, find_layers(original))), original
    for part in request.parts():
        try:
            masked = mask(found, args, kwargs, calibration=batches, ignore=names, **request.asked(part), **masking)
        except BudgetError:
            if part == 1:
                raise
            continue
        found = repair(masked, original, batches, **(last if part == 1 else {"ridge": last["ridge"]}))
    return found


def _with_data(importance: Heuristic, calibration: Iterable[Any] | None, side: Side) -> Heuristic:
    """What ``"auto"`` and ``"obs"`` stand for."""
    if _is_named(importance, "auto") and (calibration is None or side == "output"):
        return "l2"
    if _is_named(importance, "auto", "obs") and calibration is not None:
        return OBS(list(checked_batches(calibration)))  # gone over once a step
    if calibration is not None:
        raise InputError(
            f'calibration is for importance="obs"; {importance!r} needs none, or has its own. To repair what such '
            "masks leave, call upscale.repair, or upscale.prune with calibration="
        )
    return importance


def _is_named(importance: Heuristic, *names: str) -> bool:
    return isinstance(importance, str) and importance.lower() in names


def _copy(model: nn.Module, importance: Heuristic) -> tuple[nn.Module, Heuristic]:
    """A copy of the model, and the importance for it: what Torch-Pruning's know is by the parameters' identity."""
    memo: dict[int, Any] = {}
    try:
        copied = copy.deepcopy(model, memo)
        if is_from_torch_pruning(importance):
            importance = copy.deepcopy(importance, memo)
    except Exception as error:
        for name, layer in find_layers(model).items():
            refuse_computed(name, layer, ("weight",))  # what torch.nn.utils.prune leaves cannot be copied after a call
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({error}). Build a second one and load its weights, or mask the "
            "model itself: upscale.MaskingManager(model, example_inputs=...).importance().mask(...), then "
            "upscale.export(model, args)"
        ) from error
    if is_from_torch_pruning(importance):
        for parameter, twin in zip(model.parameters(), copied.parameters(), strict=True):
            twin.grad = None if parameter.grad is None else parameter.grad.clone()
    return copied, importance
