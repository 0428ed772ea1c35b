"""Batch norms' statistics taken anew from the calibration data, as far as that helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..observe import quietly_evaluated
from ..recalibrating import Averages, Statistics, tracking_norms
from ..signature import call_with
from .examples import has_fixed_batch
from .outputs import Outputs, examples_of
from .pair import Inputs, Pair
from .samples import is_held_out

__all__ = ["recalibrated"]

_SHARES = (0.5, 1.0)


def recalibrated(pair: Pair, model: nn.Module, inputs: Inputs, outputs: Outputs) -> float | None:
    """Move all batch norms' statistics to those of the calibration data by the share, 0, 1/2 or 1, that brings the
    outputs closest to the original's on held-out examples. Returns the share; None where there is no batch norm, or
    no batch to measure it on.

    The statistics are those of :func:`upscale.recalibrate` on the examples that are not held out. Where capture fixed
    the batch size these cannot be run by themselves, and nothing is moved.
    """
    shared = {id(tensor) for tensor in pair.masked.tensors.values()}
    norms = [norm for norm in tracking_norms(model).values() if id(norm.running_mean) in shared]
    if not norms or has_fixed_batch(pair.masked):
        return None
    present = {norm: _statistics(norm) for norm in norms}
    averages = Averages(norms)
    with quietly_evaluated(model):
        for leaves in _used(inputs):
            args, kwargs = call_with(pair.masked.signature.arguments, leaves)
            with averages:
                model(*args, **kwargs)
    if not averages.found:
        return None
    best, chosen = outputs.error(), 0.0
    for share in _SHARES:
        _move(present, averages.found, share)
        error = outputs.error()
        if error < best:
            best, chosen = error, share
    _move(present, averages.found, chosen)
    return chosen


def _used(inputs: Inputs) -> Iterator[list[Tensor]]:
    """The examples of each batch that are not held out. One by itself may be too little for a norm to measure."""
    start = 0
    for leaves, size in zip(inputs.leaves, inputs.sizes, strict=True):
        chosen = ~is_held_out(torch.arange(start, start + size))
        start += size
        if int(chosen.sum()) > 1:
            yield [examples_of(leaf, chosen).to(inputs.device) for leaf in leaves]


def _statistics(norm: _BatchNorm) -> Statistics:
    assert norm.running_mean is not None and norm.running_var is not None
    count = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
    return Statistics(norm.running_mean.clone(), norm.running_var.clone(), count)


def _move(present: Mapping[_BatchNorm, Statistics], new: Mapping[_BatchNorm, Statistics], share: float) -> None:
    for norm, after in new.items():
        before = present[norm]
        mean, variance = before.mean.lerp(after.mean, share), before.variance.lerp(after.variance, share)
        Statistics(mean, variance, before.count).write(norm)
