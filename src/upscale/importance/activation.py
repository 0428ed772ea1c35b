"""Weights times what they are multiplied with: magnitude that knows the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..channels import Side, entries_of, norm_per_channel, per_channel
from .batches import FromBatches, feed
from .subject import Subject
from .watch import Watch, as_maps, check_reached

__all__ = ["ActivationMagnitude"]


class ActivationMagnitude(FromBatches):
    """Norm of a channel's weights, each times the norm of the input channel that it multiplies.

    Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), arXiv 2306.11695,
    equation 1, scores a single weight by ``|W[o, i]| * norm(X[i])``, where ``X[i]`` holds all values of input channel
    ``i`` (here at every pixel too) in the data. A channel's score is the Euclidean norm of its weights' scores. On the
    input side that is ``norm(W[:, i]) * norm(X[i])``.

    Parameters
    ----------
    batches:
        What the model is called with; see :func:`upscale.importance.batches.feed`. Labels are ignored.
    """

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See :meth:`Importance.scores`."""
        squares: dict[str, Tensor] = {}

        def note(name: str, value: Tensor) -> None:
            maps = as_maps(name, subject.layers[name], "input", value)
            if maps is not None:
                squares[name] = squares.get(name, 0) + _squares(maps)

        watch = Watch(subject.model, subject.layers, "input", note)
        feed(subject.model, self._batches, "activations", watch=watch)
        check_reached(subject.layers, squares)
        return {n: weighted(layer, subject.side, squares[n].sqrt()) for n, layer in subject.layers.items()}


def _squares(maps: Tensor) -> Tensor:
    """Sum of squares of each channel of (examples, channels, ...): float64, on the CPU."""
    dims = [d for d in range(maps.ndim) if d != 1]
    dtype = torch.float32 if maps.dtype in (torch.float16, torch.bfloat16) else None
    return torch.linalg.vector_norm(maps, 2, dim=dims, dtype=dtype).cpu().double().square()


def weighted(layer: nn.Module, side: Side, norms: Tensor) -> Tensor:
    """Scores of the channels of ``side``; ``norms``: one an input channel of the layer, float64, on the CPU."""
    if side == "input":
        return norm_per_channel(layer, "input", 2).cpu().double() * norms
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    spread = entries_of(layer, "input", norms.to(weight.device, dtype))
    return per_channel(layer, "output", (weight.detach() * spread).square()).sqrt()
