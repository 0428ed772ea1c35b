"""Batch-norm scales as the importance of channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..channels import Side, channel_count
from ..errors import InputError
from ..printing import listed
from .subject import Importance, Subject, without_score

__all__ = ["BatchNormScale"]


class BatchNormScale:
    """Magnitude of the scale (weight) of the batch norm that a channel goes through.

    Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", arXiv 1708.06519, section 3.
    Train with :func:`upscale.regularize.bn_scale` to push scales towards zero.

    On the output side, the batch norm that directly follows the layer. On the input side, the last batch norm that the
    channel went through before the layer reads it, found in the model's graph (so the model must be one that
    ``torch.export`` captures): through activations, pooling, flattening, concatenations and channel shuffles. Where
    several meet in a sum, as at the end of a residual block, their scales are added.

    Parameters
    ----------
    otherwise:
        The importance of layers of which no channel has a batch norm (a classifier's, say). Without it they raise
        ``InputError``. With ``is_global=True`` and with constrained masks the two kinds of score are compared or added.
    """

    def __init__(self, otherwise: Importance | None = None) -> None:
        if otherwise is not None and not isinstance(otherwise, Importance):
            raise InputError(f"otherwise must be an object of upscale.importance, such as L2(), not {otherwise!r}")
        self._otherwise = otherwise

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See :meth:`Importance.scores`."""
        found = _of_readers(subject) if subject.side == "input" else _of_writers(subject)
        without = {name: layer for name, layer in subject.layers.items() if name not in found}
        if not without:
            return found
        if self._otherwise is None:
            raise InputError(_advice(subject.side, list(without), all_of_them=not found))
        rest = replace(subject, layers=without, tied=())
        return {**found, **self._otherwise.scores(rest)}


def _advice(side: Side, names: list[str], all_of_them: bool) -> str:
    problem = f"no batch norm scales the channels of {listed(names)} on the {side} side"
    if all_of_them:
        return f"{problem}, nor of any other layer that can be masked: choose another importance, such as 'l2'"
    return (
        f"{problem}: say how to score them, for instance with upscale.importance.BatchNormScale(otherwise="
        f"upscale.importance.L2()), or leave them alone with {without_score(names)}, given to MaskingManager"
    )


def _of_writers(subject: Subject) -> dict[str, Tensor]:
    found = {}
    for name in subject.layers:
        weights = [norm.weight for norm in subject.norms.get(name, ())]
        scales = [weight.detach().abs() for weight in weights if isinstance(weight, Tensor)]
        if scales:
            found[name] = torch.stack(scales).sum(dim=0)
    return found


def _of_readers(subject: Subject) -> dict[str, Tensor]:
    from .norms_read import norms_read  # the front end of the compiler, loaded where a graph is needed

    if subject.example is None:
        raise InputError(
            "batch-norm scales on the input side need the model's graph: give MaskingManager example_inputs="
        )
    found = {}
    read = norms_read(subject.model, *subject.example)
    for name, layer in subject.layers.items():
        size, calls = channel_count(layer, "input"), read.get(name, [])
        if calls and all(len(call.scale) == size and call.known.all() for call in calls):
            found[name] = torch.from_numpy(np.sum([call.scale for call in calls], axis=0))
    return found
