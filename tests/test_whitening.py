"""Coordinates in which what a layer reads is white: there and back, what they whiten, and what they are good for."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from upscale.repairing import blockwise, whitening
from upscale.repairing.pair import capture_pair, collect
from upscale.repairing.sites import find_sites
from upscale.repairing.tape import Tape
from upscale.repairing.whitening import Whitened, whitened


class Matrix(nn.Module):
    """A product with a matrix of shape (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (40, 6)),
    "matrix": (Matrix, (40, 6)),
    "tokens": (lambda: nn.Linear(6, 4), (12, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (12, 6, 9)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (12, 6, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6), (12, 6, 7, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (12, 6, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2), (12, 6, 3, 4, 3)),
}


def inputs_like(*shape: int, channels: int = 1) -> Tensor:
    """Inputs whose channels are far from zero and much alike."""
    x = torch.randn(*shape, dtype=torch.float64).movedim(channels, -1)
    mixed: Tensor = x @ torch.randn(x.shape[-1], x.shape[-1], dtype=torch.float64) + 3
    return mixed.movedim(-1, channels)


def coordinates(model: nn.Module, batches: Sequence[Tensor]) -> list[Whitened]:
    masked = copy.deepcopy(model)
    inputs = collect(masked, batches)
    pair = capture_pair(masked, model, inputs)
    sites, _ = find_sites(pair, masked)
    return whitened(sites, Tape(pair.masked, inputs.device), inputs.leaves, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("most", [1000, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_there_and_back(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in parts that do not go into the number of inputs, and where some have no weight left."""
    monkeypatch.setattr(whitening, "_MOST", most)
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    model = build().double()
    with torch.no_grad():
        model.weight.flatten()[::5] = 0
    (way,) = coordinates(model, [inputs_like(*shape, channels=shape.index(6))])
    value = way.inside(model.weight.detach())
    torch.testing.assert_close(way.outside(value), model.weight.detach(), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(value.flatten()[:3], model.weight.detach().flatten()[:3])


def test_what_is_read_is_white(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without damping the Gram matrix behind the root is the mean of the diagonal, in every direction."""
    monkeypatch.setattr(whitening, "_DAMPING", 1e-9)
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).double(), inputs_like(400, 6)
    (way,) = coordinates(model, x.split(100))
    white = x @ way.root[0, 0]
    gram = white.mT @ white / len(x)
    torch.testing.assert_close(gram, x.square().mean() * torch.eye(6, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_groups_are_whitened_for_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "_DAMPING", 1e-9)
    torch.manual_seed(0)
    model, x = nn.Conv2d(6, 4, 1, groups=2).double(), inputs_like(64, 6, 1, 1)
    (way,) = coordinates(model, [x])
    for group, part in enumerate(x.flatten(1).split(3, 1)):
        white = part @ way.root[group, 0]
        wanted = part.square().mean() * torch.eye(3, dtype=torch.float64)
        torch.testing.assert_close(white.mT @ white / len(x), wanted, rtol=1e-5, atol=1e-5)


def test_inputs_without_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).double(), inputs_like(100, 6)
    with torch.no_grad():
        model.weight[:, [1, 4]] = 0
    (way,) = coordinates(model, [x])
    others = [0, 2, 3, 5]
    rest = nn.Linear(4, 4).double()
    (same,) = coordinates(rest, [x[:, others]])
    torch.testing.assert_close(way.root[0, 0][others][:, others], same.root[0, 0])
    wanted = torch.eye(6, dtype=torch.float64)[[1, 4]]
    torch.testing.assert_close(way.root[0, 0][[1, 4]], wanted, rtol=1e-12, atol=1e-12)


def test_a_layer_that_reads_zeros_or_has_no_weights_keeps_its_values() -> None:
    model = nn.Linear(6, 4).double()
    for weight, x in ((1.0, torch.zeros(20, 6)), (0.0, torch.randn(20, 6))):
        with torch.no_grad():
            model.weight.fill_(weight)
        (way,) = coordinates(model, [x.double()])
        torch.testing.assert_close(way.outside(way.inside(model.weight.detach())), model.weight.detach())


def test_a_fit_in_half_precision_takes_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth of a weight is lost in bfloat16, many of them are not."""
    monkeypatch.setattr(blockwise, "_RATE", 0.001)
    torch.manual_seed(0)
    model, x = nn.Linear(24, 6).bfloat16(), inputs_like(512, 24).bfloat16()
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.weight.mul_(1.25)
    inputs = collect(masked, x.split(64))
    pair = capture_pair(masked, model, inputs)
    sites, _ = find_sites(pair, masked)
    with torch.no_grad():
        fit = blockwise._Fit(pair, inputs, blockwise._parameters(pair, masked), blockwise._ends(pair.masked))
        fit.whiten(sites, torch.Generator().manual_seed(0))
        assert torch.equal(fit.fitted()[0], masked.weight)
        (before,) = fit.errors()
        (after,) = fit.descend(100, 0, False, [before])
    assert fit.fitted()[0].dtype == torch.bfloat16
    assert after < before


@pytest.mark.parametrize("seed", range(3))
def test_steps_lead_further_where_inputs_are_alike(seed: int) -> None:
    """Behind the root all directions are as steep."""
    torch.manual_seed(seed)
    model, x = nn.Linear(24, 6).double(), inputs_like(512, 24)
    left = []
    near = copy.deepcopy(model)
    with torch.no_grad():
        near.weight.mul_(1 + 0.3 * torch.randn(6, 24))
    for whitens in (True, False):
        masked = copy.deepcopy(near)
        inputs = collect(masked, x.split(64))
        pair = capture_pair(masked, model, inputs)
        sites, _ = find_sites(pair, masked)
        with torch.no_grad():
            fit = blockwise._Fit(pair, inputs, blockwise._parameters(pair, masked), blockwise._ends(pair.masked))
            if whitens:
                fit.whiten(sites, torch.Generator().manual_seed(0))
            (after,) = fit.descend(100, 0, False, fit.errors())
            left.append(after)
    assert left[0] < 0.8 * left[1]
