"""Penalties to add to a training loss, so that whole channels become small before they are masked.

::

    loss = criterion(model(x), y) + 1e-4 * upscale.regularize.group_lasso(model, side="input")
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .channels import Side, channel_rows, is_layer, norm_of_rows
from .errors import InputError
from .mask_arguments import checked_model, one_of

__all__ = ["bn_scale", "group_lasso"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def group_lasso(model: nn.Module, side: Side = "input") -> Tensor:
    """Sum over all channels of ``sqrt(n) * norm``: the Euclidean norm of the channel's ``n`` weights.

    Yuan and Lin 2006, "Model selection and estimation in regression with grouped variables"; for the
    channels of networks Wen et al. 2016, "Learning Structured Sparsity in Deep Neural Networks", arXiv 1608.03665.
    Over all convolutions, transposed convolutions and linear layers, each weight once, whether ``side`` is
    ``"input"`` or ``"output"``.

    Returns a scalar with gradients, on the device of the model; the gradient at a channel that is zero is zero. Raises
    ``InputError`` for an unknown side, or a model without such layers.
    """
    one_of("side", side, ("input", "output"))
    # By the parameter, so that a shared weight counts once; a weight that is computed anew has none.
    layers = {id(m._parameters.get("weight", m)): m for m in checked_model(model).modules() if is_layer(m)}
    if not layers:
        raise InputError("the model has no convolution, transposed convolution or linear layer")
    return _sum([_lasso(layer, side) for layer in layers.values()])


def bn_scale(model: nn.Module) -> Tensor:
    """Sum of the magnitudes of all batch norms' scales.

    Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", arXiv 1708.06519,
    equation 1. :class:`upscale.importance.BatchNormScale` then ranks channels by these scales.

    Returns a scalar with gradients, on the device of the model. Raises ``InputError`` for a model without batch norms
    that have a scale.
    """
    norms = [m for m in checked_model(model).modules() if isinstance(m, _BATCH_NORMS) and m.affine]
    if not norms:
        raise InputError("the model has no batch norm with a scale")
    return _sum([norm.weight.abs().sum() for norm in norms])


def _lasso(layer: nn.Module, side: Side) -> Tensor:
    rows = channel_rows(layer, side)
    return norm_of_rows(rows, 2).sum() * math.sqrt(rows[0].numel())


def _sum(terms: list[Tensor]) -> Tensor:
    device = terms[0].device  # parts of a model may lie on several
    return torch.stack([term.to(device) for term in terms]).sum()
