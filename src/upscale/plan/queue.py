"""A device that works while the host calls on: what a step costs depends on which of the two waits for the other."""

from __future__ import annotations

import math
from dataclasses import replace

from torch.fx import Node

from ..aliases import first_tensor
from ..flow import Flow, FlowNode
from ..flow.effects import Contract, size_of
from .cost import Setting

__all__ = ["as_issued"]

# A slice is a call of no kernel: what it takes of the time that the host takes for a layer's call (H200, torch 2.11).
_SLICE = 1 / 3


def as_issued(flow: Flow, setting: Setting) -> Setting:
    """The setting as it is for this program.

    Where the host takes longer to issue all calls than the device for the work that masks have left, work costs
    nothing: a smaller layer saves no time, and one more call, or slice, costs what it takes to issue it.
    """
    rates = setting.rates
    if not rates.issue:
        return setting
    calls = [(node, f) for node, f in flow.nodes.items() if node.op == "call_function"]
    if len(calls) * rates.issue <= sum(_work(flow, node, f, setting) for node, f in calls):
        return setting
    free = replace(rates, multiply=0.0, load=0.0, copy=0.0, pick=0.0, stretch=0.0)
    return replace(setting, rates=replace(free, call=rates.issue, view=_SLICE * rates.issue))


def _work(flow: Flow, node: Node, f: FlowNode, setting: Setting) -> float:
    """Nanoseconds of the device: multiplications, or writing the result."""
    effect = f.effect
    if isinstance(effect, Contract) and effect.operand is not None:
        sizes = effect.weight.meta["val"].shape
        rows, columns = int(size_of(sizes[effect.weight_out])), 1.0
        if node in flow.demands and effect.weight_in is not None:
            rows, columns = len(flow.live[node]), float(flow.demands[node].inputs.sum()) / f.groups
        return columns * setting.computing(node, effect, rows)
    value = first_tensor(node.meta.get("val"))
    if value is None:
        return 0.0
    left = 1.0
    if f.channels is not None and node in flow.live:
        left = len(flow.live[node]) / max(1, len(f.channels.units))
    written = math.prod(float(size_of(s)) for s in value.shape) * value.dtype.itemsize * left
    return written * setting.examples * setting.rates.copy
