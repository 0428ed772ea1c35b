"""A device that works while the host calls on: what a step costs depends on which of the two waits for the other."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor
from torch.fx import Node

from ..aliases import first_tensor
from ..flow import Flow, FlowNode
from ..flow.effects import Contract, size_of
from .cost import Setting

__all__ = ["as_issued"]


def as_issued(flow: Flow, setting: Setting) -> Setting:
    """The setting as it is for this program.

    Where the host takes longer to issue all calls than the device takes for all work of the unpruned program, work
    costs nothing: a smaller layer saves no time, and one more call costs what it takes to issue it.
    """
    rates = setting.rates
    if not rates.issue:
        return setting
    calls = [(node, f) for node, f in flow.nodes.items() if node.op == "call_function"]
    if len(calls) * rates.issue <= sum(_work(node, f, setting) for node, f in calls):
        return setting
    idle = replace(rates, multiply=0.0, load=0.0, copy=0.0, pick=0.0, stretch=0.0, call=rates.issue)
    return replace(setting, rates=idle)


def _work(node: Node, f: FlowNode, setting: Setting) -> float:
    """Nanoseconds of the device: multiplications, or writing the result."""
    effect = f.effect
    if isinstance(effect, Contract) and effect.operand is not None:
        sizes = effect.weight.meta["val"].shape
        columns = 1 if effect.weight_in is None else size_of(sizes[effect.weight_in])
        return columns * setting.computing(node, effect, int(size_of(sizes[effect.weight_out])))
    value = first_tensor(node.meta.get("val"))
    if not isinstance(value, Tensor):
        return 0.0
    return (
        math.prod(float(size_of(s)) for s in value.shape) * value.dtype.itemsize * setting.examples * setting.rates.copy
    )
