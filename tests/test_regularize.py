"""Penalties for training: their values, and their gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import upscale
from support.scores import LAYERS, slices
from upscale import InputError


@pytest.mark.parametrize("side", ["input", "output"])
def test_group_lasso_is_the_weighted_sum_of_norms(side: Any) -> None:
    layers = [make().double() for make in LAYERS.values()]
    expected = sum(
        math.sqrt(part.size) * math.sqrt(math.fsum(float(w) ** 2 for w in part.flat))
        for layer in layers
        for part in slices(layer, side)
    )
    tied = nn.Linear(6, 4)
    tied.weight = layers[0].weight
    model = nn.ModuleList([*layers, tied, nn.LayerNorm(3)])  # a shared weight counts once
    penalty = upscale.regularize.group_lasso(model, side=side)
    assert penalty.shape == () and penalty.item() == pytest.approx(expected)
    penalty.backward()
    for layer in layers:
        for part, grad in zip(slices(layer, side), slices_of_grad(layer, side), strict=True):
            np.testing.assert_allclose(grad, math.sqrt(part.size) * part / np.linalg.norm(part.ravel()))


def slices_of_grad(layer: nn.Module, side: str) -> list[np.ndarray]:
    other = copy.deepcopy(layer)
    other.weight.data = layer.weight.grad
    return slices(other, side)


def test_regularisers_by_hand() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    penalty = upscale.regularize.group_lasso(layer)
    assert penalty.item() == pytest.approx(5 * math.sqrt(2))
    penalty.backward()
    assert layer.weight.grad is not None and layer.weight.grad[:, 1].tolist() == [0, 0]  # not NaN
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    model[0].weight.data, model[1].weight.data = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-4.0, 0.5])
    sparsity = upscale.regularize.bn_scale(model)
    sparsity.backward()
    assert sparsity.item() == 7.5 and model[0].weight.grad.tolist() == [1, -1, 0]
    with pytest.raises(InputError, match="no batch norm"):
        upscale.regularize.bn_scale(layer)
    with pytest.raises(InputError, match="side"):
        upscale.regularize.group_lasso(layer, side="left")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no convolution"):
        upscale.regularize.group_lasso(model)
