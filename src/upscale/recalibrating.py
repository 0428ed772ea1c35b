"""Batch norms' statistics taken anew from data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .accept import unwrap
from .errors import InputError, NonFiniteError
from .idle import is_frozen_norm
from .importance.batches import checked_batches, feed
from .large import all_finite

__all__ = ["Averages", "Statistics", "recalibrate", "tracking_norms"]

Model = TypeVar("Model", bound=nn.Module)


def recalibrate(model: Model, batches: Iterable[Any]) -> Model:
    """Take the running statistics of all batch norms anew, in place, as pruning has changed what they read.

    Every norm's running mean and variance become the averages of those of the batches, each batch with the same weight
    (``momentum=None`` in torch's words). While they are measured the norms use the statistics of the batch, as in
    training, and all else is in eval mode; this is the "precise" batch norm of Wu and Johnson 2021, arXiv 2105.07576,
    section 3, with torch's average of variances. Needs no labels; some hundred images will do, in batches of 32 or
    more. A bar is shown on stderr if it takes more than two seconds.

    Args:
        model: any module, pruned, masked or neither. Only batch norms that track statistics are changed; those that
            the data never reaches keep what they have, and so do ``momentum`` and training flags.
        batches: an iterable of batches: tensors, tuples or dicts, as for
            :func:`upscale.importance.batches.feed`; labels are ignored.

    Returns:
        ``model`` itself.

    Raises:
        InputError: there are no batches, one does not fit the model or has a single value per channel, or the model
            has no such norm. NonFiniteError: NaN or infinite values in a batch, or in the statistics.
            UnsupportedModelError: a ScriptModule or a sharded model. The model is unchanged in every case.
    """
    checked_batches(batches)
    plain = unwrap(model)
    norms = tracking_norms(plain)
    if not norms:
        raise InputError(
            "recalibrate: the model has no batch norm with running statistics (a batch norm that is called as a "
            "function, or is frozen, is no module that could be recalibrated)"
        )
    averages = Averages(norms.values())
    feed(plain, batches, "batch norm statistics", watch=averages)
    if not averages.found:
        raise InputError(f"recalibrate: the data never reaches a batch norm; the first one is {next(iter(norms))}")
    _check_finite(norms, averages.found)
    for norm, statistics in averages.found.items():
        statistics.write(norm)
    return model


@dataclass(frozen=True, eq=False)
class Statistics:
    """``mean``, ``variance``: (channels,), as the norm holds them; ``count``: of the calls they are the averages of."""

    mean: Tensor
    variance: Tensor
    count: int

    @torch.no_grad()
    def write(self, norm: _BatchNorm) -> None:
        """Put them in their place, in the tensors that are there."""
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(self.variance)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(self.count)


class Averages(AbstractContextManager[None]):
    """While it is entered, norms normalise by the batch, and statistics are averaged over all their calls.

    It may be entered several times: the averages go on. ``found``: the result after the last time, without norms that
    were never called. Whoever enters it puts training flags and buffers back afterwards; momenta are put back here.
    """

    def __init__(self, norms: Iterable[_BatchNorm]) -> None:
        self.found: dict[_BatchNorm, Statistics] = {}
        # Counters of our own: a norm may have none, and torch would then keep its statistics without a word.
        self._counts = {norm: torch.zeros((), dtype=torch.int64) for norm in norms}
        self._kept: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self._kept = [(norm.momentum, norm.num_batches_tracked) for norm in self._counts]
        for norm, count in self._counts.items():
            norm.training, norm.momentum, norm.num_batches_tracked = True, None, count
            if not count:
                norm.reset_running_stats()  # counts as a write to the buffers; those of batch_norm itself do not

    def __exit__(self, *error: object) -> None:
        for (norm, count), (momentum, counter) in zip(self._counts.items(), self._kept, strict=True):
            norm.training, norm.momentum, norm.num_batches_tracked = False, momentum, counter
            if count:
                assert norm.running_mean is not None and norm.running_var is not None
                self.found[norm] = Statistics(norm.running_mean.clone(), norm.running_var.clone(), int(count))


def tracking_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of ``model`` that keep running statistics, by path; not those of a class that freezes them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
        and not is_frozen_norm(module)
    }


def _check_finite(norms: Mapping[str, _BatchNorm], found: Mapping[_BatchNorm, Statistics]) -> None:
    for name, norm in norms.items():
        if norm in found and not (all_finite(found[norm].mean) and all_finite(found[norm].variance)):
            raise NonFiniteError(f"{name}: the statistics of what it reads are NaN or infinite")
