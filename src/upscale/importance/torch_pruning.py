"""Torch-Pruning's importance objects as scores of channels."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import Side, channel_count
from ..errors import InputError
from ..interop.dependencies import dependency_graph, reads, writes
from ..printing import listed
from .subject import Subject, without_score

__all__ = ["FromTorchPruning", "is_from_torch_pruning"]


def is_from_torch_pruning(heuristic: Any) -> bool:
    """Whether this is an importance of Torch-Pruning, or of a class made from one."""
    kind = heuristic if isinstance(heuristic, type) else type(heuristic)
    return any(base.__module__.split(".")[0] == "torch_pruning" for base in kind.__mro__)


class FromTorchPruning:
    """Scores of an importance of Torch-Pruning, such as ``torch_pruning.importance.MagnitudeImportance(p=2)``.

    Such an importance scores a *group*: the layers that lose a channel together. Where every layer is masked on its own
    (unconstrained and contiguous masks), a group is what its mask zeroes: the layer's side in question and, on the
    output side, the batch norms that directly follow. Constrained masks are scored by the groups of Torch-Pruning's
    own dependency graph (Fang et al. 2023, arXiv 2301.12900), so that the ranking is that of its pruners; a group's
    score is shared out among the places where it is masked, so that they add up to it.

    Scores that have a ``normalizer`` compare layers as they are with ``is_global``, others as this library's do.
    Importances that need gradients take those that the model's parameters hold (``loss.backward()`` before).
    """

    def __init__(self, importance: Any) -> None:
        self._importance = importance
        self.compares_layers = getattr(importance, "normalizer", None) is not None

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See :meth:`Importance.scores`.

        Raises ``InputError``, naming the layers, where the importance gives none to some.
        """
        # A copy, because the Hessian's forgets the gradients that it has gathered once it is asked.
        called = _Called(copy.copy(self._importance))
        with _gradients_put_back(subject.model):
            return _tied(called, subject) if subject.tied else _alone(called, subject)


class _Called:
    """The importance, with its errors told."""

    def __init__(self, importance: Any) -> None:
        self._importance = importance
        self.name = type(importance).__name__

    def __call__(self, name: str, group: Any) -> Tensor | None:
        try:
            found = self._importance(group)
        except Exception as error:
            raise InputError(
                f"Torch-Pruning's {self.name} cannot score {name}: {error!r}. {self.advice([name])}"
            ) from error
        if found is None:
            return None
        size = len(group[0].idxs)
        if not isinstance(found, Tensor) or found.shape != (size,):
            told = f"one of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"Torch-Pruning's {self.name} must return a tensor of shape ({size},) for {name}, not {told}"
            )
        if found.is_complex():
            raise InputError(f"Torch-Pruning's {self.name} gives {name} complex scores, which have no order")
        return found.detach()

    def advice(self, names: list[str]) -> str:
        return (
            "Gradients must be there if it needs them (loss.backward() before); layers that it does not know are left "
            f"alone with {without_score(names)}, given to MaskingManager"
        )

    def nothing_for(self, names: list[str]) -> InputError:
        return InputError(f"Torch-Pruning's {self.name} gives no score to {listed(names)}. {self.advice(names)}")


def _alone(importance: _Called, subject: Subject) -> dict[str, Tensor]:
    found, without = {}, []
    for name, layer in subject.layers.items():
        group = _group_of(name, layer, subject.side, subject.norms.get(name, ()))
        score = None if group is None else importance(name, group)
        if score is None:
            without.append(name)
        else:
            found[name] = score
    if without:
        raise importance.nothing_for(without)
    return found


