"""What an exported model must do besides giving the same numbers: be an ordinary module, guard what is fixed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

import upscale

from .build import make_inputs
from .graph import Graph, Input

Equal = Callable[[nn.Module, nn.Module, Sequence[torch.Tensor]], str]


def ordinary(model: nn.Module, pruned: nn.Module, example: Sequence[torch.Tensor], equal: Equal) -> str:
    """What is wrong with the exported model as a module: its state, a deep copy, a second export; "" if nothing is."""
    new = set(pruned.state_dict()) - set(model.state_dict())
    allowed = {name for name in new if _computed(name, model)}
    if new - allowed:
        return f"state_dict has keys that the model has not: {', '.join(sorted(new - allowed))}"
    fault = equal(pruned, copy.deepcopy(pruned), example)
    if fault:
        return f"a deep copy differs: {fault}"
    try:
        again = upscale.export(pruned, tuple(x.clone() for x in example), verify=False)
    except (upscale.NothingToPruneError, upscale.ConstantOutputError):
        return ""
    except Exception as error:
        return f"the exported model cannot be exported again: {type(error).__name__}: {str(error)[:300]}"
    fault = equal(pruned, again, example)
    return f"exported again it differs: {fault}" if fault else ""


def _computed(name: str, model: nn.Module) -> bool:
    """Whether a weight was computed from others (weight norm, pruning, standardisation) and is stored as one now."""
    owner, _, leaf = name.rpartition(".")
    keys = model.state_dict()
    owned = f"{owner}.parametrizations.{leaf}.original"
    related = (f"{owner}.{leaf}_orig", f"{owner}.{leaf}_g", owned, f"{owned}0")
    return any(key in keys for key in related) or "." not in name or name not in keys and owner not in _paths(model)


def _paths(model: nn.Module) -> set[str]:
    return {path for path, _ in model.named_modules()}


def other_sizes(graph: Graph, model: nn.Module, pruned: nn.Module, equal: Equal) -> str:
    """Fed with another height or length, the exported model must refuse or be right."""
    inputs = []
    for item in graph.inputs:
        grow = bool(item.dims) and (len(item.dims) > 1 or item.vocabulary > 0)
        last = len(item.dims) - (2 if len(item.dims) == 2 and not item.vocabulary else 1)
        dims = tuple(n + 2 * (grow and i == last) for i, n in enumerate(item.dims))
        inputs.append(Input(item.name, dims, item.vocabulary))
    tensors = make_inputs(inputs, graph.batch, graph.seed + 102)
    try:
        model(*(x.clone() for x in tensors))
        pruned(*(x.clone() for x in tensors))
    except Exception:
        return ""
    fault = equal(model, pruned, tensors)
    return (
        f"unguarded: at sizes {[tuple(x.shape) for x in tensors]} (another than the example's): {fault}"
        if fault
        else ""
    )
