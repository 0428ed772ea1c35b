"""Which layers masks are made for, and which of their channels go together, for each method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .channels import Side, channel_count, is_layer
from .errors import InputError
from .grouping import tied_groups
from .observe import Observation
from .ranking import Group

if TYPE_CHECKING:
    from .readers import Reading

__all__ = ["FINDERS", "Grouped", "Search", "find_layers"]

Example = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]  # the example call, or an error where there is none


@dataclass(frozen=True, eq=False)
class Search:
    """What groups are made of. ``protected``: layers that must be left alone, and why. ``seen``: one run of the model.
    ``norms_after``: the batch norms that directly follow a layer."""

    model: nn.Module
    layers: Mapping[str, nn.Module]
    side: Side
    protected: Mapping[str, str]
    seen: Observation | None
    norms_after: Callable[[str], Sequence[str]]

    def reason(self, name: str) -> str | None:
        """Why a layer gets no mask of its own; None if it does."""
        layer = self.layers[name]
        if name in self.protected:
            return self.protected[name]
        if self.side == "input" and getattr(layer, "groups", 1) > 1:
            return "grouped convolution: its groups could no longer be of one size"
        if channel_count(layer, self.side) < 2:
            return "has a single channel"
        if self.seen is not None and self.seen.executed and name not in self.seen.executed:
            return "is not used by the forward pass"
        return None


@dataclass(frozen=True, eq=False)
class Grouped:
    """``groups`` of channels that are masked together; ``skipped``: layers without a mask, and why; ``reading``: who
    reads what, for contiguous masks only."""

    groups: list[Group]
    skipped: dict[str, str] = field(default_factory=dict)
    reading: Reading | None = None


def _unconstrained(search: Search, _: Example) -> Grouped:
    """Every layer on its own, but layers that share a batch norm together: it has one weight for all."""
    groups, skipped = [], {}
    for cluster in _clusters(search):
        reasons = {name: reason for name in cluster if (reason := search.reason(name))}
        skipped.update(reasons)
        if not reasons:
            size = channel_count(search.layers[cluster[0]], search.side)
            groups.append(Group({name: torch.arange(size) for name in cluster}, size))
    return Grouped(groups, skipped)


def _clusters(search: Search) -> list[list[str]]:
    if search.side == "input":
        return [[name] for name in search.layers]
    clusters: list[list[str]] = []
    home: dict[str, list[str]] = {}  # batch norm -> the cluster that it belongs to
    for name in search.layers:
        norms = search.norms_after(name)
        cluster = next((home[norm] for norm in norms if norm in home), None)
        if cluster is None:
            cluster = []
            clusters.append(cluster)
        cluster.append(name)
        home.update(dict.fromkeys(norms, cluster))
    return clusters


def _constrained(search: Search, example: Example) -> Grouped:
    """The groups that the model's graph ties together, but for those with a protected layer in them."""
    from .segments import segments  # the whole front end, loaded where a graph is needed

    groups, skipped = [], {}
    for group in tied_groups(segments(search.model, *example()), search.side, search.layers):
        guarded = next((name for name in group.members if name in search.protected), None)
        if guarded is None:
            groups.append(group)
        else:
            reason = f"on one tensor with {guarded}, which {search.protected[guarded]}"
            skipped.update(dict.fromkeys(group.members, reason))
    return Grouped(groups, skipped)


def _contiguous(search: Search, example: Example) -> Grouped:
    """A group for every layer whose mask is free, as the model's graph shows it."""
    from .contiguous_masks import groups_of, read_spaces

    alone = {name: reason for name in search.layers if (reason := search.reason(name))}
    reading = read_spaces(search.model, *example(), search.layers, alone)
    groups = groups_of(reading)
    found = {name for group in groups for name in group.members}
    unseen = dict.fromkeys(search.layers, "reads no channels that the graph can follow")
    return Grouped(groups, {n: r for n, r in {**unseen, **reading.skipped}.items() if n not in found}, reading)


FINDERS: dict[str, Callable[[Search, Example], Grouped]] = {
    "unconstrained": _unconstrained,
    "constrained": _constrained,
    "contiguous": _contiguous,
}


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Maskable layers by path, each weight once, in order of registration."""
    within_attention = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    layers: dict[str, nn.Module] = {}
    weights: set[int] = set()
    for name, module in model.named_modules():
        if not is_layer(module) or id(module) in within_attention:
            continue
        weight = module._parameters.get("weight")  # not module.weight: it may be computed, with side effects
        if isinstance(weight, nn.UninitializedParameter):
            raise InputError(f"{name}: a lazy layer has no weight yet; run the model once first")
        key = id(module if weight is None else weight)
        if key not in weights:
            weights.add(key)
            layers[name] = module
    return layers
