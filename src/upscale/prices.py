"""What single channels cost: a linear estimate, by which masks are chosen before an export is counted in full."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from .channels import Side
from .flow import Flow, analyse_flow
from .flow.effects import Contract, size_of
from .grouping import Segments
from .plan import Setting, Target
from .program import Program
from .ranking import Group
from .segments import groups_of
from .setting import setting_for

__all__ = ["channel_prices"]

_LEAST = torch.finfo(torch.float64).eps


def channel_prices(program: Program, kind: str, groups: Sequence[Group], side: Side) -> list[Tensor]:
    """For each group what each of its channels costs: float64 (channels,), above 0.

    A channel costs its share of the layers that it is masked in. Of the layers on the other side of its segment it
    costs an equal part with all that must mask it for them to lose it: what a convolution writes goes when no layer
    reads it any more. What a depthwise layer in between costs is left out. ``kind``: ``"flops"`` counts
    multiplications, ``"params"`` weights, ``"latency"`` modelled time.
    """
    flow = analyse_flow(program, partial=False)
    costs = _costs(flow, _setting(program, kind))
    shared = _shared(groups_of(flow), costs, side)
    found = []
    for group in groups:
        price = torch.full((group.size,), _LEAST, dtype=torch.float64)
        for name, index in group.members.items():
            places = index.reshape(group.size, -1)
            price += costs[name].of_channel(side) * (places >= 0).sum(1)
            if name in shared:
                price += (shared[name][places.clamp(min=0)] * (places >= 0)).sum(1)
        found.append(price)
    return found


@dataclass(frozen=True)
class _Cost:
    """Of one layer: what it costs in all, and its numbers of channels."""

    total: float = 0.0
    inputs: int = 1
    outputs: int = 1

    def of_channel(self, side: str) -> float:
        return self.total / (self.inputs if side == "input" else self.outputs)


def _setting(program: Program, kind: str) -> Setting:
    """What the layers' costs are counted in."""
    setting = setting_for(program, Target())
    multiply, load = {"flops": (1.0, 0.0), "params": (0.0, 1.0)}.get(kind, (setting.rates.multiply, setting.rates.load))
    return replace(setting, rates=replace(setting.rates, multiply=multiply, load=load))


def _costs(flow: Flow, setting: Setting) -> dict[str, _Cost]:
    found: dict[str, _Cost] = defaultdict(_Cost)
    counts_weights = not setting.rates.multiply
    for node, entry in flow.nodes.items():
        effect = entry.effect
        if isinstance(effect, Contract) and (effect.operand is not None or counts_weights):
            name = str(effect.weight.target).removesuffix(".weight")
            inputs, outputs = _channels(effect.operand, effect.in_dim), _channels(node, effect.out_dim)
            here = setting.computing(node, effect, outputs) * inputs / effect.groups
            before = 0.0 if counts_weights else found[name].total  # a weight is there once, however often it is used
            found[name] = _Cost(before + here, inputs, outputs)
    return found


def _channels(node: fx.Node | None, dim: int | None) -> int:
    return 1 if node is None or dim is None else max(1, size_of(node.meta["val"].shape[dim]))


def _shared(segments: Segments, costs: Mapping[str, _Cost], side: Side) -> dict[str, Tensor]:
    """For each layer, by channel, its part in what the layers on the other side of its segments cost."""
    found: dict[str, Tensor] = {}
    for members in segments:
        tables = [(name, here, index.reshape(len(index), -1)) for name, here, index in members]
        price, sharers = torch.zeros(len(members[0][2]), dtype=torch.float64), torch.zeros(len(members[0][2]))
        for name, here, places in tables:
            if here == side:
                sharers += (places >= 0).any(1)
            else:
                price += costs[name].of_channel(here) * (places >= 0).sum(1)
        for name, here, places in tables:
            if here == side:
                row, column = torch.nonzero(places >= 0, as_tuple=True)
                size = costs[name].inputs if side == "input" else costs[name].outputs
                mine = found.setdefault(name, torch.zeros(size, dtype=torch.float64))
                share = price / sharers.clamp_min(1) / (places >= 0).sum(1).clamp_min(1)  # behind a flatten: of a place
                mine[places[row, column]] += share[row]
    return found
