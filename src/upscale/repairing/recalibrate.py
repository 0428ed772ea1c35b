"""Batch norms' statistics taken anew from the calibration data, as far as that helps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from ..aliases import argument
from .outputs import Outputs
from .pair import Inputs, Pair
from .samples import is_held_out
from .sites import is_frozen, writer
from .tape import Frontier, State, Tape

__all__ = ["recalibrated"]

_SHARES = (0.5, 1.0)
Write = Callable[[Tensor], None]


def recalibrated(pair: Pair, model: nn.Module, inputs: Inputs, outputs: Outputs, limit: int) -> float | None:
    """Move all batch norms' statistics to those of the calibration data by the share, 0, 1/2 or 1, that brings the
    outputs closest to the original's on held-out examples. Returns the share; None where there is no batch norm.

    Statistics are taken in the order of execution, each with those before it in place, and without the examples held
    out. ``limit``: bytes of activations to keep.
    """
    norms = _norms(pair, model)
    if not norms:
        return None
    present = [[tensor.clone() for tensor, _ in statistics] for _, statistics in norms]
    best, chosen = outputs.error(), 0.0
    _measure(pair, inputs, norms, limit)
    new = [[tensor.clone() for tensor, _ in statistics] for _, statistics in norms]
    for share in _SHARES:
        _move(norms, present, new, share)
        error = outputs.error()
        if error < best:
            best, chosen = error, share
    _move(norms, present, new, chosen)
    return chosen


Norms = list[tuple[fx.Node, list[tuple[Tensor, Write]]]]


def _norms(pair: Pair, model: nn.Module) -> Norms:
    """The batch norms that are called once, with their running mean and variance and how to write them."""
    found: Norms = []
    for node in pair.masked.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default or not is_frozen(node):
            continue
        slots = [argument(node, name) for name in ("running_mean", "running_var")]
        if any(slot.op != "get_attr" or len(slot.users) > 1 for slot in slots):
            continue
        writes = [writer(model, pair.masked, str(slot.target)) for slot in slots]
        tensors = [pair.masked.tensors[str(slot.target)] for slot in slots]
        pairs = [(tensor, write) for tensor, write in zip(tensors, writes, strict=True) if write is not None]
        if len(pairs) == len(slots):
            found.append((node, pairs))
    return found


def _measure(pair: Pair, inputs: Inputs, norms: Norms, limit: int) -> None:
    tape = Tape(pair.masked, inputs.device)
    frontier = Frontier((tape,), inputs.leaves, limit)
    for node, ((mean, write_mean), (variance, write_variance)) in norms:
        sums = [torch.zeros_like(mean, dtype=torch.float64) for _ in range(2)]
        count = 0

        def add(number: int, states: tuple[State, ...], node: fx.Node = node, sums: list[Tensor] = sums) -> None:
            nonlocal count
            read = _used(tape.value(states[0], node.args[0]), number, inputs).transpose(0, 1).flatten(1).double()
            sums[0] += read.sum(1)
            sums[1] += read.square().sum(1)
            count += read.shape[1]

        frontier.visit((node,), add)
        if count > 1:
            middle = sums[0] / count
            write_mean(middle.to(mean.dtype))
            write_variance(((sums[1] - count * middle.square()) / (count - 1)).clamp_min(0).to(variance.dtype))


def _used(read: Tensor, number: int, inputs: Inputs) -> Tensor:
    """What a batch norm reads of the examples that are not held out."""
    start, size = sum(inputs.sizes[:number]), inputs.sizes[number]
    if len(read) % size:
        return read
    owners = torch.arange(start, start + size).repeat_interleave(len(read) // size)
    return read[~is_held_out(owners).to(read.device)]


def _move(norms: Norms, present: list[list[Tensor]], new: list[list[Tensor]], share: float) -> None:
    for (_, statistics), before, after in zip(norms, present, new, strict=True):
        for (_, write), old, moved in zip(statistics, before, after, strict=True):
            write(old.lerp(moved, share))