def _group_of(name: str, layer: nn.Module, side: Side, norms: tuple[nn.Module, ...]) -> Any:
    """A group of what the mask of one layer zeroes; None for a kind of layer that Torch-Pruning does not know."""
    from torch_pruning import dependency
    from torch_pruning.pruner import function

    kinds = {
        ("input", True): function.prune_linear_in_channels,
        ("output", True): function.prune_linear_out_channels,
        ("input", False): function.prune_conv_in_channels,
        ("output", False): function.prune_conv_out_channels,
    }
    if not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        return None
    parts: list[tuple[nn.Module, Any]] = [(layer, kinds[side, isinstance(layer, nn.Linear)])]
    if side == "output":
        parts += [(norm, function.prune_batchnorm_out_channels) for norm in norms]
    group = dependency.Group()
    for number, (module, handler) in enumerate(parts):
        node = dependency.Node(module, None, name)
        channels = list(range(channel_count(layer, side)))
        group.add_dep(dependency.Dependency(handler, handler, node, node), channels)
        group[number].root_idxs = channels
    return group


def _tied(importance: _Called, subject: Subject) -> dict[str, Tensor]:
    assert subject.example is not None
    graph = dependency_graph(subject.model, *subject.example)
    names = {id(layer): name for name, layer in subject.layers.items()}
    sizes = {name: channel_count(layer, subject.side) for name, layer in subject.layers.items()}
    scores = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
    missing = _masked_places(subject, sizes)
    for group in map(functools.partial(_from_a_layer, graph), graph.get_all_groups()):
        places = _places(group, names, subject.side)
        score = importance(listed(dict.fromkeys(name for name, _, _ in places)), group) if places else None
        if score is not None:
            _share_out(scores, places, score.cpu().double())
            for name, channels, _ in places:
                missing[name][channels] = False
    without = [name for name, channels in missing.items() if channels.any()]
    if without:
        raise importance.nothing_for(without)
    return scores


def _from_a_layer(graph: Any, group: Any) -> Any:
    """The group as it is seen from a layer that importances count; they pass over a depthwise convolution, and a
    flattened reader's number of channels would be taken for the group's."""
    if reads(group[0].dep) or _is_counted(group[0].dep.target.module):
        return group
    for dep, channels in group:
        module = dep.target.module
        if (
            writes(dep)
            and _is_counted(module)
            and len(channels) == len(group[0].idxs) == channel_count(module, "output")
        ):
            return graph.get_pruning_group(module, dep.handler, list(range(len(channels))))
    return group


def _is_counted(module: Any) -> bool:
    is_layer = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    return is_layer and (isinstance(module, nn.Linear) or module.groups == 1 or module.groups != module.out_channels)


def _places(group: Any, names: Mapping[int, str], side: Side) -> list[tuple[str, list[int], list[int]]]:
    """Where the group is masked: (layer, its channels, the group's channel that each of them is)."""
    wanted = reads if side == "input" else writes
    found = []
    for item in group:
        name = names.get(id(item.dep.target.module))
        if name is not None and wanted(item.dep) and None not in item.root_idxs:
            found.append((name, list(item.idxs), list(item.root_idxs)))
    return found


def _share_out(scores: Mapping[str, Tensor], places: list[tuple[str, list[int], list[int]]], score: Tensor) -> None:
    """Add a group's ``score``, divided by the number of places of each channel, to the scores of its places."""
    every = torch.tensor([root for _, _, roots in places for root in roots])
    part = score / torch.bincount(every, minlength=len(score))
    for name, channels, roots in places:
        scores[name].index_add_(0, torch.tensor(channels), part[torch.tensor(roots)])


def _masked_places(subject: Subject, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """For each layer the channels that masks may take: bool, (channels,)."""
    found = {name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()}
    for group in subject.tied:
        for name, index in group.members.items():
            found[name][index[index >= 0]] = True
    return found


@contextlib.contextmanager
def _gradients_put_back(model: nn.Module) -> Iterator[None]:
    """The Hessian's writes what it has gathered over the gradients."""
    before = [(p, p.grad, None if p.grad is None else p.grad.data) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient, values in before:
            parameter.grad = gradient
            if gradient is not None and values is not None:
                gradient.data = values
