"""What Torch-Pruning has chosen, as masks: groups that its pruners propose, and histories of what they have pruned.

A group of Torch-Pruning (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900) lists, for
the channels that go together, every layer that writes or reads them. A mask is what one side of it says.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..channels import Side, channel_count
from ..errors import InputError, UnsupportedModelError
from ..mask_arguments import as_call, checked_model, one_of
from ..mask_groups import find_layers
from ..mask_objects import MaskSet
from .dependencies import dependency_graph, reads, writes

__all__ = ["masks_from_groups", "masks_from_history"]

# Modules whose channels go with those of a neighbour and need no mask of their own.
_FOLLOWERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


def masks_from_groups(model: nn.Module, groups: Any, side: Side = "input") -> MaskSet:
    """The masks that prune what groups of Torch-Pruning would, for ``manager.masks.update``.

    Args:
        model: the model that the groups are of, not pruned.
        groups: a ``torch_pruning.dependency.Group`` or an iterable of them, such as ``pruner.step(interactive=True)``;
            they are not to be pruned by Torch-Pruning itself.
        side: that of the manager. On the input side a model with these masks computes what Torch-Pruning's does, but
            for norms over channels, which still see all of them.

    Returns:
        For each layer that loses channels a bool tensor (channels of ``side``,), True for those that stay.

    Raises:
        InputError: groups of another model, groups that were pruned already, indices that a layer does not have,
            modules that take no masks, or a group that no mask of this side can express. Nothing is changed.
    """
    named = _Named.of(model, side)
    gone: dict[str, set[int]] = {}
    if groups is None:
        raise InputError(
            "there are no groups: pruner.step() has pruned and returns nothing; pruner.step(interactive=True) returns "
            "groups, or give masks_from_history the model as it was before and pruner.pruning_history()"
        )
    for group in [groups] if hasattr(groups, "items") else groups:
        for name, channels in named.channels(group).items():
            gone.setdefault(name, set()).update(channels)
    return _masks(named, gone)


def masks_from_history(model: nn.Module, history: Iterable[Any], example_inputs: Any, side: Side = "input") -> MaskSet:
    """The masks that prune what a history of Torch-Pruning has pruned, of one or several steps.

    The history is pruned again on a copy of ``model``, because the indices of a later step count what was left then.

    Args:
        model: a model as it was before it was pruned.
        history: ``pruner.pruning_history()``: (layer, whether its output channels, indices), in order.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        side: see :func:`masks_from_groups`.

    Returns:
        As :func:`masks_from_groups`.

    Raises:
        InputError: entries that are no such triples, unknown layers, indices out of range (as with a model that is
            pruned already), modules that take no masks, or where Torch-Pruning is missing or cannot trace the model.
        UnsupportedModelError: the model cannot be copied. It is unchanged in every case.
    """
    original = _Named.of(model, side)
    args, kwargs = as_call(example_inputs)
    if not isinstance(history, Iterable):
        raise InputError(f"a history is what pruner.pruning_history() returns, not {history!r}")
    try:
        copied = copy.deepcopy(original.model)
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be copied: {error}") from error
    named = _Named.of(copied, side)
    graph = dependency_graph(copied, args, kwargs)
    left = {name: list(range(channel_count(layer, side))) for name, layer in original.layers.items()}
    gone: dict[str, set[int]] = {}
    for number, entry in enumerate(history):
        group = _replayed(graph, copied, _entry(number, entry))
        for name, channels in named.channels(group).items():
            gone.setdefault(name, set()).update(left[name][channel] for channel in channels)
            left[name] = [channel for k, channel in enumerate(left[name]) if k not in channels]
        group.prune(record_history=False)
    return _masks(original, gone)


@dataclass(frozen=True, eq=False)
class _Named:
    """A model's layers by path, and the paths of all its modules by identity."""

    model: nn.Module
    side: Side
    layers: Mapping[str, nn.Module]
    paths: Mapping[int, str]

    @classmethod
    def of(cls, model: nn.Module, side: Side) -> _Named:
        model = checked_model(model)
        one_of("side", side, ("input", "output"))
        layers = find_layers(model)
        by_weight = {id(layer._parameters.get("weight")): name for name, layer in layers.items()}
        paths = {}
        for path, module in model.named_modules():  # a module with a tied weight goes by the layer that owns it
            weight = module._parameters.get("weight")
            paths[id(module)] = path if weight is None else by_weight.get(id(weight), path)
        return cls(model, side, layers, paths)

    def channels(self, group: Any) -> dict[str, set[int]]:
        """The channels that ``group`` takes from each layer on this side."""
        if not len(group[0].idxs):
            return {}  # a step of an iterative pruner may take nothing from a group
        self._refuse_pruned(group)
        wanted = reads if self.side == "input" else writes
        found: dict[str, set[int]] = {}
        for dep, channels in group:
            name = self._layer(dep)
            if name is not None and wanted(dep):
                found.setdefault(name, set()).update(self._checked(name, channels))
        if not found:
            raise InputError(
                f"the group of {self._root(group)} takes channels from no layer's {self.side} side (does it prune the "
                "model's own output or input?): leave it out, with ignored_layers= of Torch-Pruning's pruner"
            )
        return found

    def _layer(self, dep: Any) -> str | None:
        """The path of an item's layer; None for what takes no mask and needs none."""
        module = dep.target.module
        if isinstance(module, nn.Parameter) or not any(True for _ in module.parameters()):
            return None  # Torch-Pruning's own operations, and tables that are added or multiplied
        path = self.paths.get(id(module))
        if path is None:
            raise InputError(
                f"a group prunes {module}, which is no module of this {type(self.model).__name__}: build the pruner "
                "for this very model, or go by names with masks_from_history"
            )
        if path in self.layers:
            return path
        if isinstance(module, _FOLLOWERS) or (self.side == "input" and isinstance(module, nn.Embedding)):
            return None
        raise InputError(
            f"a group prunes {path}, and masks are not made for {type(module).__name__}: leave it out, with "
            "ignored_layers= of Torch-Pruning's pruner"
        )

    def _checked(self, name: str, channels: Iterable[int]) -> set[int]:
        layer = self.layers[name]
        if self.side == "input" and getattr(layer, "groups", 1) > 1:
            raise InputError(f"{name} is a grouped convolution, whose inputs take no masks: use side='output'")
        size, found = channel_count(layer, self.side), {int(channel) for channel in channels}
        bad = sorted(channel for channel in found if not 0 <= channel < size)
        if bad:
            raise InputError(
                f"{name} has {size} {self.side} channels (0 to {size - 1}), and {bad[0]} is to be pruned: is the model "
                "pruned already? Give it as it was before"
            )
        return found

    def _root(self, group: Any) -> str:
        return self.paths.get(id(group[0].dep.target.module), str(group[0].dep.target.module))

    def _refuse_pruned(self, group: Any) -> None:
        graph = getattr(group, "_DG", None)
        if graph is not None and any(entry[2] is group[0].idxs for entry in graph.pruning_history()):
            raise InputError(
                f"the group of {self._root(group)} was pruned by Torch-Pruning already, so its indices no longer fit: "
                "make masks of groups instead of pruning them, or give masks_from_history the model as it was before"
            )


