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
    notes = " ".join(pruned.report.notes)  # type: ignore[union-attr]
    new = {
        name for name in set(pruned.state_dict()) - set(model.state_dict()) if f"{name} is computed from" not in notes
    }
    if new:
        return f"state_dict has keys that the model has not: {', '.join(sorted(new))}"
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


def other_sizes(graph: Graph) -> list[Input]:
    """The inputs with another height, length or number of tokens."""
    made = []
    for item in graph.inputs:
        dims = list(item.dims)
        if len(dims) == 2 and not item.vocabulary:
            dims[0] += 2
        elif len(dims) > 2 or item.vocabulary:
            dims[-1] += 2
        made.append(Input(item.name, tuple(dims), item.vocabulary))
    return made


def unguarded(graph: Graph, model: nn.Module, pruned: nn.Module, equal: Equal) -> str:
    """Fed with other sizes, the exported model must refuse or be right; what is wrong, "" if nothing is."""
    tensors = make_inputs(other_sizes(graph), graph.batch, graph.seed + 102)
    try:
        model(*(x.clone() for x in tensors))
        pruned(*(x.clone() for x in tensors))
    except Exception:
        return ""
    fault = equal(model, pruned, tensors)
    sizes = [tuple(x.shape) for x in tensors]
    return f"unguarded: at sizes {sizes}, others than the example's: {fault}" if fault else ""
