"""How much the loss changes, to first order, if a channel goes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import per_channel
from ..errors import InputError, NonFiniteError
from .batches import checked_batches, feed
from .subject import Subject
from .watch import check_reached

__all__ = ["Taylor"]

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class _Gate:
    """A parameter whose entries are all multiplied by a channel's gate; ``layer``: whose weight it is, if it is one."""

    parameter: nn.Parameter
    layer: nn.Module | None = None


class Taylor:
    """Squared first-order estimate of what the loss changes by when the channel is zeroed.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, section 3: with a
    gate that multiplies the channel, the square of the loss's derivative by the gate, which is ``(sum of g * w)**2``
    over the parameters ``w`` that the gate multiplies and their gradients ``g``; averaged over batches. The gate is
    where the mask is: on the input side it multiplies the channel's entries of the layer's weight; on the output side
    the scale and shift of the batch norm that directly follows (as in the paper), or, where there is none, the
    channel's weights and bias.

    The model runs in eval mode; its parameters' ``grad`` and ``requires_grad`` are left as they were.

    Parameters
    ----------
    batches:
        What the model is called with; see :func:`upscale.importance.batches.feed`. The smaller a batch, the closer
        the average of squares is to one over examples.
    loss:
        ``loss(output, batch)``, a scalar tensor; the batch is the whole one, labels included, on the model's device.
    """

    def __init__(self, batches: Iterable[Any], loss: Loss) -> None:
        """Raises ``InputError`` if ``batches`` is no iterable of batches, or ``loss`` no function."""
        self._batches = checked_batches(batches)
        if not callable(loss):
            raise InputError(f"loss must be a function of (output, batch), not {type(loss).__name__}")
        self._loss = loss

    def scores(self, subject: Subject) -> dict[str, Tensor]:
        """See :meth:`Importance.scores`."""
        gates = {name: _gates(subject, name) for name in subject.layers}
        parameters = list({id(g.parameter): g.parameter for found in gates.values() for g in found}.values())
        totals: dict[str, Tensor] = {}
        count = 0

        def use(output: Any, batch: Any) -> None:
            nonlocal count
            gradients = self._gradients(count, output, batch, parameters)
            for name, found in gates.items():
                reached = [g for g in found if id(g.parameter) in gradients]
                if reached:
                    change = sum(_change(g, subject, gradients[id(g.parameter)]) for g in reached)
                    assert isinstance(change, Tensor)
                    totals[name] = totals.get(name, 0) + change.cpu().double().square()
            count += 1

        with _differentiable(parameters):
            feed(subject.model, self._batches, "gradients", use, torch.enable_grad())
        check_reached(subject.layers, totals)
        return {name: total / count for name, total in totals.items()}

    def _gradients(self, number: int, output: Any, batch: Any, parameters: Sequence[nn.Parameter]) -> dict[int, Tensor]:
        """Gradients of the loss by the identity of the parameter, without those that it does not depend on."""
        with torch.enable_grad():
            loss = self._loss(output, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            told = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"batch {number}: the loss must be a tensor with one element, not {told}")
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"batch {number}: the loss is {loss.item()}")
        if not loss.requires_grad:
            raise InputError(f"batch {number}: the loss does not depend on the model's weights, or was detached")
        with torch.enable_grad():
            scalar = loss.reshape(())
        found = torch.autograd.grad(scalar, parameters, allow_unused=True)
        return {id(p): g for p, g in zip(parameters, found, strict=True) if g is not None}


def _gates(subject: Subject, name: str) -> list[_Gate]:
    layer = subject.layers[name]
    norms = subject.norms.get(name, ()) if subject.side == "output" else ()
    affine = [p for norm in norms for p in (norm.weight, norm.bias) if isinstance(p, nn.Parameter)]
    if affine:
        return [_Gate(parameter) for parameter in affine]
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    found = [_Gate(weight, layer)]
    if subject.side == "output" and isinstance(layer.bias, nn.Parameter):
        found.append(_Gate(layer.bias))
    return found


def _change(gate: _Gate, subject: Subject, gradient: Tensor) -> Tensor:
    """Derivative of the loss by the gate of each channel, through this parameter."""
    dtype = torch.promote_types(gate.parameter.dtype, torch.float32)
    product = gate.parameter.detach().to(dtype) * gradient
    return product if gate.layer is None else per_channel(gate.layer, subject.side, product)


@contextlib.contextmanager
def _differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters with gradients, frozen ones too; as they were on the way out."""
    flags = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