def _entry(number: int, entry: Any) -> tuple[str, bool, list[int]]:
    fits = isinstance(entry, (tuple, list)) and len(entry) == 3
    if not fits or not isinstance(entry[0], str) or not isinstance(entry[1], bool):
        raise InputError(
            f"entry {number} of the history is {entry!r}; it must be (layer, whether its output channels, indices), as "
            "in pruner.pruning_history()"
        )
    try:
        return entry[0], entry[1], [int(channel) for channel in entry[2]]
    except (TypeError, ValueError) as error:
        raise InputError(f"entry {number} of the history: the indices of {entry[0]} are no integers") from error


def _replayed(graph: Any, model: nn.Module, entry: tuple[str, bool, list[int]]) -> Any:
    """The group of one entry, on the model as it is at that point."""
    name, is_output, channels = entry
    modules = dict(model.named_modules())
    if modules.get(name) not in graph.module2node:
        near = difflib.get_close_matches(name, [n for n, m in modules.items() if m in graph.module2node], n=3)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise InputError(f"the history prunes {name!r}, and the model has no such layer{hint}")
    module = modules[name]
    pruner = graph.get_pruner_of_module(module)
    size = (pruner.get_out_channels if is_output else pruner.get_in_channels)(module)
    bad = [channel for channel in channels if not 0 <= channel < size]
    if bad:
        side = "output" if is_output else "input"
        raise InputError(
            f"the history prunes {side} channel {bad[0]} of {name} where {size} are left (0 to {size - 1}): is the "
            "model pruned already? Give it as it was before"
        )
    return graph.get_pruning_group(
        module, pruner.prune_out_channels if is_output else pruner.prune_in_channels, channels
    )


def _masks(named: _Named, gone: Mapping[str, Iterable[int]]) -> MaskSet:
    masks = MaskSet()
    masks.side = named.side
    for name in [name for name in named.layers if name in gone]:
        mask = torch.ones(channel_count(named.layers[name], named.side), dtype=torch.bool)
        mask[torch.tensor(sorted(gone[name]), dtype=torch.int64)] = False
        masks[name] = mask
    return masks
